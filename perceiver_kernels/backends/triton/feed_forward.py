"""feed_forward on a GPU: LayerNorm in a pass, torch's matrix products, and a pass over each for what follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.linear import epilogue_bwd, linear_fwd, load_strided
from perceiver_kernels.backends.triton.tiles import Tiles

# Rows that a program of the backward pass goes through, summing columns: the order of sums follows from shapes alone.
ROWS_OF_PART = 16


@triton.jit
def layer_norm_fwd_kernel(
    x, weight, bias, out, mean, rstd, x_row, x_column, rows, channels, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """LayerNorm of whole rows, its means and its reciprocal standard deviations."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < channels)
    value = load_strided(x, row, column, x_row, x_column, mask)
    average = tl.sum(value, 1, keep_dims=True) / channels
    value = tl.where(column < channels, value - average, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / channels + eps)
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)
    value *= scale
    if weight is not None:
        value *= tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(out + row * channels + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_bwd_kernel(
    d_out, x, weight, mean, rstd, d_x, d_weight, d_bias, x_row, x_column, rows, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_OF_PART: tl.constexpr,
):  # fmt: skip
    """d_x, and the sums over each part's rows that make up d_weight and d_bias, (parts, channels)."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    weight_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * ROWS_OF_PART, tl.minimum(rows, (part + 1) * ROWS_OF_PART), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column < channels)
        average = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normed = tl.where(mask, (load_strided(x, row, column, x_row, x_column, mask) - average) * scale, 0.0)
        d_normed = tl.load(d_out + row * channels + column, mask=mask, other=0.0).to(tl.float32)
        weight_sums += d_normed * normed
        bias_sums += d_normed
        if d_x is not None:
            if weight is not None:
                d_normed *= tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
            along = tl.sum(d_normed * normed, 1, keep_dims=True) / channels
            level = tl.sum(d_normed, 1, keep_dims=True) / channels
            d_value = (d_normed - level - normed * along) * scale
            tl.store(d_x + row * channels + column, d_value.to(d_x.dtype.element_ty), mask=mask)
    if d_weight is not None:
        tl.store(d_weight + part * channels + column, tl.sum(weight_sums, 0)[None, :], mask=column < channels)
    if d_bias is not None:
        tl.store(d_bias + part * channels + column, tl.sum(bias_sums, 0)[None, :], mask=column < channels)


def default_tiles(channels: int) -> Tiles:
    """A program holds whole rows, of 16 elements and more a thread."""
    columns = tiles.next_power_of_2(channels, 16)
    return Tiles(min(ROWS_OF_PART, max(1, 2048 // columns)), columns, warps=min(16, max(4, columns // 512)))


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of (rows, channels), any strides, in dtype; its means and reciprocal deviations, (rows,) in float32."""
    rows, channels = x.shape
    out = x.new_empty(rows, channels, dtype=dtype)
    mean, rstd = x.new_empty(2, rows, dtype=torch.float32)
    choice = default_tiles(channels)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    if out.numel():
        layer_norm_fwd_kernel[(triton.cdiv(rows, choice.rows),)](
            x, weight, bias, out, mean, rstd, *x.stride(), rows, channels, eps,
            ROWS=choice.rows, COLUMNS=choice.columns, num_warps=choice.warps, **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip
    return out, mean, rstd


def layer_norm_bwd(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x in its dtype and of weight and bias in float32, None where not needed; d_out contiguous."""
    needs_x, needs_weight, needs_bias = needs
    rows, channels = x.shape
    parts, choice = triton.cdiv(rows, ROWS_OF_PART), default_tiles(channels)
    weight = None if weight is None else weight.contiguous()
    d_x = x.new_empty(x.shape) if needs_x else None
    sums = [x.new_empty(parts, channels, dtype=torch.float32) if need else None for need in (needs_weight, needs_bias)]
    if x.numel():
        layer_norm_bwd_kernel[(parts,)](
            d_out, x, weight, mean, rstd, d_x, *sums, *x.stride(), rows, channels,
            ROWS=choice.rows, COLUMNS=choice.columns, ROWS_OF_PART=ROWS_OF_PART, num_warps=choice.warps,
            **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip
    d_weight, d_bias = (None if part is None else part.sum(0) for part in sums)
    return d_x, d_weight, d_bias


def feed_forward_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor | None,
    activation: str,
    eps: float,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """out (rows, out_features) in dtype, and the first product in compute_dtype where it is to be saved, else empty."""
    normed, _, _ = layer_norm_fwd(x, norm_weight, norm_bias, eps, compute_dtype)
    inner, hidden = linear_fwd(normed, weight_in, bias_in, None, activation, compute_dtype, compute_dtype, save_hidden)
    return linear_fwd(inner, weight_out, bias_out, residual, "none", compute_dtype, dtype, False)[0], hidden


def feed_forward_bwd(
    d_out: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    hidden: Tensor,
    activation: str,
    eps: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, weight_in, bias_in and weight_out, empty where not needed."""
    needs_x, needs_norm_weight, needs_norm_bias, needs_in, needs_bias_in, needs_out = needs
    dtype = hidden.dtype
    own_in, own_out, d_out = weight_in.to(dtype), weight_out.to(dtype), d_out.to(dtype)
    normed, mean, rstd = layer_norm_fwd(x, norm_weight, norm_bias, eps, dtype)
    product = hidden if hidden.dim() == 2 else F.linear(normed, own_in)
    d_product, d_bias_in, inner = epilogue_bwd(
        product, bias_in, d_out @ own_out, activation, sums=needs_bias_in, inner=needs_out
    )
    needs_norm = (needs_x, needs_norm_weight, needs_norm_bias)
    d_norm: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs_norm):
        d_norm = layer_norm_bwd(d_product @ own_in, x, norm_weight, mean, rstd, needs_norm)
    found = (
        *d_norm,
        d_product.t() @ normed if needs_in else None,
        d_bias_in,
        None if inner is None else d_out.t() @ inner,
    )
    inputs = (x, norm_weight, norm_bias, weight_in, bias_in, weight_out)
    return tuple(
        x.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in zip(found, inputs, strict=True)
    )
