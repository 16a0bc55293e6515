"""What kernels of dense attention are made of: tiles, a running softmax, its split over programs and the merge of it.

Programs own a block of rows and step along the other side; results and scratch lie as (batch, rows, heads, channels).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.gpu import multiprocessors
from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.exponential import LN2
from perceiver_kernels.backends.triton.tiles import Tiles

MAX_PARTS = 1024


# --- where programs are ----------------------------------------------------------------------------------------------


@triton.jit
def program(rows, heads, BLOCK: tl.constexpr):
    """Batch, head, the block's row indices (64-bit) and which of them exist, of a program along axis 0."""
    blocks = tl.cdiv(rows, BLOCK)
    at = tl.program_id(0)
    row = (at % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return (at // blocks // heads).to(tl.int64), (at // blocks % heads).to(tl.int64), row, row < rows


@triton.jit
def part_of(size, step):
    """First and last of the part that a program along axis 1 takes of a dimension."""
    first = tl.program_id(1) * step
    return first, tl.minimum(first + step, size)


@triton.jit
def at_results(base, batch, head, row, rows, heads, size, CHANNELS: tl.constexpr):
    """Rows of a (parts, batch, rows, heads, channels) array in the program's part; size = batch * rows * heads."""
    part = tl.program_id(1).to(tl.int64)
    return base + (part * size + (batch * rows + row) * heads + head) * CHANNELS


@triton.jit
def attended(mask, batch, key, end, mask_batch, mask_row):
    """Which of the keys before `end` are attended to."""
    attend = key < end
    if mask is not None:
        attend &= tl.load(mask + batch * mask_batch + key * mask_row, mask=attend, other=0) != 0
    return attend


# --- tiles and the softmax --------------------------------------------------------------------------------------------


@triton.jit
def load_tile(row_pointers, row_inside, first, stride, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels first ... first + WIDTH of some rows; zeros outside."""
    channel = first + tl.arange(0, WIDTH)
    pointers = row_pointers[:, None] + channel.to(tl.int64)[None, :] * stride
    return tl.load(pointers, mask=row_inside[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def store_tile(row_pointers, row_inside, first, value, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Writes channels first ... first + WIDTH of some rows whose channels are contiguous."""
    channel = first + tl.arange(0, WIDTH)
    pointers = row_pointers[:, None] + channel[None, :]
    inside = row_inside[:, None] & (channel < CHANNELS)[None, :]
    tl.store(pointers, value.to(row_pointers.dtype.element_ty), mask=inside)


@triton.jit
def softmax_step(scores, peak, total):
    """Takes scores (in powers of two) into a running softmax: their weights, what the sums so far shrink by, the sums.

    Scores of -inf weigh nothing, also where there are no others yet.
    """
    higher = tl.maximum(peak, tl.max(scores, 1))
    reference = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(peak - reference)
    return p, shrink, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def log_sum_exp(peak, total):
    """The natural logarithm, in float64; -inf where nothing was summed."""
    return (peak.to(tl.float64) + tl.log2(total.to(tl.float64))) * LN2


@triton.jit
def merge_kernel(partial, partial_peaks, partial_totals, result, lse, rows, heads, count,
                 CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row (batch, row, head) of a softmax whose tokens were split over `count` parts, in the order of the parts."""
    at = tl.program_id(0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64)
    every = tl.arange(0, PARTS).to(tl.int64)
    peaks = tl.load(partial_peaks + every * size + at, mask=every < count, other=-float("inf"))
    totals = tl.load(partial_totals + every * size + at, mask=every < count, other=0.0)
    peak = tl.max(peaks, 0)
    reference = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.where(totals == 0, 0.0, totals * tl.exp2(peaks - reference)), 0)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, count, BLOCK):
        part = first + tl.arange(0, BLOCK).to(tl.int64)
        weight = tl.exp2(tl.load(partial_peaks + part * size + at, mask=part < count, other=-float("inf")) - reference)
        pointers = partial + ((part * size + at) * CHANNELS)[:, None] + channel[None, :]
        sums = tl.load(pointers, mask=(part < count)[:, None] & (channel < CHANNELS)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * sums, 0)
    acc = tl.where(total == 0, 0.0, acc / total)
    tl.store(result + at * CHANNELS + channel, acc.to(result.dtype.element_ty), mask=channel < CHANNELS)
    head, row, batch = at % heads, at // heads % rows, at // heads // rows
    tl.store(lse + (batch * heads + head) * rows + row, log_sum_exp(peak, total).to(lse.dtype.element_ty))


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How programs hold channels: `count` of them with width + tail channels each, both powers of two."""

    count: int
    width: int
    tail: int


def share(channels: int, most: int) -> Share:
    """Few programs with at most `most` channels each, and little padding: 261 = 256 + 16 instead of 512."""
    count = -(-channels // most)
    each = -(-channels // (16 * count)) * 16
    width = 1 << (each.bit_length() - 1)
    tail = tiles.next_power_of_2(each - width, 16) if each > width else 0
    return Share(count, 2 * width, 0) if tail == width else Share(count, width, tail)


@dataclass(frozen=True)
class Limits:
    """What a program can hold in registers.

    Attributes:
        rows, columns: of a tile of scores.
        chunk: channels of one product of scores.
        channels: of the accumulator; more are shared out over programs that repeat the scores.
        two_channels: of each, where there are two accumulators.
    """

    rows: int
    columns: int
    chunk: int
    channels: int
    two_channels: int


def choose_tiles(rows: int, length: int, programs: int, channels: int, most: Limits, device: torch.device) -> Tiles:
    """By shape: a block of rows that steps along a dimension of some length, split so that a GPU is filled twice.

    Args:
        programs: how many there are for each block of rows.
        channels: of a program's accumulators.
    """
    block = min(tiles.next_power_of_2(rows, 16), most.rows)
    wanted = -(-2 * multiprocessors(device) // (programs * -(-rows // block)))
    parts = max(1, min(wanted, length // (2 * most.columns), MAX_PARTS))
    return Tiles(block, most.columns, 8 if channels > 128 else 4, 2, parts)


def candidates(default: Tiles) -> list[Tiles]:
    """What autotuning compares with the default."""
    choices = [dataclasses.replace(default, columns=c, warps=w) for c in (16, 32, 64) for w in (4, 8)]
    return [choice for choice in choices if choice != default]


def step_of(length: int, sizes: Tiles) -> int:
    """Length of a part, in whole blocks of columns."""
    return max(1, -(-length // (sizes.parts * sizes.columns))) * sizes.columns


def mask_arguments(mask: Tensor | None) -> tuple[Any, ...]:
    return (None, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())


def merge(partial: Tensor, peaks: Tensor, totals: Tensor, result: Tensor, lse: Tensor, rows: int, heads: int) -> None:
    """Merges partial softmaxes (parts, batch, rows, heads, channels) into result, and lse (batch, heads, rows)."""
    parts, channels = partial.shape[0], partial.shape[-1]
    width = min(tiles.next_power_of_2(channels), 256)
    merge_kernel[(lse.numel(), triton.cdiv(channels, width))](
        partial, peaks, totals, result, lse, rows, heads, parts, CHANNELS=channels, WIDTH=width,
        PARTS=tiles.next_power_of_2(parts), BLOCK=min(tiles.next_power_of_2(parts), 8), **runtime.LAUNCH_OPTIONS,
    )  # fmt: skip
