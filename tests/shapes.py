"""The shape grid: every op's tests draw their cases from these lists and from the backends' declarations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from perceiver_kernels import dispatch
from perceiver_kernels.backends.cuda import runtime as cuda
from perceiver_kernels.backends.triton.runtime import interpreting


@dataclass(frozen=True)
class SeparableShape:
    """One call of separable attention."""

    batch: int
    query_batch: int
    rows: int
    channels: int
    grid: tuple[int, ...]

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        return f"B{self.batch}-Q{self.query_batch}-R{self.rows}-c{self.channels}-{grid}"


SEPARABLE_SHAPES = [
    SeparableShape(1, 1, 1, 1, (1,)),
    SeparableShape(2, 1, 5, 3, (4, 6)),
    SeparableShape(2, 2, 15, 3, (4, 6, 3)),
    SeparableShape(1, 1, 16, 2, (2, 3, 4, 5)),
    SeparableShape(3, 1, 17, 4, (1, 129)),
    SeparableShape(2, 2, 33, 3, (7, 128)),
    SeparableShape(1, 1, 31, 3, (127,)),
    SeparableShape(2, 1, 9, 5, (20, 17)),
    SeparableShape(1, 1, 3, 128, (3, 9)),
    SeparableShape(2, 1, 2, 1, (260, 1)),
    SeparableShape(1, 1, 4, 3, (150, 130)),  # few rows and many tokens: split over tokens, states merged
    SeparableShape(1, 1, 2, 3, (20000,)),  # the same along a single axis
    SeparableShape(0, 1, 3, 2, (2, 3)),
    SeparableShape(2, 1, 3, 2, (2, 0)),
    SeparableShape(2, 1, 0, 2, (2, 3)),
]


@dataclass(frozen=True)
class LatentShape:
    """One call of latent attention."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    head_dim_v: int

    def __str__(self) -> str:
        return f"B{self.batch}-H{self.heads}-N{self.queries}-M{self.keys}-D{self.head_dim}-Dv{self.head_dim_v}"


LATENT_SHAPES = [
    LatentShape(1, 1, 1, 1, 1, 1),
    LatentShape(2, 3, 15, 17, 8, 8),
    LatentShape(1, 2, 16, 16, 17, 17),
    LatentShape(2, 1, 17, 15, 40, 24),
    LatentShape(1, 2, 127, 129, 64, 64),
    LatentShape(2, 2, 128, 128, 64, 64),
    LatentShape(1, 2, 129, 127, 96, 33),
    LatentShape(1, 1, 97, 257, 1, 128),
    LatentShape(1, 1, 1, 300, 128, 1),
    LatentShape(1, 1, 300, 1, 161, 161),
    LatentShape(1, 1, 193, 130, 256, 256),
    LatentShape(5, 8, 33, 40, 12, 20),  # more heads than parts of keys are wanted for
    LatentShape(1, 1, 20, 2500, 5, 7),  # as many parts of keys as there may be, of several blocks each
]


@dataclass(frozen=True)
class QueryShape:
    """One call of separable attention from queries on a grid; channels -1: without data."""

    batch: int
    table_batch: int
    query_batch: int
    heads: int
    keys: int
    channels: int
    head_dim_v: int
    grid: tuple[int, ...]

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        batches = f"B{self.batch}-T{self.table_batch}-Q{self.query_batch}"
        return f"{batches}-H{self.heads}-N{self.keys}-c{self.channels}-Dv{self.head_dim_v}-{grid}"


QUERY_SHAPES = [
    QueryShape(1, 1, 1, 1, 1, -1, 1, (1,)),
    QueryShape(2, 1, 2, 1, 5, 3, 7, (3, 2)),
    QueryShape(2, 2, 1, 2, 17, -1, 16, (2, 15)),
    QueryShape(1, 1, 1, 1, 33, 9, 33, (2, 17)),  # more channels than are unrolled
    QueryShape(2, 1, 1, 1, 16, -1, 3, (2, 1, 3)),
    QueryShape(1, 1, 1, 1, 3, 1, 5, (2, 2, 1, 2)),
    QueryShape(1, 1, 1, 1, 129, -1, 4, (37,)),
    QueryShape(1, 1, 1, 1, 20, -1, 135, (2, 3)),  # several chunks of the values' channels
    QueryShape(1, 1, 1, 1, 18, -1, 4, (11, 2)),  # several outer positions in a part
    QueryShape(1, 1, 1, 7, 4, -1, 4, (2, 36)),  # several tiles of columns in a part
    QueryShape(0, 1, 1, 2, 4, 2, 4, (2, 3)),
    QueryShape(2, 1, 2, 0, 4, -1, 4, (2, 3)),
    QueryShape(2, 2, 1, 2, 0, 2, 4, (2, 3)),
    QueryShape(2, 1, 2, 2, 4, 2, 4, (0, 3)),
    QueryShape(2, 1, 2, 2, 4, -1, 4, (3, 0)),
    QueryShape(1, 1, 1, 2, 4, 0, 4, (3, 2)),
]


def device_of(backend: str) -> str:
    """Where a backend's tests run: kernels for GPUs on one if there is one, else on the CPU as they can be."""
    on_gpu = backend in ("cuda", "triton") and not (interpreted(backend) or emulated(backend))
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def available_backends(op: str) -> list[str]:
    """Backends that can run the op on this machine, the reference last."""
    return [entry.backend for entry in dispatch.declarations(op) if _can_be_tested(entry)]


