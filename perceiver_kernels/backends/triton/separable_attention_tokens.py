"""The other half of separable attention's backward: gradients of the tokens, x and r, where they are wanted."""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# Triton's tuples grow by +; it knows no starred expressions.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton import tiles
from perceiver_kernels.backends.triton.exponential import LOG2E, exp2
from perceiver_kernels.backends.triton.philox import keep_scales
from perceiver_kernels.backends.triton.separable_forms import (
    outer_entries,
    outer_indices,
    outer_sum,
    program_indices,
    token_offset,
)
from perceiver_kernels.backends.triton.separable_geometry import Geometry, dropout_arguments, options
from perceiver_kernels.backends.triton.tiles import Tiles


@triton.jit
def form_of_tokens(
    form, data, entries, column, outer_table, live, there,
    C: tl.constexpr, AXES: tl.constexpr, FEW: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """channels . x + the sum of the tables, for some rows and tokens: (rows, tokens)."""
    tables = (form + C)[:, None]
    value = tl.load(tables + outer_table + column[None, :], mask=there, other=0.0)
    if AXES > 1:
        value += outer_sum(tables, entries, 1, there, AXES)
    if FEW:
        for c in tl.static_range(C):
            value += tl.load(form + c, mask=live, other=0.0)[:, None] * data[c][None, :]
    else:
        channels = many_channels(form, live, C, CHANNELS)
        value += tl.dot(channels, data, input_precision=PRECISION)
    return value


@triton.jit
def many_channels(form, live, C: tl.constexpr, CHANNELS: tl.constexpr):
    """The data channels of some rows: (rows, CHANNELS)."""
    channel = tl.arange(0, CHANNELS)[None, :]
    return tl.load(form[:, None] + channel, mask=live[:, None] & (channel < C), other=0.0)


@triton.jit
def add_rows(
    sums, weights, form, live, C: tl.constexpr, FEW: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr
):
    """sums + the weighted sum over some rows of their data channels, per token."""
    if FEW:
        result = ()
        for c in tl.static_range(C):
            channel = tl.load(form + c, mask=live, other=0.0)
            result = result + (sums[c] + tl.sum(weights * channel[:, None], 0),)
        return result
    else:
        channels = many_channels(form, live, C, CHANNELS)
        return sums + tl.dot(tl.trans(channels), weights, input_precision=PRECISION)


@triton.jit(do_not_specialize=["seed", "threshold"])
def separable_attention_bwd_tokens_kernel(
    form,
    upstream,
    statistics,
    x,
    r,
    mask,
    d_x,
    d_r,
    seed,
    threshold,
    keep_scale,
    form_batch,
    rows,
    padded_rows,
    outer,
    columns,
    outer_table,
    size_1,
    size_2,
    size_3,
    x_batch,
    x_1,
    x_2,
    x_3,
    x_column,
    x_channel,
    r_batch,
    r_1,
    r_2,
    r_3,
    r_column,
    mask_batch,
    mask_1,
    mask_2,
    mask_3,
    mask_column,
    C: tl.constexpr,
    AXES: tl.constexpr,
    WITH_R: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_R: tl.constexpr,
    FEW: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Gradients of TOKENS tokens, sums over all rows; here tokens lie across lanes.

    form (batch or 1, rows, entries) and upstream (batch, rows, entries), both with entries contiguous.
    """
    tokens = tl.cast(outer, tl.int64) * columns
    _, block, batch = program_indices(1, tl.cdiv(tokens, TOKENS))
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < tokens
    position, column = token // columns, token % columns
    sizes = (size_1, size_2, size_3)
    indices = outer_indices(position, sizes)
    keep = exists
    if MASKED:
        at = mask + batch * mask_batch + token_offset(indices, column, mask_1, mask_2, mask_3, mask_column)
        keep = exists & (tl.load(at, mask=exists, other=0) != 0)
    factor = tl.full((TOKENS,), 1.0, tl.float32)
    if WITH_R:
        at = r + batch * r_batch + token_offset(indices, column, r_1, r_2, r_3, r_column)
        factor = tl.load(at, mask=keep, other=1.0)
    x += batch * x_batch + token_offset(indices, column, x_1, x_2, x_3, x_column)
    channel = tl.arange(0, CHANNELS)[:, None].to(tl.int64)
    if FEW:
        data, d_data = (), ()
        for c in tl.static_range(C):
            data = data + (tl.load(x + c * tl.cast(x_channel, tl.int64), mask=keep, other=0).to(tl.float32),)
            d_data = d_data + (tl.zeros((TOKENS,), tl.float32),)
    else:
        at = x[None, :] + channel * x_channel
        data = tl.load(at, mask=(channel < C) & keep[None, :], other=0).to(tl.float32)
        d_data = tl.zeros((CHANNELS, TOKENS), tl.float32)
    d_factor = tl.zeros((TOKENS,), tl.float32)

    entries = outer_entries(position[None, :], sizes, AXES)
    form_size = C + outer_table + columns
    statistics += batch * 4 * padded_rows
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        there = live[:, None] & keep[None, :]
        a = form + batch * form_batch + row.to(tl.int64) * form_size
        d_acc = upstream + (batch * rows + row) * form_size
        reference, correction = tl.load(statistics + row), tl.load(statistics + padded_rows + row)
        delta, total = tl.load(statistics + 2 * padded_rows + row), tl.load(statistics + 3 * padded_rows + row)
        scores = form_of_tokens(a, data, entries, column, outer_table, live, there, C, AXES, FEW, CHANNELS, PRECISION)
        u = form_of_tokens(d_acc, data, entries, column, outer_table, live, there, C, AXES, FEW, CHANNELS, PRECISION)
        p = exp2(scores * (factor * LOG2E)[None, :] - reference[:, None], COMPILED)
        p = tl.where(there, p, 0.0)
        kept = p
        if DROPOUT:
            kept *= keep_scales(seed, batch, row[:, None], token[None, :], threshold, keep_scale)
        weights = kept * correction[:, None]
        d_scores = weights * (u * factor[None, :]) + kept * total[:, None] - p * delta[:, None]
        if NEEDS_X:
            d_data = add_rows(d_data, d_scores, a, live, C, FEW, CHANNELS, PRECISION)
            d_data = add_rows(d_data, weights, d_acc, live, C, FEW, CHANNELS, PRECISION)
        if NEEDS_R:
            # A weight of 0 times a score of -inf is 0.
            d_factor += tl.sum(d_scores * tl.maximum(scores, -3.0e38), 0) + tl.sum(weights * u, 0)

    of_batch = batch * tokens + token
    if NEEDS_R:
        tl.store(d_r + of_batch, tl.where(keep, d_factor, 0.0), mask=exists)
    if NEEDS_X:
        if FEW:
            for c in tl.static_range(C):
                value = tl.where(keep, factor * d_data[c], 0.0)
                tl.store(d_x + of_batch * C + c, value.to(d_x.dtype.element_ty), mask=exists)
        else:
            value = tl.where(keep[None, :], factor[None, :] * d_data, 0.0)
            at = d_x + of_batch[None, :] * C + channel
            tl.store(at, value.to(d_x.dtype.element_ty), mask=(channel < C) & exists[None, :])


def tokens_gradients(
    geometry: Geometry,
    form: Tensor,
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
    d_sums: Tensor,
    statistics: Tensor,
    d_x: Tensor,
    d_r: Tensor,
) -> None:
    choice = Tiles(8, 64, warps=1) if geometry.few_channels else Tiles(16, 32, warps=8)
    by_rows, d_by_rows = form.transpose(1, 2).contiguous(), d_sums.transpose(1, 2).contiguous()
    programs = triton.cdiv(geometry.columns * geometry.outer, choice.columns) * geometry.batch
    separable_attention_bwd_tokens_kernel[(programs,)](
        by_rows,
        d_by_rows,
        statistics,
        x,
        r,
        mask,
        d_x,
        d_r,
        form_batch=0 if form.shape[0] == 1 else by_rows.stride(0),
        rows=geometry.rows,
        padded_rows=statistics.shape[-1],
        outer_table=geometry.outer_table,
        **geometry.sizes(),
        **geometry.strides("x", x),
        **geometry.strides("r", r),
        **geometry.strides("mask", mask),
        **dropout_arguments(dropout_p, seed),
        NEEDS_X=d_x.numel() > 0,
        NEEDS_R=d_r.numel() > 0,
        CHANNELS=tiles.next_power_of_2(geometry.channels, 16),
        ROWS=choice.rows,
        TOKENS=choice.columns,
        PRECISION="ieee",  # as forward, whose lse it meets
        num_warps=choice.warps,
        num_stages=choice.stages,
        **options(geometry, r, mask, dropout_p),
    )
