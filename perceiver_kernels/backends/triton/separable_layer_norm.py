"""LayerNorm's reciprocal standard deviation of tokens [data ; per-axis features] in Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.grids import on_four_axes
from perceiver_kernels.backends.triton.tiles import Tiles

TILE = 1024


@triton.jit
def _data(source, stride_c, c, x_scale, x_shift, present, SCALED: tl.constexpr, SHIFTED: tl.constexpr):
    """x * x_scale + x_shift of channel c."""
    x = tl.load(source + c * tl.cast(stride_c, tl.int64), mask=present, other=0).to(tl.float32)
    if SCALED:
        x *= tl.load(x_scale + c)
    if SHIFTED:
        x += tl.load(x_shift + c)
    return x


@triton.jit(do_not_specialize=["rows"])
def separable_layer_norm_fwd_kernel(
    r, x, x_scale, x_shift,
    sums_0, sums_1, sums_2, sums_3, squares_0, squares_1, squares_2, squares_3,
    size_0, size_1, size_2, size_3, rows,
    stride_b, stride_0, stride_1, stride_2, stride_3, stride_c,
    feature_channels, inverse_width, eps,
    AXES: tl.constexpr, CHANNELS: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS positions of (batch, leading axes) times COLUMNS of the last axis; the second read of x is from a cache."""
    blocks = tl.cdiv(size_3, COLUMNS)
    row_block, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = (row_block.to(rows.dtype) * ROWS + tl.arange(0, ROWS))[:, None]  # 32 bits where they are enough
    at_3 = (block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    present = (row < rows) & (at_3 < size_3)
    at_2, outer = row % size_2, row // size_2
    at_1, outer = outer % size_1, outer // size_1
    at_0, batch = outer % size_0, (outer // size_0).to(tl.int64)
    source = x + batch * stride_b + at_0.to(tl.int64) * stride_0 + at_1.to(tl.int64) * stride_1
    source += at_2.to(tl.int64) * stride_2 + at_3 * stride_3

    feature_sum = tl.load(sums_3 + at_3, mask=at_3 < size_3, other=0.0)
    feature_square = tl.load(squares_3 + at_3, mask=at_3 < size_3, other=0.0)
    if AXES > 1:
        feature_sum += tl.load(sums_2 + at_2)
        feature_square += tl.load(squares_2 + at_2)
    if AXES > 2:
        feature_sum += tl.load(sums_1 + at_1)
        feature_square += tl.load(squares_1 + at_1)
    if AXES > 3:
        feature_sum += tl.load(sums_0 + at_0)
        feature_square += tl.load(squares_0 + at_0)

    total = tl.zeros((ROWS, COLUMNS), tl.float32) + feature_sum
    for c in range(0, CHANNELS):
        total += _data(source, stride_c, c, x_scale, x_shift, present, SCALED, SHIFTED)
    mean = total * inverse_width
    # The mean is subtracted before squaring: no large numbers cancel.
    deviation = feature_square - 2.0 * mean * feature_sum + feature_channels * mean * mean
    for c in range(0, CHANNELS):
        centred = _data(source, stride_c, c, x_scale, x_shift, present, SCALED, SHIFTED) - mean
        deviation += centred * centred
    tl.store(r + row.to(tl.int64) * size_3 + at_3, tl.rsqrt(deviation * inverse_width + eps), mask=present)


def separable_layer_norm_fwd(
    x: Tensor,
    sums: Sequence[Tensor],
    squares: Sequence[Tensor],
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    feature_channels: int,
    eps: float,
) -> Tensor:
    """(batch, S_1, ..., S_A): 1 / sqrt(variance + eps), the mean subtracted before squaring."""
    r = sums[0].new_empty(x.shape[:-1])
    if not r.numel():
        return r
    axes, channels = len(sums), x.shape[-1]
    batch, sizes = x.shape[0], on_four_axes(x.shape[1:-1], 1)
    rows = batch * math.prod(sizes[:-1])
    x_scale, x_shift = (None if v is None else v.contiguous() for v in (x_scale, x_shift))
    features = [on_four_axes([s.contiguous() for s in per_axis], r) for per_axis in (sums, squares)]

    def launch(choice: Tiles) -> None:
        grid = (triton.cdiv(rows, choice.rows) * triton.cdiv(sizes[-1], choice.columns),)
        separable_layer_norm_fwd_kernel[grid](
            r, x, x_scale, x_shift, *features[0], *features[1], *sizes, rows,
            x.stride(0), *on_four_axes(x.stride()[1:-1], 0), x.stride(-1),
            feature_channels, 1 / (channels + feature_channels), eps,
            AXES=axes, CHANNELS=channels, SCALED=x_scale is not None, SHIFTED=x_shift is not None,
            ROWS=choice.rows, COLUMNS=choice.columns,
            num_warps=choice.warps, num_stages=choice.stages, **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip

    columns = min(TILE, tiles.next_power_of_2(sizes[-1]))
    launch(Tiles(rows=min(TILE // columns, tiles.next_power_of_2(rows)), columns=columns))
    return r
