"""Separable attention: the core of cross-attention to tokens on a grid, without encoded tokens, keys or values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import native
from perceiver_kernels.backends.reference import separable_attention as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.dropout import seed_number, seed_tensor
from perceiver_kernels.ops.registration import define, register_pair
from perceiver_kernels.ops.validation import (
    COMPUTE_DTYPES,
    DTYPES,
    Named,
    check_batch,
    check_boolean,
    check_devices,
    check_dtypes,
    check_rows,
)

OP = "separable_attention"
MAX_AXES = 4
MAX_CHANNELS = 128
MAX_TOKENS = 2**34  # the counter of the dropout generator
DATA_DTYPES = (*DTYPES, torch.uint8)

declare_gpu(
    OP,
    "cuda",
    "triton",
    compute_dtypes=(torch.float32,),
    data_dtypes=(*GPU_DTYPES, torch.uint8),
    axes=(1, MAX_AXES),
    channels=(1, MAX_CHANNELS),
)
declare_native(
    OP, native, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DATA_DTYPES, axes=(1, MAX_AXES), channels=(1, MAX_CHANNELS)
)
declare_reference(OP, reference, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DATA_DTYPES)


@dataclass(frozen=True)
class SeparableState:
    """Attention of every row over one set of tokens; states over disjoint sets merge into the state over their union.

    Attributes:
        acc: (batch, rows, c), sum over tokens of w * x, with w = softmax(s) * r.
        marginals: per axis (batch, rows, S_k), w summed over all other axes.
        lse: (batch, rows), log of the sum of exp(s); -inf where a row has nothing to attend to.
        total: (batch, rows), sum of the weights: 1, or 0 where a row has nothing to attend to; under dropout the sum of
            the kept, rescaled weights.
    """

    acc: Tensor
    marginals: tuple[Tensor, ...]
    lse: Tensor
    total: Tensor

    def merge(self, other: SeparableState) -> SeparableState:
        """The state over the union of two disjoint token sets on the same grid (docs/separable_attention.md).

        Raises:
            ValueError: the states' shapes differ.
        """
        sizes, other_sizes = ([tuple(t.shape) for t in (s.acc, *s.marginals)] for s in (self, other))
        if sizes != other_sizes:
            raise ValueError(f"other has acc and marginals of shapes {other_sizes}, must be {sizes} as in this state")
        lse, mine, theirs = merge_weights(self.lse, other.lse)
        return SeparableState(
            mine[..., None] * self.acc + theirs[..., None] * other.acc,
            tuple(
                mine[..., None] * m + theirs[..., None] * n
                for m, n in zip(self.marginals, other.marginals, strict=True)
            ),
            lse,
            mine * self.total + theirs * other.total,
        )


def merge_weights(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp of two partial softmaxes and the factor of each; rows that are empty in both keep factor 0."""
    larger = torch.maximum(first, second).detach()
    reference = torch.where(larger == -torch.inf, 0.0, larger)
    first_sum, second_sum = (first - reference).exp(), (second - reference).exp()
    total = first_sum + second_sum
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, reference + safe.log())
    return lse, first_sum / safe, second_sum / safe


