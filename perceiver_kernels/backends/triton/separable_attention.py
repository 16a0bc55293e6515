"""Separable attention in Triton (docs/separable_attention.md): a row in a thread, tokens streaming past all rows.

The last grid axis is the column axis, the others together are outer positions. Tokens are packed once into tile rows,
COLUMNS columns at one outer position. A program is one warp; it owns ROWS rows, some strips of COLUMNS columns and some
outer positions. Rows lie across lanes and tokens inside a thread, so that nothing in the main loops crosses lanes, and
a strip's table and marginal stay in registers while the outer positions pass. Programs leave partial sums, which a
merge kernel adds in an order that follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.gpu import multiprocessors
from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.exponential import LOG2E, exp2
from perceiver_kernels.backends.triton.separable_attention_tokens import tokens_gradients
from perceiver_kernels.backends.triton.separable_forms import (
    add_marginals,
    add_outer,
    add_weighted,
    column_table,
    dropout_scales,
    extent,
    first_token,
    linear_form,
    load_channels,
    no_weights,
    outer_entries,
    outer_indices,
    outer_sum,
    program_indices,
    program_share,
    program_sums,
    settle,
    store_columns,
    token_offset,
    unless_masked,
)
from perceiver_kernels.backends.triton.separable_geometry import Geometry, Split, dropout_arguments, options
from perceiver_kernels.backends.triton.separable_merge import Partials
from perceiver_kernels.backends.triton.tiles import Tiles

State = tuple[Tensor, Tensor, Tensor]

# A row's sums are of 2^(score - reference). No score of a program exceeds its reference by more than this.
LAZY_MARGIN = tl.constexpr(60.0)

PACKED_TILE_ROWS = 64  # per program of the pack kernel; the tokens' extents are known for so many at a time
WARPS_PER_MULTIPROCESSOR = 8
LEAST_TILE_ROWS = 8  # of a program, so that partial sums stay few


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
    indices = outer_indices(position, (size_1, size_2, size_3))
    there = (tile_row < tile_rows)[:, None]
    keep = there & (column < columns)
    if MASKED:
        at = mask + batch * mask_batch + token_offset(indices, column, mask_1, mask_2, mask_3, mask_column)
        keep = keep & (tl.load(at, mask=keep, other=0) != 0)
    quantities: tl.constexpr = C + WITH_R + MASKED
    target = tokens + ((batch * tile_rows + tile_row) * quantities * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    extents += (batch * blocks + block) * 2 * (C + 1)

    factor = tl.full((TILE_ROWS, COLUMNS), 1.0, tl.float32)
    if WITH_R:
        at = r + batch * r_batch + token_offset(indices, column, r_1, r_2, r_3, r_column)
        factor = tl.load(at, mask=keep, other=1.0)
        tl.store(target + C * COLUMNS, factor, mask=there)
    if MASKED:
        tl.store(target + (C + WITH_R) * COLUMNS, keep.to(tl.float32), mask=there)
    tl.store(extents + C, tl.min(tl.where(keep, factor, float("inf"))))
    tl.store(extents + (C + 1) + C, tl.max(tl.where(keep, factor, -float("inf"))))

    source = x + batch * x_batch + token_offset(indices, column, x_1, x_2, x_3, x_column)
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
            scores = unless_masked(scores, -float("inf"), token, C, WITH_R, MASKED, COLUMNS)
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


@triton.jit(do_not_specialize=["seed", "threshold"])
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
    COMPILED: tl.constexpr,
):
    """Sums of 2^(score - reference) of ROWS rows over group_size strips and part_size outer positions.

    A state is acc, the sum of the weights, the same after dropout, and the reference.
    """
    batch, row, group, part, first_strip, last_strip, first, last = program_share(
        rows, strips, outer, parts, part_size, groups, group_size, ROWS
    )
    live = row < rows
    sizes = (size_1, size_2, size_3)
    stride, padded = tl.cast(rows, tl.int64), tl.cast(padded_rows, tl.int64)
    quantities: tl.constexpr = C + WITH_R + MASKED

    form += batch * form_batch + row
    outer_tables = form + C * stride
    column_tables = form + (C + outer_table) * stride
    tokens += batch * strips * outer * (quantities * COLUMNS)
    extents += batch * extent_blocks * (2 * (C + 1))
    states, outer_sums, column_sums = program_sums(
        states, outer_sums, column_sums, batch, row, group, part, groups, parts, columns, outer_table, padded, C, AXES
    )
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
            p = exp2(scores, COMPILED)
            p = unless_masked(p, 0.0, token, C, WITH_R, MASKED, COLUMNS)
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
        store_columns(column_sums, strip, columns, padded, marginal, COLUMNS)


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


@triton.jit(do_not_specialize=["seed", "threshold"])
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
    COMPILED: tl.constexpr,
):
    """Sums of ds = r dS, the gradients of the form, as forward's kernel leaves its sums."""
    batch, row, group, part, first_strip, last_strip, first, last = program_share(
        rows, strips, outer, parts, part_size, groups, group_size, ROWS
    )
    live = row < rows
    sizes = (size_1, size_2, size_3)
    stride, padded = tl.cast(rows, tl.int64), tl.cast(padded_rows, tl.int64)
    quantities: tl.constexpr = C + WITH_R + MASKED

    form += batch * form_batch + row
    upstream += batch * (C + outer_table + columns) * stride + row
    tokens += batch * strips * outer * (quantities * COLUMNS)
    states, outer_sums, column_sums = program_sums(
        states, outer_sums, column_sums, batch, row, group, part, groups, parts, columns, outer_table, padded, C, AXES
    )
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
            p = exp2(scores, COMPILED)
            p = unless_masked(p, 0.0, token, C, WITH_R, MASKED, COLUMNS)
            if DROPOUT:
                keep = dropout_scales(seed, batch, row, position, strip, columns, threshold, keep_scale, COLUMNS)
                u = keep * u - delta[None, :]
            ds = p * u
            d_a = add_weighted(d_a, ds, states, padded, token, C, FEW, COLUMNS)
            d_table, d_outer_score = add_marginals(ds, d_table, token, C, WITH_R, COLUMNS)
            add_outer(outer_sums, entries, d_outer_score, padded, AXES)
            token += quantities * COLUMNS
        settle(d_a, states, padded, C, FEW)
        store_columns(column_sums, strip, columns, padded, d_table, COLUMNS)


