"""What a Perceiver IO's decoder asks: queries that are learned, on a Fourier grid, from inputs, of tasks, or all of it.

Every builder gives its queries written out, all of them or a few; those on a grid describe themselves as well, so that
the decoder need not build them (decoder.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.encodings import FourierEncoding, FourierGrid
from perceiver_kernels.modules.decoder import GridQueries, check_indices


class Queries(nn.Module):
    """What builders of queries have in common: `num_channels`, queries written out, and queries on a grid."""

    num_channels: int

    def forward(self, batch: int, indices: Tensor | None = None, **given: Tensor) -> Tensor:
        """The queries written out.

        Args:
            batch: how many inputs.
            indices: (P,), int64: which queries, in row-major order of a grid; None for all of them.
            given: what the queries are made of at call time, by the name that a builder goes by; others are ignored.

        Returns:
            (batch, O, num_channels), or (batch, P, num_channels); one that is the same for all has O = 1.

        Raises:
            ValueError: something given is missing or does not fit; the message names it.
        """
        raise NotImplementedError

    def on_grid(self, **given: Tensor) -> GridQueries | None:
        """The same queries for a decoder that does not build them, or None where they are not of that form."""
        return None


class LearnedQueries(Queries):
    """Parameters, drawn from a normal distribution of deviation 0.02; a single one is the same for every query.

    Args:
        num_queries: O.
        num_channels: of a query.
    """

    def __init__(self, num_queries: int, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.embeddings = nn.Parameter(0.02 * torch.randn(num_queries, num_channels))

    def forward(self, batch: int, indices: Tensor | None = None, **given: Tensor) -> Tensor:
        if indices is None or len(self.embeddings) == 1:
            return self.embeddings.expand(batch, -1, -1)
        return self.embeddings[_checked(indices, len(self.embeddings))].expand(batch, -1, -1)


class FourierQueries(Queries):
    """The Fourier features of a grid's positions; without parameters.

    Args:
        grid: the positions and their features.
    """

    like: Tensor

    def __init__(self, grid: FourierGrid) -> None:
        super().__init__()
        self.grid = grid
        self.num_channels = grid.num_channels
        # Where the module is and in which dtype it computes.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, batch: int, indices: Tensor | None = None, **given: Tensor) -> Tensor:
        if indices is None:
            queries = self.grid.encode(self.like.device, self.like.dtype)[None]
        else:
            queries = GridQueries(self.grid).at(_checked(indices, self.grid.num_positions), self.like.dtype)
        return queries.expand(batch, -1, -1)

    def on_grid(self, **given: Tensor) -> GridQueries | None:
        return GridQueries(self.grid)


class InputQueries(Queries):
    """Queries that are given at call time: the inputs themselves, or whatever the caller has made of them.

    Args:
        num_channels: of a query.
        name: by which they are given: (batch or 1, O, num_channels), or with the axes of a grid in place of O.
    """

    def __init__(self, num_channels: int, name: str = "inputs") -> None:
        super().__init__()
        self.num_channels = num_channels
        self.name = name

    def forward(self, batch: int, indices: Tensor | None = None, **given: Tensor) -> Tensor:
        queries = self.read(given).flatten(1, -2)
        if len(queries) not in (1, batch):
            raise ValueError(f"{self.name} has batch {len(queries)}, must have 1 or {batch}")
        if indices is not None:
            queries = queries[:, _checked(indices, queries.shape[1])]
        return queries.expand(batch, -1, -1)

    def read(self, given: dict[str, Tensor]) -> Tensor:
        """What was given under this builder's name."""
        queries = _given(given, self.name, "(batch, ..., channels)")
        if queries.dim() < 3 or queries.shape[-1] != self.num_channels:
            expected = f"(batch or 1, queries, {self.num_channels}), or a grid's axes for the queries"
            raise ValueError(f"{self.name} has shape {tuple(queries.shape)}, must be {expected}")
        if not queries.is_floating_point():
            raise ValueError(f"{self.name} has dtype {queries.dtype}, must be floating-point")
        return queries


class PositionQueries(Queries):
    """The Fourier features of free positions, given at call time.

    Args:
        encoding: of the positions.
        name: by which they are given: (O, A) or (batch or 1, O, A).
    """

    def __init__(self, encoding: FourierEncoding, name: str = "positions") -> None:
        super().__init__()
        self.encoding = encoding
        self.name = name
        self.num_channels = encoding.num_channels

    def forward(self, batch: int, indices: Tensor | None = None, **given: Tensor) -> Tensor:
        positions = _given(given, self.name, "(queries, axes)")
        positions = positions[None] if positions.dim() == 2 else positions
        if positions.dim() != 3 or len(positions) not in (1, batch):
            raise ValueError(f"{self.name} has shape {tuple(positions.shape)}, must be ({batch} or 1, queries, axes)")
        if indices is not None:
            positions = positions[:, _checked(indices, positions.shape[1])]
        return self.encoding(positions).expand(batch, -1, -1)


