"""Separable attention in Triton (docs/separable_attention.md): a row in a thread, tokens streaming past all rows.

The last grid axis is the column axis, the others together are outer positions. Tokens are packed once into tile rows,
COLUMNS columns at one outer position. A program is one warp; it owns ROWS rows, some strips of COLUMNS columns and some
outer positions. Rows lie across lanes and tokens inside a thread, so that nothing in the main loops crosses lanes, and
a strip's table and marginal stay in registers while the outer positions pass. Programs leave partial sums, which a
merge kernel adds in an order that follows from the shapes.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# Triton's tuples grow by +; it knows no starred expressions.
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.philox import keep_scales, threshold
from perceiver_kernels.backends.triton.tiles import Tiles

State = tuple[Tensor, Tensor, Tensor]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
# A row's sums are of 2^(score - reference). No score of a program exceeds its reference by more than this.
LAZY_MARGIN = tl.constexpr(60.0)

CHANNELS_IN_REGISTERS = 4
PACKED_TILE_ROWS = 64  # per program of the pack kernel; the tokens' extents are known for so many at a time
WARPS_PER_MULTIPROCESSOR = 8
LEAST_TILE_ROWS = 8  # of a program, so that partial sums stay few


# --- pieces of the kernels -------------------------------------------------------------------------------------------


@triton.jit
def exp2(x, INTERPRETED: tl.constexpr):
    """2^x, subnormal results flushed to zero: one instruction instead of five."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def program_indices(blocks, units):
    """Which block of which unit of which batch entry a program does."""
    program = tl.program_id(0)
    return program % blocks, program // blocks % units, (program // blocks // units).to(tl.int64)


@triton.jit
def row_indices(block, ROWS: tl.constexpr):
    """A block's rows, those of a lane side by side."""
    own: tl.constexpr = ROWS // 32
    return tl.max_contiguous(block * ROWS + tl.max_contiguous(tl.arange(0, ROWS), own), own)


@triton.jit
def outer_indices(position, sizes):
    """Where an outer position stands on each outer axis; sizes beyond the last outer axis are 1."""
    inner = sizes[1] * sizes[2]
    return position // inner, position // sizes[2] % sizes[1], position % sizes[2]


@triton.jit
def outer_entries(position, sizes, AXES: tl.constexpr):
    """The entries of an outer position in the stacked tables of the outer axes."""
    if AXES == 1:
        return ()
    elif AXES == 2:
        return (tl.cast(position, tl.int64),)
    else:
        index = outer_indices(position, sizes)
        entries = (tl.cast(index[0], tl.int64), tl.cast(sizes[0] + index[1], tl.int64))
        if AXES == 4:
            entries = entries + (tl.cast(sizes[0] + sizes[1] + index[2], tl.int64),)
        return entries


@triton.jit
def outer_sum(tables, entries, stride, live, AXES: tl.constexpr):
    """The sum of the outer tables at an outer position's entries, for each row."""
    if AXES == 1:
        return tl.zeros(live.shape, tl.float32)
    else:
        total = tl.load(tables + entries[0] * stride, mask=live, other=0.0)
        for axis in tl.static_range(1, AXES - 1):
            total += tl.load(tables + entries[axis] * stride, mask=live, other=0.0)
        return total


@triton.jit
def add_outer(sums, entries, value, stride, AXES: tl.constexpr):
    """Adds to the program's own marginals of the outer axes."""
    for axis in tl.static_range(AXES - 1):
        target = sums + entries[axis] * stride
        tl.store(target, tl.load(target) + value)


@triton.jit
def column_table(tables, strip, columns, stride, live, other, COLUMNS: tl.constexpr):
    """A strip of the last axis's table: (COLUMNS, rows)."""
    column = (strip * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]
    return tl.load(tables[None, :] + column * stride, mask=(column < columns) & live[None, :], other=other)