def separable_attention(
    a: Tensor,
    tables: Sequence[Tensor],
    x: Tensor,
    r: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
) -> SeparableState:
    """Softmax attention whose scores are sums of one term per grid axis and a few data channels.

    s[i, m] = r[m] * (a[i] . x[m] + sum_k tables[k][i, m_k]),  p = softmax over m of s,  w[i, m] = p[i, m] * r[m];
    results are w's weighted sum of x and its marginals along each axis. No (rows, tokens) array is ever stored.

    Args:
        a: (batch or 1, rows, c), float32 or float64: this is the dtype of the computation. Batch 1 is not expanded.
        tables: per grid axis, 1 to 4 of them, (batch or 1, rows, S_k), in a's dtype; best with rows contiguous.
        x: (batch, S_1, ..., S_A, c) or (batch, M, c) with M = S_1 * ... * S_A, any strides (channels first as a view);
            float32, float64, bfloat16, float16, or uint8 raw pixels. 1 to 128 channels.
        r: (batch, S_1, ..., S_A) or (batch, M), in a's dtype: a factor per token, such as LayerNorm's; None means 1.
        mask: bool, shaped as r: True = attend. A row with nothing to attend to gets zeros and zero gradients.
        dropout_p: probability in [0, 1) of dropping an attention weight; the kept ones are divided by 1 - dropout_p.
        seed: of the dropout, from 0 to 2^63 - 1; by default drawn from torch's generator.
        x_scale, x_shift: (c,) in a's dtype: x is read as x * x_scale + x_shift (raw pixels' normalisation), at no cost.

    Returns:
        SeparableState in a's dtype; acc and marginals are views with rows contiguous.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: O(batch * rows * sum S_k) beyond the inputs. Backward is deterministic and recomputes the weights.
    Errors: as float32 softmax with exactly accumulated statistics; see the tolerance table in tests/numerics.py.
    Source: docs/separable_attention.md; the softmax is streamed as in Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    tables = tuple(tables)
    x, r, mask = _checked(a, tables, x, r, mask, x_scale, x_shift)
    random = seed_tensor(dropout_p, seed)
    if x_scale is None and x_shift is None:
        return _state(a, tables, x, r, mask, random, dropout_p)
    scale = a.new_ones(a.shape[2]) if x_scale is None else x_scale
    shift = a.new_zeros(a.shape[2]) if x_shift is None else x_shift
    shifted = (tables[0] + (a * shift).sum(-1, keepdim=True), *tables[1:])
    state = _state(a * scale, shifted, x, r, mask, random, dropout_p)
    weights = state.marginals[0].sum(-1, keepdim=True)
    return SeparableState(state.acc * scale + weights * shift, state.marginals, state.lse, state.total)


def _state(
    a: Tensor,
    tables: tuple[Tensor, ...],
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    random: Tensor | None,
    dropout_p: float,
) -> SeparableState:
    form = torch.cat([part.transpose(1, 2) for part in (a, *tables)], 1)
    sums, lse, total = torch.ops.perceiver_kernels.separable_attention_fwd(form, x, r, mask, random, dropout_p)
    acc, *marginals = (part.transpose(1, 2) for part in sums.split([part.shape[2] for part in (a, *tables)], 1))
    return SeparableState(acc, tuple(marginals), lse.to(a.dtype), total)


def attend_to_grid(
    form: Tensor, x: Tensor, r: Tensor | None = None, *, mask: Tensor | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """separable_attention for callers that have a and the tables in one array: nothing is copied, no shape checked.

    Args:
        form: (batch or 1, c + S_1 + ... + S_A, rows), a and then the tables, transposed.
        x: (batch, S_1, ..., S_A, c); r and mask (batch, S_1, ..., S_A).

    Returns:
        (batch, c + S_1 + ... + S_A, rows), acc and then the marginals; and total (batch, rows).
    """
    random = seed_tensor(dropout_p)
    sums, _, total = torch.ops.perceiver_kernels.separable_attention_fwd(form, x, r, mask, random, dropout_p)
    return sums, total


def _checked(
    a: Tensor,
    tables: tuple[Tensor, ...],
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Validates the arguments; returns x, r and mask with the grid's axes apart."""
    check_rows(a)
    if not 1 <= len(tables) <= MAX_AXES:
        raise ValueError(f"tables has {len(tables)} entries, must have one per grid axis, 1 to {MAX_AXES}")
    if x.dtype not in DATA_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}, must be float32, float64, bfloat16, float16 or uint8")
    for k, table in enumerate(tables):
        if table.dim() != 3 or table.shape[0] != a.shape[0] or table.shape[1] != a.shape[1]:
            raise ValueError(
                f"tables[{k}] has shape {tuple(table.shape)}, must be ({a.shape[0]}, {a.shape[1]}, positions) as a has "
                f"shape {tuple(a.shape)}"
            )
    grid = tuple(table.shape[2] for table in tables)
    tokens = math.prod(grid)
    if tokens >= MAX_TOKENS:
        raise ValueError(f"tables span {tokens} tokens, must span fewer than {MAX_TOKENS}")
    x = _on_grid("x", x, grid, 1)
    if not 1 <= x.shape[-1] <= MAX_CHANNELS:
        raise ValueError(f"x has {x.shape[-1]} channels, must have 1 to {MAX_CHANNELS}")
    if x.shape[-1] != a.shape[2]:
        raise ValueError(f"x has {x.shape[-1]} channels, must have {a.shape[2]} as a has")
    if a.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"a has batch {a.shape[0]}, must be 1 or {x.shape[0]} as x has")
    if r is not None:
        r = _on_grid("r", r, grid, 0)
        check_batch("r", r, like=("x", x))
    if mask is not None:
        check_boolean(mask)
        mask = _on_grid("mask", mask, grid, 0)
        check_batch("mask", mask, like=("x", x))
    for name, vector in (("x_scale", x_scale), ("x_shift", x_shift)):
        if vector is not None and tuple(vector.shape) != (a.shape[2],):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, must be ({a.shape[2]},), one per channel of x")
    computed: list[Named] = [(f"tables[{k}]", table) for k, table in enumerate(tables)]
    computed += [("r", r), ("x_scale", x_scale), ("x_shift", x_shift)]
    check_dtypes(computed, like=("a", a))
    check_devices([*computed, ("x", x), ("mask", mask)], like=("a", a))
    return x, r, mask


