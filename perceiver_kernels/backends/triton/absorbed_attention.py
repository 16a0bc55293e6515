"""Absorbed attention in Triton: tiles of rows x tokens, the features of a token's position made where it is loaded.

Signatures as in backends/reference/absorbed_attention.py. Kernels see the channels of a token as [x | position | sines
of all axes | cosines of all axes], whatever order the caller has them in: so a sine and its cosine come from one angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends import centring
from perceiver_kernels.backends.reference.attention import over_batch
from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.dense_attention import (
    Limits,
    at_results,
    attended,
    candidates,
    choose_tiles,
    load_tile,
    log_sum_exp,
    mask_arguments,
    merge,
    part_of,
    program,
    share,
    softmax_step,
    step_of,
    store_tile,
)
from perceiver_kernels.backends.triton.exponential import LOG2E
from perceiver_kernels.backends.triton.philox import keep_scales, threshold
from perceiver_kernels.backends.triton.tiles import Tiles
from perceiver_kernels.backends.triton.waves import sine_and_cosine, split_frequencies

State = tuple[Tensor, Tensor, Tensor]
Features = tuple[Sequence[float], bool, bool, bool]


@triton.jit
def load_data(x, positions, batch, token, attend, first, x_batch, x_row, x_channel, p_batch, p_row, p_axis,
              CHANNELS: tl.constexpr, AXES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """[x | position] of some tokens in float32, from channel `first` on; AXES = 0 where positions are no features."""
    data = tl.zeros((token.shape[0], WIDTH), tl.float32)
    if CHANNELS > 0:
        data += load_tile(x + batch * x_batch + token * x_row, attend, first, x_channel, CHANNELS, WIDTH).to(tl.float32)
    if AXES > 0:
        axis = first + tl.arange(0, WIDTH) - CHANNELS
        pointers = positions + batch * p_batch + (token * p_row)[:, None] + axis.to(tl.int64)[None, :] * p_axis
        inside = attend[:, None] & ((axis >= 0) & (axis < AXES))[None, :]
        data += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return data


@triton.jit
def load_waves(positions, frequencies, batch, token, attend, p_batch, p_row, p_axis, WAVES: tl.constexpr,
               BANDS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Sines and cosines of some tokens' positions; zeros outside."""
    wave = tl.arange(0, WIDTH)
    high = tl.load(frequencies + wave, mask=wave < WAVES, other=0.0)[None, :]
    low = tl.load(frequencies + WAVES + wave, mask=wave < WAVES, other=0.0)[None, :]
    inside = attend[:, None] & (wave < WAVES)[None, :]
    pointers = positions + batch * p_batch + (token * p_row)[:, None] + (wave // BANDS).to(tl.int64)[None, :] * p_axis
    sine, cosine = sine_and_cosine(tl.load(pointers, mask=inside, other=0.0).to(tl.float32), high, low)
    return sine, tl.where(inside, cosine, 0.0)


@triton.jit
def load_tokens(x, positions, frequencies, batch, token, attend, x_batch, x_row, x_channel, p_batch, p_row, p_axis,
                CHANNELS: tl.constexpr, AXES: tl.constexpr, WAVES: tl.constexpr, BANDS: tl.constexpr,
                WIDTH: tl.constexpr, TAIL: tl.constexpr, WAVE_WIDTH: tl.constexpr):  # fmt: skip
    """z of some tokens as four tiles: data, the data's tail, sines, cosines; those that there are none of, empty."""
    data = load_data(x, positions, batch, token, attend, 0, x_batch, x_row, x_channel, p_batch, p_row, p_axis,
                     CHANNELS, AXES, WIDTH)  # fmt: skip
    tail = tl.zeros((token.shape[0], 1), tl.float32)
    if TAIL:
        tail = load_data(x, positions, batch, token, attend, WIDTH, x_batch, x_row, x_channel, p_batch, p_row, p_axis,
                         CHANNELS, AXES, TAIL)  # fmt: skip
    sine = tl.zeros((token.shape[0], 1), tl.float32)
    cosine = sine
    if WAVES:
        sine, cosine = load_waves(positions, frequencies, batch, token, attend, p_batch, p_row, p_axis, WAVES, BANDS,
                                  WAVE_WIDTH)  # fmt: skip
    return data, tail, sine, cosine


@triton.jit
def squares(tile, mean, COUNT: tl.constexpr):
    """Sum of squared distances from the mean over the first COUNT channels of a tile."""
    away = tl.where((tl.arange(0, tile.shape[1]) < COUNT)[None, :], tile - mean[:, None], 0.0)
    return tl.sum(away * away, 1)


@triton.jit
def statistics(data, tail, sine, cosine, eps, DATA: tl.constexpr, WAVES: tl.constexpr, COSINES: tl.constexpr):
    """Mean of every token's channels, and r; 0 and 1 without LayerNorm."""
    mean = tl.zeros((data.shape[0],), tl.float32)
    r = mean + 1.0
    if eps is not None:
        TAIL: tl.constexpr = DATA - data.shape[1]
        channels: tl.constexpr = DATA + WAVES + COSINES
        total = tl.sum(data, 1) + tl.sum(tail, 1) + tl.sum(sine, 1)
        if COSINES:
            total += tl.sum(cosine, 1)
        mean = total / channels
        away = squares(data, mean, DATA)
        if TAIL > 0:
            away += squares(tail, mean, TAIL)
        if WAVES:
            away += squares(sine, mean, WAVES)
        if COSINES:
            away += squares(cosine, mean, COSINES)
        r = tl.rsqrt(away / channels + eps)
    return mean, r


@triton.jit
def over_tokens(rows, inside, data, tail, sine, cosine, DATA: tl.constexpr, WAVES: tl.constexpr, COSINES: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """form . z of some rows and tokens; rows point at forms in the kernels' order of channels."""
    WIDTH: tl.constexpr = data.shape[1]
    result = tl.dot(load_tile(rows, inside, 0, 1, DATA, WIDTH), tl.trans(data), input_precision=PRECISION)
    if DATA > WIDTH:
        form = load_tile(rows, inside, WIDTH, 1, DATA, tail.shape[1])
        result = tl.dot(form, tl.trans(tail), result, input_precision=PRECISION)
    if WAVES:
        form = load_tile(rows + DATA, inside, 0, 1, WAVES, sine.shape[1])
        result = tl.dot(form, tl.trans(sine), result, input_precision=PRECISION)
    if COSINES:
        form = load_tile(rows + DATA + WAVES, inside, 0, 1, COSINES, sine.shape[1])
        result = tl.dot(form, tl.trans(cosine), result, input_precision=PRECISION)
    return result


@triton.jit
def no_sums(ROWS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, WAVE_WIDTH: tl.constexpr):
    """Sums over tokens of nothing yet, in four tiles as z."""
    wave: tl.constexpr = max(WAVE_WIDTH, 1)
    return (tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, max(TAIL, 1)), tl.float32),
            tl.zeros((ROWS, wave), tl.float32), tl.zeros((ROWS, wave), tl.float32))  # fmt: skip


