"""Compare a module of this library with the one it replaces: outputs and all gradients, on every path."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_no_worse
from torch import Tensor, nn

from perceiver_kernels.modules import attention

PATHS = ("separable", "absorbed", "projected")


def force_path(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Make every CrossAttention take this path, so that small shapes reach all of them; separable only with a grid."""
    choose = attention.choose_path

    def forced(**shapes: Any) -> attention.PathChoice:
        choice = choose(**shapes)
        return choice if path == "separable" and shapes["grid"] is None else dataclasses.replace(choice, path=path)

    monkeypatch.setattr(attention, "choose_path", forced)


def randomise(module: nn.Module) -> None:
    """Move every parameter away from its initial value, so that a LayerNorm's forgotten weight or bias shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def outputs_and_gradients(
    module: nn.Module, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """function(*inputs) in dtype, and the gradients of a fixed weighting of it by every input and every parameter."""
    module.to(dtype)
    inputs = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
    out = function(*inputs)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(dtype)
    parameters = dict(module.named_parameters())
    names = [f"input {i}" for i in range(len(inputs))] + [*parameters]
    gradients = torch.autograd.grad((out * weighting).sum(), (*inputs, *parameters.values()))
    return {"output": out.detach()} | dict(zip(names, gradients, strict=True))


def nearly_the_same(inputs: tuple[Tensor, ...], count: int) -> list[tuple[Tensor, ...]]:
    """The inputs, and others that differ from them by a thousandth."""
    generator = torch.Generator().manual_seed(9)

    def changed(tensor: Tensor) -> Tensor:
        return tensor * (1 + 1e-3 * torch.randn(tensor.shape, generator=generator).to(tensor))

    return [inputs, *(tuple(map(changed, inputs)) for _ in range(count - 1))]


def stacked(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def assert_parity(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    *,
    call_ours: Callable[..., Tensor] | None = None,
    call_theirs: Callable[..., Tensor] | None = None,
) -> None:
    """Ours in dtype is no worse than theirs in dtype, both judged by theirs in float64; parameters have the same names.

    The largest rounding error of a small model is a matter of chance: in lower precisions it is that of several calls
    with inputs that are nearly the same. In float64, where theirs is no better a truth than ours, the two agree but for
    rounding. The calls take the inputs, and default to the modules themselves.
    """
    draws = nearly_the_same(inputs, 1 if dtype == torch.float64 else 3)
    actual = stacked([outputs_and_gradients(ours, call_ours or ours, draw, dtype) for draw in draws])
    plain = stacked([outputs_and_gradients(theirs, call_theirs or theirs, draw, dtype) for draw in draws])
    truth = stacked([outputs_and_gradients(theirs, call_theirs or theirs, draw, torch.float64) for draw in draws])
    assert actual.keys() == truth.keys()
    largest = max(tensor.abs().max().item() for tensor in truth.values())
    for name, expected in truth.items():
        zero_by_symmetry = expected.abs().max() < 1e-13 * largest
        if dtype == torch.float64 or zero_by_symmetry:
            atol = 1e3 * torch.finfo(dtype).eps * largest
            torch.testing.assert_close(actual[name].double(), expected, rtol=0.0, atol=atol, msg=name)
        else:
            assert_no_worse(actual[name], plain[name], expected, name)
