"""linear on a GPU: torch's matrix product, and one pass over it for bias, activation and residual."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.exponential import LOG2E
from perceiver_kernels.backends.triton.tiles import Tiles

SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
INVERSE_SQRT_TWO_PI: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))
SQRT_TWO_OVER_PI: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
CUBIC: tl.constexpr = tl.constexpr(0.044715)

# Rows that a program of the backward pass goes through, summing columns: the order of sums follows from shapes alone.
ROWS_OF_PART = 64


@triton.jit
def gelu_and_slope(x, TANH: tl.constexpr):
    """x * below(x) and its derivative, below being the normal distribution or what tanh makes of it."""
    if TANH:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        below = 1 / (1 + tl.exp2((x + CUBIC * x * x * x) * (-2 * SQRT_TWO_OVER_PI * LOG2E)))
        # Far from 0 the second term is 0; x is kept from overflowing in it.
        near = tl.minimum(tl.maximum(x, -32.0), 32.0)
        slope_of_u = SQRT_TWO_OVER_PI * (1 + 3 * CUBIC * near * near)
        slope = below + 2 * near * below * (1 - below) * slope_of_u
    else:
        below = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
        slope = below + x * INVERSE_SQRT_TWO_PI * tl.exp2(x * x * (-0.5 * LOG2E))
    return x * below, slope


@triton.jit
def load_biased(product, bias, row, column, mask, features):
    """A tile of product + bias, in float32."""
    value = tl.load(product + row * features + column, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_strided(tensor, row, column, row_stride, column_stride, mask):
    at = tensor + row * row_stride + column.to(tl.int64) * column_stride
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def linear_fwd_kernel(
    product, bias, residual, out, residual_row, residual_column, rows, width, features,
    ACTIVATED: tl.constexpr, TANH: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (rows, width) = f(product + bias) + residual; GATED: features is 2 width, else width."""
    strips = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // strips).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < width)
    value = load_biased(product, bias, row, column, mask, features)
    if GATED:
        gate, _ = gelu_and_slope(load_biased(product, bias, row, column + width, mask, features), TANH)
        value *= gate
    elif ACTIVATED:
        value, _ = gelu_and_slope(value, TANH)
    if residual is not None:
        value += load_strided(residual, row, column, residual_row, residual_column, mask)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def linear_bwd_kernel(
    product, bias, d_out, d_product, d_bias, inner, d_out_row, d_out_column, rows, width, features,
    ACTIVATED: tl.constexpr, TANH: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_OF_PART: tl.constexpr,
):  # fmt: skip
    """d_product (rows, features), its sums over each part's rows in d_bias (parts, features), and inner = f again."""
    strips = tl.cdiv(width, COLUMNS)
    part = (tl.program_id(0) // strips).to(tl.int64)
    column = (tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * ROWS_OF_PART, tl.minimum(rows, (part + 1) * ROWS_OF_PART), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column < width)
        at = row * features + column
        d_value = load_strided(d_out, row, column, d_out_row, d_out_column, mask)
        value = load_biased(product, bias, row, column, mask, features)
        if GATED:
            gate, slope = gelu_and_slope(load_biased(product, bias, row, column + width, mask, features), TANH)
            d_gate = d_value * value * slope
            tl.store(d_product + at + width, d_gate.to(d_product.dtype.element_ty), mask=mask)
            gate_sums += d_gate
            d_value *= gate
            value *= gate
        elif ACTIVATED:
            value, slope = gelu_and_slope(value, TANH)
            d_value *= slope
        tl.store(d_product + at, d_value.to(d_product.dtype.element_ty), mask=mask)
        sums += d_value
        if inner is not None:
            tl.store(inner + row * width + column, value.to(inner.dtype.element_ty), mask=mask)
    if d_bias is not None:
        at = part * features + column
        tl.store(d_bias + at, tl.sum(sums, 0)[None, :], mask=column < width)
        if GATED:
            tl.store(d_bias + at + width, tl.sum(gate_sums, 0)[None, :], mask=column < width)


def default_tiles(width: int) -> Tiles:
    """Whole warps read along rows, 16 bytes of a 16-bit dtype a thread; few rows, lest registers run out."""
    columns = min(256, tiles.next_power_of_2(width, 16))
    return Tiles(min(ROWS_OF_PART, 1024 // columns), columns)


def _options(activation: str) -> dict[str, bool]:
    return {
        "ACTIVATED": activation != "none",
        "TANH": activation.endswith("_tanh"),
        "GATED": activation.startswith("geglu"),
    }


def _width(product: Tensor, activation: str) -> int:
    return product.shape[1] // 2 if activation.startswith("geglu") else product.shape[1]


def epilogue_fwd(
    product: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """f(product + bias) + residual, (rows, channels) in dtype; product contiguous, residual of any strides."""
    rows, width = product.shape[0], _width(product, activation)
    out = product.new_empty(rows, width, dtype=dtype)
    strides = (0, 0) if residual is None else residual.stride()
    bias = None if bias is None else bias.contiguous()
    choice = default_tiles(width)
    grid = (triton.cdiv(rows, choice.rows) * triton.cdiv(width, choice.columns),)
    if out.numel():
        linear_fwd_kernel[grid](
            product, bias, residual, out, *strides, rows, width, product.shape[1], **_options(activation),
            ROWS=choice.rows, COLUMNS=choice.columns, num_warps=choice.warps, **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip
    return out


def epilogue_bwd(
    product: Tensor, bias: Tensor | None, d_out: Tensor, activation: str, *, sums: bool, inner: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of the product, and where asked for its column sums in float32 and f(product + bias), in its dtype."""
    (rows, features), width = product.shape, _width(product, activation)
    parts, choice = triton.cdiv(rows, ROWS_OF_PART), default_tiles(width)
    bias = None if bias is None else bias.contiguous()
    d_product = torch.empty_like(product)
    d_bias = product.new_empty(parts, features, dtype=torch.float32) if sums else None
    again = product.new_empty(rows, width) if inner else None
    if product.numel():
        linear_bwd_kernel[(parts * triton.cdiv(width, choice.columns),)](
            product, bias, d_out, d_product, d_bias, again, *d_out.stride(), rows, width, features,
            **_options(activation), ROWS=choice.rows, COLUMNS=choice.columns, ROWS_OF_PART=ROWS_OF_PART,
            num_warps=choice.warps, **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip
    return d_product, None if d_bias is None else d_bias.sum(0), again


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    save_product: bool,
) -> tuple[Tensor, Tensor]:
    """out (rows, channels) in dtype, and x @ weight^T in compute_dtype where it is to be saved, else empty."""
    x, weight = x.to(compute_dtype), weight.to(compute_dtype)
    if activation == "none" and residual is None and dtype == compute_dtype and not save_product:
        return F.linear(x, weight, None if bias is None else bias.to(dtype)), x.new_empty(0)
    product = F.linear(x, weight)
    out = epilogue_fwd(product, bias, residual, activation, dtype)
    return out, product if save_product else x.new_empty(0)


def linear_bwd(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, empty where not needed; a product that was not saved is computed again."""
    needs_x, needs_weight, needs_bias = needs
    own_x, own_weight = x.to(product.dtype), weight.to(product.dtype)
    product = product if product.dim() == 2 else F.linear(own_x, own_weight)
    d_product, d_bias, _ = epilogue_bwd(product, bias, d_out, activation, sums=needs_bias, inner=False)
    return (
        (d_product @ own_weight).to(x.dtype) if needs_x else x.new_empty(0),
        (d_product.t() @ own_x).to(weight.dtype) if needs_weight else weight.new_empty(0),
        weight.new_empty(0) if d_bias is None else d_bias.to(weight.dtype if bias is None else bias.dtype),
    )
