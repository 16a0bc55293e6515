"""What a swapped preprocessor gives in place of an array of tokens: the tokens' segments, not yet built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.modules.segments import Segment, materialized


class UnbuiltTokens:
    """Tokens (batch, M, C) in segments, which a swapped layer reads as they are; to all others they are the array.

    Shape, device and dtype are known; a torch function, a method or an index builds the array, once.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._built: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        batch, _, channels = self.segments[0].shape
        return torch.Size((batch, sum(segment.shape[1] for segment in self.segments), channels))

    @property
    def device(self) -> torch.device:
        return self.segments[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.segments[0].dtype

    @property
    def ndim(self) -> int:
        return 3

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def materialize(self) -> Tensor:
        """The array."""
        if self._built is None:
            self._built = materialized(self.segments)
        return self._built

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there are segments
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return function(*map(built, args), **{name: built(value) for name, value in (kwargs or {}).items()})


def built(value: Any) -> Any:
    """A value with the arrays for all unbuilt tokens in it."""
    if isinstance(value, UnbuiltTokens):
        return value.materialize()
    return type(value)(map(built, value)) if type(value) in (list, tuple) else value
