"""Philox 4x32-10 in integer tensors: the dropout masks that every backend must reproduce bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def _product(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in 64-bit integers that must not overflow: by halves."""
    low = multiplier * (value & 0xFFFF)
    high = multiplier * (value >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """The four output words of each counter (four broadcastable int64 tensors of 32-bit words)."""
    key = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        high_0, low_0 = _product(MULTIPLIERS[0], counter[0])
        high_1, low_1 = _product(MULTIPLIERS[1], counter[2])
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(k + step) & WORD for k, step in zip(key, KEY_STEPS, strict=True)]
    return counter


def dropout_scales(shape: torch.Size, dropout_p: float, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(batch, rows, tokens): 0 where a weight is dropped, 1 / (1 - dropout_p) where it is kept.

    Word (token mod 4) of counter (token / 4, row, batch, 0) belongs to (batch, row, token); below dropout_p * 2^32 it
    drops the weight.
    """

    batch, rows, tokens = shape

    def index(count: int) -> Tensor:
        return torch.arange(count, device=device)

    token = index(tokens)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox([(token >> 2)[None, None], index(rows)[None, :, None], index(batch)[:, None, None], zero], seed)
    stacked = torch.stack(torch.broadcast_tensors(*words), -1)
    word = stacked.gather(-1, (token & 3).expand(batch, rows, tokens)[..., None])[..., 0]
    return (word >= int(dropout_p * 2**32)).to(dtype) / (1.0 - dropout_p)
