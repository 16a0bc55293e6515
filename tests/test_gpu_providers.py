"""Whom a GPU's figures are compared with: each computes what this library computes, with the same weights."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels.benchmarking import compare, gpu_cases, gpu_providers
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.models import Model, compare_models
from perceiver_kernels.benchmarking.providers import PROVIDERS, Provider

FAST = compare.Effort(budget=0.0, min_rounds=1)
CASE = Case("small", "for tests", (6, 5), 3, 6.0, 3, 8, 16, head_dim=9, batch=2)
# Fused backends are a GPU's, but for the one named flash, which CPUs have too.
NEEDS_GPU = ("efficient", "cudnn", "graph")
LAYERS = {
    provider.name: provider
    for provider in gpu_providers.encoder_providers("forward", compiled=False)
    if not provider.name.endswith(NEEDS_GPU)
}
MODELS = {model.name: model for entry in gpu_cases.tiny().models for model in [entry.model]}


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("provider", LAYERS.values(), ids=LAYERS)
def test_layers_are_exact(provider: Provider, mode: str) -> None:
    if provider.missing():
        pytest.skip(provider.missing())
    (result,) = compare.compare(CASE, mode, [provider], FAST)
    assert result.refused is None and result.worst_error and result.worst_error.rms < 1e-5
    assert "output" in result.errors and ("gradient of latents" in result.errors) == (mode != "forward")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_in_16_bit(dtype: torch.dtype) -> None:
    results = compare.compare(CASE, "forward+backward", LAYERS.values(), FAST, image=CASE.image().to(dtype))
    for result in results:
        missing = LAYERS[result.provider].missing()
        assert result.refused == missing
        assert missing or (result.worst_error and 1e-5 < result.worst_error.rms < 0.03)


def test_the_truth_of_a_large_batch_is_that_of_its_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TRUTH_PAIRS", 1)
    monkeypatch.setattr(compare, "TRUTH_LATENTS", 3)
    assert compare.truth(CASE, "forward+backward", CASE.image())["output"].shape == (1, 3, 16)
    (result,) = compare.compare(CASE, "forward", [PROVIDERS["ours"]], FAST)
    assert result.worst_error and result.worst_error.rms < 1e-5


@pytest.mark.parametrize("mode", ["forward", "train-step"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_models_are_exact(model: Model, mode: str) -> None:
    providers = gpu_providers.model_providers(model, mode, compiled=False)
    missing = {provider.name: provider.missing() for provider in providers}
    results = {result.provider: result for result in compare_models(model, mode, providers, FAST)}
    assert {name: result.refused for name, result in results.items()} == missing
    assert results["ours"].timing and results["plain"].timing
    for result in results.values():
        if result.errors:
            assert result.worst_error and result.worst_error.rms < 1e-5


def test_autocast_dtypes_are_named_by_the_mode() -> None:
    model = MODELS["imagenet-released"]
    for mode, low, high in (("forward", 0.0, 1e-5), ("forward-bfloat16", 1e-4, 0.1), ("forward-float16", 1e-5, 1e-2)):
        (result,) = compare_models(model, mode, [gpu_providers.PLAIN], FAST)
        assert result.worst_error and low <= result.worst_error.rms < high


def test_nobody_is_tried_after_the_deadline() -> None:
    late = compare.Effort(budget=0.0, min_rounds=1, deadline=0.0)
    (result,) = compare.compare(CASE, "forward", [PROVIDERS["ours"]], late)
    assert result.refused == "no time left" and result.timing is None
    (result,) = compare_models(MODELS["imagenet-paper"], "forward", ["ours"], late)
    assert result.refused == "no time left"


def test_channels_in_the_order_of_transformers() -> None:
    order = gpu_providers.transformers_order(Case("", "", (4, 5), 2, 4.0, 3, 8, 16))
    # data; both positions; sines of both axes; cosines of both
    assert order.tolist() == [0, 1, 2, 7, 12, 3, 4, 8, 9, 5, 6, 10, 11]
