"""What the kernels of separable attention are made of: forms over tokens, their sums, and where entries are."""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# Triton's tuples grow by +; it knows no starred expressions.
from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.philox import keep_scales


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
def program_share(rows, strips, outer, parts, part_size, groups, group_size, ROWS: tl.constexpr):
    """What a program does: its entry of the batch, its rows, its group of strips and part of the outer positions; the
    first strip and the one after the last, and the same of the outer positions."""
    block, slot, batch = program_indices(tl.cdiv(rows, ROWS), groups * parts)
    group, part = slot // parts, slot % parts
    strip, position = group * group_size, part * part_size
    last_strip, last = tl.minimum(strip + group_size, strips), tl.minimum(position + part_size, outer)
    return batch, row_indices(block, ROWS), group, part, strip, last_strip, position, last


@triton.jit
def program_sums(
    states, outer_sums, column_sums, batch, row, group, part, groups, parts, columns, outer_table, padded,
    C: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Where a program leaves its sums: states (batch, groups * parts, c + 3, padded rows), outer_sums (batch, outer
    slots, outer entries, padded rows) and column_sums (batch, parts, columns, padded rows)."""
    states += (batch * groups * parts + (group * parts + part)) * (C + 3) * padded + row
    outer_sums += outer_slot(batch, group, part, groups, parts, AXES) * outer_table * padded + row
    column_sums += (batch * parts + part) * columns * padded + row
    return states, outer_sums, column_sums


@triton.jit
def outer_indices(position, sizes):
    """Where an outer position stands on each outer axis; sizes of missing axes, which come first, are 1."""
    leading = position // sizes[2]
    return leading // sizes[1], leading % sizes[1], position % sizes[2]


@triton.jit
def token_offset(indices, column, stride_1, stride_2, stride_3, stride_column):
    """Where a token of a grid is, from its place on the outer axes and its column."""
    return indices[0] * stride_1 + indices[1] * stride_2 + indices[2] * stride_3 + column * stride_column


@triton.jit
def outer_entries(position, sizes, AXES: tl.constexpr):
    """The entries of an outer position in the stacked tables of the outer axes."""
    if AXES == 1:
        return ()
    elif AXES == 2:
        return (tl.cast(position, tl.int64),)
    else:
        index_1, index_2, index_3 = outer_indices(position, sizes)
        if AXES == 3:
            # The first axis that there is needs no remainder.
            return (tl.cast(position // sizes[2], tl.int64), tl.cast(sizes[1] + index_3, tl.int64))
        else:
            second, third = sizes[0] + index_2, sizes[0] + sizes[1] + index_3
            return (tl.cast(index_1, tl.int64), tl.cast(second, tl.int64), tl.cast(third, tl.int64))


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
def store_columns(sums, strip, columns, stride, value, COLUMNS: tl.constexpr):
    """Writes a strip of the last axis's marginal: (COLUMNS, rows)."""
    column = (strip * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]
    tl.store(sums[None, :] + column * stride, value, mask=column < columns)


@triton.jit
def unless_masked(
    value, otherwise, token, C: tl.constexpr, WITH_R: tl.constexpr, MASKED: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile row's values, `otherwise` for tokens that are masked."""
    if MASKED:
        return tl.where(tl.load(token + (C + WITH_R) * COLUMNS)[:, None] != 0, value, otherwise)
    else:
        return value


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
