"""Cross-attention in Triton: tiles of queries x keys, products over head_dim chunk by chunk, any split of either side.

Signatures as in backends/reference/cross_attention.py. Results and scratch lie as (batch, rows, heads, channels).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.centring import common_key
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

# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def first_channel(CHANNELS: tl.constexpr, SHARE: tl.constexpr):
    """Where the share of channels begins of a program along axis 2; known to the compiler where there is but one."""
    return 0 if SHARE >= CHANNELS else tl.program_id(2) * SHARE


@triton.jit
def at_rows(base, batch, head, row, stride_batch, stride_head, stride_row):
    return base + batch * stride_batch + head * stride_head + row * stride_row


@triton.jit
def reference_points(lse, at, inside):
    """lse in powers of two, such that a query with nothing to attend to, or none at all, gets weights of zero."""
    natural = tl.load(lse + at, mask=inside, other=-float("inf"))
    return tl.where(natural == -float("inf"), float("inf"), natural * LOG2E)


@triton.jit
def products(left, left_inside, left_stride, right, right_inside, right_stride, CHANNELS: tl.constexpr,
             CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """left @ right^T of rows given by pointers, summed over chunks of their channels."""
    result = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    for first in range(0, CHANNELS, CHUNK):
        l_tile = load_tile(left, left_inside, first, left_stride, CHANNELS, CHUNK)
        r_tile = load_tile(right, right_inside, first, right_stride, CHANNELS, CHUNK)
        result = tl.dot(l_tile, tl.trans(r_tile), result, input_precision=PRECISION)
    return result


@triton.jit(do_not_specialize=["seed", "threshold"])
def cross_attention_fwd_kernel(
    q, k, v, mask, out, lse, peaks, totals,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel,
    mask_batch, mask_row, heads, queries, keys, step, size, scale, seed, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, SPLIT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """A block of queries over a part of the keys; a program's share of the values' channels is WIDTH + TAIL of them.

    With SPLIT, out, peaks and totals are the partial results of merge_kernel; else out and lse are the call's.
    """
    batch, head, query, query_inside = program(queries, heads, ROWS)
    q_rows = at_rows(q, batch, head, query, q_batch, q_head, q_row)
    channel = first_channel(HEAD_DIM_V, WIDTH + TAIL)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    if TAIL:
        acc_tail = tl.zeros((ROWS, TAIL), tl.float32)
    begin, end = part_of(keys, step)
    for first in range(begin, end, COLUMNS):
        key = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        attend = attended(mask, batch, key, end, mask_batch, mask_row)
        k_rows = at_rows(k, batch, head, key, k_batch, k_head, k_row)
        v_rows = at_rows(v, batch, head, key, v_batch, v_head, v_row)
        s = products(q_rows, query_inside, q_channel, k_rows, attend, k_channel, HEAD_DIM, CHUNK, PRECISION)
        s = tl.where(attend[None, :], s * scale, -float("inf"))
        p, shrink, peak, total = softmax_step(s, peak, total)
        if DROPOUT:
            row = head * queries + query
            p *= keep_scales(seed, batch, row[:, None], key[None, :], threshold, keep_scale)
        p = p.to(v.dtype.element_ty)
        v_tile = load_tile(v_rows, attend, channel, v_channel, HEAD_DIM_V, WIDTH)
        acc = tl.dot(p, v_tile, acc * shrink[:, None], input_precision=PRECISION)
        if TAIL:
            v_tile = load_tile(v_rows, attend, channel + WIDTH, v_channel, HEAD_DIM_V, TAIL)
            acc_tail = tl.dot(p, v_tile, acc_tail * shrink[:, None], input_precision=PRECISION)

    out_rows = at_results(out, batch, head, query, queries, heads, size, HEAD_DIM_V)
    if SPLIT:
        at = tl.program_id(1).to(tl.int64) * size + (batch * queries + query) * heads + head
        tl.store(peaks + at, peak, mask=query_inside)
        tl.store(totals + at, total, mask=query_inside)
    else:
        natural = log_sum_exp(peak, total).to(lse.dtype.element_ty)
        tl.store(lse + (batch * heads + head) * queries + query, natural, mask=query_inside)
        total = tl.where(total == 0, 1.0, total)
        acc = acc / total[:, None]
        if TAIL:
            acc_tail = acc_tail / total[:, None]
    store_tile(out_rows, query_inside, channel, acc, HEAD_DIM_V, WIDTH)
    if TAIL:
        store_tile(out_rows, query_inside, channel + WIDTH, acc_tail, HEAD_DIM_V, TAIL)


@triton.jit(do_not_specialize=["seed", "threshold"])
def cross_attention_bwd_rows_kernel(
    q, k, v, mask, out, lse, d_out, delta, d_q, rests,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel,
    out_batch, out_head, out_row, out_channel, d_batch, d_head, d_row, d_channel,
    mask_batch, mask_row, heads, queries, keys, step, size, scale, d_scale, seed, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """d_q of a block of queries from a part of the keys, sum over m of dS[i, m] k_m, and that of dS, in float32.

    And delta for the keys' kernel.
    """
    batch, head, query, query_inside = program(queries, heads, ROWS)
    q_rows = at_rows(q, batch, head, query, q_batch, q_head, q_row)
    d_rows = at_rows(d_out, batch, head, query, d_batch, d_head, d_row)
    out_rows = at_rows(out, batch, head, query, out_batch, out_head, out_row)
    channel = first_channel(HEAD_DIM, WIDTH + TAIL)
    at = (batch * heads + head) * queries + query
    reference = reference_points(lse, at, query_inside)
    d = tl.zeros((ROWS,), tl.float32)
    for first in range(0, HEAD_DIM_V, CHUNK):
        out_tile = load_tile(out_rows, query_inside, first, out_channel, HEAD_DIM_V, CHUNK).to(tl.float32)
        d += tl.sum(out_tile * load_tile(d_rows, query_inside, first, d_channel, HEAD_DIM_V, CHUNK), 1)
    tl.store(delta + at, d, mask=query_inside & (tl.program_id(1) + tl.program_id(2) == 0))

    WIDE: tl.constexpr = k.dtype.element_ty == tl.float32
    rest = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    if TAIL:
        acc_tail = tl.zeros((ROWS, TAIL), tl.float32)
    begin, end = part_of(keys, step)
    for first in range(begin, end, COLUMNS):
        key = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        attend = attended(mask, batch, key, end, mask_batch, mask_row)
        k_rows = at_rows(k, batch, head, key, k_batch, k_head, k_row)
        v_rows = at_rows(v, batch, head, key, v_batch, v_head, v_row)
        s = products(q_rows, query_inside, q_channel, k_rows, attend, k_channel, HEAD_DIM, CHUNK, PRECISION)
        u = products(d_rows, query_inside, d_channel, v_rows, attend, v_channel, HEAD_DIM_V, CHUNK, PRECISION)
        if DROPOUT:
            row = head * queries + query
            u *= keep_scales(seed, batch, row[:, None], key[None, :], threshold, keep_scale)
        d_s = tl.exp2(s * scale - reference[:, None]) * (u - d[:, None])
        d_s = tl.where(attend[None, :], d_s, 0.0).to(k.dtype.element_ty)
        if WIDE:
            rest += tl.sum(d_s, 1)
        k_tile = load_tile(k_rows, attend, channel, k_channel, HEAD_DIM, WIDTH)
        acc = tl.dot(d_s, k_tile, acc, input_precision=PRECISION)
        if TAIL:
            k_tile = load_tile(k_rows, attend, channel + WIDTH, k_channel, HEAD_DIM, TAIL)
            acc_tail = tl.dot(d_s, k_tile, acc_tail, input_precision=PRECISION)

    results = at_results(d_q, batch, head, query, queries, heads, size, HEAD_DIM)
    store_tile(results, query_inside, channel, acc * d_scale, HEAD_DIM, WIDTH)
    if TAIL:
        store_tile(results, query_inside, channel + WIDTH, acc_tail * d_scale, HEAD_DIM, TAIL)
    if WIDE:
        rests += tl.program_id(1).to(tl.int64) * size + at
        tl.store(rests, rest * d_scale, mask=query_inside & (tl.program_id(2) == 0))


@triton.jit(do_not_specialize=["seed", "threshold"])
def cross_attention_bwd_tokens_kernel(
    q, k, v, mask, lse, d_out, delta, d_k, d_v,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel, v_batch, v_head, v_row, v_channel,
    d_batch, d_head, d_row, d_channel,
    mask_batch, mask_row, heads, queries, keys, step, size, scale, d_scale, seed, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    WIDTH_V: tl.constexpr, TAIL_V: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of a block of keys from a part of the queries: sums over i of dS[i, m] q_i and of p keep d_out_i."""
    batch, head, key, key_inside = program(keys, heads, ROWS)
    attend = attended(mask, batch, key, keys, mask_batch, mask_row)
    k_rows = at_rows(k, batch, head, key, k_batch, k_head, k_row)
    v_rows = at_rows(v, batch, head, key, v_batch, v_head, v_row)
    channel, channel_v = first_channel(HEAD_DIM, WIDTH + TAIL), first_channel(HEAD_DIM_V, WIDTH_V + TAIL_V)
    k_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    v_acc = tl.zeros((ROWS, WIDTH_V), tl.float32)
    if TAIL:
        k_tail = tl.zeros((ROWS, TAIL), tl.float32)
    if TAIL_V:
        v_tail = tl.zeros((ROWS, TAIL_V), tl.float32)
    begin, end = part_of(queries, step)
    for first in range(begin, end, COLUMNS):
        query = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = query < end
        q_rows = at_rows(q, batch, head, query, q_batch, q_head, q_row)
        d_rows = at_rows(d_out, batch, head, query, d_batch, d_head, d_row)
        at = (batch * heads + head) * queries + query
        s = products(k_rows, attend, k_channel, q_rows, inside, q_channel, HEAD_DIM, CHUNK, PRECISION)
        p = tl.exp2(s * scale - reference_points(lse, at, inside)[None, :])
        u = products(v_rows, attend, v_channel, d_rows, inside, d_channel, HEAD_DIM_V, CHUNK, PRECISION)
        d = tl.load(delta + at, mask=inside, other=0.0)[None, :]
        if DROPOUT:
            row = head * queries + query
            keep = keep_scales(seed, batch, row[None, :], key[:, None], threshold, keep_scale)
            d_s = (p * (keep * u - d)).to(q.dtype.element_ty)
            p *= keep
        else:
            d_s = (p * (u - d)).to(q.dtype.element_ty)
        p = p.to(d_out.dtype.element_ty)
        d_tile = load_tile(d_rows, inside, channel_v, d_channel, HEAD_DIM_V, WIDTH_V)
        v_acc = tl.dot(p, d_tile, v_acc, input_precision=PRECISION)
        if TAIL_V:
            d_tile = load_tile(d_rows, inside, channel_v + WIDTH_V, d_channel, HEAD_DIM_V, TAIL_V)
            v_tail = tl.dot(p, d_tile, v_tail, input_precision=PRECISION)
        q_tile = load_tile(q_rows, inside, channel, q_channel, HEAD_DIM, WIDTH)
        k_acc = tl.dot(d_s, q_tile, k_acc, input_precision=PRECISION)
        if TAIL:
            q_tile = load_tile(q_rows, inside, channel + WIDTH, q_channel, HEAD_DIM, TAIL)
            k_tail = tl.dot(d_s, q_tile, k_tail, input_precision=PRECISION)

    # What a masked key's row holds is not its gradient: its scores were those of zeros.
    hidden = ~attend[:, None]
    k_results = at_results(d_k, batch, head, key, keys, heads, size, HEAD_DIM)
    v_results = at_results(d_v, batch, head, key, keys, heads, size, HEAD_DIM_V)
    store_tile(k_results, key_inside, channel, tl.where(hidden, 0.0, k_acc * d_scale), HEAD_DIM, WIDTH)
    store_tile(v_results, key_inside, channel_v, tl.where(hidden, 0.0, v_acc), HEAD_DIM_V, WIDTH_V)
    if TAIL:
        store_tile(k_results, key_inside, channel + WIDTH, tl.where(hidden, 0.0, k_tail * d_scale), HEAD_DIM, TAIL)
    if TAIL_V:
        store_tile(v_results, key_inside, channel_v + WIDTH_V, tl.where(hidden, 0.0, v_tail), HEAD_DIM_V, TAIL_V)


