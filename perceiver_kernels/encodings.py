"""What a position becomes: Fourier features of grids, as per-axis tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class FourierGrid:
    """Fourier features of the positions of a grid; each feature depends on one coordinate only."""

    shape: tuple[int, ...]
    num_bands: int
    max_freq: float | tuple[float, ...] | None = None
    order: str = "per_axis"
    spacing: str | tuple[float, ...] = "linear"
    concat_pos: bool = True
    sine_only: bool = False

    @property
    def num_axes(self) -> int:
        return len(self.shape)

    @property
    def num_positions(self) -> int:
        return math.prod(self.shape)

    @property
    def axis_channels(self) -> tuple[int, ...]:
        return ((1 if self.sine_only else 2) * self.num_bands + (1 if self.concat_pos else 0),) * self.num_axes

    @property
    def num_channels(self) -> int:
        return sum(self.axis_channels)

    def tables(self, device=None, dtype=torch.float32) -> tuple[Tensor, ...]:
        return _tables(self, str(device or "cpu"), dtype)

    def feature_sums(self, device=None, dtype=torch.float32):
        t = _tables(self, str(device or "cpu"), torch.float64)
        return tuple(v.sum(1).to(dtype) for v in t), tuple(v.square().sum(1).to(dtype) for v in t)

    def channel_index(self) -> tuple[Tensor, ...]:
        out, at = [], 0
        for e in self.axis_channels:
            out.append(torch.arange(at, at + e))
            at += e
        return tuple(out)

    def encode(self, device=None, dtype=torch.float32) -> Tensor:
        t = self.tables(device, dtype)
        parts = []
        for k, table in enumerate(t):
            shape = [1] * self.num_axes + [table.shape[1]]
            shape[k] = self.shape[k]
            parts.append(table.view(shape).expand(*self.shape, -1))
        return torch.cat(parts, -1).flatten(0, -2)


@lru_cache(maxsize=64)
def _tables(grid: FourierGrid, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    out = []
    for k, size in enumerate(grid.shape):
        mf = grid.max_freq[k] if isinstance(grid.max_freq, tuple) else grid.max_freq
        p = torch.linspace(-1, 1, size, dtype=torch.float64)[:, None]
        f = torch.linspace(1, mf / 2, grid.num_bands, dtype=torch.float64) * math.pi
        out.append(torch.cat([(p * f).sin(), (p * f).cos(), p], 1).to(device, dtype))
    return tuple(out)


class FourierEncoding(torch.nn.Module):
    """placeholder"""
