"""The sizes of a call of separable attention, how its kernels are told them, and how its work is divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton
from torch import Tensor

from perceiver_kernels.backends.triton import runtime
from perceiver_kernels.backends.triton.grids import on_outer_axes
from perceiver_kernels.backends.triton.philox import threshold
from perceiver_kernels.backends.triton.tiles import Tiles

CHANNELS_IN_REGISTERS = 4


@dataclass(frozen=True)
class Geometry:
    """The sizes of one call: the last grid axis is the columns, the others together are the outer positions."""

    batch: int
    rows: int
    channels: int
    outer_sizes: tuple[int, ...]
    columns: int

    @classmethod
    def of(cls, form: Tensor, x: Tensor) -> Geometry:
        batch, *grid, channels = x.shape
        return cls(batch, form.shape[2], channels, tuple(grid[:-1]), grid[-1])

    @property
    def axes(self) -> int:
        return len(self.outer_sizes) + 1

    @property
    def outer(self) -> int:
        return math.prod(self.outer_sizes)

    @property
    def outer_table(self) -> int:
        return sum(self.outer_sizes)

    @property
    def empty(self) -> bool:
        return 0 in (self.batch, self.rows, self.outer, self.columns)

    @property
    def few_channels(self) -> bool:
        return self.channels <= CHANNELS_IN_REGISTERS

    def sizes(self) -> dict[str, int]:
        """The grid as the kernels name it."""
        sizes = on_outer_axes(self.outer_sizes, 1)
        return {"outer": self.outer, "columns": self.columns} | _numbered("size", sizes)

    def strides(self, name: str, tensor: Tensor | None) -> dict[str, int]:
        """The strides of x, r or mask as the kernels name them."""
        per_axis = [0] * (self.axes + 1) if tensor is None else list(tensor.stride())
        named = {f"{name}_batch": per_axis[0], f"{name}_column": per_axis[self.axes]}
        named |= _numbered(name, on_outer_axes(per_axis[1 : self.axes], 0))
        return named | {"x_channel": per_axis[-1]} if name == "x" else named


def _numbered(name: str, values: Sequence[int]) -> dict[str, int]:
    return {f"{name}_{number}": value for number, value in enumerate(values, 1)}


@dataclass(frozen=True)
class Split:
    """How the tokens are divided among programs: groups of strips of columns times parts of the outer positions."""

    strips: int
    groups: int
    group_size: int
    parts: int
    part_size: int

    @classmethod
    def of(cls, geometry: Geometry, choice: Tiles) -> Split:
        """As many shares as choice.parts says, about; as square as the grid, for then partial sums are fewest."""
        strips, outer = triton.cdiv(geometry.columns, choice.columns), geometry.outer
        parts = min(max(round(math.sqrt(choice.parts * outer / geometry.columns)), 1), outer)
        groups = min(triton.cdiv(choice.parts, parts), strips)
        parts = min(triton.cdiv(choice.parts, groups), outer)
        group_size, part_size = triton.cdiv(strips, groups), triton.cdiv(outer, parts)
        return cls(strips, triton.cdiv(strips, group_size), group_size, triton.cdiv(outer, part_size), part_size)

    @property
    def slots(self) -> int:
        return self.groups * self.parts

    def arguments(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("groups", "group_size", "parts", "part_size")}


def options(geometry: Geometry, r: Tensor | None, mask: Tensor | None, dropout_p: float) -> dict[str, object]:
    return {
        "C": geometry.channels,
        "AXES": geometry.axes,
        "WITH_R": r is not None,
        "MASKED": mask is not None,
        "DROPOUT": dropout_p > 0,
        "FEW": geometry.few_channels,
        "COMPILED": not runtime.interpreting(),
        **runtime.LAUNCH_OPTIONS,
    }


def dropout_arguments(dropout_p: float, seed: int) -> dict[str, int | float]:
    return {"seed": seed, "threshold": threshold(dropout_p), "keep_scale": 1 / (1 - dropout_p)}
