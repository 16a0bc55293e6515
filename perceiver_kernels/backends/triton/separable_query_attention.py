"""Separable attention of queries on a grid in Triton: launched by ops.separable_query_attention, through dispatch.

A tile of queries lies within one line of the grid's last axis, the columns, whose table is read tile by tile; the
tables of the other, outer axes give one number per key, their sum at the line's outer position. Scores are in powers
of two. Tiles are (queries, keys) where programs own queries and (keys, queries) where they own keys, so that sums over
what a program passes over stay within few threads; indices come shaped, and the same functions serve both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.gpu import multiprocessors
from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.exponential import LOG2E, exp2
from perceiver_kernels.backends.triton.grids import on_outer_axes
from perceiver_kernels.backends.triton.philox import keep_scales, threshold
from perceiver_kernels.backends.triton.tiles import Tiles

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def query_tile(outers, columns, QUERIES: tl.constexpr):
    """A program's outer position and tile of columns, and its place beyond the queries: in the batch or its heads."""
    tiles = outers * tl.cdiv(columns, QUERIES)
    tile = tl.program_id(0) % tiles
    return tile % outers, tile // outers, (tl.program_id(0) // tiles).to(tl.int64)


@triton.jit
def attending(mask, keys, N):
    """Which keys there are and are not masked."""
    attends = keys < N
    if mask is not None:
        attends = attends & (tl.load(mask + keys, mask=attends, other=0) != 0)
    return attends


@triton.jit
def key_bias(h, keys, attends):
    """What a key adds to its scores: h, or -inf where nothing attends to it."""
    if h is None:
        return tl.where(attends, 0.0, float("-inf"))
    else:
        return tl.load(h + keys, mask=attends, other=float("-inf")) * LOG2E


@triton.jit
def query_factor(r, query, inside):
    """r, or 1 where there is none."""
    if r is None:
        return tl.full(inside.shape, 1.0, tl.float32)
    else:
        return tl.load(r + query, mask=inside, other=0.0)


