"""Every CUDA kernel, run again, gives the same bits: on a GPU, on the host in shuffled orders and under sanitizers."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from another_process import run_checks
from numerics import root_mean_square, tf32_allowed
from shapes import available_backends, device_of, emulated
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.encodings import FourierGrid

HERE = Path(__file__)

DEVICE = device_of("cuda")
HALVES = (torch.bfloat16, torch.float16)

# By op: calls, from random inputs to outputs, that together run every kernel that there is for it.
Calls = Callable[[], Iterator[Sequence[Tensor]]]
CALLS: dict[str, Calls] = {}


def calls(function: Calls) -> Calls:
    CALLS[function.__name__.removeprefix("run_")] = function
    return function


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def some(*shape: int) -> Tensor:
    """A mask."""
    return torch.rand(shape, device=DEVICE) < 0.9


@calls
def run_fourier_encode() -> Iterator[Sequence[Tensor]]:
    points = torch.randn(300, 3, device=DEVICE)
    points[7, 1] = 6e4  # far, and still a number in 16 bits
    yield [pk.fourier_encode(points, 9, 20.0), pk.fourier_encode(points[:2], 1000, 20.0)]
    for dtype in HALVES:
        yield [pk.fourier_encode(points[:, :2], 9, 20.0, dtype=dtype, order="grouped")]
        yield [pk.fourier_encode(points[:2], 2000, 20.0, dtype=dtype)]
    grid, data = FourierGrid((5, 40), 7, 9.0), leaf(9, 200, 3)
    yield [grid.encode(data=data[:2])]
    yield [grid.encode(data=data)]
    yield [grid.encode(data=data.detach().half()[:, ::2].repeat(1, 2, 1))]
    yield [FourierGrid((5, 3), 7, 9.0).encode(data=data.detach().half()[:2, :15])]


@calls
def run_separable_attention() -> Iterator[Sequence[Tensor]]:
    def call(x: Tensor, grid: Sequence[int], r: Tensor | None = None, **options: Any) -> list[Tensor]:
        tables = [leaf(1, 17, size) for size in grid]
        state = pk.separable_attention(leaf(1, 17, x.shape[2]), tables, x, r, **options)
        return [state.acc, *state.marginals, state.lse]

    for channels in (1, 2, 3, 4):
        yield call(leaf(1, 21, channels), (21,))
        yield call(leaf(1, 21, channels), (21,), leaf(1, 21))
        yield call(leaf(1, 60, channels), (3, 20))
        yield call(leaf(1, 72, channels), (2, 2, 18), leaf(1, 72))
    for channels in (1, 2, 3, 4, 5, 24, 40):
        yield call(leaf(2, 18, channels), (2, 9), leaf(2, 18), mask=some(2, 18), dropout_p=0.2, seed=3)
    pixels = torch.randint(0, 5, (2, 60, 3), dtype=torch.uint8, device=DEVICE)
    for tf32 in (False, True):
        with tf32_allowed(tf32):
            for x in (pixels, *(leaf(2, 60, 3, dtype=dtype) for dtype in (torch.float32, *HALVES))):
                yield call(x, (3, 20), leaf(2, 60))
            for channels, dtype in itertools.product((9, 24, 40, 72), (torch.float32, torch.bfloat16)):
                yield call(leaf(1, 18, channels, dtype=dtype), (2, 9), leaf(1, 18))


@calls
def run_separable_query_attention() -> Iterator[Sequence[Tensor]]:
    def call(dtype: torch.dtype, head_dim: int, batch: int, **options: Any) -> list[Tensor]:
        tables, v = [leaf(1, 1, 18, 11), leaf(1, 1, 18, 3)], leaf(batch, 1, 18, head_dim, dtype=dtype)
        return [pk.separable_query_attention(tables, v, **options)]

    for dtype, head_dim in ((torch.float32, 5), *itertools.product(HALVES, (5, 72))):
        if dtype != torch.bfloat16:
            yield call(dtype, head_dim, 1)
        else:
            queries = {"h": leaf(2, 1, 18), "k": leaf(1, 1, 18, 2), "x": leaf(1, 33, 2), "r": leaf(1, 33)}
            yield call(dtype, head_dim, 2, **queries, mask=some(2, 18), dropout_p=0.2, seed=3)


@calls
def run_latent_attention() -> Iterator[Sequence[Tensor]]:
    for dtype, (head_dim, queries) in itertools.product(HALVES, ((64, 70), (128, 9))):
        yield [pk.latent_attention(*(leaf(1, 1, rows, head_dim, dtype=dtype) for rows in (queries, 70, 70)))]


def results(op: str, backend: str) -> list[Tensor]:
    """Outputs of the op's calls, and their gradients in all leaves: random numbers are the same each time."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    with pk.use_backend(backend):
        for outputs in CALLS[op]():
            graded = [out for out in outputs if out.requires_grad]
            leaves = list(dict.fromkeys(leaf for out in graded for leaf in leaves_of(out)))
            upstream = [torch.randn_like(out) for out in graded]
            found += [*outputs, *(torch.autograd.grad(graded, leaves, upstream) if graded else ())]
    return [result.detach() for result in found]


