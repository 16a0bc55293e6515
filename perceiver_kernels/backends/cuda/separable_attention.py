"""separable_attention in CUDA C++: csrc/cuda/separable_attention.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.cuda.separable_attention_tokens import tokens_gradients
from perceiver_kernels.backends.native import describe

State = tuple[Tensor, Tensor, Tensor]

ROWS_OF_STATISTICS = 64  # their number is padded to a multiple of this


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
    workspace = _workspace(call, form)
    runtime.module().separable_attention_fwd(
        *call, runtime.multiprocessors(x.device), describe(workspace), describe(sums), describe(lse), describe(total),
        runtime.stream(x),
    )  # fmt: skip
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
        workspace = _workspace(call, form)
        runtime.module().separable_attention_bwd_rows(
            *call, runtime.multiprocessors(x.device), describe(workspace), describe(d_sums), describe(statistics),
            describe(d_form), runtime.stream(x),
        )  # fmt: skip
    if needs_x or needs_r:
        tokens_gradients(form, x, r, mask, dropout_p, seed, d_sums, statistics, d_x, d_r)
    return d_form, d_x, d_r


def _empty(form: Tensor, x: Tensor) -> bool:
    """Whether there are no rows or no tokens."""
    return form.shape[2] == 0 or x.numel() == 0


def _call(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int
) -> tuple[tuple[Any, ...], tuple[float, int, int]]:
    return (describe(form), describe(x), describe(r), describe(mask)), (dropout_p, seed, 0)


def _workspace(call: tuple[Any, ...], form: Tensor) -> Tensor:
    return form.new_empty(runtime.module().separable_attention_workspace(*call, runtime.multiprocessors(form.device)))


def _statistics(saved: State, upstream: State, dropout_p: float) -> Tensor:
    """(batch, 4, padded rows): what backward needs of a row besides forms, by separable_attention_bwd_prepare_kernel."""
    sums, lse, total = (value.contiguous() for value in saved)
    d_sums, d_lse, d_total = upstream
    padded = -(-sums.shape[2] // ROWS_OF_STATISTICS) * ROWS_OF_STATISTICS
    statistics = sums.new_empty(sums.shape[0], 4, padded)
    runtime.module().separable_attention_bwd_prepare(
        describe(sums), describe(lse), describe(total), describe(d_sums), describe(d_lse.double()), describe(d_total),
        dropout_p > 0, describe(statistics), runtime.stream(sums),
    )  # fmt: skip
    return statistics
