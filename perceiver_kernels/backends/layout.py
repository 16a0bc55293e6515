"""How attention's results lie in memory: rows before heads, so that the next projection reads them without a copy."""

from __future__ import annotations

from torch import Tensor


def rows_first(like: Tensor, rows: int, channels: int) -> Tensor:
    """An uninitialised (batch, heads, rows, channels) tensor that lies in memory as (batch, rows, heads, channels)."""
    batch, heads = like.shape[:2]
    return like.new_empty(batch, rows, heads, channels).transpose(1, 2)


def with_rows_first(result: Tensor) -> Tensor:
    """The same (batch, heads, rows, channels), in memory as (batch, rows, heads, channels)."""
    return result.transpose(1, 2).contiguous().transpose(1, 2)