def leaves_of(out: Tensor) -> list[Tensor]:
    """The tensors that an output was computed from."""
    found, seen, ahead = [], set(), [out.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        ahead += [following for following, _ in node.next_functions]
    return found


OPS = sorted({entry.op for entry in dispatch.declarations() if entry.backend == "cuda"})
EMULATED = emulated("cuda")


@functools.cache
def in_order(op: str) -> list[Tensor]:
    return results(op, "cuda")


AVAILABLE = [op for op in OPS if "cuda" in available_backends(op)]


@pytest.mark.parametrize("op", AVAILABLE)
def test_calls_give_what_the_reference_gives(op: str) -> None:
    """But for roundings of 16-bit numbers; tests of each op are stricter."""
    for result, expected in zip(in_order(op), results(op, "reference"), strict=True):
        assert root_mean_square(result.double() - expected.double()) <= 0.02 * root_mean_square(expected)


@pytest.mark.parametrize("op", AVAILABLE)
def test_any_order_gives_the_same_bits(op: str) -> None:
    for seed in (1, 2):
        with cuda_emulation.shuffled(seed):
            again = results(op, "cuda")
        assert all(torch.equal(one, same) for one, same in zip(in_order(op), again, strict=True))


@pytest.mark.skipif(not EMULATED, reason="needs the emulation of a GPU")
def test_calls_run_every_kernel() -> None:
    """Every instance of the templates too."""
    for op in OPS:
        in_order(op)
    ran, existing = cuda_emulation.launched()
    assert ran and sorted(existing - ran) == []


@pytest.mark.skipif(not EMULATED, reason="needs the emulation of a GPU")
def test_paths_of_sm_80() -> None:
    """Copies without barriers, and products of warps where sm_90 has those of warpgroups."""
    checks = """
    for op in t.OPS:
        t.test_calls_give_what_the_reference_gives(op)
        t.test_any_order_gives_the_same_bits(op)
    """
    run_checks("test_cuda_sanitized", checks, **{cuda_emulation.ARCH: "800"})


WITH_SANITIZERS = EMULATED and cuda_emulation.sanitizer_libraries()


@pytest.mark.skipif(not WITH_SANITIZERS, reason="on a GPU, or without a compiler that has sanitizers")
@pytest.mark.parametrize(
    "selected",
    [
        [HERE.name, "-k", "what_the_reference_gives"],
        ["test_fourier_encode.py", "-k", "cuda and (test_out or far or (dtypes_and_counts and 15))"],
        ["test_encodings.py", "-k", "cuda and (alignment or given_memory)"],
    ],
    ids=lambda selected: selected[0],
)
def test_sanitizers_find_nothing(selected: list[str]) -> None:
    """In all kernels, and over the odd shapes of those whose memory has the most forms."""
    environment = {**os.environ, **cuda_emulation.sanitizer_environment(), "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selected]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
