"""CUDA kernels run again give the same bits: on a GPU, on the host in shuffled orders and under sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_emulation
import pytest
import torch
from shapes import available_backends, device_of
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.backends.cuda import runtime as cuda
from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.ops.absorbed_attention import absorbed_attention
from perceiver_kernels.ops.feed_forward import feed_forward
from perceiver_kernels.ops.linear import linear
from perceiver_kernels.ops.separable_layer_norm import separable_layer_norm

HERE = Path(__file__)

DEVICE = device_of("cuda")

# By op: a call in several blocks, with everything that it can do, from random inputs to outputs.
Op = Callable[[], list[Tensor]]
CALLS: dict[str, Op] = {}


def call(function: Op) -> Op:
    CALLS[function.__name__.removeprefix("run_")] = function
    return function


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_()


def some(*shape: int) -> Tensor:
    """A mask."""
    return torch.rand(shape, device=DEVICE) < 0.9


@call
def run_fourier_encode() -> list[Tensor]:
    points = torch.randn(300, 3, device=DEVICE)
    points[7, 1] = 1e7
    grid, data = FourierGrid((5, 40), 7, 9.0), leaf(9, 200, 3)
    return [
        pk.fourier_encode(points, 9, 20.0),
        pk.fourier_encode(points[:, :2], 9, 20.0, dtype=torch.bfloat16, order="grouped"),
        grid.encode(data=data[:2]),
        grid.encode(data=data),
        grid.encode(data=data.detach().half()[:, ::2].repeat(1, 2, 1)),
    ]


@call
def run_separable_attention() -> list[Tensor]:
    tables, r = [leaf(1, 17, 7), leaf(1, 17, 40)], leaf(2, 280)
    options = {"mask": some(2, 280), "dropout_p": 0.2, "seed": 3}
    state = pk.separable_attention(leaf(1, 17, 3), tables, leaf(2, 280, 3), r, **options)
    return [state.acc, *state.marginals, state.lse]


@call
def run_separable_query_attention() -> list[Tensor]:
    tables, v = [leaf(2, 2, 18, 11), leaf(2, 2, 18, 3)], leaf(2, 2, 18, 5)
    return [pk.separable_query_attention(tables, v, mask=some(2, 18), dropout_p=0.2, seed=3)]


@call
def run_separable_layer_norm() -> list[Tensor]:
    sums = [torch.randn(size, device=DEVICE) for size in (7, 30)]
    squares = [part.square() + 1 for part in sums]
    return [separable_layer_norm(leaf(2, 7, 30, 3).detach(), sums, squares, feature_channels=8)]


@call
def run_latent_attention() -> list[Tensor]:
    wide, wider = ([leaf(2, 1, rows, head_dim) for rows in (70, 130, 130)] for head_dim in (64, 128))
    return [
        pk.latent_attention(*(tensor.half() for tensor in wide)),
        pk.latent_attention(*(tensor.bfloat16() for tensor in wider)),
    ]


@call
def run_cross_attention() -> list[Tensor]:
    q, k, v = leaf(2, 1, 9, 33), leaf(2, 1, 200, 33), leaf(2, 1, 200, 17)
    return [pk.cross_attention(q, k, v, mask=some(2, 200), dropout_p=0.2, seed=3)]


@call
def run_absorbed_attention() -> list[Tensor]:
    return list(absorbed_attention(leaf(2, 9, 21), leaf(2, 150, 21), mask=some(2, 150), dropout_p=0.2, seed=3))


@call
def run_linear() -> list[Tensor]:
    return [linear(leaf(70, 24), leaf(40, 24), leaf(40), activation="gelu", residual=leaf(70, 40))]


@call
def run_feed_forward() -> list[Tensor]:
    weights = (leaf(24), leaf(24), leaf(64, 24), leaf(64), leaf(24, 32), leaf(24))
    return [feed_forward(leaf(70, 24), *weights, residual=leaf(70, 24))]


def orders() -> Iterator[int]:
    """Runs kernels in several orders where they are emulated; on a GPU no two runs are alike."""
    for seed in (1, 2, 0):
        if cuda.emulated():
            cuda_emulation.shuffle(seed)
        yield seed


def results(op: str, backend: str) -> list[Tensor]:
    """Outputs of the op's call, and their gradients in all leaves: random numbers are the same each time."""
    torch.manual_seed(0)
    with pk.use_backend(backend):
        outputs = CALLS[op]()
        graded = [out for out in outputs if out.requires_grad and out.dtype.is_floating_point]
        leaves = list(dict.fromkeys(leaf for out in graded for leaf in leaves_of(out)))
        upstream = [torch.randn_like(out) for out in graded]
        return [*outputs, *(torch.autograd.grad(graded, leaves, upstream, allow_unused=True) if graded else ())]


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


OPS = sorted({entry.op for entry in dispatch.declarations()})


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_call(op: str) -> None:
    assert all(result.isfinite().all() for result in results(op, "reference"))


@pytest.mark.parametrize("op", [op for op in OPS if "cuda" in available_backends(op)])
def test_any_order_gives_the_same_bits(op: str) -> None:
    first, *others = [results(op, "cuda") for _ in orders()]
    for other in others:
        assert all(torch.equal(one, same) for one, same in zip(first, other, strict=True))


WITH_SANITIZERS = DEVICE == "cpu" and cuda_emulation.compiler() and cuda_emulation.sanitizer_libraries()


@pytest.mark.skipif(not WITH_SANITIZERS, reason="on a GPU, or without a compiler that has sanitizers")
@pytest.mark.parametrize(
    "selected",
    [
        [HERE.name, "-k", "any_order"],
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