class TaskQueries(Queries):
    """An embedding of the task, the same for every query of an input; drawn as `LearnedQueries` are.

    Args:
        num_tasks: how many tasks there are.
        num_channels: of an embedding.
        name: by which tasks are given: int64, () for all inputs or (batch,).
    """

    def __init__(self, num_tasks: int, num_channels: int, name: str = "tasks") -> None:
        super().__init__()
        self.num_channels = num_channels
        self.name = name
        self.embeddings = nn.Parameter(0.02 * torch.randn(num_tasks, num_channels))

    def forward(self, batch: int, indices: Tensor | None = None, **given: Tensor) -> Tensor:
        tasks = self._read(given)
        if tuple(tasks.shape) not in ((), (batch,)):
            raise ValueError(f"{self.name} has shape {tuple(tasks.shape)}, must be () or ({batch},)")
        return self.embeddings[tasks].reshape(-1, 1, self.num_channels).expand(batch, -1, -1)

    def constant(self, given: dict[str, Tensor]) -> Tensor | None:
        """The embedding, where all inputs have the same task."""
        tasks = self._read(given)
        return self.embeddings[tasks] if tasks.dim() == 0 else None

    def _read(self, given: dict[str, Tensor]) -> Tensor:
        tasks = _given(given, self.name, "() or (batch,)")
        if tasks.dtype != torch.int64:
            raise ValueError(f"{self.name} has dtype {tasks.dtype}, must be torch.int64")
        check_indices(self.name, tasks.flatten(), len(self.embeddings))
        return tasks


class ConcatenatedQueries(Queries):
    """Other queries side by side, along the channels; one that is the same for all queries is repeated.

    They are on a grid, and need not be built, where they are, in this order: `InputQueries` (any number of them),
    `FourierQueries`, and single `LearnedQueries` or `TaskQueries` of one task for all inputs (any number of them).

    Args:
        parts: two or more builders.
    """

    def __init__(self, *parts: Queries) -> None:
        super().__init__()
        if len(parts) < 2:
            raise ValueError(f"parts has {len(parts)} entries, must have at least 2")
        self.parts = nn.ModuleList(parts)
        self.num_channels = sum(part.num_channels for part in parts)

    def forward(self, batch: int, indices: Tensor | None = None, **given: Tensor) -> Tensor:
        parts = [part(batch, indices, **given) for part in self.parts]
        num_queries = next((part.shape[1] for part in parts if part.shape[1] != 1), 1)
        for i, part in enumerate(parts):
            if part.shape[1] not in (1, num_queries):
                raise ValueError(f"parts[{i}] has {part.shape[1]} queries, must have 1 or {num_queries}")
        return torch.cat([part.expand(-1, num_queries, -1) for part in parts], dim=-1)

    def on_grid(self, **given: Tensor) -> GridQueries | None:
        grids = [part.grid for part in self.parts if isinstance(part, FourierQueries)]
        inputs = [part for part in self.parts if isinstance(part, InputQueries)]
        order = [*inputs, *(part for part in self.parts if isinstance(part, FourierQueries))]
        constants = [_constant(part, given) for part in self.parts[len(order) :]]
        if len(grids) != 1 or [*self.parts[: len(order)]] != order or any(part is None for part in constants):
            return None
        grid = grids[0]
        data = [_on_axes(part.read(given), part.name, grid) for part in inputs]
        batch = max(map(len, data), default=1)
        return GridQueries(
            grid,
            data=torch.cat([part.expand(batch, -1, -1) for part in data], -1) if data else None,
            constant=torch.cat([constant for constant in constants if constant is not None]) if constants else None,
        )


def _constant(part: nn.Module, given: dict[str, Tensor]) -> Tensor | None:
    """The channels that a part gives every query of every input, or None where they differ."""
    if isinstance(part, LearnedQueries):
        return part.embeddings[0] if len(part.embeddings) == 1 else None
    return part.constant(given) if isinstance(part, TaskQueries) else None


def _on_axes(data: Tensor, name: str, grid: FourierGrid) -> Tensor:
    if data.flatten(1, -2).shape[1] != grid.num_positions:
        raise ValueError(
            f"{name} has shape {tuple(data.shape)}, must have a query per position of the grid {grid.shape}"
        )
    return data.flatten(1, -2)


def _given(given: dict[str, Any], name: str, shape: str) -> Tensor:
    if not isinstance(given.get(name), Tensor):
        raise ValueError(f"{name} is {type(given.get(name)).__name__}, must be given as a tensor {shape}")
    return given[name]


def _checked(indices: Tensor, num_queries: int) -> Tensor:
    check_indices("indices", indices, num_queries)
    return indices