@triton.jit
def over_queries(
    u, form, x, outer, column_entry, inside, keys, attends, N, x_channel, size_1, size_2, size_3,
    AXES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The columns' table u, plus the outer tables at one position of theirs, plus x . k.

    x is a pointer per query; size_1 to size_3 are the outer axes' sizes, missing ones in front.
    """
    sizes = (size_1, size_2, size_3)
    total = tl.zeros(attends.shape, tl.float32)
    entry = tl.cast(column_entry, tl.int64)
    for axis in tl.static_range(AXES - 1):
        size = sizes[2 - axis]
        entry -= size
        total += tl.load(form + (entry + outer % size) * N + keys, mask=attends, other=0.0)
        outer = outer // size
    u += total
    if CHANNELS <= 8:
        for channel in tl.static_range(CHANNELS):
            data = tl.load(x + channel * tl.cast(x_channel, tl.int64), mask=inside, other=0.0)
            u += data * tl.load(form + channel * tl.cast(N, tl.int64) + keys, mask=attends, other=0.0)
    else:
        for channel in range(CHANNELS):
            data = tl.load(x + channel * tl.cast(x_channel, tl.int64), mask=inside, other=0.0)
            u += data * tl.load(form + channel * tl.cast(N, tl.int64) + keys, mask=attends, other=0.0)
    return u


@triton.jit
def add_gradients(
    d_form, d_u, x, outer, column_entry, inside, keys, exists, N, x_channel, size_1, size_2, size_3,
    AXES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds a (keys, queries) tile at one outer position to the gradients of k and of the outer tables, which nobody but
    this program adds to."""
    sizes = (size_1, size_2, size_3)
    if x is not None:
        for channel in range(CHANNELS):
            data = tl.load(x + channel * tl.cast(x_channel, tl.int64), mask=inside, other=0.0)
            at = d_form + channel * tl.cast(N, tl.int64) + keys
            tl.store(at, tl.load(at, mask=exists, other=0.0) + tl.sum(d_u * data, 1), mask=exists)
    total = tl.sum(d_u, 1)
    entry = tl.cast(column_entry, tl.int64)
    for axis in tl.static_range(AXES - 1):
        size = sizes[2 - axis]
        entry -= size
        at = d_form + (entry + outer % size) * N + keys
        tl.store(at, tl.load(at, mask=exists, other=0.0) + total, mask=exists)
        outer = outer // size
    if AXES > 2 or CHANNELS > 0:
        tl.debug_barrier()  # the next outer position adds to some of them again, perhaps by other threads


@triton.jit
def product(
    left, left_channel, left_exists, right, right_channel, right_exists, size,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left @ right^T over all channels, chunk by chunk unless one is the whole; both are pointers to rows."""
    total = tl.zeros([left.shape[0], right.shape[0]], tl.float32)
    for start in range(0, CHUNK if WHOLE else size, CHUNK):
        channel = (start + tl.arange(0, CHUNK))[None, :].to(tl.int64)
        a = tl.load(left + channel * left_channel, mask=left_exists & (channel < size), other=0.0)
        b = tl.load(right + channel * right_channel, mask=right_exists & (channel < size), other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["seed", "threshold"])
def separable_query_attention_fwd_kernel(
    form, v, h, x, r, mask, out, lse,
    N, heads, outers, columns, column_entry, entries, head_dim, size_1, size_2, size_3,
    form_batch, h_batch, x_batch, x_query, x_channel, r_batch, seed, threshold, keep_scale,
    AXES: tl.constexpr, CHANNELS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, COMPILED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries in one head, for one chunk of the values' channels."""
    outer, column_tile, batch_head = query_tile(outers, columns, QUERIES)
    batch, head = batch_head // heads, batch_head % heads
    queries = outers * columns
    column = column_tile * QUERIES + tl.arange(0, QUERIES)
    inside = column < columns
    query = (outer * columns + column).to(tl.int64)
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)

    form += batch * form_batch + head * entries * N
    h = None if h is None else h + batch * h_batch + head * N
    x = None if x is None else x + batch * x_batch + query[:, None] * x_query
    r = None if r is None else r + batch * r_batch
    mask = None if mask is None else mask + batch * N
    table = form + (column_entry + column)[:, None].to(tl.int64) * N
    v += (batch * heads + head) * N * head_dim + channel[None, :]

    factor = query_factor(r, query, inside) * LOG2E
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, CHUNK], tl.float32)
    for start in range(0, N, KEYS):
        keys = start + tl.arange(0, KEYS)
        attends = attending(mask, keys, N)
        u = tl.load(table + keys[None, :], mask=inside[:, None] & attends[None, :], other=0.0)
        u = over_queries(
            u, form, x, outer, column_entry, inside[:, None], keys[None, :], attends[None, :], N, x_channel,
            size_1, size_2, size_3, AXES, CHANNELS,
        )  # fmt: skip
        s = factor[:, None] * u + key_bias(h, keys, attends)[None, :]

        larger = tl.maximum(largest, tl.max(s, 1))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        p = exp2(s - reference[:, None], COMPILED)
        rescale = exp2(largest - reference, COMPILED)
        largest = larger
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            row = head * queries + query
            p *= keep_scales(seed, batch, row[:, None], keys[None, :], threshold, keep_scale)
        values = tl.load(
            v + keys[:, None].to(tl.int64) * head_dim, mask=attends[:, None] & (channel < head_dim)[None, :], other=0.0
        )
        acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc /= total[:, None]
    out += ((batch * queries + query[:, None]) * heads + head) * head_dim + channel[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=inside[:, None] & (channel < head_dim)[None, :])
    # Every chunk of channels has the same to say.
    lse += (batch * heads + head) * queries + query
    tl.store(lse, tl.where(empty, float("-inf"), largest + tl.log2(total)) / LOG2E, mask=inside)


