"""Grids as kernels take them: of a fixed number of axes, missing ones in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

MAX_AXES = 4

T = TypeVar("T")


def on_four_axes(values: Sequence[T], absent: T) -> list[T]:
    """One value per axis, with `absent` for each missing axis."""
    return _in_front(values, absent, MAX_AXES)


def on_outer_axes(values: Sequence[T], absent: T) -> list[T]:
    """The same for all axes but the last, where kernels treat that one apart."""
    return _in_front(values, absent, MAX_AXES - 1)


def _in_front(values: Sequence[T], absent: T, axes: int) -> list[T]:
    return [*[absent] * (axes - len(values)), *values]