@triton.jit
def first_token(tokens, strip, position, outer, QUANTITIES: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the packed tokens of a tile row are; those of the next outer position follow."""
    tile_row = tl.cast(strip, tl.int64) * outer + position
    return tokens + tile_row * (QUANTITIES * COLUMNS) + tl.arange(0, COLUMNS)


@triton.jit
def load_channels(form, factor, stride, live, C: tl.constexpr, FEW: tl.constexpr):
    """factor times the form's data channels, in registers where they are few."""
    channels = (factor,)
    if FEW:
        for c in tl.static_range(C):
            channels = channels + (tl.load(form + c * stride, mask=live, other=0.0) * factor,)
    return channels


@triton.jit
def linear_form(
    channels, table, outer, constant, form, stride, live, token,
    C: tl.constexpr, WITH_R: tl.constexpr, FEW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """r (channels . x + table + outer) + constant, for a tile row's tokens and all rows: (COLUMNS, rows)."""
    if WITH_R:
        r = tl.broadcast_to(tl.load(token + C * COLUMNS)[:, None], table.shape)
        value = tl.fma(r, table + outer[None, :], tl.broadcast_to(constant[None, :], table.shape))
    else:
        value = table + (outer + constant)[None, :]
    if FEW:
        for c in tl.static_range(C):
            value += channels[1 + c][None, :] * tl.load(token + c * COLUMNS)[:, None]
    else:
        for c in range(C):
            channel = tl.load(form + c * stride, mask=live, other=0.0) * channels[0]
            value += channel[None, :] * tl.load(token + c * COLUMNS)[:, None]
    return value


@triton.jit
def no_weights(like, C: tl.constexpr, FEW: tl.constexpr):
    """What add_weighted starts from."""
    acc = (tl.zeros_like(like),)
    if FEW:
        for _ in tl.static_range(C - 1):
            acc = acc + (tl.zeros_like(like),)
    return acc


@triton.jit
def add_weighted(acc, weights, sums, stride, token, C: tl.constexpr, FEW: tl.constexpr, COLUMNS: tl.constexpr):
    """acc + the tile row's sum of weights r x; many channels are added to the sums in memory instead."""
    if FEW:
        result = ()
        for c in tl.static_range(C):
            result = result + (acc[c] + tl.sum(weights * tl.load(token + c * COLUMNS)[:, None], 0),)
        return result
    else:
        for c in range(C):
            value = weights * tl.load(token + c * COLUMNS)[:, None]
            tl.store(sums + c * stride, tl.load(sums + c * stride) + tl.sum(value, 0))
        return acc


@triton.jit
def settle(acc, sums, stride, C: tl.constexpr, FEW: tl.constexpr):
    """Adds what add_weighted kept in registers to the sums in memory: short sums lose less to rounding."""
    if FEW:
        for c in tl.static_range(C):
            tl.store(sums + c * stride, tl.load(sums + c * stride) + acc[c])


@triton.jit
def add_marginals(weights, marginal, token, C: tl.constexpr, WITH_R: tl.constexpr, COLUMNS: tl.constexpr):
    """The column marginal with the tile row's w = weights r added, and their sum, the outer position's."""
    if WITH_R:
        r = tl.load(token + C * COLUMNS)[:, None]
        return tl.fma(weights, tl.broadcast_to(r, weights.shape), marginal), tl.sum(weights * r, 0)
    else:
        return marginal + weights, tl.sum(weights, 0)


@triton.jit
def dropout_scales(
    seed, batch, row, position, strip, columns, threshold, keep_scale, COLUMNS: tl.constexpr
):  # fmt: skip
    """What dropout multiplies a tile row's weights with: (COLUMNS, rows)."""
    token = tl.cast(position, tl.int64) * columns + strip * COLUMNS + tl.arange(0, COLUMNS)
    return keep_scales(seed, batch, row[None, :], token[:, None], threshold, keep_scale)


@triton.jit
def outer_slot(batch, group, part, groups, parts, AXES: tl.constexpr):
    """Whose marginals of the outer axes a program adds to: with one such axis, parts have nothing in common."""
    if AXES > 2:
        return (batch * groups + group) * parts + part
    else:
        return batch * groups + group


@triton.jit
def extent(extents, first, last, quantities):
    """The smallest and the largest of one packed quantity over some blocks of tile rows."""
    low, high = tl.full((32,), float("inf"), tl.float32), tl.full((32,), -float("inf"), tl.float32)
    for start in range(first, last, 32):
        block = start + tl.arange(0, 32)
        at = extents + block.to(tl.int64) * 2 * quantities
        low = tl.minimum(low, tl.load(at, mask=block < last, other=float("inf")))
        high = tl.maximum(high, tl.load(at + quantities, mask=block < last, other=-float("inf")))
    return tl.min(low), tl.max(high)


# --- tokens ----------------------------------------------------------------------------------------------------------


@triton.jit
def separable_attention_pack_kernel(
    x,
    r,
    mask,
    tokens,
    extents,
    tile_rows,
    outer,
    columns,
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
    WITH_R: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Tile rows of r x_1, ..., r x_c, then r and whether to keep the token, where there are such; and extents.

    tokens (batch, tile rows, quantities, COLUMNS): strip after strip, the outer positions within a strip. extents
    (batch, blocks, 2, c + 1): smallest and largest r x and r of TILE_ROWS tile rows.
    """
    blocks = tl.cdiv(tile_rows, TILE_ROWS)
    _, block, batch = program_indices(1, blocks)
    tile_row = block.to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    position = (tile_row % outer)[:, None]
    column = (tile_row // outer)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sizes = (size_1, size_2, size_3)
    index_1, index_2, index_3 = outer_indices(position, sizes)
    there = (tile_row < tile_rows)[:, None]
    keep = there & (column < columns)
    if MASKED:
        at = mask + batch * mask_batch + index_1 * mask_1 + index_2 * mask_2 + index_3 * mask_3 + column * mask_column
        keep = keep & (tl.load(at, mask=keep, other=0) != 0)
    quantities: tl.constexpr = C + WITH_R + MASKED
    target = tokens + ((batch * tile_rows + tile_row) * quantities * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    extents += (batch * blocks + block) * 2 * (C + 1)

    factor = tl.full((TILE_ROWS, COLUMNS), 1.0, tl.float32)
    if WITH_R:
        at = r + batch * r_batch + index_1 * r_1 + index_2 * r_2 + index_3 * r_3 + column * r_column
        factor = tl.load(at, mask=keep, other=1.0)
        tl.store(target + C * COLUMNS, factor, mask=there)
    if MASKED:
        tl.store(target + (C + WITH_R) * COLUMNS, keep.to(tl.float32), mask=there)
    tl.store(extents + C, tl.min(tl.where(keep, factor, float("inf"))))
    tl.store(extents + (C + 1) + C, tl.max(tl.where(keep, factor, -float("inf"))))

    source = x + batch * x_batch + index_1 * x_1 + index_2 * x_2 + index_3 * x_3 + column * x_column
    for c in range(C):
        value = tl.load(source, mask=keep, other=0).to(tl.float32) * factor
        tl.store(target + c * COLUMNS, value, mask=there)
        tl.store(extents + c, tl.min(tl.where(keep, value, float("inf"))))
        tl.store(extents + (C + 1) + c, tl.max(tl.where(keep, value, -float("inf"))))
        source += x_channel


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def largest_scores(
    largest, a, form, outer_tables, column_tables, tokens, first_strip, last_strip, first, last,
    outer, columns, sizes, stride, live,
    C: tl.constexpr, AXES: tl.constexpr, WITH_R: tl.constexpr, MASKED: tl.constexpr, FEW: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each row's largest score over some strips and outer positions, or `largest`."""
    constant = tl.zeros_like(largest)
    for strip in range(first_strip, last_strip):
        table = column_table(column_tables, strip, columns, stride, live, -float("inf"), COLUMNS) * LOG2E
        token = first_token(tokens, strip, first, outer, C + WITH_R + MASKED, COLUMNS)
        for position in range(first, last):
            entries = outer_entries(position, sizes, AXES)
            outer_score = outer_sum(outer_tables, entries, stride, live, AXES) * LOG2E
            scores = linear_form(a, table, outer_score, constant, form, stride, live, token, C, WITH_R, FEW, COLUMNS)
            if MASKED:
                scores = tl.where(tl.load(token + (C + WITH_R) * COLUMNS)[:, None] != 0, scores, -float("inf"))
            largest = tl.maximum(largest, tl.max(scores, 0))
            token += (C + WITH_R + MASKED) * COLUMNS
    return largest


@triton.jit
def score_bound(
    form, outer_tables, column_tables, extents, first_strip, last_strip, first, last,
    outer, columns, sizes, stride, live,
    C: tl.constexpr, AXES: tl.constexpr, COLUMNS: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """A bound of each row's scores over some strips and outer positions, by interval arithmetic."""
    low, high = tl.full(live.shape, float("inf"), tl.float32), tl.full(live.shape, -float("inf"), tl.float32)
    column_low, column_high = low, high
    for position in range(first, last):
        value = outer_sum(outer_tables, outer_entries(position, sizes, AXES), stride, live, AXES)
        low, high = tl.minimum(low, value), tl.maximum(high, value)
    for strip in range(first_strip, last_strip):
        table = column_table(column_tables, strip, columns, stride, live, float("inf"), COLUMNS)
        column_low = tl.minimum(column_low, tl.min(table, 0))
        table = column_table(column_tables, strip, columns, stride, live, -float("inf"), COLUMNS)
        column_high = tl.maximum(column_high, tl.max(table, 0))
    low, high = low + column_low, high + column_high
    first_block = (tl.cast(first_strip, tl.int64) * outer + first) // TILE_ROWS
    last_block = ((tl.cast(last_strip, tl.int64) - 1) * outer + last - 1) // TILE_ROWS + 1
    r_low, r_high = extent(extents + C, first_block, last_block, C + 1)
    bound = tl.maximum(tl.maximum(low * r_low, low * r_high), tl.maximum(high * r_low, high * r_high))
    for c in range(C):
        a = tl.load(form + c * stride, mask=live, other=0.0)
        x_low, x_high = extent(extents + c, first_block, last_block, C + 1)
        bound += tl.maximum(a * x_low, a * x_high)
    return bound * LOG2E


@triton.jit
def separable_attention_fwd_kernel(
    form,
    tokens,
    extents,
    states,
    outer_sums,
    column_sums,
    seed,
    threshold,
    keep_scale,
    form_batch,
    rows,
    padded_rows,
    outer,
    columns,
    strips,
    outer_table,
    size_1,
    size_2,
    size_3,
    extent_blocks,
    parts,
    part_size,
    groups,
    group_size,
    C: tl.constexpr,
    AXES: tl.constexpr,
    WITH_R: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    FEW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sums of 2^(score - reference) of ROWS rows over group_size strips and part_size outer positions.

    states (batch, groups * parts, c + 3, padded rows): acc, the sum of the weights, the same after dropout, reference;
    outer_sums (batch, outer slots, outer entries, padded rows) and column_sums (batch, parts, columns, padded rows).
    """
    block, slot, batch = program_indices(tl.cdiv(rows, ROWS), groups * parts)
    group, part = slot // parts, slot % parts
    first_strip, last_strip = group * group_size, tl.minimum(group * group_size + group_size, strips)
    first, last = part * part_size, tl.minimum(part * part_size + part_size, outer)
    row = row_indices(block, ROWS)
    live = row < rows
    sizes = (size_1, size_2, size_3)
    stride, padded = tl.cast(rows, tl.int64), tl.cast(padded_rows, tl.int64)
    quantities: tl.constexpr = C + WITH_R + MASKED

    form += batch * form_batch + row
    outer_tables = form + C * stride
    column_tables = form + (C + outer_table) * stride
    tokens += batch * strips * outer * (quantities * COLUMNS)
    extents += batch * extent_blocks * (2 * (C + 1))
    states += (batch * groups * parts + slot) * (C + 3) * padded + row
    outer_sums += outer_slot(batch, group, part, groups, parts, AXES) * outer_table * padded + row
    column_sums += (batch * parts + part) * columns * padded + row
    a = load_channels(form, LOG2E, stride, live, C, FEW)

    # The reference is a score that each row has, and where others may lie far above it, the largest.
    nothing = tl.full((ROWS,), -float("inf"), tl.float32)
    reference = largest_scores(
        nothing, a, form, outer_tables, column_tables, tokens, first_strip, first_strip + 1, first, first + 1,
        outer, columns, sizes, stride, live, C, AXES, WITH_R, MASKED, FEW, COLUMNS,
    )  # fmt: skip
    bound = score_bound(
        form, outer_tables, column_tables, extents, first_strip, last_strip, first, last,
        outer, columns, sizes, stride, live, C, AXES, COLUMNS, TILE_ROWS,
    )  # fmt: skip
    within = (bound <= reference + LAZY_MARGIN) | (row >= rows)
    if tl.min(within.to(tl.int32)) == 0:
        reference = largest_scores(
            reference, a, form, outer_tables, column_tables, tokens, first_strip, last_strip, first, last,
            outer, columns, sizes, stride, live, C, AXES, WITH_R, MASKED, FEW, COLUMNS,
        )  # fmt: skip
    tl.store(states + (C + 2) * padded, reference)
    # A row that has only scores of -inf: its weights are 2^-inf = 0, not 2^(-inf + inf).
    constant = tl.where(reference == -float("inf"), 0.0, -reference)

    for strip in range(first_strip, last_strip):
        table = column_table(column_tables, strip, columns, stride, live, -float("inf"), COLUMNS) * LOG2E
        marginal = tl.zeros((COLUMNS, ROWS), tl.float32)
        total, kept = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        acc = no_weights(total, C, FEW)
        token = first_token(tokens, strip, first, outer, quantities, COLUMNS)
        for position in range(first, last):
            entries = outer_entries(position, sizes, AXES)
            outer_score = outer_sum(outer_tables, entries, stride, live, AXES) * LOG2E
            scores = linear_form(a, table, outer_score, constant, form, stride, live, token, C, WITH_R, FEW, COLUMNS)
            p = exp2(scores, INTERPRETED)
            if MASKED:
                p = tl.where(tl.load(token + (C + WITH_R) * COLUMNS)[:, None] != 0, p, 0.0)
            total += tl.sum(p, 0)
            if DROPOUT:
                p *= dropout_scales(seed, batch, row, position, strip, columns, threshold, keep_scale, COLUMNS)
                kept += tl.sum(p, 0)
            acc = add_weighted(acc, p, states, padded, token, C, FEW, COLUMNS)
            marginal, outer_weight = add_marginals(p, marginal, token, C, WITH_R, COLUMNS)
            add_outer(outer_sums, entries, outer_weight, padded, AXES)
            token += quantities * COLUMNS
        settle(acc, states, padded, C, FEW)
        settle((total, kept if DROPOUT else total), states + C * padded, padded, 2, True)
        column = (strip * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]
        tl.store(column_sums[None, :] + column * padded, marginal, mask=column < columns)


# --- merging ---------------------------------------------------------------------------------------------------------


@triton.jit
def separable_attention_merge_kernel(
    partials,
    result,
    lse,
    total,
    rows,
    padded_rows,
    columns,
    outer_table,
    outer_slots,
    outer_sums,
    column_sums,
    parts,
    part_size,
    groups,
    group_size,
    batches,
    C: tl.constexpr,
    AXES: tl.constexpr,
    FORWARD: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Adds the programs' partial sums of ENTRIES entries of ROWS rows: forward's as states merge, divided by the sum of
    the weights; backward's as they are, over `batches` entries of the batch where all of them share a form.

    partials: the states, the marginals of the outer axes from element outer_sums on, those of the columns from element
    column_sums on.
    """
    entries = C + outer_table + columns
    block, entry_block, batch = program_indices(tl.cdiv(rows, ROWS), tl.cdiv(entries, ENTRIES))
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < rows
    padded = tl.cast(padded_rows, tl.int64)
    slots = groups * parts
    states = partials + batch * slots * (C + 3) * padded + row[None, :]
    reference, weight = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if FORWARD:
        reference, weight, kept = merged_weights(states, slots, padded, C, ROWS, SLOTS)
        empty = weight == 0
        weight = tl.where(empty, 1.0, weight)
        if entry_block == 0:
            exact = LN2 * reference.to(tl.float64) + tl.log(weight.to(tl.float64))
            tl.store(lse + batch * rows + row, tl.where(empty, -float("inf"), exact), mask=live)
            tl.store(total + batch * rows + row, tl.where(empty, 0.0, kept / weight), mask=live)

    # Which slots hold a part of an entry: `count` of them from `first` on, `step` apart; and where their parts are.
    entry = entry_block * ENTRIES + tl.arange(0, ENTRIES)
    of_column, of_outer = entry >= C + outer_table, (entry >= C) & (entry < C + outer_table)
    of_groups = of_outer & (AXES == 2)
    column = entry - C - outer_table
    count = tl.where(of_column, parts, tl.where(of_groups, groups, slots))
    step = tl.where(of_groups, parts, 1)
    first = tl.where(of_column, column // (COLUMNS * group_size) * parts, 0)
    first = tl.where(of_groups, (entry - C) // part_size, first)
    size = tl.where(of_column, columns, tl.where(of_outer, outer_table, C + 3)).to(tl.int64)
    of_batch = tl.where(of_column, parts, tl.where(of_outer, outer_slots, slots)) * size
    begin = tl.where(of_column, column_sums + column * padded, entry * padded)
    begin = tl.where(of_outer, outer_sums + (entry - C) * padded, begin)

    value = tl.zeros((ENTRIES, ROWS), tl.float32)
    for b in range(batch, batch + batches):
        of_row = partials + ((begin + b * of_batch * padded)[:, None] + row[None, :])[None, :, :]
        for start in range(0, slots, SLOTS):
            index = (start + tl.arange(0, SLOTS))[:, None]
            there = ((index < count[None, :]) & (entry < entries)[None, :])[:, :, None]
            partial = tl.load(of_row + (index * size[None, :] * padded)[:, :, None], mask=there, other=0.0)
            if FORWARD:
                slot = first[None, :] + index * step[None, :]
                at = states[None, :, :] + (slot * ((C + 3) * padded) + (C + 2) * padded)[:, :, None]
                partial *= tl.exp2(tl.load(at, mask=there, other=-float("inf")) - reference[None, None, :])
            value += tl.sum(partial, 0)
    target = result + (batch * entries + entry)[:, None] * rows + row[None, :]
    tl.store(target, value / weight[None, :], mask=(entry < entries)[:, None] & live[None, :])


@triton.jit
def merged_weights(states, slots, padded, C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The largest of the slots' references, and the sums of the weights, before and after dropout, relative to it."""
    reference = tl.full((ROWS,), -float("inf"), tl.float32)
    for start in range(0, slots, SLOTS):
        slot = (start + tl.arange(0, SLOTS))[:, None]
        at = states + (slot * (C + 3) + C + 2) * padded
        reference = tl.maximum(reference, tl.max(tl.load(at, mask=slot < slots, other=-float("inf")), 0))
    reference = tl.where(reference == -float("inf"), 0.0, reference)
    weight, kept = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, slots, SLOTS):
        slot = (start + tl.arange(0, SLOTS))[:, None]
        at = states + (slot * (C + 3) + C) * padded
        there = slot < slots
        factor = tl.exp2(tl.load(at + 2 * padded, mask=there, other=-float("inf")) - reference[None, :])
        weight += tl.sum(factor * tl.load(at, mask=there, other=0.0), 0)
        kept += tl.sum(factor * tl.load(at + padded, mask=there, other=0.0), 0)
    return reference, weight, kept


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def separable_attention_bwd_prepare_kernel(
    sums,
    lse,
    total,
    d_sums,
    d_lse,
    d_total,
    statistics,
    rows,
    padded_rows,
    entries,
    lse_batch,
    lse_row,
    total_batch,
    total_row,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """statistics (batch, 4, padded rows): what backward's main loops need of a row besides forms.

    The weights are recomputed as 2^(score - reference), reference being log2(e) lse in float32; what rounding took away
    is a factor near 1 of the upstream gradients: the others are factor, factor * delta and factor * d_total.
    """
    block, _, batch = program_indices(padded_rows // ROWS, 1)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < rows
    delta = tl.zeros((ROWS,), tl.float64)
    for start in range(0, entries, ENTRIES):
        entry = (start + tl.arange(0, ENTRIES))[:, None]
        at = (batch * entries + entry) * rows + row[None, :]
        there = (entry < entries) & live[None, :]
        upstream = tl.load(d_sums + at, mask=there, other=0.0).to(tl.float64)
        delta += tl.sum(upstream * tl.load(sums + at, mask=there, other=0.0), 0)
    exact = tl.load(lse + batch * rows + row, mask=live, other=-float("inf")) * LOG2E
    empty = exact == -float("inf")
    exact = tl.where(empty, 0.0, exact)
    reference = exact.to(tl.float32)
    factor = tl.where(empty, 0.0, tl.exp2((reference - exact).to(tl.float32)))
    of_total = tl.zeros((ROWS,), tl.float64)
    if DROPOUT:
        of_total += tl.load(d_total + batch * total_batch + row * total_row, mask=live, other=0.0)
        delta += of_total * tl.load(total + batch * rows + row, mask=live, other=0.0)
    delta -= tl.load(d_lse + batch * lse_batch + row * lse_row, mask=live, other=0.0)
    at = statistics + batch * 4 * padded_rows + row
    tl.store(at, reference)
    tl.store(at + padded_rows, factor)
    tl.store(at + 2 * padded_rows, tl.where(empty, 0.0, factor * delta).to(tl.float32))
    tl.store(at + 3 * padded_rows, tl.where(empty, 0.0, factor * of_total).to(tl.float32))


@triton.jit
def separable_attention_bwd_rows_kernel(
    form,
    upstream,
    statistics,
    tokens,
    states,
    outer_sums,
    column_sums,
    seed,
    threshold,
    keep_scale,
    form_batch,
    rows,
    padded_rows,
    statistics_rows,
    outer,
    columns,
    strips,
    outer_table,
    size_1,
    size_2,
    size_3,
    parts,
    part_size,
    groups,
    group_size,
    C: tl.constexpr,
    AXES: tl.constexpr,
    WITH_R: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    FEW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sums of ds = r dS, the gradients of the form, as forward's kernel leaves its sums."""
    block, slot, batch = program_indices(tl.cdiv(rows, ROWS), groups * parts)
    group, part = slot // parts, slot % parts
    first_strip, last_strip = group * group_size, tl.minimum(group * group_size + group_size, strips)
    first, last = part * part_size, tl.minimum(part * part_size + part_size, outer)
    row = row_indices(block, ROWS)
    live = row < rows
    sizes = (size_1, size_2, size_3)
    stride, padded = tl.cast(rows, tl.int64), tl.cast(padded_rows, tl.int64)
    quantities: tl.constexpr = C + WITH_R + MASKED

    form += batch * form_batch + row
    upstream += batch * (C + outer_table + columns) * stride + row
    tokens += batch * strips * outer * (quantities * COLUMNS)
    states += (batch * groups * parts + slot) * (C + 3) * padded + row
    outer_sums += outer_slot(batch, group, part, groups, parts, AXES) * outer_table * padded + row
    column_sums += (batch * parts + part) * columns * padded + row
    statistics += batch * 4 * statistics_rows + row
    reference, factor = tl.load(statistics), tl.load(statistics + statistics_rows)
    delta, total = tl.load(statistics + 2 * statistics_rows), tl.load(statistics + 3 * statistics_rows)
    a = load_channels(form, LOG2E, stride, live, C, FEW)
    d_acc = load_channels(upstream, factor, stride, live, C, FEW)
    constant = total if DROPOUT else -delta

    for strip in range(first_strip, last_strip):
        at = (C + outer_table) * stride
        table = column_table(form + at, strip, columns, stride, live, -float("inf"), COLUMNS) * LOG2E
        d_marginal = column_table(upstream + at, strip, columns, stride, live, 0.0, COLUMNS) * factor[None, :]
        d_table = tl.zeros((COLUMNS, ROWS), tl.float32)
        d_a = no_weights(delta, C, FEW)
        token = first_token(tokens, strip, first, outer, quantities, COLUMNS)
        for position in range(first, last):
            entries = outer_entries(position, sizes, AXES)
            outer_score = outer_sum(form + C * stride, entries, stride, live, AXES) * LOG2E
            d_outer = outer_sum(upstream + C * stride, entries, stride, live, AXES) * factor
            scores = linear_form(a, table, outer_score, -reference, form, stride, live, token, C, WITH_R, FEW, COLUMNS)
            u = linear_form(
                d_acc, d_marginal, d_outer, constant, upstream, stride, live, token, C, WITH_R, FEW, COLUMNS
            )
            p = exp2(scores, INTERPRETED)
            if MASKED:
                p = tl.where(tl.load(token + (C + WITH_R) * COLUMNS)[:, None] != 0, p, 0.0)
            if DROPOUT:
                keep = dropout_scales(seed, batch, row, position, strip, columns, threshold, keep_scale, COLUMNS)
                u = keep * u - delta[None, :]
            ds = p * u
            d_a = add_weighted(d_a, ds, states, padded, token, C, FEW, COLUMNS)
            d_table, d_outer_score = add_marginals(ds, d_table, token, C, WITH_R, COLUMNS)
            add_outer(outer_sums, entries, d_outer_score, padded, AXES)
            token += quantities * COLUMNS
        settle(d_a, states, padded, C, FEW)
        column = (strip * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]
        tl.store(column_sums[None, :] + column * padded, d_table, mask=column < columns)


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


@triton.jit
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
    INTERPRETED: tl.constexpr,
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
    index_1, index_2, index_3 = outer_indices(position, sizes)
    keep = exists
    if MASKED:
        at = mask + batch * mask_batch + index_1 * mask_1 + index_2 * mask_2 + index_3 * mask_3 + column * mask_column
        keep = exists & (tl.load(at, mask=exists, other=0) != 0)
    factor = tl.full((TOKENS,), 1.0, tl.float32)
    if WITH_R:
        at = r + batch * r_batch + index_1 * r_1 + index_2 * r_2 + index_3 * r_3 + column * r_column
        factor = tl.load(at, mask=keep, other=1.0)
    x += batch * x_batch + index_1 * x_1 + index_2 * x_2 + index_3 * x_3 + column * x_column
    channel = tl.arange(0, CHANNELS)[:, None].to(tl.int64)
    if FEW:
        data, d_data = (), ()
        for c in tl.static_range(C):
            data = data + (tl.load(x + c * x_channel, mask=keep, other=0).to(tl.float32),)
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
        p = exp2(scores * (factor * LOG2E)[None, :] - reference[:, None], INTERPRETED)
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
            d_factor += tl.sum(d_scores * scores + weights * u, 0)

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


# --- launching -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """The sizes of one call: the last grid axis is the columns, the others together are the outer positions."""

    batch: int
    rows: int
    channels: int
    outer_sizes: tuple[int, ...]
    columns: int

    @classmethod
    def of(cls, form: Tensor, x: Tensor) -> Geometry:
        batch, *grid, channels = x.shape
        return cls(batch, form.shape[2], channels, tuple(grid[:-1]), grid[-1])

    @property
    def axes(self) -> int:
        return len(self.outer_sizes) + 1

    @property
    def outer(self) -> int:
        return math.prod(self.outer_sizes)

    @property
    def outer_table(self) -> int:
        return sum(self.outer_sizes)

    @property
    def empty(self) -> bool:
        return 0 in (self.batch, self.rows, self.outer, self.columns)

    @property
    def few_channels(self) -> bool:
        return self.channels <= CHANNELS_IN_REGISTERS

    def sizes(self) -> dict[str, int]:
        """The grid as the kernels name it."""
        padded = (*self.outer_sizes, 1, 1, 1)
        return {"outer": self.outer, "columns": self.columns} | {f"size_{k + 1}": padded[k] for k in range(3)}

    def strides(self, name: str, tensor: Tensor | None) -> dict[str, int]:
        """The strides of x, r or mask as the kernels name them."""
        per_axis = [0] * (self.axes + 1) if tensor is None else list(tensor.stride())
        outer = (*per_axis[1 : self.axes], 0, 0, 0)
        named = {f"{name}_batch": per_axis[0], f"{name}_column": per_axis[self.axes]}
        named |= {f"{name}_{k + 1}": outer[k] for k in range(3)}
        return named | {"x_channel": per_axis[-1]} if name == "x" else named


@dataclass(frozen=True)
class Split:
    """How the tokens are divided among programs: groups of strips of columns times parts of the outer positions."""

    strips: int
    groups: int
    group_size: int
    parts: int
    part_size: int

    @classmethod
    def of(cls, geometry: Geometry, choice: Tiles) -> Split:
        """As many shares as choice.parts says, about; as square as the grid, for then partial sums are fewest."""
        strips, outer = triton.cdiv(geometry.columns, choice.columns), geometry.outer
        parts = min(max(round(math.sqrt(choice.parts * outer / geometry.columns)), 1), outer)
        groups = min(triton.cdiv(choice.parts, parts), strips)
        parts = min(triton.cdiv(choice.parts, groups), outer)
        group_size, part_size = triton.cdiv(strips, groups), triton.cdiv(outer, parts)
        return cls(strips, triton.cdiv(strips, group_size), group_size, triton.cdiv(outer, part_size), part_size)

    @property
    def slots(self) -> int:
        return self.groups * self.parts

    def arguments(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("groups", "group_size", "parts", "part_size")}


def _tiles(geometry: Geometry, rows: int, columns: int, device: torch.device) -> Tiles:
    """A warp to a program, and so many parts that each multiprocessor has some warps."""
    blocks = geometry.batch * triton.cdiv(geometry.rows, rows)
    wanted = triton.cdiv(WARPS_PER_MULTIPROCESSOR * tiles.multiprocessors(device), blocks)
    most = geometry.outer * triton.cdiv(geometry.columns, columns) // LEAST_TILE_ROWS
    return Tiles(rows, columns, warps=1, stages=1, parts=max(min(wanted, most), 1))


def _candidates(geometry: Geometry, sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Tiles]:
    """Tiles of these rows and columns, without those that would mostly hold no rows."""
    fitting = [size for size in sizes if size[0] <= max(32, tiles.next_power_of_2(geometry.rows))]
    return [_tiles(geometry, *size, device) for size in fitting]


# Rows and columns of a tile row, the best first: as many pairs as registers hold.
FORWARD_TILES = ((128, 8), (64, 16), (32, 16))
BACKWARD_TILES = ((64, 16), (64, 8), (32, 16))


@dataclass(frozen=True)
class Packed:
    """Tokens as the kernels of the rows read them."""

    tokens: Tensor
    extents: Tensor


def _packed(geometry: Geometry, x: Tensor, r: Tensor | None, mask: Tensor | None, columns: int) -> Packed:
    tile_rows = triton.cdiv(geometry.columns, columns) * geometry.outer
    blocks = triton.cdiv(tile_rows, PACKED_TILE_ROWS)
    quantities = geometry.channels + (r is not None) + (mask is not None)
    packed = Packed(
        x.new_empty(geometry.batch, tile_rows, quantities, columns, dtype=torch.float32),
        x.new_empty(geometry.batch, blocks, 2, geometry.channels + 1, dtype=torch.float32),
    )
    separable_attention_pack_kernel[(geometry.batch * blocks,)](
        x,
        r,
        mask,
        packed.tokens,
        packed.extents,
        tile_rows,
        **geometry.sizes(),
        **geometry.strides("x", x),
        **geometry.strides("r", r),
        **geometry.strides("mask", mask),
        C=geometry.channels,
        WITH_R=r is not None,
        MASKED=mask is not None,
        COLUMNS=columns,
        TILE_ROWS=PACKED_TILE_ROWS,
        num_warps=4,
        num_stages=1,
        **runtime.LAUNCH_OPTIONS,
    )
    return packed


class Partials:
    """What programs leave for the merge kernel, in one array; it starts at zero, for programs add to their sums."""

    def __init__(self, geometry: Geometry, split: Split, choice: Tiles, device: torch.device) -> None:
        self.geometry, self.split, self.choice = geometry, split, choice
        self.padded_rows = triton.cdiv(geometry.rows, choice.rows) * choice.rows
        self.outer_slots = split.slots if geometry.axes > 2 else split.groups
        of_rows = geometry.batch * self.padded_rows
        self.outer_sums = of_rows * split.slots * (geometry.channels + 3)
        self.column_sums = self.outer_sums + of_rows * self.outer_slots * geometry.outer_table
        self.array = torch.zeros(self.column_sums + of_rows * split.parts * geometry.columns, device=device)

    def arguments(self) -> dict[str, Tensor]:
        """As the kernels that leave them name them."""
        return {
            "states": self.array,
            "outer_sums": self.array[self.outer_sums :],
            "column_sums": self.array[self.column_sums :],
        }

    def merge(self, result: Tensor, *softmax: Tensor) -> None:
        """Into result, with lse and total where these are states of a softmax."""
        geometry = self.geometry
        rows, entries = 32, 16
        programs = triton.cdiv(geometry.rows, rows) * triton.cdiv(result.shape[1], entries) * result.shape[0]
        separable_attention_merge_kernel[(programs,)](
            self.array,
            result,
            *(softmax or (None, None)),
            geometry.rows,
            self.padded_rows,
            geometry.columns,
            geometry.outer_table,
            self.outer_slots,
            self.outer_sums,
            self.column_sums,
            **self.split.arguments(),
            batches=geometry.batch // result.shape[0],
            C=geometry.channels,
            AXES=geometry.axes,
            FORWARD=bool(softmax),
            ENTRIES=entries,
            ROWS=rows,
            COLUMNS=self.choice.columns,
            SLOTS=min(tiles.next_power_of_2(self.split.slots), 8),
            num_warps=4,
            num_stages=1,
            **runtime.LAUNCH_OPTIONS,
        )


def _options(geometry: Geometry, r: Tensor | None, mask: Tensor | None, dropout_p: float) -> dict[str, object]:
    return {
        "C": geometry.channels,
        "AXES": geometry.axes,
        "WITH_R": r is not None,
        "MASKED": mask is not None,
        "DROPOUT": dropout_p > 0,
        "FEW": geometry.few_channels,
        "INTERPRETED": runtime.interpreting(),
        **runtime.LAUNCH_OPTIONS,
    }


def _dropout(dropout_p: float, seed: int) -> dict[str, int | float]:
    return {"seed": seed, "threshold": threshold(dropout_p), "keep_scale": 1 / (1 - dropout_p)}


def separable_attention_fwd(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int
) -> State:
    """sums, lse (float64) and total of separable attention; shapes as in ops.separable_attention.attend_to_grid."""
    geometry = Geometry.of(form, x)
    device = x.device
    sums = form.new_empty(geometry.batch, form.shape[1], geometry.rows)
    lse = form.new_empty(geometry.batch, geometry.rows, dtype=torch.float64)
    total = form.new_empty(geometry.batch, geometry.rows)
    if geometry.empty:
        return sums.zero_(), lse.fill_(-torch.inf), total.zero_()
    form = form.contiguous()

    def run(choice: Tiles) -> None:
        split = Split.of(geometry, choice)
        packed = _packed(geometry, x, r, mask, choice.columns)
        partials = Partials(geometry, split, choice, device)
        programs = triton.cdiv(geometry.rows, choice.rows) * split.slots * geometry.batch
        separable_attention_fwd_kernel[(programs,)](
            form,
            packed.tokens,
            packed.extents,
            form_batch=0 if form.shape[0] == 1 else form.stride(0),
            rows=geometry.rows,
            padded_rows=partials.padded_rows,
            strips=split.strips,
            extent_blocks=packed.extents.shape[1],
            outer_table=geometry.outer_table,
            **geometry.sizes(),
            **split.arguments(),
            **partials.arguments(),
            **_dropout(dropout_p, seed),
            ROWS=choice.rows,
            COLUMNS=choice.columns,
            TILE_ROWS=PACKED_TILE_ROWS,
            num_warps=choice.warps,
            num_stages=choice.stages,
            **_options(geometry, r, mask, dropout_p),
        )
        partials.merge(sums, lse, total)

    default, *others = _candidates(geometry, FORWARD_TILES, device)
    run(tiles.choose("separable_attention_fwd_kernel", _problem(geometry, r, mask, dropout_p), default, others, run))
    return sums, lse, total


def _problem(geometry: Geometry, r: Tensor | None, mask: Tensor | None, dropout_p: float) -> tuple[object, ...]:
    """What a choice of tiles depends on."""
    sizes = (geometry.batch, geometry.rows, geometry.outer, geometry.columns)
    rounded = map(tiles.next_power_of_2, sizes)
    return (*rounded, geometry.channels, geometry.axes, r is not None, mask is not None, dropout_p > 0)


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
    geometry = Geometry.of(form, x)
    needs_form, needs_x, needs_r = needs
    d_form = form.new_empty(form.shape if needs_form else 0)
    d_x = x.new_empty(x.shape if needs_x else 0)
    d_r = form.new_empty(x.shape[:-1] if needs_r else 0)
    if geometry.empty:
        return d_form.zero_(), d_x.zero_(), d_r.zero_()
    form, d_sums = form.contiguous(), upstream[0].contiguous()
    statistics = _statistics(geometry, saved, (d_sums, *upstream[1:]), dropout_p)
    if needs_form:
        _rows_gradients(geometry, form, x, r, mask, dropout_p, seed, d_sums, statistics, d_form)
    if needs_x or needs_r:
        _tokens_gradients(geometry, form, x, r, mask, dropout_p, seed, d_sums, statistics, d_x, d_r)
    return d_form, d_x, d_r


def _statistics(geometry: Geometry, saved: State, upstream: State, dropout_p: float) -> Tensor:
    """(batch, 4, padded rows) of separable_attention_bwd_prepare_kernel."""
    padded = triton.cdiv(geometry.rows, 128) * 128
    sums, lse, total = (value.contiguous() for value in saved)
    d_sums, d_lse, d_total = upstream
    statistics = sums.new_empty(geometry.batch, 4, padded)
    rows = 32
    separable_attention_bwd_prepare_kernel[(padded // rows * geometry.batch,)](
        sums,
        lse,
        total,
        d_sums,
        d_lse,
        d_total,
        statistics,
        geometry.rows,
        padded,
        sums.shape[1],
        *d_lse.stride(),
        *d_total.stride(),
        DROPOUT=dropout_p > 0,
        ROWS=rows,
        ENTRIES=32,
        num_warps=4,
        num_stages=1,
        **runtime.LAUNCH_OPTIONS,
    )
    return statistics


def _rows_gradients(
    geometry: Geometry,
    form: Tensor,
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
    d_sums: Tensor,
    statistics: Tensor,
    d_form: Tensor,
) -> None:
    def run(choice: Tiles) -> None:
        split = Split.of(geometry, choice)
        packed = _packed(geometry, x, r, mask, choice.columns)
        partials = Partials(geometry, split, choice, x.device)
        programs = triton.cdiv(geometry.rows, choice.rows) * split.slots * geometry.batch
        separable_attention_bwd_rows_kernel[(programs,)](
            form,
            d_sums,
            statistics,
            packed.tokens,
            form_batch=0 if form.shape[0] == 1 else form.stride(0),
            rows=geometry.rows,
            padded_rows=partials.padded_rows,
            statistics_rows=statistics.shape[-1],
            strips=split.strips,
            outer_table=geometry.outer_table,
            **geometry.sizes(),
            **split.arguments(),
            **partials.arguments(),
            **_dropout(dropout_p, seed),
            ROWS=choice.rows,
            COLUMNS=choice.columns,
            num_warps=choice.warps,
            num_stages=choice.stages,
            **_options(geometry, r, mask, dropout_p),
        )
        partials.merge(d_form)

    default, *others = _candidates(geometry, BACKWARD_TILES, x.device)
    problem = _problem(geometry, r, mask, dropout_p)
    run(tiles.choose("separable_attention_bwd_rows_kernel", problem, default, others, run))


def _tokens_gradients(
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
        **_dropout(dropout_p, seed),
        NEEDS_X=d_x.numel() > 0,
        NEEDS_R=d_r.numel() > 0,
        CHANNELS=tiles.next_power_of_2(geometry.channels, 16),
        ROWS=choice.rows,
        TOKENS=choice.columns,
        PRECISION=runtime.input_precision(torch.float32),
        num_warps=choice.warps,
        num_stages=choice.stages,
        **_options(geometry, r, mask, dropout_p),
    )