@triton.jit
def add_weighted(w, data, tail, sine, cosine, acc, acc_tail, acc_sine, acc_cosine, TAIL: tl.constexpr,
                 WAVES: tl.constexpr, COSINES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """sums + w @ z, in four tiles as z."""
    acc = tl.dot(w, data, acc, input_precision=PRECISION)
    if TAIL:
        acc_tail = tl.dot(w, tail, acc_tail, input_precision=PRECISION)
    if WAVES:
        acc_sine = tl.dot(w, sine, acc_sine, input_precision=PRECISION)
    if COSINES:
        acc_cosine = tl.dot(w, cosine, acc_cosine, input_precision=PRECISION)
    return acc, acc_tail, acc_sine, acc_cosine


@triton.jit
def store_sums(rows, inside, acc, acc_tail, acc_sine, acc_cosine, DATA: tl.constexpr, WAVES: tl.constexpr,
               COSINES: tl.constexpr):  # fmt: skip
    WIDTH: tl.constexpr = acc.shape[1]
    store_tile(rows, inside, 0, acc, DATA, WIDTH)
    if DATA > WIDTH:
        store_tile(rows, inside, WIDTH, acc_tail, DATA, acc_tail.shape[1])
    if WAVES:
        store_tile(rows + DATA, inside, 0, acc_sine, WAVES, acc_sine.shape[1])
    if COSINES:
        store_tile(rows + DATA + WAVES, inside, 0, acc_cosine, COSINES, acc_cosine.shape[1])


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold"])
def absorbed_attention_fwd_kernel(
    a, x, positions, frequencies, mask, sums, lse, peaks, totals,
    a_batch, x_batch, x_row, x_channel, p_batch, p_row, p_axis, mask_batch, mask_row,
    rows, tokens, step, size, eps, seed, threshold, keep_scale,
    CHANNELS: tl.constexpr, AXES: tl.constexpr, WAVES: tl.constexpr, COSINES: tl.constexpr, BANDS: tl.constexpr,
    SPLIT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, WAVE_WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of rows over a part of the tokens. sums are acc, and total as a last channel.

    With SPLIT, sums, peaks and totals are the partial results of merge_kernel; else sums and lse are the call's.
    """
    DATA: tl.constexpr = CHANNELS + AXES
    FORM: tl.constexpr = DATA + WAVES + COSINES
    batch, _, row, inside = program(rows, 1, ROWS)
    a_rows = a + batch * a_batch + row * FORM
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    kept = tl.zeros((ROWS,), tl.float32)
    acc, acc_tail, acc_sine, acc_cosine = no_sums(ROWS, WIDTH, TAIL, WAVE_WIDTH)
    begin, end = part_of(tokens, step)
    for first in range(begin, end, COLUMNS):
        token = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        attend = attended(mask, batch, token, end, mask_batch, mask_row)
        data, tail, sine, cosine = load_tokens(
            x, positions, frequencies, batch, token, attend, x_batch, x_row, x_channel, p_batch, p_row, p_axis,
            CHANNELS, AXES, WAVES, BANDS, WIDTH, TAIL, WAVE_WIDTH)  # fmt: skip
        _mean, r = statistics(data, tail, sine, cosine, eps, DATA, WAVES, COSINES)
        s = over_tokens(a_rows, inside, data, tail, sine, cosine, DATA, WAVES, COSINES, PRECISION)
        s = tl.where(attend[None, :], s * (r * LOG2E)[None, :], -float("inf"))
        p, shrink, peak, total = softmax_step(s, peak, total)
        if DROPOUT:
            p *= keep_scales(seed, batch, row[:, None], token[None, :], threshold, keep_scale)
        kept = kept * shrink + tl.sum(p, 1)
        shrink = shrink[:, None]
        w = tl.where(attend[None, :], p * r[None, :], 0.0)
        acc, acc_tail, acc_sine, acc_cosine = add_weighted(
            w, data, tail, sine, cosine, acc * shrink, acc_tail * shrink, acc_sine * shrink, acc_cosine * shrink,
            TAIL, WAVES, COSINES, PRECISION)  # fmt: skip

    if SPLIT:
        at = tl.program_id(1).to(tl.int64) * size + batch * rows + row
        tl.store(peaks + at, peak, mask=inside)
        tl.store(totals + at, total, mask=inside)
    else:
        tl.store(lse + batch * rows + row, log_sum_exp(peak, total), mask=inside)
        total = tl.where(total == 0, 1.0, total)
        kept = kept / total
        total = total[:, None]
        acc, acc_tail, acc_sine, acc_cosine = acc / total, acc_tail / total, acc_sine / total, acc_cosine / total
    results = at_results(sums, batch, 0, row, rows, 1, size, FORM + 1)
    store_sums(results, inside, acc, acc_tail, acc_sine, acc_cosine, DATA, WAVES, COSINES)
    tl.store(results + FORM, kept, mask=inside)


@triton.jit
def load_state(reference, correction, delta, d_total, at, inside):
    """What backward knows of some rows; rows that do not exist get weights of zero."""
    return (tl.load(reference + at, mask=inside, other=float("inf")), tl.load(correction + at, mask=inside, other=0.0),
            tl.load(delta + at, mask=inside, other=0.0), tl.load(d_total + at, mask=inside, other=0.0))  # fmt: skip


@triton.jit(do_not_specialize=["seed", "threshold"])
def absorbed_attention_bwd_rows_kernel(
    a, x, positions, frequencies, mask, d_acc, reference, correction, delta, d_total, d_a, rests,
    a_batch, x_batch, x_row, x_channel, p_batch, p_row, p_axis, mask_batch, mask_row,
    rows, tokens, step, size, eps, seed, threshold, keep_scale,
    CHANNELS: tl.constexpr, AXES: tl.constexpr, WAVES: tl.constexpr, COSINES: tl.constexpr, BANDS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, WAVE_WIDTH: tl.constexpr,
):  # fmt: skip
    """d_a of a block of rows from a part of the tokens: sum over m of r dS[i, m] z_m; and that of dS."""
    DATA: tl.constexpr = CHANNELS + AXES
    FORM: tl.constexpr = DATA + WAVES + COSINES
    batch, _, row, inside = program(rows, 1, ROWS)
    a_rows, d_rows = a + batch * a_batch + row * FORM, d_acc + (batch * rows + row) * FORM
    point, factor, d, d_t = load_state(reference, correction, delta, d_total, batch * rows + row, inside)
    rest = tl.zeros((ROWS,), tl.float32)
    acc, acc_tail, acc_sine, acc_cosine = no_sums(ROWS, WIDTH, TAIL, WAVE_WIDTH)
    begin, end = part_of(tokens, step)
    for first in range(begin, end, COLUMNS):
        token = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        attend = attended(mask, batch, token, end, mask_batch, mask_row)
        data, tail, sine, cosine = load_tokens(
            x, positions, frequencies, batch, token, attend, x_batch, x_row, x_channel, p_batch, p_row, p_axis,
            CHANNELS, AXES, WAVES, BANDS, WIDTH, TAIL, WAVE_WIDTH)  # fmt: skip
        _mean, r = statistics(data, tail, sine, cosine, eps, DATA, WAVES, COSINES)
        s = over_tokens(a_rows, inside, data, tail, sine, cosine, DATA, WAVES, COSINES, PRECISION)
        p = tl.exp2(s * (r * LOG2E)[None, :] - point[:, None]) * factor[:, None]
        u = over_tokens(d_rows, inside, data, tail, sine, cosine, DATA, WAVES, COSINES, PRECISION)
        d_p = u * r[None, :] + d_t[:, None]
        if DROPOUT:
            d_p *= keep_scales(seed, batch, row[:, None], token[None, :], threshold, keep_scale)
        d_s = tl.where(attend[None, :], p * (d_p - d[:, None]), 0.0)
        rest += tl.sum(d_s, 1)
        d_s *= r[None, :]
        acc, acc_tail, acc_sine, acc_cosine = add_weighted(
            d_s, data, tail, sine, cosine, acc, acc_tail, acc_sine, acc_cosine, TAIL, WAVES, COSINES, PRECISION
        )

    results = at_results(d_a, batch, 0, row, rows, 1, size, FORM)
    store_sums(results, inside, acc, acc_tail, acc_sine, acc_cosine, DATA, WAVES, COSINES)
    tl.store(rests + tl.program_id(1).to(tl.int64) * size + batch * rows + row, rest, mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def absorbed_attention_bwd_tokens_kernel(
    a, x, positions, frequencies, mask, d_acc, reference, correction, delta, d_total, d_x,
    a_batch, x_batch, x_row, x_channel, p_batch, p_row, p_axis, mask_batch, mask_row,
    rows, tokens, eps, seed, threshold, keep_scale,
    CHANNELS: tl.constexpr, AXES: tl.constexpr, WAVES: tl.constexpr, COSINES: tl.constexpr, BANDS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, WAVE_WIDTH: tl.constexpr,
):  # fmt: skip
    """d_x of a block of tokens: sums over the rows, and what comes through r."""
    DATA: tl.constexpr = CHANNELS + AXES
    FORM: tl.constexpr = DATA + WAVES + COSINES
    batch, _, token, token_inside = program(tokens, 1, ROWS)
    attend = attended(mask, batch, token, tokens, mask_batch, mask_row)
    data, tail, sine, cosine = load_tokens(
        x, positions, frequencies, batch, token, attend, x_batch, x_row, x_channel, p_batch, p_row, p_axis,
        CHANNELS, AXES, WAVES, BANDS, WIDTH, TAIL, WAVE_WIDTH)  # fmt: skip
    mean, r = statistics(data, tail, sine, cosine, eps, DATA, WAVES, COSINES)
    d_r = tl.zeros((ROWS,), tl.float32)
    acc, acc_tail, _, _ = no_sums(ROWS, WIDTH, TAIL, 1)
    for first in range(0, rows, COLUMNS):
        row = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = row < rows
        a_rows, d_rows = a + batch * a_batch + row * FORM, d_acc + (batch * rows + row) * FORM
        point, factor, d, d_t = load_state(reference, correction, delta, d_total, batch * rows + row, inside)
        form = over_tokens(a_rows, inside, data, tail, sine, cosine, DATA, WAVES, COSINES, PRECISION)
        p = tl.exp2(form * (r * LOG2E)[None, :] - point[:, None]) * factor[:, None]
        u = over_tokens(d_rows, inside, data, tail, sine, cosine, DATA, WAVES, COSINES, PRECISION)
        kept = p
        if DROPOUT:
            kept *= keep_scales(seed, batch, row[:, None], token[None, :], threshold, keep_scale)
        d_s = kept * (u * r[None, :] + d_t[:, None]) - p * d[:, None]
        d_r += tl.sum(d_s * form + kept * u, 0)
        d_s, w = tl.trans(d_s * r[None, :]), tl.trans(kept * r[None, :])
        acc = tl.dot(d_s, load_tile(a_rows, inside, 0, 1, CHANNELS, WIDTH), acc, input_precision=PRECISION)
        acc = tl.dot(w, load_tile(d_rows, inside, 0, 1, CHANNELS, WIDTH), acc, input_precision=PRECISION)
        if TAIL:
            a_tile = load_tile(a_rows, inside, WIDTH, 1, CHANNELS, TAIL)
            acc_tail = tl.dot(d_s, a_tile, acc_tail, input_precision=PRECISION)
            d_tile = load_tile(d_rows, inside, WIDTH, 1, CHANNELS, TAIL)
            acc_tail = tl.dot(w, d_tile, acc_tail, input_precision=PRECISION)

    if eps is not None:
        through_r = (d_r * r * r * r / FORM)[:, None]
        acc -= through_r * (data - mean[:, None])
        acc_tail -= through_r * (tail - mean[:, None])
    # What a masked token's row holds is not its gradient: its scores were those of zeros.
    results = d_x + (batch * tokens + token) * CHANNELS
    store_tile(results, token_inside, 0, tl.where(attend[:, None], acc, 0.0), CHANNELS, WIDTH)
    if TAIL:
        store_tile(results, token_inside, WIDTH, tl.where(attend[:, None], acc_tail, 0.0), CHANNELS, TAIL)


# --- launches ---------------------------------------------------------------------------------------------------------


def limits(kernel: str, width: int) -> Limits:
    """What registers and shared memory can hold of tokens of some width, beside two forms, or one wide one.

    Everything is float32, without tensor cores unless TensorFloat-32 is allowed.
    """
    rows = 16 if width > 128 else 32
    return Limits(rows, 16 if kernel == "bwd_rows" else rows, chunk=0, channels=0, two_channels=0)


@cache  # for good: a captured graph may read it
def kernel_order(
    channels: int, axes: int, waves: int, grouped: bool, concat_pos: bool, sine_only: bool, device: torch.device
) -> Tensor | None:
    """Where the channels [x | position | sines | cosines] stand in the caller's order; None: just there."""
    if waves == 0 or grouped:
        return None
    bands = waves // axes
    width = (1 if sine_only else 2) * bands + concat_pos
    starts = [channels + axis * width for axis in range(axes)]
    order = [*range(channels), *(start + width - 1 for start in starts if concat_pos)]
    for first in (0,) if sine_only else (0, bands):
        order += [start + first + band for start in starts for band in range(bands)]
    return torch.tensor(order, device=device)


class _Context:
    """A call's tokens as its kernels want them."""

    def __init__(
        self,
        a: Tensor,
        x: Tensor | None,
        positions: Tensor | None,
        features: Features,
        mask: Tensor | None,
        eps: float | None,
        dropout_p: float,
        seed: int,
    ) -> None:
        frequencies, grouped, concat_pos, sine_only = features
        tokens = positions if x is None else x
        assert tokens is not None
        shared = (positions, mask, a) if x is None else (x,)
        self.batch = next((t.shape[0] for t in shared if t is not None and t.shape[0] != 1), 1)
        self.rows, self.tokens, self.channels = a.shape[1], tokens.shape[1], a.shape[2]
        axes, count = 0 if positions is None else positions.shape[2], len(frequencies)
        channels = 0 if x is None else x.shape[2]
        self.order = kernel_order(channels, axes, count, grouped, concat_pos, sine_only, a.device)
        self.a = self.ordered(a)
        mask, *mask_strides = mask_arguments(mask)
        high_low = split_frequencies(tuple(frequencies), a.device) if count else None
        self.tensors = (self.a, x, positions, high_low, mask)
        self.strides = (
            self.a.stride(0) if a.shape[0] > 1 else 0,
            *((0, 0, 0) if x is None else x.stride()),
            *((0, 0, 0) if positions is None else _shared_stride(positions)),
            *mask_strides,
        )
        self.numbers = (eps, seed, threshold(dropout_p), 1 / (1 - dropout_p))
        data = share(max(channels + concat_pos * axes, 1), 1 << 30)
        wave = tiles.next_power_of_2(count, 16) if count else 0
        self.width = data.width + data.tail + (1 if sine_only else 2) * wave
        self.options: dict[str, Any] = {
            "CHANNELS": channels, "AXES": axes * concat_pos, "WAVES": count, "COSINES": 0 if sine_only else count,
            "BANDS": count // max(axes, 1), "DROPOUT": dropout_p > 0, "PRECISION": runtime.input_precision(a.dtype),
            "WIDTH": data.width, "TAIL": data.tail, "WAVE_WIDTH": wave, **runtime.LAUNCH_OPTIONS,
        }  # fmt: skip

    def ordered(self, form: Tensor) -> Tensor:
        """A form (batch, rows, channels) in the kernels' order of channels."""
        return (form if self.order is None else form.index_select(2, self.order)).contiguous()

    def restored(self, form: Tensor) -> Tensor:
        """The same form in the caller's order again."""
        return form.contiguous() if self.order is None else torch.empty_like(form).index_copy_(2, self.order, form)

    def problem(self) -> tuple[Any, ...]:
        """What the choice of tiles depends on."""
        sizes = map(tiles.next_power_of_2, (self.rows, self.tokens))
        return self.batch, *sizes, *(self.options[name] for name in ("WIDTH", "TAIL", "WAVE_WIDTH"))


def _shared_stride(positions: Tensor) -> tuple[int, ...]:
    """Strides of an array whose batch may be 1 for all inputs."""
    batch, *others = positions.stride()
    return (batch if positions.shape[0] > 1 else 0, *others)


def absorbed_attention_fwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    features: Features,
    mask: Tensor | None,
    eps: float | None,
    dropout_p: float,
    seed: int,
) -> State:
    """acc (batch, rows, C) and total (batch, rows) in float32, lse (batch, rows) in float64."""
    context = _Context(a, x, positions, features, mask, eps, dropout_p, seed)
    batch, rows = context.batch, context.rows
    sums = a.new_empty(1, batch, rows, 1, context.channels + 1)
    lse = a.new_empty(batch, rows, dtype=torch.float64)

    def run(sizes: Tiles) -> None:
        partial, peaks, totals = sums, None, None
        if sizes.parts > 1:
            partial = a.new_empty(sizes.parts, *sums.shape[1:])
            peaks, totals = a.new_empty(2, sizes.parts, lse.numel())
        absorbed_attention_fwd_kernel[(batch * triton.cdiv(rows, sizes.rows), sizes.parts)](
            *context.tensors, partial, lse, peaks, totals, *context.strides,
            rows, context.tokens, step_of(context.tokens, sizes), lse.numel(), *context.numbers,
            SPLIT=sizes.parts > 1, ROWS=sizes.rows, COLUMNS=sizes.columns,
            num_warps=sizes.warps, num_stages=sizes.stages, **context.options,
        )  # fmt: skip
        if peaks is not None and totals is not None:
            merge(partial, peaks, totals, sums, lse, rows, 1)

    if lse.numel():
        most = limits("fwd", context.width)
        default = choose_tiles(rows, context.tokens, batch, context.width, most, a.device)
        problem = context.problem()
        run(tiles.choose("absorbed_attention_fwd_kernel", problem, default, candidates(default), run))
    acc, total = sums[0, :, :, 0].split([context.channels, 1], 2)
    return context.restored(acc), lse, total[..., 0].contiguous()


def absorbed_attention_bwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    features: Features,
    mask: Tensor | None,
    eps: float | None,
    dropout_p: float,
    seed: int,
    saved: State,
    upstream: State,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of a and x, empty where not needed."""
    acc, lse, total = saved
    d_acc, d_lse, d_total = upstream
    context = _Context(a, x, positions, features, mask, eps, dropout_p, seed)
    batch, rows, tokens = context.batch, context.rows, context.tokens
    delta = (d_acc * acc).sum(-1) + d_total * total - d_lse.to(a.dtype)
    state = (context.ordered(d_acc), *_reference_points(lse), delta, d_total.contiguous())

    def run_rows(sizes: Tiles) -> Tensor:
        d_a, sums = a.new_empty(sizes.parts, batch, rows, context.channels), a.new_empty(sizes.parts, batch, rows)
        absorbed_attention_bwd_rows_kernel[(batch * triton.cdiv(rows, sizes.rows), sizes.parts)](
            *context.tensors, *state, d_a, sums, *context.strides,
            rows, tokens, step_of(tokens, sizes), batch * rows, *context.numbers,
            ROWS=sizes.rows, COLUMNS=sizes.columns, num_warps=sizes.warps, num_stages=sizes.stages, **context.options,
        )  # fmt: skip
        rest = sums.sum(0) - upstream[1]
        return over_batch(centring.without_rest(context.restored(d_a.sum(0)), rest, acc, total), a)

    def run_tokens(sizes: Tiles) -> Tensor:
        assert x is not None
        d_x = x.new_empty(x.shape)
        absorbed_attention_bwd_tokens_kernel[(batch * triton.cdiv(tokens, sizes.rows),)](
            *context.tensors, *state, d_x, *context.strides, rows, tokens, *context.numbers,
            ROWS=sizes.rows, COLUMNS=sizes.columns, num_warps=sizes.warps, num_stages=sizes.stages, **context.options,
        )  # fmt: skip
        return d_x

    needs_a, needs_x = needs
    d_a, d_x = a.new_empty(0), a.new_empty(0)
    problem = context.problem()
    if needs_a:
        d_a = torch.zeros_like(a)
        if d_acc.numel() and tokens:
            most = limits("bwd_rows", context.width)
            default = choose_tiles(rows, tokens, batch, context.width, most, a.device)
            chosen = tiles.choose("absorbed_attention_bwd_rows_kernel", problem, default, candidates(default), run_rows)
            d_a = run_rows(chosen)
    if needs_x and x is not None:
        d_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        if d_x.numel():
            most = limits("bwd_tokens", context.width)
            default = choose_tiles(tokens, 0, batch, context.width, most, a.device)
            name = "absorbed_attention_bwd_tokens_kernel"
            d_x = run_tokens(tiles.choose(name, problem, default, candidates(default), run_tokens))
    return d_a, d_x


def _reference_points(lse: Tensor) -> tuple[Tensor, Tensor]:
    """lse in powers of two, rounded to float32, and the factor that rounding took from the weights.

    A row with nothing to attend to gets a reference of infinity: weights of zero.
    """
    exact = lse * math.log2(math.e)
    empty = lse == -torch.inf
    rounded = exact.float().masked_fill(empty, torch.inf)
    return rounded, torch.exp2(rounded.double() - exact).masked_fill(empty, 1.0).float()
