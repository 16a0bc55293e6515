"""Tables of the axes of a grid spread over its positions, and the reverse, marginals of what its positions have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def spread(tables: Sequence[Tensor]) -> list[Tensor]:
    """Per axis its table (.., .., S_k, ...) with the other axes inserted, such that their sum is over the grid."""
    axes = len(tables)
    return [table.unflatten(2, [1] * k + [table.shape[2]] + [1] * (axes - 1 - k)) for k, table in enumerate(tables)]


def marginals(values: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """Per axis the sums (.., .., S_k, ...) over all other axes of values (.., .., M, ...) at the grid's positions."""
    on_grid, axes = values.unflatten(2, tuple(grid)), range(len(grid))
    return [on_grid.sum([2 + d for d in axes if d != k]) if len(grid) > 1 else on_grid for k in axes]
