"""Whole modules on the Triton backend: outputs and gradients as on the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_no_worse
from shapes import device_of
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels import dispatch

pytest.importorskip("triton")

MODULES: dict[str, Callable[..., nn.Module]] = {
    "SelfAttention": lambda **options: pk.SelfAttention(24, heads=3, head_dim=8, qkv_bias=True, **options),
    "FeedForward": lambda **options: pk.FeedForward(24, mult=2, **options),
    "FeedForward-gelu": lambda **options: pk.FeedForward(24, mult=2, activation="gelu", save_hidden=False, **options),
}


class Block(nn.Module):
    """A layer of the latent tower: attention, then an MLP, each with its residual."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.mlp = MODULES["SelfAttention"](**options), MODULES["FeedForward"](**options)

    def forward(self, x: Tensor, *, residual: Tensor) -> Tensor:
        x = self.attention(x, residual=residual)
        return self.mlp(x, residual=x)


def results(module: nn.Module, x: Tensor, backend: str, device: str = "cpu") -> dict[str, Tensor]:
    """The output and the gradients of the input and of every parameter."""
    module = module.to(device)
    leaf = x.to(device).requires_grad_()
    with pk.use_backend(backend):
        out = module(leaf, residual=leaf)
        weighting = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view(out.shape)
        parameters = dict(module.named_parameters())
        gradients = torch.autograd.grad((out * weighting).sum(), [leaf, *parameters.values()])
    named = zip(("x", *parameters), gradients, strict=True)
    return {"out": out.detach().cpu(), **{name: gradient.cpu() for name, gradient in named}}


@pytest.mark.parametrize("name", [*MODULES, "Block"])
def test_outputs_and_gradients_are_the_reference_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_KERNELS_LINEAR", "torch")
    module = {**MODULES, "Block": Block}[name]()
    x = torch.randn(2, 17, 24)
    actual, plain = results(module, x, "triton", device_of("triton")), results(module, x, "reference")
    truth = results(module.double(), x.double(), "reference")
    for key, exact in truth.items():
        assert_no_worse(actual[key], plain[key], exact, key)


def test_every_kernel_of_a_layer_is_triton_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but LayerNorm and matrix products before the attention is left to torch, and no other backend runs."""
    seen: set[tuple[str, str]] = set()
    select = dispatch.select

    def spy(call: dispatch.Call) -> dispatch.Declaration:
        chosen = select(call)
        seen.add((call.op, chosen.backend))
        return chosen

    monkeypatch.setattr(dispatch, "select", spy)
    results(Block(), torch.randn(1, 5, 24), "triton", device_of("triton"))
    assert seen == {(op, "triton") for op in ("latent_attention", "linear", "feed_forward")}
