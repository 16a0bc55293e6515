"""latent_attention on a GPU: a tile of queries meets all keys, tile by tile; in backward keys meet all queries, too."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.gpu import multiprocessors
from perceiver_kernels.backends.layout import rows_first
from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.backends.triton.exponential import LN2, LOG2E, exp2
from perceiver_kernels.backends.triton.philox import keep_scales, threshold
from perceiver_kernels.backends.triton.tiles import Tiles


@triton.jit
def program(heads, rows, ROWS: tl.constexpr):
    """Input, head and rows of this program. Neighbours share a head, so that what they all read stays in the cache."""
    tiles_of_head = tl.cdiv(rows, ROWS)
    tile, head = tl.program_id(0) % tiles_of_head, tl.program_id(0) // tiles_of_head
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), tile * ROWS + tl.arange(0, ROWS)


@triton.jit
def pointers(tensor, batch, head, row, channel, batch_stride, head_stride, row_stride):
    """To a tile of one head of a (batch, heads, rows, channels) tensor whose channels are contiguous."""
    start = tensor + batch * batch_stride + head * head_stride
    return start + row.to(tl.int64)[:, None] * row_stride + channel[None, :]


@triton.jit
def results(tensor, batch, head, row, channel, heads, rows, CHANNELS: tl.constexpr):
    """To a tile of a result, which lies in memory as (batch, rows, heads, channels)."""
    return tensor + (((batch * rows + row) * heads + head) * CHANNELS)[:, None] + channel[None, :]


@triton.jit
def load_tile(pointers, row, rows, channel, EVEN: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile, with zeros for rows (EVEN: none) and channels (CHANNELS == WIDTH: none) beyond the tensor's."""
    if EVEN and CHANNELS == WIDTH:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=(channel < CHANNELS)[None, :], other=0.0)
    elif CHANNELS == WIDTH:
        return tl.load(pointers, mask=(row < rows)[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=(row < rows)[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def store_tile(pointers, value, row, rows, channel, CHANNELS: tl.constexpr):
    mask = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("seed", "threshold"))
def latent_attention_fwd_kernel(
    q, k, v, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, queries, keys, score_scale, seed, threshold, keep_scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, NEGATIVE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """out and lse of ROWS queries. score_scale is |scale| log2(e), so that a greatest product is a greatest score."""
    batch, head, row = program(heads, queries, ROWS)
    channel, channel_v, column = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, COLUMNS)
    q_tile = load_tile(
        pointers(q, batch, head, row, channel, q_batch, q_head, q_row), row, queries, channel, False, DIM, WIDTH
    )
    if NEGATIVE:
        q_tile = -q_tile
    k_pointers = pointers(k, batch, head, column, channel, k_batch, k_head, k_row)
    v_pointers = pointers(v, batch, head, column, channel_v, v_batch, v_head, v_row)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH_V), tl.float32)
    for first in tl.range(0, keys, COLUMNS):
        token = first + column
        k_tile = load_tile(k_pointers, token, keys, channel, EVEN, DIM, WIDTH)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if not EVEN:
            product = tl.where((token < keys)[None, :], product, -float("inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(product, 1))
        # Where no product has been finite yet, weights are 0, not the NaN of a difference of infinities.
        base = tl.where(highest == -float("inf"), 0.0, highest * score_scale)
        weight = exp2(product * score_scale - base[:, None], COMPILED)
        rescale = exp2(before * score_scale - base, COMPILED)
        total = total * rescale + tl.sum(weight, 1)
        if DROPOUT:
            weight *= keep_scales(seed, batch, (head * queries + row)[:, None], token[None, :], threshold, keep_scale)
        v_tile = load_tile(v_pointers, token, keys, channel_v, EVEN, DIM_V, WIDTH_V)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
        k_pointers += COLUMNS * tl.cast(k_row, tl.int64)
        v_pointers += COLUMNS * tl.cast(v_row, tl.int64)
    nothing = highest == -float("inf")
    log_total = tl.where(nothing, highest, (highest * score_scale + tl.log2(total)) * LN2)
    tl.store(lse + (batch * heads + head) * queries + row, log_total, mask=row < queries)
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    store_tile(results(out, batch, head, row, channel_v, heads, queries, DIM_V), acc, row, queries, channel_v, DIM_V)


@triton.jit
def load_log2_total(lse, batch, head, row, heads, queries):
    """log2 of the total weight of rows, +inf (then every weight is 0) for those that have none or do not exist."""
    value = tl.load(lse + (batch * heads + head) * queries + row, mask=row < queries, other=-float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value * LOG2E)


@triton.jit(do_not_specialize=("seed", "threshold"))
def latent_attention_bwd_queries_kernel(
    q, k, v, out, lse, d_out, delta, d_q,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_out_batch, d_out_head, d_out_row,
    heads, queries, keys, scale, score_scale, seed, threshold, keep_scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """d_q and delta = sum(d_out * out) of ROWS queries."""
    batch, head, row = program(heads, queries, ROWS)
    channel, channel_v, column = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, COLUMNS)
    q_tile = load_tile(
        pointers(q, batch, head, row, channel, q_batch, q_head, q_row), row, queries, channel, False, DIM, WIDTH
    )
    d_out_tile = load_tile(
        pointers(d_out, batch, head, row, channel_v, d_out_batch, d_out_head, d_out_row),
        row, queries, channel_v, False, DIM_V, WIDTH_V,
    )  # fmt: skip
    out_tile = load_tile(
        results(out, batch, head, row, channel_v, heads, queries, DIM_V), row, queries, channel_v, False, DIM_V, WIDTH_V
    )
    row_delta = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + (batch * heads + head) * queries + row, row_delta, mask=row < queries)
    log2_total = load_log2_total(lse, batch, head, row, heads, queries)
    k_pointers = pointers(k, batch, head, column, channel, k_batch, k_head, k_row)
    v_pointers = pointers(v, batch, head, column, channel_v, v_batch, v_head, v_row)
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float32
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    key_sum, key_squares = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in tl.range(0, keys, COLUMNS):
        token = first + column
        k_tile = load_tile(k_pointers, token, keys, channel, EVEN, DIM, WIDTH)
        v_tile = load_tile(v_pointers, token, keys, channel_v, EVEN, DIM_V, WIDTH_V)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weight = exp2(product * score_scale - log2_total[:, None], COMPILED)
        d_weight = tl.dot(d_out_tile, tl.trans(v_tile), input_precision=PRECISION)
        if DROPOUT:
            d_weight *= keep_scales(seed, batch, (head * queries + row)[:, None], token[None, :], threshold, keep_scale)
        d_score = weight * (d_weight - row_delta[:, None])
        if not EVEN:
            d_score = tl.where((token < keys)[None, :], d_score, 0.0)
        if WIDE:
            rest += tl.sum(d_score, 1)
            key_sum += tl.sum(k_tile, 0)
            key_squares += tl.sum(k_tile * k_tile, 0)
        acc = tl.dot(d_score.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
        k_pointers += COLUMNS * tl.cast(k_row, tl.int64)
        v_pointers += COLUMNS * tl.cast(v_row, tl.int64)
    if WIDE:  # what rounding leaves of a sum of d_score, times what keys have in common (docs/dense_attention.md)
        mean = key_sum / tl.maximum(keys, 1)
        mean = tl.where(2 * mean * key_sum > key_squares, mean, 0.0)  # as common_key of backends/centring.py
        acc -= rest[:, None] * mean[None, :]
    store_tile(results(d_q, batch, head, row, channel, heads, queries, DIM), acc * scale, row, queries, channel, DIM)


@triton.jit(do_not_specialize=("seed", "threshold"))
def latent_attention_bwd_keys_kernel(
    q, k, v, lse, d_out, delta, d_k, d_v,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_out_batch, d_out_head, d_out_row,
    heads, queries, keys, scale, score_scale, seed, threshold, keep_scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of ROWS keys, from tiles of (keys, queries)."""
    batch, head, token = program(heads, keys, ROWS)
    channel, channel_v, column = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, COLUMNS)
    k_tile = load_tile(
        pointers(k, batch, head, token, channel, k_batch, k_head, k_row), token, keys, channel, False, DIM, WIDTH
    )
    v_tile = load_tile(
        pointers(v, batch, head, token, channel_v, v_batch, v_head, v_row),
        token,
        keys,
        channel_v,
        False,
        DIM_V,
        WIDTH_V,
    )
    q_pointers = pointers(q, batch, head, column, channel, q_batch, q_head, q_row)
    d_out_pointers = pointers(d_out, batch, head, column, channel_v, d_out_batch, d_out_head, d_out_row)
    acc_k = tl.zeros((ROWS, WIDTH), tl.float32)
    acc_v = tl.zeros((ROWS, WIDTH_V), tl.float32)
    for first in tl.range(0, queries, COLUMNS):
        row = first + column
        q_tile = load_tile(q_pointers, row, queries, channel, EVEN, DIM, WIDTH)
        log2_total = load_log2_total(lse, batch, head, row, heads, queries)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        weight = exp2(product * score_scale - log2_total[None, :], COMPILED)
        d_out_tile = load_tile(d_out_pointers, row, queries, channel_v, EVEN, DIM_V, WIDTH_V)
        row_delta = tl.load(delta + (batch * heads + head) * queries + row, mask=row < queries, other=0.0)
        d_weight = tl.dot(v_tile, tl.trans(d_out_tile), input_precision=PRECISION)
        kept = weight
        if DROPOUT:
            keep = keep_scales(seed, batch, (head * queries + row)[None, :], token[:, None], threshold, keep_scale)
            kept = weight * keep
            d_weight *= keep
        acc_v = tl.dot(kept.to(d_out_tile.dtype), d_out_tile, acc_v, input_precision=PRECISION)
        d_score = weight * (d_weight - row_delta[None, :])
        acc_k = tl.dot(d_score.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION)
        q_pointers += COLUMNS * tl.cast(q_row, tl.int64)
        d_out_pointers += COLUMNS * tl.cast(d_out_row, tl.int64)
    store_tile(results(d_k, batch, head, token, channel, heads, keys, DIM), acc_k * scale, token, keys, channel, DIM)
    store_tile(results(d_v, batch, head, token, channel_v, heads, keys, DIM_V), acc_v, token, keys, channel_v, DIM_V)


# Tiles by how a kernel multiplies and by the wider head dimension, up to 64, 128 and 256. No registers are spilled on
# sm_80 and sm_90 (tests/test_latent_attention.py). In full float32 there are no tensor cores: small tiles, many warps.
TILES = {
    "fwd": {
        "narrow": (Tiles(128, 64), Tiles(128, 64, warps=8), Tiles(64, 32, warps=8)),
        "tf32": (Tiles(64, 32), Tiles(64, 32, warps=8), Tiles(32, 32, warps=8)),
        "ieee": (Tiles(64, 32, warps=8), Tiles(32, 32, warps=8), Tiles(32, 16, warps=8)),
    },
    "bwd_queries": {
        "narrow": (Tiles(64, 64), Tiles(64, 64, warps=8), Tiles(32, 32, warps=8)),
        "tf32": (Tiles(64, 32), Tiles(32, 32, warps=8), Tiles(32, 16, warps=8)),
        "ieee": (Tiles(64, 32, warps=8), Tiles(64, 16, warps=8), Tiles(16, 16, warps=8)),
    },
    "bwd_keys": {
        "narrow": (Tiles(64, 64), Tiles(64, 64, warps=8), Tiles(32, 32, warps=8)),
        "tf32": (Tiles(64, 32), Tiles(32, 32, warps=8), Tiles(32, 16, warps=8)),
        "ieee": (Tiles(64, 32, warps=8), Tiles(32, 32, warps=8), Tiles(16, 16, warps=8)),
    },
}
WIDTHS = (64, 128, 256)


def default_tiles(kernel: str, dtype: torch.dtype, head_dim: int, rows: int, multiprocessors: int) -> Tiles:
    """Tiles for a kernel; smaller ones where a GPU would not be filled.

    Args:
        kernel: "fwd", "bwd_queries" or "bwd_keys".
        dtype, head_dim: of the inputs, the wider of the two head dimensions.
        rows: of all heads of all inputs.
        multiprocessors: of the GPU.
    """
    kind = runtime.input_precision(dtype) if dtype == torch.float32 else "narrow"
    found = TILES[kernel][kind][next(at for at, width in enumerate(WIDTHS) if head_dim <= width)]
    if found.rows == 128 and rows < 128 * multiprocessors:
        return dataclasses.replace(found, rows=64, warps=4)
    return found


def _launch(
    kernel: Any, name: str, q: Tensor, v: Tensor, rows: int, columns: int, arguments: tuple[Any, ...], **options: Any
) -> None:
    """Runs a kernel whose programs take a tile of rows past all columns, in every head of q and v."""
    heads_in_all, dim, dim_v = q.shape[0] * q.shape[1], q.shape[3], v.shape[3]
    if not heads_in_all * rows:
        return
    constants = {
        "DIM": dim,
        "DIM_V": dim_v,
        "WIDTH": tiles.next_power_of_2(dim, 16),
        "WIDTH_V": tiles.next_power_of_2(dim_v, 16),
        "PRECISION": runtime.input_precision(q.dtype),
        "COMPILED": not runtime.interpreting(),
        **options,
    }

    def run(choice: Tiles) -> None:
        kernel[(heads_in_all * triton.cdiv(rows, choice.rows),)](
            *arguments, **constants, ROWS=choice.rows, COLUMNS=choice.columns, EVEN=columns % choice.columns == 0,
            num_warps=choice.warps, num_stages=choice.stages, **runtime.LAUNCH_OPTIONS,
        )  # fmt: skip

    default = default_tiles(
        name.removeprefix("latent_attention_"),
        q.dtype, max(dim, dim_v), heads_in_all * rows, multiprocessors(q.device),
    )  # fmt: skip
    candidates = (
        dataclasses.replace(default, stages=default.stages + 1),
        dataclasses.replace(default, rows=2 * default.rows, warps=8),
        dataclasses.replace(default, columns=2 * default.columns),
    )
    problem = (q.dtype, dim, dim_v, options["DROPOUT"], *map(tiles.next_power_of_2, (heads_in_all, rows, columns)))
    run(tiles.choose(name, problem, default, candidates, run))


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, heads and rows; channels have 1."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _dropout(dropout_p: float, seed: int) -> tuple[int, int, float]:
    return seed, threshold(dropout_p), 1 / (1 - dropout_p)


def latent_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, N, head_dim_v), in memory as (batch, N, heads, head_dim_v), and lse (batch, heads, N)."""
    q, k, v = (_channels_contiguous(tensor) for tensor in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    out, lse = rows_first(q, queries, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    # A scale of 0 times the -inf of a token that does not exist would be NaN.
    score_scale = max(abs(scale) * LOG2E.value, torch.finfo(torch.float32).tiny)
    arguments = (
        q, k, v, out, lse, *_strides(q, k, v), q.shape[1], queries, keys, score_scale,
        *_dropout(dropout_p, seed),
    )  # fmt: skip
    _launch(
        latent_attention_fwd_kernel, "latent_attention_fwd", q, v, queries, keys, arguments,
        NEGATIVE=scale < 0, DROPOUT=dropout_p > 0,
    )  # fmt: skip
    return out, lse


def latent_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in memory as (batch, rows, heads, channels)."""
    q, k, v, d_out = (_channels_contiguous(tensor) for tensor in (q, k, v, d_out))
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    queries, keys = q.shape[2], k.shape[2]
    d_q, d_k, d_v = (rows_first(tensor, *tensor.shape[2:]) for tensor in (q, k, v))
    delta = torch.empty_like(lse)
    shared = (
        *_strides(q, k, v, d_out), q.shape[1], queries, keys, scale, scale * LOG2E.value, *_dropout(dropout_p, seed),
    )  # fmt: skip
    _launch(
        latent_attention_bwd_queries_kernel, "latent_attention_bwd_queries", q, v, queries, keys,
        (q, k, v, out, lse, d_out, delta, d_q, *shared), DROPOUT=dropout_p > 0,
    )  # fmt: skip
    _launch(
        latent_attention_bwd_keys_kernel, "latent_attention_bwd_keys", q, v, keys, queries,
        (q, k, v, lse, d_out, delta, d_k, d_v, *shared), DROPOUT=dropout_p > 0,
    )  # fmt: skip
    return d_q, d_k, d_v