def _can_be_tested(entry: dispatch.Declaration) -> bool:
    devices = {"any", "cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    return not entry.unavailable() and not devices.isdisjoint((*entry.devices, *entry.devices_if_forced()))


def declared(op: str, backend: str) -> dispatch.Declaration:
    """What a backend declares of an op: tests ask it for dtypes and limits."""
    return next(entry for entry in dispatch.declarations(op) if entry.backend == backend)


def interpreted(backend: str) -> bool:
    """Whether a backend's kernels run in the interpreter, where a program costs a millisecond: small shapes, then."""
    return backend == "triton" and interpreting()


def emulated(backend: str) -> bool:
    """Whether a backend's kernels run in the emulation, where a tile takes milliseconds: small shapes, then."""
    return backend == "cuda" and cuda.emulated()


def dtypes_of(op: str, backend: str) -> list[torch.dtype]:
    """The dtypes to test a backend with: all that it declares; Triton's interpreter does not multiply bfloat16."""
    dtypes = declared(op, backend).data_dtypes
    return [dtype for dtype in dtypes if not (interpreted(backend) and dtype == torch.bfloat16)]


# The structure of LATENT_SHAPES in fewer and smaller tiles.
LATENT_SHAPES_INTERPRETED = [
    LatentShape(1, 1, 1, 1, 1, 1),
    LatentShape(2, 3, 15, 17, 8, 8),
    LatentShape(1, 2, 16, 16, 17, 17),
    LatentShape(2, 1, 17, 15, 40, 24),
    LatentShape(1, 2, 64, 64, 64, 64),
    LatentShape(1, 1, 129, 127, 64, 33),
    LatentShape(1, 1, 33, 129, 1, 128),
    LatentShape(1, 1, 1, 100, 128, 1),
    LatentShape(1, 1, 40, 1, 161, 161),
    LatentShape(1, 1, 33, 40, 256, 256),
    LatentShape(1, 1, 20, 300, 5, 7),
]


def latent_shapes(backend: str) -> list[LatentShape]:
    small = interpreted(backend) or emulated(backend)
    shapes = LATENT_SHAPES_INTERPRETED if small else LATENT_SHAPES
    return list(dict.fromkeys(fitted(shape, backend) for shape in shapes))


def fitted(shape: LatentShape, backend: str) -> LatentShape:
    """The shape with the next head dimensions that the backend has a kernel for."""
    head_dims = declared("latent_attention", backend).head_dims
    if head_dims is None:
        return shape
    widest = max(shape.head_dim, shape.head_dim_v)
    head_dim = next((head_dim for head_dim in head_dims if widest <= head_dim), head_dims[-1])
    return replace(shape, head_dim=head_dim, head_dim_v=head_dim)


# The same structure in the interpreter, where a tile row of tokens takes milliseconds.
SEPARABLE_SHAPES_INTERPRETED = [
    SeparableShape(1, 1, 1, 1, (1,)),
    SeparableShape(2, 1, 5, 3, (4, 6)),
    SeparableShape(2, 2, 15, 3, (2, 3, 3)),
    SeparableShape(1, 1, 16, 2, (2, 1, 2, 3)),
    SeparableShape(2, 1, 2, 1, (9, 1)),
    SeparableShape(1, 1, 17, 4, (1, 33)),
    SeparableShape(1, 1, 70, 3, (19,)),
    SeparableShape(1, 1, 130, 3, (3, 9)),
    SeparableShape(2, 2, 9, 5, (4, 9)),
    SeparableShape(1, 1, 3, 24, (2, 5)),
    SeparableShape(1, 1, 4, 3, (17, 20)),  # split over both axes, states merged
    SeparableShape(1, 1, 2, 3, (270,)),  # the same along a single axis
    SeparableShape(0, 1, 3, 2, (2, 3)),
    SeparableShape(2, 1, 3, 2, (2, 0)),
    SeparableShape(2, 1, 0, 2, (2, 3)),
]


def separable_shapes(backend: str) -> list[SeparableShape]:
    if interpreted(backend):
        return SEPARABLE_SHAPES_INTERPRETED
    if emulated(backend):  # a long axis takes seconds
        return [replace(shape, grid=tuple(min(size, 3000) for size in shape.grid)) for shape in SEPARABLE_SHAPES]
    return SEPARABLE_SHAPES


# Few queries and many keys, or the reverse, of any head_dim; the interpreter takes seconds for larger ones.
CROSS_SHAPES = [
    LatentShape(1, 1, 1, 1, 1, 1),
    LatentShape(2, 3, 5, 17, 8, 5),
    LatentShape(1, 2, 15, 16, 17, 24),
    LatentShape(2, 1, 17, 129, 33, 40),
    LatentShape(1, 1, 127, 15, 5, 17),
    LatentShape(1, 1, 3, 700, 16, 16),  # split over keys
    LatentShape(1, 1, 500, 2, 16, 9),  # split over queries
    LatentShape(1, 1, 16, 33, 261, 322),
    LatentShape(1, 1, 17, 31, 704, 1024),
]