def _on_grid(name: str, tensor: Tensor, grid: tuple[int, ...], trailing: int) -> Tensor:
    """The tensor as (batch, *grid, ...); tokens may come in one dimension."""
    flat, full = 2 + trailing, 1 + len(grid) + trailing
    if tensor.dim() == full and tuple(tensor.shape[1 : 1 + len(grid)]) == grid:
        return tensor
    if tensor.dim() != flat or tensor.shape[1] != math.prod(grid):
        tail = ", channels" if trailing else ""
        expected = f"(batch, {math.prod(grid)}{tail}) or (batch, {', '.join(map(str, grid))}{tail})"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {expected} for the grid of the tables")
    return tensor.unflatten(1, grid) if tensor.numel() else tensor.reshape(tensor.shape[0], *grid, *tensor.shape[2:])


def _call(form: Tensor, x: Tensor, mask: Tensor | None, dropout_p: float) -> dispatch.Call:
    axes = x.dim() - 2
    return dispatch.Call(OP, form.device.type, form.dtype, x.dtype, axes, x.shape[-1], mask is not None, dropout_p > 0)


def explain(
    a: Tensor,
    tables: Sequence[Tensor],
    x: Tensor,
    r: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **_: Any,
) -> str:
    """Which backend would run this call of separable_attention, and the others' reasons why not."""
    call = dispatch.Call(OP, a.device.type, a.dtype, x.dtype, len(tables), x.shape[-1], mask is not None, dropout_p > 0)
    return dispatch.describe(call)


define(
    "separable_attention_fwd(Tensor form, Tensor x, Tensor? r, Tensor? mask, Tensor? random, float dropout_p) "
    "-> (Tensor sums, Tensor lse, Tensor total)"
)
define(
    "separable_attention_bwd(Tensor form, Tensor x, Tensor? r, Tensor? mask, Tensor? random, float dropout_p, "
    "Tensor sums, Tensor lse, Tensor total, Tensor d_sums, Tensor d_lse, Tensor d_total, "
    "bool needs_form, bool needs_x, bool needs_r) -> (Tensor d_form, Tensor d_x, Tensor d_r)"
)


def _fwd(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, random: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.select(_call(form, x, mask, dropout_p)).load()
    return backend.separable_attention_fwd(form, x, r, mask, dropout_p, seed_number(random))


def _bwd(
    form: Tensor,
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    random: Tensor | None,
    dropout_p: float,
    sums: Tensor,
    lse: Tensor,
    total: Tensor,
    d_sums: Tensor,
    d_lse: Tensor,
    d_total: Tensor,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.select(_call(form, x, mask, dropout_p)).load()
    saved, upstream = (sums, lse, total), (d_sums, d_lse, d_total)
    return backend.separable_attention_bwd(form, x, r, mask, dropout_p, seed_number(random), saved, upstream, needs)


def _fwd_fake(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, random: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, (_, entries, rows) = x.shape[0], form.shape
    return (
        form.new_empty(batch, entries, rows),
        form.new_empty(batch, rows, dtype=torch.float64),
        form.new_empty(batch, rows),
    )


def _bwd_fake(form: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_form, needs_x, needs_r = rest[-3:]
    return (
        form.new_empty(form.shape if needs_form else 0),
        x.new_empty(x.shape if needs_x else 0),
        form.new_empty(x.shape[:-1] if needs_r else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    form, x, r, mask, random, dropout_p = inputs
    ctx.save_for_backward(form, x, r, mask, random, *output)
    ctx.dropout_p = dropout_p
    ctx.needs = (form.requires_grad, x.requires_grad, r is not None and r.requires_grad)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    form, x, r, mask, random, *output = ctx.saved_tensors
    upstream = [
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(output, gradients, strict=True)
    ]
    results = torch.ops.perceiver_kernels.separable_attention_bwd(
        form, x, r, mask, random, ctx.dropout_p, *output, *upstream, *ctx.needs
    )
    d_form, d_x, d_r = (result if needed else None for result, needed in zip(results, ctx.needs, strict=True))
    return d_form, d_x, d_r, None, None, None


register_pair(OP, (_fwd, _bwd), (_fwd_fake, _bwd_fake), _setup_context, _backward)