@triton.jit
def separable_query_attention_bwd_delta_kernel(
    out, d_out, delta, queries, heads, head_dim, d_out_batch, d_out_head, d_out_query, d_out_channel,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """delta = d_out . out, of a tile of queries in one head."""
    blocks = tl.cdiv(queries, QUERIES)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    query = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    out += ((batch * queries + query[:, None]) * heads + head) * head_dim
    d_out += batch * d_out_batch + head * d_out_head + query[:, None] * d_out_query
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(0, head_dim, CHUNK):
        channel = (start + tl.arange(0, CHUNK))[None, :].to(tl.int64)
        inside = (query < queries)[:, None] & (channel < head_dim)
        gradient = tl.load(d_out + channel * d_out_channel, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(gradient * tl.load(out + channel, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(delta + (batch * heads + head) * queries + query, total, mask=query < queries)


@triton.jit
def saved_statistics(lse, delta, row, inside):
    """What is subtracted from a query's scores, in powers of two, and its delta; zeros for one that attends to nothing,
    whose scores are all -inf."""
    reference = tl.load(lse + row, mask=inside, other=0.0) * LOG2E
    return tl.where(reference == float("-inf"), 0.0, reference), tl.load(delta + row, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["seed", "threshold"])
def separable_query_attention_bwd_queries_kernel(
    form, v, h, x, r, mask, d_out, lse, delta, d_x, d_r,
    N, heads, outers, columns, column_entry, entries, head_dim, size_1, size_2, size_3,
    form_batch, h_batch, x_batch, x_query, x_channel, r_batch, seed, threshold, keep_scale,
    d_out_batch, d_out_head, d_out_query, d_out_channel, batches,
    AXES: tl.constexpr, CHANNELS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, COMPILED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, DATA: tl.constexpr,
    DATA_PRECISION: tl.constexpr,
):  # fmt: skip
    """d_x and d_r, where they are not None, of a tile of queries: sums over keys, heads, and the `batches` entries of
    the batch that share the queries."""
    outer, column_tile, group = query_tile(outers, columns, QUERIES)
    queries = outers * columns
    column = column_tile * QUERIES + tl.arange(0, QUERIES)
    inside = column < columns
    query = (outer * columns + column).to(tl.int64)
    data = tl.arange(0, DATA)
    d_data = tl.zeros([QUERIES, DATA], tl.float32)
    d_factor = tl.zeros([QUERIES], tl.float32)
    for index in range(batches * heads):
        batch, head = group * batches + index // heads, (index % heads).to(tl.int64)
        entry = form + batch * form_batch + head * entries * N
        value = v + (batch * heads + head) * N * head_dim
        bias = None if h is None else h + batch * h_batch + head * N
        datum = None if x is None else x + batch * x_batch + query[:, None] * x_query
        attendance = None if mask is None else mask + batch * N
        table = entry + (column_entry + column)[:, None].to(tl.int64) * N
        gradient = d_out + batch * d_out_batch + head * d_out_head + query[:, None] * d_out_query

        factor = query_factor(None if r is None else r + batch * r_batch, query, inside)
        row = head * queries + query
        reference, delta_row = saved_statistics(lse, delta, batch * heads * queries + row, inside)
        for start in range(0, N, KEYS):
            keys = start + tl.arange(0, KEYS)
            attends = attending(attendance, keys, N)
            u = tl.load(table + keys[None, :], mask=inside[:, None] & attends[None, :], other=0.0)
            u = over_queries(
                u, entry, datum, outer, column_entry, inside[:, None], keys[None, :], attends[None, :], N, x_channel,
                size_1, size_2, size_3, AXES, CHANNELS,
            )  # fmt: skip
            s = (factor * LOG2E)[:, None] * u + key_bias(bias, keys, attends)[None, :]
            p = exp2(s - reference[:, None], COMPILED)
            d_p = product(
                gradient, d_out_channel, inside[:, None],
                value + keys[:, None].to(tl.int64) * head_dim, 1, attends[:, None], head_dim, CHUNK, WHOLE, PRECISION,
            )  # fmt: skip
            if DROPOUT:
                d_p *= keep_scales(seed, batch, row[:, None], keys[None, :], threshold, keep_scale)
            d_s = p * (d_p - delta_row[:, None])
            if d_r is not None:
                # A score of -inf weighs nothing, whatever it is multiplied with.
                d_factor += tl.sum(tl.where(p == 0, 0.0, d_s * u), 1)
            if d_x is not None:
                k = tl.load(
                    entry + data[None, :] * N + keys[:, None],
                    mask=attends[:, None] & (data < CHANNELS)[None, :],
                    other=0.0,
                )
                d_data = tl.dot(factor[:, None] * d_s, k, d_data, input_precision=DATA_PRECISION)

    query += group * queries
    if d_r is not None:
        tl.store(d_r + query, d_factor, mask=inside)
    if d_x is not None:
        at = d_x + query[:, None] * CHANNELS + data[None, :]
        tl.store(at, d_data, mask=inside[:, None] & (data < CHANNELS)[None, :])


@triton.jit(do_not_specialize=["seed", "threshold"])
def separable_query_attention_bwd_keys_kernel(
    form, v, h, x, r, mask, d_out, lse, delta, d_entries, d_table, d_v, d_h,
    N, heads, outers, columns, column_entry, entries, head_dim, size_1, size_2, size_3,
    form_batch, h_batch, x_batch, x_query, x_channel, r_batch, seed, threshold, keep_scale,
    d_out_batch, d_out_head, d_out_query, d_out_channel, column_parts, outer_parts,
    AXES: tl.constexpr, CHANNELS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, COMPILED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys in one head, where they are not None, from a part of the queries: some of the outer
    positions, and every column_parts-th tile of columns.

    d_v is of one chunk of channels; d_entries holds those of k and the outer tables, d_table the columns'.
    """
    parts, tiles = column_parts * outer_parts, tl.cdiv(N, KEYS)
    part = tl.program_id(0) % parts
    column_part, outer_part = part % column_parts, part // column_parts
    tile = tl.program_id(0) // parts % tiles
    batch_head = (tl.program_id(0) // (parts * tiles)).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    queries = outers * columns
    keys = tile * KEYS + tl.arange(0, KEYS)
    exists = keys < N
    channel = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)

    form += batch * form_batch + head * entries * N
    h = None if h is None else h + batch * h_batch + head * N
    x = None if x is None else x + batch * x_batch
    r = None if r is None else r + batch * r_batch
    mask = None if mask is None else mask + batch * N
    v += (batch * heads + head) * N * head_dim + keys[:, None].to(tl.int64) * head_dim
    d_out += batch * d_out_batch + head * d_out_head
    slot = batch_head * parts + part
    if d_table is not None:
        d_entries += slot * column_entry * N
        d_table += (batch_head * outer_parts + outer_part) * columns * N

    attends = attending(mask, keys, N)
    bias = key_bias(h, keys, attends)
    d_values = tl.zeros([KEYS, CHUNK], tl.float32)
    d_bias = tl.zeros([KEYS], tl.float32)
    share = tl.cdiv(outers, outer_parts)
    for column_tile in range(column_part, tl.cdiv(columns, QUERIES), column_parts):
        column = column_tile * QUERIES + tl.arange(0, QUERIES)
        inside = column < columns
        at_table = (column_entry + column)[None, :].to(tl.int64) * N + keys[:, None]
        table = tl.load(form + at_table, mask=attends[:, None] & inside[None, :], other=0.0)
        d_column = tl.zeros([KEYS, QUERIES], tl.float32)
        for outer in range(outer_part * share, tl.minimum((outer_part + 1) * share, outers)):
            query = (outer * columns + column).to(tl.int64)
            datum = None if x is None else x + query[None, :] * x_query
            u = over_queries(
                table, form, datum, outer, column_entry, inside[None, :], keys[:, None], attends[:, None], N, x_channel,
                size_1, size_2, size_3, AXES, CHANNELS,
            )  # fmt: skip
            factor = query_factor(r, query, inside)
            row = head * queries + query
            reference, delta_row = saved_statistics(lse, delta, batch * heads * queries + row, inside)
            p = exp2((factor * LOG2E)[None, :] * u + bias[:, None] - reference[None, :], COMPILED)
            gradient = d_out + query[:, None] * d_out_query
            if DROPOUT:
                keep = keep_scales(seed, batch, row[None, :], keys[:, None], threshold, keep_scale)
            if d_v is not None:
                weight = p * keep if DROPOUT else p
                upstream = tl.load(
                    gradient + channel[None, :] * d_out_channel,
                    mask=inside[:, None] & (channel < head_dim)[None, :],
                    other=0.0,
                )
                d_values = tl.dot(weight.to(upstream.dtype), upstream, d_values, input_precision=PRECISION)
            if d_table is not None:
                d_p = product(
                    v, 1, attends[:, None], gradient, d_out_channel, inside[:, None], head_dim, CHUNK, WHOLE, PRECISION
                )
                d_s = p * ((d_p * keep if DROPOUT else d_p) - delta_row[None, :])
                d_u = factor[None, :] * d_s
                d_column += d_u
                d_bias += tl.sum(d_s, 1)
                add_gradients(
                    d_entries, d_u, datum, outer, column_entry, inside[None, :], keys, attends, N, x_channel,
                    size_1, size_2, size_3, AXES, CHANNELS,
                )  # fmt: skip
        if d_table is not None:
            tl.debug_barrier()  # the next columns add to the same outer tables
            d_column = tl.where(attends[:, None], d_column, 0.0)
            tl.store(
                d_table + column[None, :].to(tl.int64) * N + keys[:, None],
                d_column,
                mask=exists[:, None] & inside[None, :],
            )

    if d_v is not None:
        d_values = tl.where(attends[:, None], d_values, 0.0)
        d_v += (slot * N + keys[:, None]) * head_dim + channel[None, :]
        tl.store(d_v, d_values.to(d_v.dtype.element_ty), mask=exists[:, None] & (channel < head_dim)[None, :])
    if d_table is not None:
        tl.store(d_h + slot * N + keys, tl.where(attends, d_bias, 0.0), mask=exists)


def _arguments(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
) -> dict[str, Any]:
    """What all kernels get. Small inputs are made contiguous; x and the gradient are read in their strides."""
    channels = 0 if x is None else x.shape[2]
    size_1, size_2, size_3 = on_outer_axes(grid[:-1], 1)
    return {
        "form": form.contiguous(),
        "v": v.contiguous(),
        "h": None if h is None else h.contiguous(),
        "x": x if channels else None,
        "r": None if r is None else r.contiguous(),
        "mask": None if mask is None else mask.contiguous(),
        "N": v.shape[2],
        "heads": v.shape[1],
        "outers": math.prod(grid[:-1]),
        "columns": grid[-1],
        "column_entry": form.shape[2] - grid[-1],
        "entries": form.shape[2],
        "head_dim": v.shape[3],
        "size_1": size_1,
        "size_2": size_2,
        "size_3": size_3,
        "form_batch": _batch_step(form, math.prod(form.shape[1:])),
        "h_batch": 0 if h is None else _batch_step(h, math.prod(h.shape[1:])),
        "x_batch": 0 if x is None else _batch_step(x, x.stride(0)),
        "x_query": 0 if x is None else x.stride(1),
        "x_channel": 0 if x is None else x.stride(2),
        "r_batch": 0 if r is None else _batch_step(r, r.shape[1]),
        "seed": seed,
        "threshold": threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "AXES": len(grid),
        "CHANNELS": channels,
        "DROPOUT": dropout_p > 0,
        "PRECISION": runtime.input_precision(v.dtype),
        "COMPILED": not runtime.interpreting(),
    }


def _batch_step(tensor: Tensor, step: int) -> int:
    """From one entry of the batch to the next; 0 where all share the one."""
    return 0 if tensor.shape[0] == 1 else step


def _chunk(v: Tensor, most: int) -> int:
    """How many channels of the values a product takes at once; without tensor cores, few."""
    return min(tiles.next_power_of_2(v.shape[3], 16), 64 if v.dtype == torch.float32 else most)


def _clipped(queries: int, keys: int, warps: int, grid: Sequence[int], v: Tensor) -> Tiles:
    """Tiles of queries (rows) and keys (columns), no larger than the last axis and N ask for."""
    rows, columns = tiles.next_power_of_2(grid[-1], 16), tiles.next_power_of_2(v.shape[2], 16)
    return Tiles(min(queries, rows), min(keys, columns), warps)


def _fwd_tiles(grid: Sequence[int], v: Tensor, chunk: int, dropout: bool) -> Tiles:
    if v.dtype == torch.float32:
        return _clipped(32, 32, 4, grid, v)
    return _clipped(32 if dropout else 64, 64, 4 if chunk <= 64 else 8, grid, v)


def _bwd_queries_tiles(grid: Sequence[int], v: Tensor, data: bool, dropout: bool) -> Tiles:
    if v.dtype == torch.float32 or data:
        return _clipped(32, 32, 8, grid, v)
    return _clipped(32 if dropout or v.shape[3] > 64 else 64, 64, 4, grid, v)


def _bwd_keys_tiles(grid: Sequence[int], v: Tensor) -> Tiles:
    return _clipped(32, 32 if v.dtype == torch.float32 else 64, 4, grid, v)


def _launch(kernel: Any, programs: tuple[int, ...], choice: Tiles, arguments: dict[str, Any]) -> None:
    kernel[programs](
        **arguments,
        QUERIES=choice.rows,
        KEYS=choice.columns,
        num_warps=choice.warps,
        num_stages=choice.stages,
        **runtime.LAUNCH_OPTIONS,
    )


def _problem(arguments: dict[str, Any], v: Tensor, grid: Sequence[int]) -> tuple[Any, ...]:
    """What the best tiles depend on."""
    sizes = (tiles.next_power_of_2(size) for size in (*v.shape[:3], math.prod(grid[:-1]), grid[-1]))
    flags = (arguments[name] is not None for name in ("h", "r", "mask"))
    return *sizes, v.shape[3], v.dtype, len(grid), arguments["CHANNELS"], arguments["DROPOUT"], *flags


def separable_query_attention_fwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, M, head_dim_v) in v's dtype, lse (batch, heads, M)."""
    batch, heads, _, head_dim = v.shape
    out = v.new_empty(batch, math.prod(grid), heads, head_dim)
    lse = form.new_empty(batch, heads, math.prod(grid))
    chunk = _chunk(v, 256)
    arguments = _arguments(form, v, h, x, r, mask, grid, dropout_p, seed)
    arguments |= {"out": out, "lse": lse, "CHUNK": chunk}

    def run(choice: Tiles) -> None:
        lines = batch * heads * math.prod(grid[:-1])
        programs = lines * triton.cdiv(grid[-1], choice.rows), triton.cdiv(head_dim, chunk)
        _launch(separable_query_attention_fwd_kernel, programs, choice, arguments)

    if out.numel():
        default = _fwd_tiles(grid, v, chunk, dropout_p > 0)
        candidates = [_clipped(128, 64, 8, grid, v), _clipped(32, 64, 4, grid, v)]
        problem = _problem(arguments, v, grid)
        run(tiles.choose("separable_query_attention_fwd_kernel", problem, default, candidates, run))
    return out.transpose(1, 2), lse


def separable_query_attention_bwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> Gradients:
    """Gradients of the form, v, h, x and r, empty where not needed."""
    needs_form, needs_v, needs_h, needs_x, needs_r = needs
    arguments = _arguments(form, v, h, x, r, mask, grid, dropout_p, seed)
    names = ("d_out_batch", "d_out_head", "d_out_query", "d_out_channel")
    gradient = {"d_out": d_out, **dict(zip(names, d_out.stride(), strict=True))}
    arguments |= {**gradient, "lse": lse, "delta": _delta(out, gradient)}
    d_form, d_h = form.new_empty(0), form.new_empty(0)
    if needs_form or needs_h:
        d_form, d_h = _bwd_keys(arguments, form, v, h, grid)
        d_form, d_h = (d if needed else form.new_empty(0) for d, needed in ((d_form, needs_form), (d_h, needs_h)))
    d_v = _bwd_values(arguments, v, grid) if needs_v else v.new_empty(0)
    d_x, d_r = _bwd_queries(arguments, v, x, r, grid, needs_x, needs_r)
    return d_form, d_v, d_h, d_x, d_r


def _delta(out: Tensor, gradient: dict[str, Any]) -> Tensor:
    batch, heads, queries, head_dim = out.shape
    delta = out.new_empty(batch, heads, queries, dtype=torch.float32)
    block = min(tiles.next_power_of_2(queries, 16), 32)
    if delta.numel():
        separable_query_attention_bwd_delta_kernel[batch * heads * triton.cdiv(queries, block),](
            out.transpose(1, 2).contiguous(), delta=delta, queries=queries, heads=heads, head_dim=head_dim, **gradient,
            QUERIES=block, CHUNK=_chunk(out, 128), **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip
    return delta


def _parts(v: Tensor, grid: Sequence[int], choice: Tiles, chunks: int) -> tuple[int, int]:
    """How many parts programs that own keys split the columns and the outer positions into, to fill the GPU."""
    batch, heads, keys, _ = v.shape
    programs = batch * heads * triton.cdiv(keys, choice.columns) * chunks
    wanted = triton.cdiv(4 * multiprocessors(v.device), max(programs, 1))
    column_parts = max(min(triton.cdiv(grid[-1], choice.rows), wanted), 1)
    return column_parts, max(min(math.prod(grid[:-1]), triton.cdiv(wanted, column_parts)), 1)


def _bwd_keys(
    arguments: dict[str, Any], form: Tensor, v: Tensor, h: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of the form and h. Parts of the queries have sums of their own, which are added up here."""
    batch, heads, keys, _ = v.shape
    chunk = _chunk(v, 128 if v.shape[3] <= 128 else 64)
    choice = _bwd_keys_tiles(grid, v)
    column_parts, outer_parts = _parts(v, grid, choice, 1)
    parts = column_parts * outer_parts
    d_entries = form.new_zeros(batch, heads, parts, arguments["column_entry"], keys)
    d_table = form.new_empty(batch, heads, outer_parts, grid[-1], keys)
    d_bias = form.new_empty(batch, heads, parts, keys)
    results = {"d_entries": d_entries, "d_table": d_table, "d_h": d_bias, "d_v": None}
    split = {"column_parts": column_parts, "outer_parts": outer_parts, "CHUNK": chunk, "WHOLE": chunk >= v.shape[3]}
    programs = batch * heads * triton.cdiv(keys, choice.columns) * parts
    if programs:
        _launch(separable_query_attention_bwd_keys_kernel, (programs, 1), choice, arguments | results | split)
    d_form = torch.cat((d_entries.sum(2), d_table.sum(2)), 2).sum_to_size(form.shape)
    return d_form, form.new_empty(0) if h is None else d_bias.sum(2).sum_to_size(h.shape)


def _bwd_values(arguments: dict[str, Any], v: Tensor, grid: Sequence[int]) -> Tensor:
    """The gradient of v: apart from those of the scores, which need all channels at once and as many registers again,
    and whose weights lie differently in them."""
    batch, heads, keys, head_dim = v.shape
    chunk = _chunk(v, 128)
    chunks = triton.cdiv(head_dim, chunk)
    choice = _bwd_keys_tiles(grid, v)
    column_parts, outer_parts = _parts(v, grid, choice, chunks)
    parts = column_parts * outer_parts
    d_v = v.new_empty(batch, heads, parts, keys, head_dim, dtype=v.dtype if parts == 1 else torch.float32)
    results = {"d_entries": None, "d_table": None, "d_h": None, "d_v": d_v}
    split = {"column_parts": column_parts, "outer_parts": outer_parts, "CHUNK": chunk, "WHOLE": chunks == 1}
    programs = batch * heads * triton.cdiv(keys, choice.columns) * parts
    if programs:
        _launch(separable_query_attention_bwd_keys_kernel, (programs, chunks), choice, arguments | results | split)
    return d_v.squeeze(2) if parts == 1 else d_v.sum(2).to(v.dtype)


def _bwd_queries(
    arguments: dict[str, Any],
    v: Tensor,
    x: Tensor | None,
    r: Tensor | None,
    grid: Sequence[int],
    needs_x: bool,
    needs_r: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and r. Where all entries of the batch have the same queries, a program adds them up."""
    shared = all(tensor is None or tensor.shape[0] == 1 for tensor in (x, r))
    groups = min(v.shape[0], 1) if shared else v.shape[0]
    nothing, queries, channels = arguments["delta"].new_empty(0), math.prod(grid), arguments["CHANNELS"]
    d_x = None if x is None or not needs_x else nothing.new_empty(groups, queries, channels)
    d_r = None if r is None or not needs_r else nothing.new_empty(groups, queries)
    chunk = _chunk(v, 128 if v.shape[3] <= 128 else 64)
    choice = _bwd_queries_tiles(grid, v, channels > 0, arguments["DROPOUT"])
    programs = groups * math.prod(grid[:-1]) * triton.cdiv(grid[-1], choice.rows)
    if programs and (d_x is not None or d_r is not None):
        arguments |= {
            "d_x": d_x if channels else None,
            "d_r": d_r,
            "batches": v.shape[0] // groups,
            "CHUNK": chunk,
            "WHOLE": chunk >= v.shape[3],
            "DATA": tiles.next_power_of_2(channels, 16),
            "DATA_PRECISION": runtime.input_precision(torch.float32),
        }
        _launch(separable_query_attention_bwd_queries_kernel, (programs,), choice, arguments)
    return (
        nothing if x is None or d_x is None else d_x.sum_to_size(x.shape),
        nothing if r is None or d_r is None else d_r.sum_to_size(r.shape),
    )
