"""Separable attention the other way round: from queries on a grid to a few keys, as in a Perceiver IO's decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import centring, native
from perceiver_kernels.backends.layout import rows_first
from perceiver_kernels.backends.reference import separable_query_attention as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.dropout import seed_number, seed_tensor
from perceiver_kernels.ops.registration import define, register_pair
from perceiver_kernels.ops.validation import (
    COMPUTE_DTYPES,
    DTYPES,
    Named,
    autocast,
    check_batch,
    check_computes,
    check_devices,
    check_dtypes,
    check_key_mask,
)

OP = "separable_query_attention"
MAX_AXES = 4
MAX_CHANNELS = 128
MAX_ROWS = 2**31  # counted in 32 bits
CUDA_MAX_HEAD_DIM = 512
TRITON_MAX_HEAD_DIM = 1024


# A row of the values whole, and tables of the data's channels, for the block's rows in backward.
def _shared_memory(call: dispatch.Call) -> int:
    return (160 if (call.channels or 0) > 256 else 96) << 10


declare_gpu(
    OP,
    "cuda",
    compute_dtypes=(torch.float32,),
    data_dtypes=GPU_DTYPES,
    axes=(1, MAX_AXES),
    channels=(1, CUDA_MAX_HEAD_DIM),
    shared_memory=_shared_memory,
)
declare_gpu(
    OP,
    "triton",
    compute_dtypes=(torch.float32,),
    data_dtypes=GPU_DTYPES,
    axes=(1, MAX_AXES),
    channels=(1, TRITON_MAX_HEAD_DIM),
)
declare_native(OP, native, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES, axes=(1, MAX_AXES))
declare_reference(OP, reference, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES)


def separable_query_attention(
    tables: Sequence[Tensor],
    v: Tensor,
    *,
    h: Tensor | None = None,
    k: Tensor | None = None,
    x: Tensor | None = None,
    r: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Softmax attention of many queries on a grid, whose scores are sums of one term per grid axis and data channels.

    s[o, n] = r[o] * (x[o] . k[n] + sum_j tables[j][n, o_j]) + h[n],  p = softmax over n of s,
    out[o] = sum_n p[o, n] v[n], for queries o = (o_1, ..., o_A) and keys n. No queries are ever stored, and no array of
    (queries, keys) or (queries, channels of an encoding).

    Args:
        tables: per grid axis, 1 to 4 of them, (batch or 1, heads, N, S_j), float32 or float64: this is the dtype of the
            computation. Batch 1 is not expanded; nor is it in h, k, x and r.
        v: (batch, heads, N, head_dim_v), any strides; in the tables' dtype, bfloat16 or float16.
        h: (batch or 1, heads, N), in the tables' dtype: a term per key, such as the query projection's bias gives.
        k: (batch or 1, heads, N, c), in the tables' dtype and with their batch: the keys' part of x's channels.
        x: (batch or 1, S_1, ..., S_A, c) or (batch or 1, M, c) with M = S_1 * ... * S_A, in the tables' dtype: data
            channels of the queries, 0 to 128; given with k or not at all.
        r: (batch or 1, S_1, ..., S_A) or (batch or 1, M), in the tables' dtype: a factor per query, such as
            LayerNorm's; None means 1.
        mask: bool (batch, N), True = attend. A query with nothing to attend to gets zeros and zero gradients.
        dropout_p: probability in [0, 1) of dropping an attention weight; the kept ones are divided by 1 - dropout_p.
        seed: of the dropout, from 0 to 2^63 - 1; by default drawn from torch's generator.

    Returns:
        (batch, heads, M, head_dim_v), in v's dtype: a transposed view of (batch, M, heads, head_dim_v), which the next
        projection reads without a copy. Under torch.autocast, v is cast as scaled_dot_product_attention casts its own.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: O(batch * heads * N * sum S_j) beyond the inputs, the result and one number per query and head; in backward
        one more such number, and partial sums, so many times the gradients of the tables, k, h and v as the queries are
        split into parts: on a CPU up to 16, or 32 over a batch, on a GPU until it is filled. On a CPU v once more, in
        the dtype of the computation. On the reference, the weights, batch * heads * M * N, are stored in full. Backward
        is deterministic and recomputes the weights.
    Source: docs/separable_attention.md; Jaegle et al. 2022, arXiv:2107.14795; Dao 2023, arXiv:2307.08691.
    """
    tables = tuple(tables)
    (v,) = autocast(v)
    x, r = _checked(tables, v, h, k, x, r, mask)
    random = seed_tensor(dropout_p, seed)
    form = torch.cat([part.transpose(2, 3) for part in (*(() if k is None else (k,)), *tables)], 2)
    grid = [table.shape[3] for table in tables]
    return torch.ops.perceiver_kernels.separable_query_attention_fwd(form, v, h, x, r, mask, random, grid, dropout_p)[0]