# --- launches ---------------------------------------------------------------------------------------------------------


def limits(*inputs: Tensor) -> Limits:
    """float32 multiplies without tensor cores; rows that are not aligned are loaded element by element."""
    aligned = all(t.stride(-1) == 1 and all(s % 16 == 0 for s in t.stride()[:-1]) for t in inputs)
    if inputs[0].dtype == torch.float32:
        return Limits(32, 32, 32, 256, 128) if aligned else Limits(32, 16, 32, 256, 96)
    return Limits(64, 32, 64, 512, 256) if aligned else Limits(64, 16, 32, 512, 128)


def summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(parts, batch, rows, heads, channels) -> (batch, heads, rows, channels), the parts added up in their order."""
    return (partial[0] if partial.shape[0] == 1 else partial.sum(0)).to(dtype).transpose(1, 2)


def _options(q: Tensor, v: Tensor, dropout_p: float, most: Limits) -> dict[str, Any]:
    return {
        "HEAD_DIM": q.shape[3],
        "HEAD_DIM_V": v.shape[3],
        "DROPOUT": dropout_p > 0,
        "PRECISION": runtime.input_precision(q.dtype),
        "CHUNK": min(tiles.next_power_of_2(max(q.shape[3], v.shape[3]), 16), most.chunk),
        **runtime.LAUNCH_OPTIONS,
    }


def _problem(q: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What the choice of tiles depends on."""
    (batch, heads, queries, head_dim), (keys, head_dim_v) = q.shape, v.shape[2:]
    return batch * heads, *map(tiles.next_power_of_2, (queries, keys)), head_dim, head_dim_v, q.dtype


