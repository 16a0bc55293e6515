"""The CUDA kernels on the host under the address and undefined-behaviour sanitizers, and in shuffled orders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_emulation
import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.encodings import FourierGrid

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or cuda_emulation.compiler() is None, reason="kernels are emulated by g++ without a GPU"
)

# Tests of an op in the emulation that reach all of its kernels in seconds; an op's own file has the rest.
SELECTED = {
    "test_fourier_encode.py": "cuda and (test_out or far or many or (dtypes_and_counts and 15)) and not machine",
    "test_encodings.py": "cuda and (alignment or given_memory or many_inputs)",
}


@pytest.mark.skipif("not cuda_emulation.sanitizer_libraries()", reason="the compiler has no sanitizers")
@pytest.mark.parametrize("file", SELECTED)
def test_sanitizers_find_nothing(file: str) -> None:
    environment = {**os.environ, **cuda_emulation.sanitizer_environment(), "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / file)]
    done = subprocess.run(
        [*command, "-k", SELECTED[file]], env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]


# Calls that run every kind of kernel of an op in several blocks; each gives all that it wrote.
CALLS: dict[str, Callable[[], list[Tensor]]] = {}


def call(function: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    CALLS[function.__name__] = function
    return function


@call
def fourier_encode() -> list[Tensor]:
    points = torch.randn(300, 3)
    grid, data = FourierGrid((5, 40), 7, 9.0), torch.randn(9, 200, 3)
    return [
        pk.fourier_encode(points, 9, 20.0),
        pk.fourier_encode(points, 9, 20.0, dtype=torch.bfloat16, order="grouped"),
        grid.encode(data=data[:2]),
        grid.encode(data=data),
    ]


@pytest.fixture
def plain_order() -> Iterator[None]:
    yield
    cuda_emulation.shuffle(0)


def test_every_op_has_a_call() -> None:
    ops = {entry.op for entry in dispatch.declarations() if entry.backend == "cuda"}
    assert ops == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_any_order_gives_the_same_bits(name: str, plain_order: None) -> None:
    results = []
    for seed in (0, 1, 2, 3):
        torch.manual_seed(0)
        cuda_emulation.shuffle(seed)
        with pk.use_backend("cuda"):
            results.append(CALLS[name]())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