def attend_from_grid(
    form: Tensor,
    v: Tensor,
    h: Tensor | None = None,
    x: Tensor | None = None,
    r: Tensor | None = None,
    *,
    grid: Sequence[int],
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """separable_query_attention for callers that have k and the tables in one array: nothing is copied or cast.

    Args:
        form: (batch or 1, heads, c + S_1 + ... + S_A, N), k and then the tables, transposed.
        grid: S_1, ..., S_A.
        v, h, x, r, mask, dropout_p: as there; the queries of x and r in one dimension.
    """
    random = seed_tensor(dropout_p)
    return torch.ops.perceiver_kernels.separable_query_attention_fwd(
        form, v, h, x, r, mask, random, list(grid), dropout_p
    )[0]


def _checked(
    tables: tuple[Tensor, ...],
    v: Tensor,
    h: Tensor | None,
    k: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Validates the arguments; returns x and r with the queries in one dimension."""
    if not 1 <= len(tables) <= MAX_AXES:
        raise ValueError(f"tables has {len(tables)} entries, must have one per grid axis, 1 to {MAX_AXES}")
    if v.dim() != 4:
        raise ValueError(f"v has {v.dim()} dimensions, must have 4: (batch, heads, keys, head_dim_v)")
    batch, heads, keys, head_dim_v = v.shape
    if head_dim_v < 1:
        raise ValueError("v has head_dim_v 0, must have at least 1")
    first = ("tables[0]", tables[0])
    check_computes(*first)
    dtype = tables[0].dtype
    if v.dtype not in (dtype, torch.bfloat16, torch.float16):
        raise ValueError(f"v has dtype {v.dtype}, must be bfloat16, float16 or {dtype} as tables[0] has")
    for j, table in enumerate(tables):
        _check_keys(f"tables[{j}]", table, batch, heads, keys, "positions")
        check_batch(f"tables[{j}]", table, like=first)
    grid = tuple(table.shape[3] for table in tables)
    if heads * math.prod(grid) >= MAX_ROWS:
        raise ValueError(
            f"tables span {math.prod(grid)} queries in {heads} heads, must span fewer than {MAX_ROWS} together"
        )
    if (k is None) != (x is None):
        raise ValueError(f"{'k' if k is None else 'x'} is None, must be given as {'x' if k is None else 'k'} is")
    if k is not None and x is not None:
        _check_keys("k", k, batch, heads, keys, "channels")
        check_batch("k", k, like=first)
        x = _flat("x", x, batch, grid, 1)
        if x.shape[2] != k.shape[3]:
            raise ValueError(f"x has {x.shape[2]} channels, must have {k.shape[3]} as k has")
        if x.shape[2] > MAX_CHANNELS:
            raise ValueError(f"x has {x.shape[2]} channels, must have 0 to {MAX_CHANNELS}")
    if h is not None and (h.dim() != 3 or h.shape[0] not in (1, batch) or tuple(h.shape[1:]) != (heads, keys)):
        raise ValueError(f"h has shape {tuple(h.shape)}, must be ({_batches(batch)}, {heads}, {keys}) for v")
    if r is not None:
        r = _flat("r", r, batch, grid, 0)
    check_key_mask(mask, batch, keys, "keys of v")
    computed: list[Named] = [(f"tables[{j}]", table) for j, table in enumerate(tables)]
    computed += [("h", h), ("k", k), ("x", x), ("r", r)]
    check_dtypes(computed, like=first)
    check_devices([*computed, ("v", v), ("mask", mask)], like=first)
    return x, r


def _batches(batch: int) -> str:
    return "1" if batch == 1 else f"1 or {batch}"


def _check_keys(name: str, tensor: Tensor, batch: int, heads: int, keys: int, last: str) -> None:
    if tensor.dim() != 4 or tensor.shape[0] not in (1, batch) or tuple(tensor.shape[1:3]) != (heads, keys):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, must be ({_batches(batch)}, {heads}, {keys}, {last}) for v"
        )


def _flat(name: str, tensor: Tensor, batch: int, grid: tuple[int, ...], trailing: int) -> Tensor:
    """The tensor as (batch or 1, M, ...); queries may come with the grid's axes apart."""
    queries = math.prod(grid)
    sizes = tuple(tensor.shape[1 : tensor.dim() - trailing])
    if tensor.dim() > 1 + trailing and tensor.shape[0] in (1, batch) and sizes in (grid, (queries,)):
        return tensor.reshape(tensor.shape[0], queries, *tensor.shape[tensor.dim() - trailing :])
    tail = ", channels" if trailing else ""
    first = _batches(batch)
    expected = f"({first}, {queries}{tail}) or ({first}, {', '.join(map(str, grid))}{tail})"
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {expected} for the grid of the tables")


def _call(form: Tensor, v: Tensor, mask: Tensor | None, axes: int, dropout_p: float) -> dispatch.Call:
    return dispatch.Call(OP, form.device.type, form.dtype, v.dtype, axes, v.shape[3], mask is not None, dropout_p > 0)


def explain(
    tables: Sequence[Tensor], v: Tensor, *, mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> str:
    """Which backend would run this call of separable_query_attention, and the others' reasons why not."""
    return dispatch.describe(_call(tables[0], v, mask, len(tables), dropout_p))


define(
    "separable_query_attention_fwd(Tensor form, Tensor v, Tensor? h, Tensor? x, Tensor? r, Tensor? mask, "
    "Tensor? random, SymInt[] grid, float dropout_p) -> (Tensor out, Tensor lse)"
)
define(
    "separable_query_attention_bwd(Tensor form, Tensor v, Tensor? h, Tensor? x, Tensor? r, Tensor? mask, "
    "Tensor? random, SymInt[] grid, float dropout_p, Tensor out, Tensor lse, Tensor d_out, "
    "bool needs_form, bool needs_v, bool needs_h, bool needs_x, bool needs_r) "
    "-> (Tensor d_form, Tensor d_v, Tensor d_h, Tensor d_x, Tensor d_r)"
)


def _fwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    random: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    backend = dispatch.select(_call(form, v, mask, len(grid), dropout_p)).load()
    return backend.separable_query_attention_fwd(form, v, h, x, r, mask, grid, dropout_p, seed_number(random))


def _bwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    random: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    *needs: bool,
) -> tuple[Tensor, ...]:
    backend = dispatch.select(_call(form, v, mask, len(grid), dropout_p)).load()
    return backend.separable_query_attention_bwd(
        form, v, h, x, r, mask, grid, dropout_p, seed_number(random), out, lse, d_out, needs
    )


def _fwd_fake(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    random: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    queries = math.prod(grid)
    return rows_first(v, queries, v.shape[3]), form.new_empty(*v.shape[:2], queries)


def _bwd_fake(
    form: Tensor, v: Tensor, h: Tensor | None, x: Tensor | None, r: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs_form, needs_v, *needs = rest[-5:]
    d_form = form.new_empty(form.shape if needs_form else 0)
    d_v = v.new_empty(v.shape if needs_v else 0)
    others = (
        form.new_empty(tensor.shape if need and tensor is not None else 0)
        for tensor, need in zip((h, x, r), needs, strict=True)
    )
    return d_form, d_v, *others


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    form, v, h, x, r, mask, random, ctx.grid, ctx.dropout_p = inputs
    ctx.save_for_backward(form, v, h, x, r, mask, random, *output)
    ctx.needs = [tensor is not None and tensor.requires_grad for tensor in (form, v, h, x, r)]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 9
    form, v, h, x, r, mask, random, out, lse = ctx.saved_tensors
    d_form, d_v, d_h, d_x, d_r = torch.ops.perceiver_kernels.separable_query_attention_bwd(
        form, v, h, x, r, mask, random, ctx.grid, ctx.dropout_p, out, lse, d_out, *ctx.needs
    )
    if ctx.needs[0]:
        d_form = centring.without_mean(d_form, mask, 3)
    if ctx.needs[2]:
        d_h = centring.without_mean(d_h, mask, 2)
    gradients = (d_form, d_v, d_h, d_x, d_r)
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, ctx.needs, strict=True))
    return (*wanted, None, None, None, None)


register_pair(OP, (_fwd, _bwd), (_fwd_fake, _bwd_fake), _setup_context, _backward)
