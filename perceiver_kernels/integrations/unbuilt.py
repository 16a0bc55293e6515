"""What swapped modules hand on in place of arrays of tokens or queries: their segments, not yet built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.modules.decoder import GridQueries


class Unbuilt:
    """An array (batch, M, C) in segments along M, which a swapped module reads as they are; to others it is the array.

    Shape, device and dtype are known; a torch function, a method or an index builds the array, once.

    Args:
        segments: each on a grid, or an array (batch or 1, tokens, C).
        batch, device, dtype: of the array.
    """

    def __init__(
        self, segments: Sequence[GridQueries | Tensor], batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.segments, self.device, self.dtype = tuple(segments), device, dtype
        channels = {part.num_channels if isinstance(part, GridQueries) else part.shape[2] for part in segments}
        self.shape = torch.Size((batch, sum(map(segment_length, segments)), *channels))
        self.ndim = len(self.shape)
        self._built: Tensor | None = None

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def materialize(self) -> Tensor:
        """The array."""
        if self._built is None:
            parts = [
                part.encode(self.device, self.dtype) if isinstance(part, GridQueries) else part
                for part in self.segments
            ]
            self._built = torch.cat([part.expand(self.shape[0], -1, -1) for part in parts], 1)
        return self._built

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for some before there are segments
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return function(*map(built, args), **{name: built(value) for name, value in (kwargs or {}).items()})


def _forward_operator(name: str) -> None:
    """Let an operator work on the array; Python looks for it in the class only."""

    def operator(self: Unbuilt, *others: Any) -> Any:
        return getattr(self.materialize(), name)(*map(built, others))

    setattr(Unbuilt, name, operator)


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    _forward_operator(f"__{_name}__")
    _forward_operator(f"__r{_name}__")
for _name in ("neg", "abs", "iter", "lt", "le", "gt", "ge"):
    _forward_operator(f"__{_name}__")


def segment_length(segment: GridQueries | Tensor) -> int:
    """Tokens or queries of a segment."""
    return segment.grid.num_positions if isinstance(segment, GridQueries) else segment.shape[1]


def only_segment(value: Unbuilt | Tensor) -> GridQueries | Tensor | None:
    """Of an array that is unbuilt and has no other segment."""
    return value.segments[0] if isinstance(value, Unbuilt) and len(value.segments) == 1 else None


def built(value: Any) -> Any:
    """A value with the arrays for all that is unbuilt in it."""
    if isinstance(value, Unbuilt):
        return value.materialize()
    return type(value)(map(built, value)) if type(value) in (list, tuple) else value
