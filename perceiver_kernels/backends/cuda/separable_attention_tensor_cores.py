"""Separable attention of planes by TensorFloat-32 products: csrc/cuda/separable_attention_tensor_cores.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.cuda.separable_attention import State, _call, _empty, _statistics
from perceiver_kernels.backends.cuda.separable_attention_tokens import tokens_gradients
from perceiver_kernels.backends.native import describe_all
from perceiver_kernels.backends.triton.runtime import input_precision

MOST_CHANNELS = 3


def fits(form: Tensor, x: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether these kernels can take a call, and torch's own products may be TensorFloat-32."""
    plane = x.dim() == 4 and x.shape[-1] <= MOST_CHANNELS
    return plane and mask is None and dropout_p == 0 and input_precision(form.dtype) == "tf32"


def forward(form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int) -> State:
    """As separable_attention.separable_attention_fwd."""
    batch, (_, entries, rows) = x.shape[0], form.shape
    sums = form.new_empty(batch, entries, rows)
    lse = form.new_empty(batch, rows, dtype=torch.float64)
    total = form.new_empty(batch, rows)
    if _empty(form, x):
        return sums.zero_(), lse.fill_(-torch.inf), total.zero_()
    form = form.contiguous()
    call = *_call(form, x, r, mask, dropout_p, seed), runtime.multiprocessors(x.device)
    workspace = form.new_empty(runtime.module().separable_attention_tensor_cores_workspace(*call))
    runtime.module().separable_attention_fwd_tensor_cores(
        *call, *describe_all((workspace, sums, lse, total)), runtime.stream(x)
    )
    return sums, lse, total


def backward(
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
    """As separable_attention.separable_attention_bwd; gradients of tokens are float32 in full."""
    needs_form, needs_x, needs_r = needs
    d_form = form.new_empty(form.shape if needs_form else 0)
    d_x = x.new_empty(x.shape if needs_x else 0)
    d_r = form.new_empty(x.shape[:-1] if needs_r else 0)
    if _empty(form, x):
        return d_form.zero_(), d_x.zero_(), d_r.zero_()
    form, d_sums = form.contiguous(), upstream[0].contiguous()
    statistics = _statistics(saved, (d_sums, *upstream[1:]), dropout_p)
    if needs_form:
        call = *_call(form, x, r, mask, dropout_p, seed), runtime.multiprocessors(x.device)
        workspace = form.new_empty(runtime.module().separable_attention_tensor_cores_workspace(*call))
        runtime.module().separable_attention_bwd_rows_tensor_cores(
            *call, *describe_all((workspace, d_sums, statistics, d_form)), runtime.stream(x)
        )
    if needs_x or needs_r:
        tokens_gradients(form, x, r, mask, dropout_p, seed, d_sums, statistics, d_x, d_r)
    return d_form, d_x, d_r
