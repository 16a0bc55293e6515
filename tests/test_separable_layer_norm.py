"""r of LayerNorm over tokens that are never built: against the tokens built, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine_code import Build, figures, needs_triton
from numerics import assert_no_worse
from shapes import available_backends, declared, device_of

import perceiver_kernels as pk
from perceiver_kernels.ops.separable_layer_norm import OP, separable_layer_norm

GRIDS = [(1,), (300,), (1030,), (5, 7), (40, 1), (3, 1, 6), (2, 3, 4, 5)]
BACKENDS = available_backends(OP)
WITH_FLOAT64 = [backend for backend in BACKENDS if torch.float64 in declared(OP, backend).compute_dtypes]


def dense(grid: pk.FourierGrid, x: torch.Tensor, eps: float) -> torch.Tensor:
    features = grid.encode(x.device, x.dtype).view(*grid.shape, -1)
    tokens = torch.cat([x, features.expand(*x.shape[:-1], -1)], -1)
    return (tokens.var(-1, correction=0) + eps).rsqrt()


def sample(shape: tuple[int, ...], channels: int, dtype: torch.dtype, backend: str) -> torch.Tensor:
    return (100 * torch.rand(2, channels, *shape)).to(device_of(backend), dtype).movedim(1, -1)


@pytest.mark.parametrize("backend, x_dtype", [(b, d) for b in BACKENDS for d in declared(OP, b).data_dtypes], ids=str)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_equals_the_built_tokens(backend: str, shape: tuple[int, ...], x_dtype: torch.dtype) -> None:
    grid = pk.FourierGrid(shape=shape, num_bands=6, max_freq=10.0)
    x = sample(shape, 3, x_dtype, backend)
    scale, shift = (torch.tensor(v, device=x.device) for v in ([0.5, 0.1, 2.0], [1.0, -30.0, 0.0]))
    sums, squares = grid.feature_sums(x.device)
    truth = dense(grid, x.double() * scale.double() + shift.double(), 1e-5)
    with pk.use_backend(backend):
        options: dict[str, Any] = {"feature_channels": grid.num_channels, "x_scale": scale, "x_shift": shift}
        actual = separable_layer_norm(x, sums, squares, **options)
        assert torch.equal(actual, separable_layer_norm(x, sums, squares, **options))
    assert_no_worse(actual, dense(grid, x.float() * scale + shift, 1e-5), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 4, 40])
def test_channels_and_strides(backend: str, channels: int) -> None:
    grid = pk.FourierGrid(shape=(3, 5), num_bands=6, max_freq=10.0)
    x = sample(grid.shape, channels, torch.float32, backend)
    sums, squares = grid.feature_sums(x.device)
    for view in (x, x.contiguous(), x[:, :1].expand(x.shape), x[..., :1].expand(x.shape), x[:0]):
        with pk.use_backend(backend):
            actual = separable_layer_norm(view, sums, squares, feature_channels=grid.num_channels)
        assert_no_worse(actual, dense(grid, view, 1e-5), dense(grid, view.double(), 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_means_do_not_cancel(backend: str) -> None:
    grid = pk.FourierGrid(shape=(4, 6), num_bands=6, max_freq=10.0)
    x = sample(grid.shape, 30, torch.float32, backend) / 100 + 10000.0
    sums, squares = grid.feature_sums(x.device)
    with pk.use_backend(backend):
        actual = separable_layer_norm(x, sums, squares, feature_channels=grid.num_channels)
    assert_no_worse(actual, dense(grid, x, 1e-5), dense(grid, x.double(), 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_data_stay_in_their_tokens(backend: str, bad: float) -> None:
    grid = pk.FourierGrid(shape=(4, 6), num_bands=3, max_freq=10.0)
    x = sample(grid.shape, 3, torch.float32, backend)
    sums, squares = grid.feature_sums(x.device)
    with pk.use_backend(backend):
        clean = separable_layer_norm(x, sums, squares, feature_channels=grid.num_channels)
        x[1, 2, 3, 0] = bad
        actual = separable_layer_norm(x, sums, squares, feature_channels=grid.num_channels)
    changed = actual != clean
    assert actual[1, 2, 3].isnan() and changed.sum() == 1


@pytest.mark.parametrize("backend", WITH_FLOAT64)
def test_gradcheck(backend: str) -> None:
    grid = pk.FourierGrid(shape=(2, 3), num_bands=2, max_freq=4.0)
    sums, squares = grid.feature_sums(dtype=torch.float64)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x: separable_layer_norm(x, sums, squares, feature_channels=10, x_scale=scale), [x]
        )
        leaves = [t.clone().requires_grad_() for t in (*sums, *squares)]
        assert torch.autograd.gradcheck(
            lambda *leaves: separable_layer_norm(x, leaves[:2], leaves[2:], feature_channels=10), leaves
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    grid = pk.FourierGrid(shape=(4, 6), num_bands=3, max_freq=10.0)
    x = sample(grid.shape, 3, torch.float32, backend)
    sums, squares = grid.feature_sums(x.device)

    def gradient(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        leaf = x.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]

    with pk.use_backend(backend):
        actual = gradient(lambda x: separable_layer_norm(x, sums, squares, feature_channels=grid.num_channels), x.dtype)
    plain, truth = (gradient(lambda x: dense(grid, x, 1e-5), dtype) for dtype in (torch.float32, torch.float64))
    assert_no_worse(actual, plain, truth, "d_x")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    device = device_of(backend)
    sums, squares = pk.FourierGrid(shape=(2, 3), num_bands=2, max_freq=4.0).feature_sums(device)
    x = torch.randn(2, 2, 3, 2, device=device, requires_grad=True)
    with pk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.perceiver_kernels.separable_layer_norm.default,
            (x, list(sums), list(squares), None, None, 10, 1e-5),
        )


@needs_triton
@pytest.mark.parametrize(("kind", "arch"), [("fp32", 80), ("bf16", 90), ("u8", 90)])
def test_machine_code(kind: str, arch: int) -> None:
    vectors = [f"{of}_{axis}" for of in ("sums", "squares") for axis in range(4)]
    build = Build(
        "separable_layer_norm:separable_layer_norm_fwd_kernel",
        {"x": f"*{kind}"}
        | dict.fromkeys(["r", "x_scale", "x_shift", *vectors], "*fp32")
        | dict.fromkeys(["size_2", "size_3", "rows", "feature_channels"], "i32")
        | dict.fromkeys([f"stride_{axis}" for axis in ("b", 0, 1, 2, 3, "c")], "i64")
        | dict.fromkeys(["inverse_width", "eps"], "fp32"),
        {"size_0": 1, "size_1": 1, "AXES": 2, "CHANNELS": 3, "SCALED": True, "SHIFTED": True,
         "ROWS": 4, "COLUMNS": 256},
        arch=arch,
    )  # fmt: skip
    found = figures(build)
    tokens_of_a_thread = 4 * 256 / 128
    assert found.spills == 0 and found.registers <= 96
    assert sum(found.operations.values()) / tokens_of_a_thread <= 110, "instructions per token"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 2, 4, 3)}, r"x has shape \(1, 2, 4, 3\), must be \(batch, 2, 3, channels\)"),
        ({"squares": [torch.zeros(2)]}, "squares has 1 entries, must have 2"),
        ({"squares": [torch.zeros(2), torch.zeros(2)]}, r"squares\[1\] is \(2,\).* must be \(3,\)"),
        (
            {"squares": [torch.zeros(2), torch.zeros(3).double()]},
            r"squares\[1\] is .*float64 on cpu, must be .*float32",
        ),
        ({"x_scale": torch.ones(1)}, r"x_scale is \(1,\).* must be \(3,\)"),
        ({"x_shift": torch.ones(3, requires_grad=True)}, "x_shift requires a gradient, but only x, sums"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 2, 3, 3), "sums": [torch.zeros(2), torch.zeros(3)]}
    arguments["squares"] = arguments["sums"]
    with pytest.raises(ValueError, match=message):
        separable_layer_norm(**{**arguments, **changes}, feature_channels=4)  # type: ignore[arg-type]
