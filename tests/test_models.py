"""Whole models in the benchmarks: runs, errors, profiles, the command line and the bars of the latent tower."""

import dataclasses

import pytest
import torch

from perceiver_kernels.benchmarking import bars, compare, models, tower_bars
from perceiver_kernels.benchmarking.cases import CASES
from perceiver_kernels.benchmarking.models import MODEL_PROVIDERS, MODELS, Model, ModelRun, compare_models
from perceiver_kernels.cli import main

FAST = compare.Effort(budget=0.0, min_rounds=1)
TOWER = Model("tower", "a small tower", (2, 6, 32), {"dim": 32, "layers": 2, "heads": 2, "mult": 1}, tower=True)
PERCEIVER = Model(
    "perceiver",
    "a small Perceiver",
    (2, 6, 5, 3),
    {
        "num_freq_bands": 2,
        "max_freq": 6.0,
        "depth": 2,
        "input_channels": 3,
        "input_axis": 2,
        "num_latents": 7,
        "latent_dim": 16,
        "latent_heads": 2,
        "latent_dim_head": 8,
        "num_classes": 10,
    },
)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models under the published names, and nothing compiled."""
    for name, model in MODELS.items():
        monkeypatch.setitem(MODELS, name, dataclasses.replace(TOWER if model.tower else PERCEIVER, name=name))
    for name, provider in MODEL_PROVIDERS.items():
        if "compiled" in name:
            monkeypatch.setitem(MODEL_PROVIDERS, name, dataclasses.replace(provider, missing=lambda: "not compiled"))


@pytest.mark.parametrize("mode", models.MODEL_MODES)
@pytest.mark.parametrize(
    ("model", "peer"), [(TOWER, "plain"), (PERCEIVER, "perceiver-pytorch")], ids=["tower", "whole"]
)
def test_same_weights_give_the_same_result(model: Model, peer: str, mode: str) -> None:
    if MODEL_PROVIDERS[peer].missing():
        pytest.skip(f"{peer} is not installed")
    results = {result.provider: result for result in compare_models(model, mode, (peer, "ours"), FAST)}
    assert all(result.timing and result.refused is None for result in results.values())
    runs = [ModelRun(MODEL_PROVIDERS[name], model, mode) for name in (peer, "ours")]
    for run in runs:
        run()
    tolerance = 2e-2 if mode == "forward-bfloat16" else 1e-5
    torch.testing.assert_close(runs[1].output, runs[0].output, rtol=tolerance, atol=tolerance, check_dtype=False)
    if mode != "train-step":
        assert results["ours"].worst_error and results["ours"].worst_error.rms < tolerance
    else:
        first, second = (dict(run.module.named_parameters()) for run in runs)
        assert first.keys() == second.keys()
        for name, parameter in first.items():
            largest = parameter.grad.abs().max().item()
            torch.testing.assert_close(second[name].grad, parameter.grad, rtol=1e-4, atol=1e-4 * largest + 1e-9)


def test_no_name_stands_for_two_things() -> None:
    assert not CASES.keys() & MODELS.keys()


def test_a_provider_of_the_other_kind_is_left_out() -> None:
    assert [result.provider for result in compare_models(TOWER, "forward", MODEL_PROVIDERS, FAST)][-1:] == ["ours"]
    names = [result.provider for result in compare_models(PERCEIVER, "forward", ("plain", "ours"), FAST)]
    assert names == ["ours"]


@pytest.mark.parametrize("mode", ["forward", "train-step"])
def test_profile_covers_the_whole_call(mode: str) -> None:
    run = ModelRun(MODEL_PROVIDERS["ours"], PERCEIVER, mode)
    run()
    shares = {share.part: share for share in models.profile(run)}
    assert {"latent attention", "cross-attention", "other"} <= set(shares)  # an MLP this small is torch's operators
    assert all(share.seconds > 0 for share in shares.values())
    text = models.profile_table(list(shares.values()), 1e9)
    assert text.count("\n") == 1 + len(shares)
    assert ("optimizer" in shares) == (mode == "train-step")


def test_multiply_adds_are_those_of_the_formula() -> None:
    dim, latents, batch = 32, 6, 2
    layer = batch * latents * (4 * dim * dim + 2 * dim * dim) + 2 * batch * latents**2 * dim
    assert models.multiply_adds(TOWER) == 2 * layer


def test_bench_of_a_model(small_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cifar10-study", "--quick", "--modes", "forward", "train-step"]) == 0
    out = capsys.readouterr().out
    assert out.count("| ours") == 2 and "of the best product" in out
    assert main(["bench", "no-such-model"]) != 0
    assert "official-tower" in capsys.readouterr().err


def test_every_bar_of_the_tower_is_measured(small_models: None) -> None:
    measured = list(bars.measured(tower_bars.GROUPS, bars.Recorder(FAST, lambda line: None)))
    unmeasured = [bar.what for bar in measured if bar.value is None]
    missing = {name for name, provider in MODEL_PROVIDERS.items() if provider.missing()}
    assert all(any(name in what for name in missing) for what in unmeasured)
    assert len(measured) > 20 and all(len(bars.row(bar)) == len(bars.HEADER) for bar in measured)