def _results(like: Tensor, parts: int, rows: int, channels: int) -> Tensor:
    """(parts, batch, rows, heads, channels), in float32 where there is something to add up."""
    batch, heads = like.shape[:2]
    dtype = torch.float32 if parts > 1 else like.dtype
    return like.new_empty(parts, batch, rows, heads, channels, dtype=dtype)


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, head_dim_v) in q's dtype, lse (batch, heads, queries) in float32."""
    (batch, heads, queries, _), (keys, head_dim_v) = q.shape, v.shape[2:]
    out = _results(q, 1, queries, head_dim_v)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    mask, *mask_strides = mask_arguments(mask)
    most = limits(q, k, v)
    channels = share(head_dim_v, most.channels)

    def run(sizes: Tiles) -> None:
        partial, peaks, totals = out, None, None
        if sizes.parts > 1:
            partial = _results(q, sizes.parts, queries, head_dim_v)
            peaks, totals = lse.new_empty(2, sizes.parts, lse.numel())
        grid = (batch * heads * triton.cdiv(queries, sizes.rows), sizes.parts, channels.count)
        cross_attention_fwd_kernel[grid](
            q, k, v, mask, partial, lse, peaks, totals, *q.stride(), *k.stride(), *v.stride(), *mask_strides,
            heads, queries, keys, step_of(keys, sizes), lse.numel(), scale * LOG2E.value,
            seed, threshold(dropout_p), 1 / (1 - dropout_p),
            SPLIT=sizes.parts > 1, ROWS=sizes.rows, COLUMNS=sizes.columns, WIDTH=channels.width, TAIL=channels.tail,
            num_warps=sizes.warps, num_stages=sizes.stages, **_options(q, v, dropout_p, most),
        )  # fmt: skip
        if peaks is not None and totals is not None:
            merge(partial, peaks, totals, out, lse, queries, heads)

    if lse.numel():
        width = channels.width + channels.tail
        default = choose_tiles(queries, keys, batch * heads * channels.count, width, most, q.device)
        run(tiles.choose("cross_attention_fwd_kernel", _problem(q, v), default, candidates(default), run))
    return summed(out, q.dtype), lse


