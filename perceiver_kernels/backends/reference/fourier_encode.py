"""Fourier features as the formulas stand: of a grid from its per-axis tables, of free positions from sin and cos."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fourier_encode_grid(tables: Sequence[Tensor], sections: Sequence[int], data: Tensor | None, out: Tensor) -> None:
    """Fills out (batch, S_1, ..., S_A, c + E) with [data | section after section, each axis's columns of the section].

    Args:
        tables: per axis (S_k, sum of sections).
        sections: widths of the column sections that every table consists of.
        data: (batch, S_1, ..., S_A, c).
        out: written to.
    """
    channel = 0
    if data is not None:
        channel = data.shape[-1]
        out[..., :channel] = data
    column = 0
    for width in sections:
        for axis, table in enumerate(tables):
            across_later_axes = (1,) * (len(tables) - 1 - axis)
            columns = table[:, column : column + width]
            out[..., channel : channel + width] = columns.reshape(-1, *across_later_axes, width)
            channel += width
        column += width


def fourier_encode_points(
    positions: Tensor, frequencies: Sequence[float], grouped: bool, concat_pos: bool, sine_only: bool, out: Tensor
) -> None:
    """Fills out (P, E) with `point_features` of positions (P, A), rounded once to its dtype."""
    out.copy_(point_features(positions.double(), frequencies, grouped, concat_pos, sine_only))


def point_features(
    positions: Tensor, frequencies: Sequence[float], grouped: bool, concat_pos: bool, sine_only: bool
) -> Tensor:
    """(P, E): sin(pi f x), cos(pi f x) and x of positions x (P, A), in their dtype.

    Args:
        positions: (P, A).
        frequencies: axis after axis, as many for each.
        grouped: [pos of all axes | sin of all | cos of all], else [sin, cos, pos] axis after axis.
        concat_pos: whether the positions themselves are features.
        sine_only: leaves the cosines out.
    """
    angles = point_angles(positions, frequencies)
    waves = [angles.sin()] if sine_only else [angles.sin(), angles.cos()]
    position = [positions[..., None]] if concat_pos else []
    if grouped:
        return torch.cat([part.flatten(1) for part in (*position, *waves)], dim=1)
    return torch.cat([*waves, *position], dim=2).flatten(1)


def point_features_gradient(
    grad: Tensor, positions: Tensor, frequencies: Sequence[float], grouped: bool, concat_pos: bool, sine_only: bool
) -> Tensor:
    """(P, A): gradient of `point_features` in the positions, given grad (P, E); differentiable itself."""
    angles = point_angles(positions, frequencies)
    axes, bands = angles.shape[1:]
    widths = [bands] if sine_only else [bands, bands]
    widths = [*concat_pos * [1], *widths] if grouped else [*widths, *concat_pos * [1]]
    if grouped:
        parts = [part.unflatten(1, (axes, -1)) for part in grad.split([axes * width for width in widths], dim=1)]
    else:
        parts = list(grad.unflatten(1, (axes, -1)).split(widths, dim=2))
    direct = parts.pop(0 if grouped else -1)[..., 0] if concat_pos else None
    d_angles = parts[0] * angles.cos()
    if not sine_only:
        d_angles = d_angles - parts[1] * angles.sin()
    through_angles = (d_angles * _radians(positions, frequencies)).sum(-1)
    return through_angles if direct is None else through_angles + direct


def point_angles(positions: Tensor, frequencies: Sequence[float]) -> Tensor:
    """(P, A, K): pi f x."""
    return positions[..., None] * _radians(positions, frequencies)


def _radians(positions: Tensor, frequencies: Sequence[float]) -> Tensor:
    """(A, K): the frequencies times pi."""
    return math.pi * torch.tensor(frequencies, dtype=positions.dtype, device=positions.device).unflatten(
        0, (positions.shape[1], -1)
    )
