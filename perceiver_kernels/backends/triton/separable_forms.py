"""What the kernels of separable attention are made of: forms over tokens, their sums, and where entries are."""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# Triton's tuples grow by +; it knows no starred expressions.
from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.philox import keep_scales


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
