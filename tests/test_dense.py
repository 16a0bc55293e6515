"""Attention to dense tokens in modules: our operators and torch's give the same, and the rule that chooses is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import force_path, randomise
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.backends import native
from perceiver_kernels.modules import CrossAttention, dense

needs_native = pytest.mark.skipif(native.cpu_unavailable() is not None, reason="without the compiled CPU module")


@pytest.fixture
def always_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls too."""
    monkeypatch.setattr(dense, "LEAST_ROWS", 0)
    monkeypatch.setattr(dense, "LEAST_WORK", 0)


def make_qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g, dtype=dtype) for size in ((1, 2, 5, 4), (3, 2, 9, 4), (3, 2, 9, 6))]


def make_mask() -> Tensor:
    """Of the last input nothing is left."""
    return torch.arange(9) < torch.tensor([[4], [9], [0]])


@needs_native
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_the_same_either_way(masked: bool, always_ours: None) -> None:
    leaves, mask = [tensor.requires_grad_() for tensor in make_qkv()], make_mask() if masked else None
    query, keys, values = leaves
    ours = dense.attend(*leaves, mask, scale=0.3)
    torchs = dense.attend_by_torch(query.expand(3, -1, -1, -1), keys, values, mask, 0.3, 0.0)
    torch.testing.assert_close(ours, torchs)
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (ours, torchs)]
    torch.testing.assert_close(*gradients)


@needs_native
@pytest.mark.parametrize(
    ("options", "masked"),
    [({}, False), ({"qkv_bias": True}, True), ({"context_norm": False, "qkv_bias": True}, False), ({"heads": 1}, True)],
)
@pytest.mark.parametrize("path", ["absorbed", "projected"])
def test_modules_are_the_same_either_way(
    path: str, options: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_path(monkeypatch, path)
    module = CrossAttention(8, 12, **{"heads": 2, "head_dim": 5, "masked_rows": "zeros", **options}).double()
    randomise(module)
    latents = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 9, 12, dtype=torch.float64, requires_grad=True)
    mask = make_mask() if masked else None
    results = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(dense, "LEAST_ROWS", 0)
        monkeypatch.setattr(dense, "LEAST_WORK", least)
        assert ("torch's" in module.explain(latents, context, mask=mask)) == (least > 0)
        out = module(latents, context, mask=mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), (latents, context, *module.parameters()))))
    torch.testing.assert_close(*results)


@needs_native
@pytest.mark.parametrize("path", ["absorbed", "projected"])
def test_modules_compile_whole_and_run_under_autocast(
    path: str, always_ours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_path(monkeypatch, path)
    module = CrossAttention(8, 12, heads=2, head_dim=5)
    latents, context = torch.randn(1, 6, 8), torch.randn(3, 9, 12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(latents, context), module(latents, context))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(latents, context)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(latents, context), rtol=0.05, atol=0.05)


@needs_native
@pytest.mark.parametrize("path", ["absorbed", "projected"])
def test_dropout_drops_by_our_generator(path: str, always_ours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same from one seed, and the mean over many draws is what no dropout gives."""
    force_path(monkeypatch, path)
    module = CrossAttention(8, 12, heads=2, head_dim=5, dropout=0.4, qkv_bias=True)
    latents, context = torch.randn(1, 6, 8), torch.randn(300, 9, 12)[:1].expand(300, -1, -1)
    torch.manual_seed(5)
    first = module(latents, context)
    torch.manual_seed(5)
    assert torch.equal(module(latents, context), first)
    expected = module.eval()(latents, context)[0]
    assert (first.mean(0) - expected).abs().max() < 6 * first.std(0).max() / 300**0.5


SIZES = dense.Sizes(batch=1, heads=1, rows=512, tokens=2000, head_dim=64, head_dim_v=64, plain=True)
LARGE = {"rows": 2048, "tokens": 2048, "head_dim": 512, "head_dim_v": 512}


@needs_native
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"rows": 1}, "1 queries are fewer than 48"),
        ({"tokens": 20}, "1.3 M multiply-adds are fewer than 67.1 M"),
        ({"head_dim_v": 1025}, "head_dim is 1025, more than 1024"),
        (LARGE, "2048 queries x 2048 tokens of head_dim 512 suit it"),
        ({**LARGE, "plain": False}, None),
        ({**LARGE, "head_dim": 32}, None),
    ],
)
def test_the_rule(changes: dict[str, int], reason: str | None) -> None:
    assert dense.torch_reason(torch.device("cpu"), dataclasses.replace(SIZES, **changes)) == reason


def test_other_devices_take_torch_s() -> None:
    assert dense.torch_reason(torch.device("cuda"), SIZES) == "the device is cuda"


def test_without_the_compiled_module_torch_s_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_unavailable", lambda: "it was not built")
    assert dense.torch_reason(torch.device("cpu"), SIZES) == "there is no compiled CPU module"
    query, keys, values = make_qkv()
    expected = F.scaled_dot_product_attention(query.expand(3, -1, -1, -1), keys, values, scale=0.3)
    torch.testing.assert_close(dense.attend(query, keys, values, scale=0.3), expected)


@needs_native
def test_explain_names_what_attends() -> None:
    module = CrossAttention(32, 64, heads=8, head_dim=32)
    text = pk.explain(module, torch.zeros(1, 512, 32), torch.zeros(1, 2000, 64))
    assert "attention: pk." in text
    text = pk.explain(module, torch.zeros(1, 1, 32), torch.zeros(1, 20, 64))
    assert "attention: torch's scaled_dot_product_attention, " in text