def cross_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtype."""
    (batch, heads, queries, head_dim), (keys, head_dim_v) = q.shape, v.shape[2:]
    if not q.numel() or not k.numel():
        d_q, d_k, d_v = (_results(t, 1, t.shape[2], t.shape[3]).zero_() for t in (q, k, v))
        return summed(d_q, q.dtype), summed(d_k, q.dtype), summed(d_v, q.dtype)
    delta = torch.empty_like(lse)
    # Contiguous, so that its sums do not depend on strides.
    common = common_key(k.contiguous(), mask) if q.dtype == torch.float32 else None
    mask, *mask_strides = mask_arguments(mask)
    strides = (*q.stride(), *k.stride(), *v.stride())
    numbers = (scale * LOG2E.value, scale, seed, threshold(dropout_p), 1 / (1 - dropout_p))
    most = limits(q, k, v, out, d_out)
    options, problem = _options(q, v, dropout_p, most), _problem(q, v)

    def run_rows(sizes: Tiles) -> Tensor:
        d_q, rests = _results(q, sizes.parts, queries, head_dim), lse.new_empty(sizes.parts, *lse.shape)
        grid = (batch * heads * triton.cdiv(queries, sizes.rows), sizes.parts, channels.count)
        cross_attention_bwd_rows_kernel[grid](
            q, k, v, mask, out, lse, d_out, delta, d_q, rests, *strides, *out.stride(), *d_out.stride(), *mask_strides,
            heads, queries, keys, step_of(keys, sizes), lse.numel(), *numbers,
            ROWS=sizes.rows, COLUMNS=sizes.columns, WIDTH=channels.width, TAIL=channels.tail,
            num_warps=sizes.warps, num_stages=sizes.stages, **options,
        )  # fmt: skip
        return summed(d_q, q.dtype) if common is None else summed(d_q, q.dtype) - rests.sum(0)[..., None] * common

    channels = share(head_dim, most.channels)
    width = channels.width + channels.tail
    default = choose_tiles(queries, keys, batch * heads * channels.count, width, most, q.device)
    d_q = run_rows(tiles.choose("cross_attention_bwd_rows_kernel", problem, default, candidates(default), run_rows))

    def run_tokens(sizes: Tiles) -> tuple[Tensor, Tensor]:
        d_k, d_v = (_results(q, sizes.parts, keys, channels) for channels in (head_dim, head_dim_v))
        grid = (batch * heads * triton.cdiv(keys, sizes.rows), sizes.parts, count)
        cross_attention_bwd_tokens_kernel[grid](
            q, k, v, mask, lse, d_out, delta, d_k, d_v, *strides, *d_out.stride(), *mask_strides,
            heads, queries, keys, step_of(queries, sizes), batch * heads * keys, *numbers,
            ROWS=sizes.rows, COLUMNS=sizes.columns,
            WIDTH=of_k.width, TAIL=of_k.tail, WIDTH_V=of_v.width, TAIL_V=of_v.tail,
            num_warps=sizes.warps, num_stages=sizes.stages, **options,
        )  # fmt: skip
        return summed(d_k, q.dtype), summed(d_v, q.dtype)

    count = -(-max(head_dim, head_dim_v) // most.two_channels)
    of_k, of_v = (share(channels, -(-channels // count)) for channels in (head_dim, head_dim_v))
    width = of_k.width + of_k.tail + of_v.width + of_v.tail
    default = choose_tiles(keys, queries, batch * heads * count, width, most, q.device)
    d_k, d_v = run_tokens(
        tiles.choose("cross_attention_bwd_tokens_kernel", problem, default, candidates(default), run_tokens)
    )
    return d_q, d_k, d_v
