"""Fourier features in Triton: of a grid by copying rows of tables, of free positions by sines of reduced angles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.grids import on_four_axes
from perceiver_kernels.backends.triton.tiles import Tiles
from perceiver_kernels.backends.triton.waves import sine_and_cosine, split_frequencies

VECTOR_BYTES = 16

# A copy moves bits, whatever they mean: half as many kernels, and none that converts.
BITS = {2: torch.int16, 4: torch.int32}


@triton.jit
def _offset(batch, at_0, at_1, at_2, stride_b, stride_0, stride_1, stride_2):
    return batch * stride_b + at_0 * stride_0 + at_1 * stride_1 + at_2 * stride_2


@triton.jit
def fourier_encode_grid_kernel(
    out, data, table_0, table_1, table_2, table_3,
    size_0, size_1, size_2, size_3, span,
    out_stride_b, out_stride_0, out_stride_1, out_stride_2, out_stride_3,
    data_stride_b, data_stride_0, data_stride_1, data_stride_2, data_stride_3, data_stride_c,
    AXES: tl.constexpr, DATA_CHANNELS: tl.constexpr, SECTIONS: tl.constexpr, CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes span tokens of the last axis, at one position of the others, GROUP tokens at a time.

    Within a group, every element of a program has one source: a row of a table, or the data. Only those of the last
    axis and of the data move on from group to group, so nothing is divided, chosen or reloaded inside the loop.
    """
    strips = tl.cdiv(size_3, span)
    outer = tl.program_id(0) // strips
    start = (tl.program_id(0) % strips).to(tl.int64) * span
    tokens = tl.minimum(span, size_3 - start).to(tl.int32)
    at_2, outer = outer % size_2, outer // size_2
    at_1, outer = outer % size_1, outer // size_1
    at_0, batch = (outer % size_0).to(tl.int64), (outer // size_0).to(tl.int64)
    at_1, at_2 = at_1.to(tl.int64), at_2.to(tl.int64)

    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, channel = element // CHANNELS, element % CHANNELS
    group = tl.full((), GROUP, tl.int64)  # so are its products with strides
    # Pointers of sources, and their steps to the next group.
    source = data + _offset(batch, at_0, at_1, at_2, data_stride_b, data_stride_0, data_stride_1, data_stride_2)
    source += start * data_stride_3 + token.to(tl.int64) * data_stride_3 + channel.to(tl.int64) * data_stride_c
    step = tl.zeros((BLOCK,), tl.int64) + group * data_stride_3
    rows, tables = (at_0, at_1, at_2, start), (table_0, table_1, table_2, table_3)
    first_channel, first_column = DATA_CHANNELS, 0
    for section in tl.static_range(len(SECTIONS)):
        for axis in tl.static_range(4 - AXES, 4):
            feature = tables[axis] + rows[axis] * COLUMNS + channel + (first_column - first_channel)
            if axis == 3:
                feature += token * COLUMNS
            source = tl.where(channel >= first_channel, feature, source)
            step = tl.where(channel >= first_channel, GROUP * COLUMNS if axis == 3 else 0, step)
            first_channel += SECTIONS[section]
        first_column += SECTIONS[section]

    elements = tl.minimum(tokens, GROUP) * CHANNELS
    still = tl.load(source, mask=(element < elements) & (step == 0), other=0)
    moving = tl.where(step == 0, GROUP * CHANNELS, element)  # past every group's end where it does not move
    base = _offset(batch, at_0, at_1, at_2, out_stride_b, out_stride_0, out_stride_1, out_stride_2)
    base += start * out_stride_3
    if PACKED:
        base = tl.multiple_of(base, VECTOR)
        target = out + base + element
    else:
        target = out + base + token.to(tl.int64) * out_stride_3 + channel
    for first in range(0, tokens, GROUP):
        end = tl.minimum(tokens - first, GROUP) * CHANNELS
        if PACKED:
            end = tl.multiple_of(end, VECTOR)
        value = tl.load(source, mask=moving < end, other=still)
        tl.store(target, value, mask=element < end)
        source += step
        target += GROUP * CHANNELS if PACKED else group * out_stride_3


def fourier_encode_grid(tables: Sequence[Tensor], sections: Sequence[int], data: Tensor | None, out: Tensor) -> None:
    """Fills out (batch, S_1, ..., S_A, c + E) with [data | section after section, each axis's columns of the section].

    Args:
        tables: per axis (S_k, sum of sections).
        sections: widths of the column sections that every table consists of.
        data: (batch, S_1, ..., S_A, c).
        out: written to.
    """
    if not out.numel():
        return
    bits = BITS[out.element_size()]
    axes, channels = len(tables), out.shape[-1]
    rows = [table.contiguous().view(bits) for table in tables]
    batch, sizes, strides = out.shape[0], on_four_axes(out.shape[1:-1], 1), on_four_axes(out.stride()[1:-1], 0)
    vector = VECTOR_BYTES // out.element_size()
    aligned = vector // math.gcd(channels, vector)  # so many tokens in a row are whole vectors
    packed = (
        strides[-1] == channels
        and sizes[-1] % aligned == 0
        and out.data_ptr() % VECTOR_BYTES == 0
        and all(
            stride % vector == 0 for stride, size in zip(out.stride()[:-2], out.shape[:-2], strict=True) if size > 1
        )
    )
    data = rows[-1].new_empty((0,) * (axes + 2)) if data is None else data.view(bits)

    def launch(choice: Tiles) -> None:
        group = aligned * _fullest_group(aligned * channels, choice.columns)
        span = group * choice.rows
        strips = triton.cdiv(sizes[-1], span)
        grid = (batch * math.prod(sizes[:-1]) * strips, triton.cdiv(group * channels, choice.columns))
        fourier_encode_grid_kernel[grid](
            out.view(bits), data, *on_four_axes(rows, rows[-1]), *sizes, span,
            out.stride(0), *strides, data.stride(0), *on_four_axes(data.stride()[1:-1], 0), data.stride(-1),
            AXES=axes, DATA_CHANNELS=channels - axes * sum(sections), SECTIONS=tuple(sections), CHANNELS=channels,
            COLUMNS=sum(sections), GROUP=group, VECTOR=vector, PACKED=packed, BLOCK=choice.columns,
            num_warps=choice.warps, num_stages=choice.stages, **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip

    problem = (channels, sizes[-1], out.element_size(), packed)
    default = Tiles(rows=16, columns=128 * vector)
    launch(tiles.choose("fourier_encode_grid", problem, default, [Tiles(64, 128 * vector), Tiles(16, 512, 2)], launch))


def _fullest_group(elements: int, block: int) -> int:
    """How many times so many elements fill blocks of this size best."""

    def filled(times: int) -> float:
        return times * elements / (triton.cdiv(times * elements, block) * block)

    return max(range(1, max(4, block // elements) + 1), key=filled)


@triton.jit
def fourier_encode_points_kernel(
    out, positions, frequencies, points, span, out_stride, stride_p, stride_a,
    AXES: tl.constexpr, BANDS: tl.constexpr, GROUPED: tl.constexpr, CONCAT_POS: tl.constexpr, SINE_ONLY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes span positions one after the other. A thread has its axes and frequencies, and both waves of each."""
    start = tl.program_id(0).to(tl.int64) * span
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    axis, band = pair // BANDS, pair % BANDS
    inside = pair < AXES * BANDS
    high = tl.load(frequencies + pair, mask=inside, other=0.0)
    low = tl.load(frequencies + AXES * BANDS + pair, mask=inside, other=0.0)

    POSITION: tl.constexpr = 1 if CONCAT_POS else 0
    WAVES: tl.constexpr = BANDS if SINE_ONLY else 2 * BANDS
    if GROUPED:
        position_channel, sine_channel, cosine_channel = axis, POSITION * AXES + pair, (POSITION + BANDS) * AXES + pair
    else:
        sine_channel = axis * (WAVES + POSITION) + band
        position_channel, cosine_channel = sine_channel + WAVES, sine_channel + BANDS
    source = positions + start * stride_p + axis.to(tl.int64) * stride_a
    target = out + start * out_stride
    for _ in range(0, tl.minimum(points - start, span).to(tl.int32)):
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        sine, cosine = sine_and_cosine(x, high, low)
        tl.store(target + sine_channel, sine.to(out.dtype.element_ty), mask=inside)
        if not SINE_ONLY:
            tl.store(target + cosine_channel, cosine.to(out.dtype.element_ty), mask=inside)
        if CONCAT_POS:
            tl.store(target + position_channel, x.to(out.dtype.element_ty), mask=inside & (band == 0))
        source += stride_p
        target += out_stride


def fourier_encode_points(
    positions: Tensor, frequencies: Sequence[float], grouped: bool, concat_pos: bool, sine_only: bool, out: Tensor
) -> None:
    """Fills out (P, E) with sin(pi f x), cos(pi f x) and x of positions (P, A), rounded once to its dtype.

    Args:
        positions: (P, A).
        frequencies: axis after axis, as many for each.
        grouped: [pos of all axes | sin of all | cos of all], else [sin, cos, pos] axis after axis.
        concat_pos: whether the positions themselves are features.
        sine_only: leaves the cosines out.
        out: written to.
    """
    if not out.numel():
        return
    points, axes = positions.shape
    pairs = len(frequencies)
    split = split_frequencies(tuple(frequencies), positions.device)

    def launch(choice: Tiles) -> None:
        grid = (triton.cdiv(points, choice.rows), triton.cdiv(pairs, choice.columns))
        fourier_encode_points_kernel[grid](
            out, positions, split, points, choice.rows, out.stride(0), *positions.stride(),
            AXES=axes, BANDS=pairs // axes, GROUPED=grouped, CONCAT_POS=concat_pos, SINE_ONLY=sine_only,
            BLOCK=choice.columns, num_warps=choice.warps, num_stages=choice.stages, **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip

    columns = min(128, tiles.next_power_of_2(pairs, at_least=64))
    default = Tiles(rows=16, columns=columns, warps=columns // 64)
    problem = (tiles.next_power_of_2(points), axes, pairs, positions.dtype, out.dtype)
    candidates = [Tiles(rows, columns, columns // 64) for rows in (8, 32)]
    launch(tiles.choose("fourier_encode_points", problem, default, candidates, launch))
