"""Tile-sized memory kept from call to call: what a kernel writes first costs more in fresh pages than in arithmetic."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from perceiver_kernels.backends.native import empty_large


class _Kept(threading.local):
    """Each thread has its own, so that calls on two threads do not share memory."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns), uninitialised; the next call for the same purpose on this thread gets the same memory."""
    count = rows * columns
    memory = _kept.memory.get((purpose, dtype))
    if memory is None or memory.numel() < count:
        memory = _kept.memory[purpose, dtype] = empty_large(torch.empty(0), (count,), dtype)
    return memory[:count].view(rows, columns)