# --- launching -------------------------------------------------------------------------------------------------------


def _tiles(geometry: Geometry, rows: int, columns: int, device: torch.device) -> Tiles:
    """A warp to a program, and so many parts that each multiprocessor has some warps."""
    blocks = geometry.batch * triton.cdiv(geometry.rows, rows)
    wanted = triton.cdiv(WARPS_PER_MULTIPROCESSOR * multiprocessors(device), blocks)
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
            **dropout_arguments(dropout_p, seed),
            ROWS=choice.rows,
            COLUMNS=choice.columns,
            TILE_ROWS=PACKED_TILE_ROWS,
            num_warps=choice.warps,
            num_stages=choice.stages,
            **options(geometry, r, mask, dropout_p),
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
        tokens_gradients(geometry, form, x, r, mask, dropout_p, seed, d_sums, statistics, d_x, d_r)
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
            **dropout_arguments(dropout_p, seed),
            ROWS=choice.rows,
            COLUMNS=choice.columns,
            num_warps=choice.warps,
            num_stages=choice.stages,
            **options(geometry, r, mask, dropout_p),
        )
        partials.merge(d_form)

    default, *others = _candidates(geometry, BACKWARD_TILES, x.device)
    problem = _problem(geometry, r, mask, dropout_p)
    run(tiles.choose("separable_attention_bwd_rows_kernel", problem, default, others, run))
