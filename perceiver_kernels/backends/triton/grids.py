"""Grids as kernels take them: always of four axes, missing ones in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

MAX_AXES = 4

T = TypeVar("T")


def on_four_axes(values: Sequence[T], absent: T) -> list[T]:
    """One value per axis, with `absent` for each missing axis."""
    return [*[absent] * (MAX_AXES - len(values)), *values]
