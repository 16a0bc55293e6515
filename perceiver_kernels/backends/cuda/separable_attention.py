"""separable_attention in CUDA C++: csrc/cuda/separable_attention.cu, _tensor_cores.cu and _many_channels.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.cuda.separable_attention_tokens import tokens_gradients
from perceiver_kernels.backends.gpu import multiprocessors, tf32_allowed
from perceiver_kernels.backends.native import describe, describe_all

State = tuple[Tensor, Tensor, Tensor]

ROWS_OF_STATISTICS = 64  # their number is padded to a multiple of this
TENSOR_CORES_MAX_CHANNELS = 3
MANY_CHANNELS = 5


def separable_attention_fwd(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int
) -> State:
    """sums, lse (float64) and total of separable attention; shapes as in ops.separable_attention.attend_to_grid."""
    batch, (_, entries, rows) = x.shape[0], form.shape
    sums = form.new_empty(batch, entries, rows)
    lse = form.new_empty(batch, rows, dtype=torch.float64)
    total = form.new_empty(batch, rows)
    if _empty(form, x):
        return sums.zero_(), lse.fill_(-torch.inf), total.zero_()
    form = form.contiguous()
    call = _call(form, x, r, mask, dropout_p, seed)
    results = _workspace(call, form), sums, lse, total
    runtime.module().separable_attention_fwd(*call, *describe_all(results), runtime.stream(x))
    return sums, lse, total


def separable_attention_bwd(
    form: Tensor,
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
    saved: State,
    upstream: State,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the form, x and r, empty where not needed."""
    needs_form, needs_x, needs_r = needs
    d_form = form.new_empty(form.shape if needs_form else 0)
    d_x = x.new_empty(x.shape if needs_x else 0)
    d_r = form.new_empty(x.shape[:-1] if needs_r else 0)
    if _empty(form, x):
        return d_form.zero_(), d_x.zero_(), d_r.zero_()
    form, d_sums = form.contiguous(), upstream[0].contiguous()
    statistics = _statistics(saved, (d_sums, *upstream[1:]), dropout_p)
    if needs_form:
        call = _call(form, x, r, mask, dropout_p, seed)
        arrays = _workspace(call, form), d_sums, statistics, d_form
        runtime.module().separable_attention_bwd_rows(*call, *describe_all(arrays), runtime.stream(x))
    if needs_x or needs_r:
        tokens_gradients(form, x, r, mask, dropout_p, seed, d_sums, statistics, d_x, d_r)
    return d_form, d_x, d_r


def _empty(form: Tensor, x: Tensor) -> bool:
    """Whether there are no rows or no tokens."""
    return form.shape[2] == 0 or x.numel() == 0


def tensor_core_products(form: Tensor, x: Tensor, mask: Tensor | None, dropout_p: float) -> int:
    """How many TensorFloat-32 products make one of float32 in the kernels of rows; 0: they use no tensor cores.

    Few channels, on planes, and many have kernels of their own. Three products keep float32's digits, two where the
    data have no more than TensorFloat-32; where torch allows it, it is one.
    """
    channels = x.shape[-1]
    if dropout_p > 0 or form.dtype != torch.float32:
        return 0
    if channels >= MANY_CHANNELS:
        return 1 if tf32_allowed() else 3 if x.dtype == torch.float32 else 2
    few = x.dim() == 4 and channels <= TENSOR_CORES_MAX_CHANNELS and mask is None
    return int(few and tf32_allowed())


def _call(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int
) -> tuple[Any, ...]:
    """What both kernels of rows take first: tensors, dropout, products by tensor cores, the GPU's multiprocessors."""
    return (
        describe_all((form, x, r, mask)),
        (dropout_p, seed, 0),
        tensor_core_products(form, x, mask, dropout_p),
        multiprocessors(x.device),
    )


def _workspace(call: tuple[Any, ...], form: Tensor) -> Tensor:
    return form.new_empty(runtime.module().separable_attention_workspace(*call))


def _statistics(saved: State, upstream: State, dropout_p: float) -> Tensor:
    """(batch, 4, padded rows): what backward needs of a row besides forms; see separable_attention_bwd_prepare."""
    sums, lse, total = (value.contiguous() for value in saved)
    padded = -(-sums.shape[2] // ROWS_OF_STATISTICS) * ROWS_OF_STATISTICS
    statistics = sums.new_empty(sums.shape[0], 4, padded)
    runtime.module().separable_attention_bwd_prepare(
        *describe_all((sums, lse, total, *upstream)), dropout_p > 0, describe(statistics), runtime.stream(sums)
    )
    return statistics
