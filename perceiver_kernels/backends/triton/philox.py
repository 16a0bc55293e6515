"""Dropout decisions in Triton: bit for bit those of backends/reference/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl


def threshold(dropout_p: float) -> int:
    """The smallest random word that keeps a weight."""
    return int(dropout_p * 2**32)


@triton.jit
def keep_scales(seed, batch, row, token, threshold, keep_scale):
    """0 where the weight of (batch, row, token) is dropped, keep_scale = 1 / (1 - dropout_p) where it is kept.

    seed and threshold are int64, the others int32 or wider and broadcast; token // 4 and row must be below 2^32.
    """
    zeros = tl.zeros_like(batch + row + token).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, zeros + (token // 4).to(tl.uint32), zeros + row.to(tl.uint32), zeros + batch.to(tl.uint32), zeros
    )
    word = token % 4 + zeros.to(tl.int32)
    chosen = tl.where(word == 0, word_0, tl.where(word == 1, word_1, tl.where(word == 2, word_2, word_3)))
    return tl.where(chosen.to(tl.int64) >= threshold, keep_scale, 0.0)
