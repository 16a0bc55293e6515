"""separable_query_attention in CUDA C++: csrc/cuda/separable_query_attention.cu and _keys.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.gpu import multiprocessors
from perceiver_kernels.backends.masked_keys import without_masked_keys, zero_masked_keys
from perceiver_kernels.backends.native import describe, describe_all

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# Of blocks that own keys, as csrc/cuda/separable_query_attention_keys.cu has them: with others, parts are less even.
BLOCK_KEYS = 128
TILE_COLUMNS = 32
CHUNKS = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


def separable_query_attention_fwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, M, head_dim_v) in v's dtype, lse (batch, heads, M)."""
    batch, heads, _, head_dim = v.shape
    out = v.new_empty(batch, math.prod(grid), heads, head_dim)
    lse = form.new_empty(batch, heads, math.prod(grid))
    inputs = _inputs(form, v, h, x, r, mask)
    runtime.module().separable_query_attention_fwd(
        describe_all(inputs),
        list(grid),
        (dropout_p, seed, 0),
        describe(out),
        describe(lse),
        runtime.stream(out),
    )
    return out.transpose(1, 2), lse


def separable_query_attention_bwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> Gradients:
    """Gradients of the form, v, h, x and r, empty where not needed."""
    needs_form, needs_v, needs_h, needs_x, needs_r = needs
    out, d_out = out.transpose(1, 2).contiguous(), d_out.transpose(1, 2).contiguous()
    reference, delta = torch.empty_like(lse), torch.empty_like(lse)
    lse = lse.contiguous()
    rows = describe_all((out, d_out, lse, reference, delta))
    runtime.module().separable_query_attention_bwd_rows(*rows, runtime.stream(out))
    inputs, saved = _inputs(form, v, h, x, r, mask), (d_out, reference, delta)
    call = describe_all(inputs), list(grid), (dropout_p, seed, 0), describe_all(saved)
    d_form, d_h, d_v, d_x, d_r = form.new_empty(0), form.new_empty(0), v.new_empty(0), None, None
    if needs_form or needs_h:
        d_form, d_h = _bwd_keys(call, form, v, h, mask, grid)
        d_form, d_h = (d if needed else form.new_empty(0) for d, needed in ((d_form, needs_form), (d_h, needs_h)))
    if needs_v:
        d_v = _bwd_values(call, v, mask, grid)
    if needs_x or needs_r:
        d_x, d_r = _bwd_queries(call, v, x if needs_x else None, r if needs_r else None, x, r, grid)
    nothing = form.new_empty(0)
    return d_form, d_v, d_h, nothing if d_x is None else d_x, nothing if d_r is None else d_r


def _inputs(
    form: Tensor, v: Tensor, h: Tensor | None, x: Tensor | None, r: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    """form, v, the keys' bias, x and r as kernels take them: small ones contiguous."""
    form, v, bias = without_masked_keys(form, v, h, mask)
    return form, v.contiguous(), bias, x, None if r is None else r.contiguous()


def _parts(v: Tensor, grid: Sequence[int], chunks: int) -> tuple[int, int]:
    """How many parts blocks that own keys split the columns and the outer positions into, to fill the GPU."""
    batch, heads, keys, _ = v.shape
    blocks = batch * heads * math.ceil(keys / BLOCK_KEYS) * chunks
    wanted = math.ceil(4 * multiprocessors(v.device) / max(blocks, 1))
    column_parts = max(min(math.ceil(grid[-1] / TILE_COLUMNS), wanted), 1)
    return column_parts, max(min(math.prod(grid[:-1]), math.ceil(wanted / column_parts)), 1)


def _bwd_keys(
    call: tuple[Any, ...], form: Tensor, v: Tensor, h: Tensor | None, mask: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of the form and h. Parts of the queries have sums of their own, which are added up here."""
    batch, heads, keys, _ = v.shape
    column_parts, outer_parts = _parts(v, grid, 1)
    parts = column_parts * outer_parts
    d_data = form.new_zeros(batch, heads, parts, form.shape[2] - sum(grid), keys)
    d_outer = form.new_zeros(batch, heads, column_parts if len(grid) == 2 else parts, sum(grid[:-1]), keys)
    d_table = form.new_empty(batch, heads, outer_parts, grid[-1], keys)
    d_bias = form.new_empty(batch, heads, parts, keys)
    results = d_data, d_outer, d_table, d_bias
    runtime.module().separable_query_attention_bwd_keys(*call, describe_all(results), runtime.stream(v))
    d_form = zero_masked_keys(torch.cat((d_data.sum(2), d_outer.sum(2), d_table.sum(2)), 2), mask, 3)
    d_h = form.new_empty(0) if h is None else zero_masked_keys(d_bias.sum(2), mask, 2).sum_to_size(h.shape)
    return d_form.sum_to_size(form.shape), d_h


def _bwd_values(call: tuple[Any, ...], v: Tensor, mask: Tensor | None, grid: Sequence[int]) -> Tensor:
    batch, heads, keys, head_dim = v.shape
    column_parts, outer_parts = _parts(v, grid, math.ceil(head_dim / CHUNKS[v.dtype]))
    d_v = v.new_empty(batch, heads, column_parts, outer_parts, keys, head_dim, dtype=torch.float32)
    runtime.module().separable_query_attention_bwd_values(*call, describe(d_v), runtime.stream(v))
    return zero_masked_keys(d_v.sum((2, 3)), mask, 2).to(v.dtype)


def _bwd_queries(
    call: tuple[Any, ...],
    v: Tensor,
    wanted_x: Tensor | None,
    wanted_r: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    grid: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and r. Where all entries of the batch have the same queries, a block adds them up."""
    shared = all(tensor is None or tensor.shape[0] == 1 for tensor in (x, r))
    groups = min(v.shape[0], 1) if shared else v.shape[0]
    d_x = None if wanted_x is None else wanted_x.new_zeros(groups, *wanted_x.shape[1:])
    d_r = None if wanted_r is None else wanted_r.new_empty(groups, math.prod(grid))
    if d_x is not None or d_r is not None:
        runtime.module().separable_query_attention_bwd_queries(*call, describe(d_x), describe(d_r), runtime.stream(v))
    return (
        None if d_x is None or wanted_x is None else d_x.sum_to_size(wanted_x.shape),
        None if d_r is None or wanted_r is None else d_r.sum_to_size(wanted_r.shape),
    )
