"""r of LayerNorm over tokens that are never built: against the tokens built, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_no_worse
from shapes import available_backends

import perceiver_kernels as pk
from perceiver_kernels.ops.separable_layer_norm import OP, separable_layer_norm

GRIDS = [(1,), (300,), (5, 7), (3, 1, 6), (2, 3, 4, 5)]


def dense(grid: pk.FourierGrid, x: torch.Tensor, eps: float) -> torch.Tensor:
    tokens = torch.cat([x, grid.encode(dtype=x.dtype).view(*grid.shape, -1).expand(*x.shape[:-1], -1)], -1)
    return (tokens.var(-1, correction=0) + eps).rsqrt()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
@pytest.mark.parametrize("backend", available_backends(OP))
def test_equals_the_built_tokens(backend: str, shape: tuple[int, ...], x_dtype: torch.dtype) -> None:
    grid = pk.FourierGrid(shape=shape, num_bands=6, max_freq=10.0)
    x = (100 * torch.rand(2, 3, *shape)).to(x_dtype).movedim(1, -1)
    scale, shift = torch.tensor([0.5, 0.1, 2.0]), torch.tensor([1.0, -30.0, 0.0])
    sums, squares = grid.feature_sums()
    with pk.use_backend(backend):
        options: dict[str, Any] = {"feature_channels": grid.num_channels, "x_scale": scale, "x_shift": shift}
        actual = separable_layer_norm(x, sums, squares, **options)
    truth = dense(grid, x.double() * scale.double() + shift.double(), 1e-5)
    assert_no_worse(actual, dense(grid, x.float() * scale + shift, 1e-5), truth)


@pytest.mark.parametrize("backend", available_backends(OP))
def test_gradcheck(backend: str) -> None:
    grid = pk.FourierGrid(shape=(2, 3), num_bands=2, max_freq=4.0)
    sums, squares = grid.feature_sums(dtype=torch.float64)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x: separable_layer_norm(x, sums, squares, feature_channels=10, x_scale=scale), [x]
        )


def test_opcheck() -> None:
    sums, squares = pk.FourierGrid(shape=(2, 3), num_bands=2, max_freq=4.0).feature_sums()
    args = (torch.randn(2, 2, 3, 2, requires_grad=True), list(sums), list(squares), None, None, 10, 1e-5)
    torch.library.opcheck(torch.ops.perceiver_kernels.separable_layer_norm.default, args)


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
        ({"x_shift": torch.ones(3, requires_grad=True)}, "x_shift requires a gradient, but only x has one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 2, 3, 3), "sums": [torch.zeros(2), torch.zeros(3)]}
    arguments["squares"] = arguments["sums"]
    with pytest.raises(ValueError, match=message):
        separable_layer_norm(**{**arguments, **changes}, feature_channels=4)  # type: ignore[arg-type]
