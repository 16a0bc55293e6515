"""The bars of the latent tower: whole models forward and in training, and the operators that they are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.bars import Bar, Recorder, percent
from perceiver_kernels.benchmarking.compare import Result
from perceiver_kernels.benchmarking.measure import Call
from perceiver_kernels.benchmarking.models import MODEL_PROVIDERS, MODELS, ModelRun, multiply_adds
from perceiver_kernels.ops.linear import linear

# Rows, in and out features of the products of the official tower: query, keys and values, output, MLP.
TOWER_PRODUCTS = ((512, 1024, 1024), (512, 1024, 2048), (512, 1024, 1024), (512, 1024, 1024), (512, 1024, 1024))


def official_tower(recorder: Recorder) -> Iterator[Bar]:
    """The latent tower of the released ImageNet model: 48 layers of 512 x 1024."""
    for mode, limits in (("forward", (2.2, 1.8)), ("forward-bfloat16", (1.7, 1.7))):
        results = recorder.compare_models("official-tower", mode, "plain", "plain-compiled", "ours")
        for peer, limit in zip(("plain", "plain-compiled"), limits, strict=True):
            yield _speedup(f"official tower, {mode}", results, peer, limit)
        yield _error(f"official tower, {mode}", results, "plain")


def paper_model(recorder: Recorder) -> Iterator[Bar]:
    """The paper's ImageNet model: 8 cross-attends, 48 self layers, tied."""
    results = recorder.compare_models(
        "imagenet-paper", "forward", "perceiver-pytorch", "perceiver-pytorch-compiled", "ours"
    )
    yield _speedup("paper's model, forward", results, "perceiver-pytorch", 3.8)
    yield _speedup("paper's model, forward", results, "perceiver-pytorch-compiled", 3.0)
    results = recorder.compare_models("imagenet-paper", "train-step", "perceiver-pytorch", "ours")
    yield _speedup("paper's model, training step", results, "perceiver-pytorch", 3.0)
    peer, ours = results["perceiver-pytorch"].memory, results["ours"].memory
    value = ours / peer if ours and peer else None
    note = f"{tables.size(ours)} of {tables.size(peer)} beyond parameters, gradients and optimizer state"
    yield Bar("paper's model, training step: peak memory", value, 1 / 3, at_least=False, show=percent, note=note)


def study_model(recorder: Recorder) -> Iterator[Bar]:
    """The CIFAR-10 study model, a batch of 64."""
    peers = ("perceiver-pytorch", "perceiver-pytorch-compiled")
    results = recorder.compare_models("cifar10-study", "train-step", *peers, "ours")
    for peer, limit in zip(peers, (4.0, 3.5), strict=True):
        yield _speedup("CIFAR-10 study, training step", results, peer, limit)
    results = recorder.compare_models("cifar10-study", "forward", *peers, "ours")
    yield _error("CIFAR-10 study, forward", results, "perceiver-pytorch")


def _speedup(what: str, results: dict[str, Result], peer: str, limit: float) -> Bar:
    theirs, ours = results[peer], results["ours"]
    what = f"{what}: {peer} / ours"
    if theirs.timing is None or ours.timing is None:
        return Bar(what, None, limit, at_least=True, note=theirs.refused or ours.refused or "")
    passes = 3 if ours.mode == "train-step" else 1  # backward has two products for each
    achieved = 2 * passes * multiply_adds(MODELS[ours.case]) / ours.timing.median
    times = ", ".join(tables.seconds(timing.median) for timing in (theirs.timing, ours.timing))
    note = f"{times}; ours at {tables.rate(achieved)}FLOP/s"
    return Bar(what, theirs.timing.ratio(ours.timing), limit, at_least=True, note=note)


def _error(what: str, results: dict[str, Result], peer: str) -> Bar:
    theirs, ours = results[peer].worst_error, results["ours"].worst_error
    value = ours.rms / theirs.rms if ours and theirs else None
    return Bar(f"{what}: our error / {peer}'s", value, 2.0, at_least=False, note="" if value else "no truth")


def attention(recorder: Recorder) -> Iterator[Bar]:
    """latent_attention against torch's scaled_dot_product_attention."""
    for head_dim in (128, 64):
        for dtype in (torch.float32, torch.bfloat16):
            calls = attention_calls(head_dim, dtype)
            times = recorder.interleave(calls)
            name = str(dtype).removeprefix("torch.")
            for direction, limit in (("forward", 1.7), ("backward", 1.5)):
                theirs, ours = times[f"SDPA {direction}"], times[f"ours {direction}"]
                flops = (4 if direction == "forward" else 10) * 8 * 512**2 * head_dim
                note = ", ".join(f"{tables.rate(flops / t.median)}FLOP/s" for t in (theirs, ours))
                what = f"attention 8 x 512 x {head_dim}, {name}, {direction}: SDPA / ours"
                yield Bar(what, theirs.ratio(ours), limit, at_least=True, note=note)


def attention_calls(head_dim: int, dtype: torch.dtype) -> dict[str, Call]:
    """Both attentions forward and backward, on the same contiguous q, k and v."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(1, 8, 512, head_dim, generator=generator).to(dtype) for _ in range(4))
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_())
    theirs, ours = F.scaled_dot_product_attention(*leaves), pk.latent_attention(*leaves)

    def backward(out: Tensor) -> Call:
        return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    return {
        "SDPA forward": lambda: F.scaled_dot_product_attention(q, k, v),
        "ours forward": lambda: pk.latent_attention(q, k, v),
        "SDPA backward": backward(theirs),
        "ours backward": backward(ours),
    }


def products(recorder: Recorder) -> Iterator[Bar]:
    """The matrix products of the official tower against the best product of the run."""
    calls: dict[str, Call] = {}
    work: dict[str, int] = {}
    for i, (rows, inputs, outputs) in enumerate(TOWER_PRODUCTS):
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        calls[f"ours {i}"] = lambda x=x, weight=weight, bias=bias: linear(x, weight, bias)  # type: ignore[misc]
        calls[f"torch {i}"] = lambda x=x, weight=weight: torch.mm(x, weight.t())  # type: ignore[misc]
        work[f"ours {i}"] = work[f"torch {i}"] = 2 * rows * inputs * outputs
    square = torch.randn(1536, 1536)
    calls["square"], work["square"] = lambda: torch.mm(square, square), 2 * 1536**3
    with torch.no_grad():
        times = recorder.interleave(calls)
    best = max(work[name] / time.median for name, time in times.items())
    ours = [name for name in calls if name.startswith("ours")]
    achieved = sum(work[name] for name in ours) / sum(times[name].median for name in ours)
    note = f"{tables.rate(achieved)}FLOP/s of {tables.rate(best)}FLOP/s"
    yield Bar("products of the tower / the best product", achieved / best, 0.9, at_least=True, show=percent, note=note)


def threads(recorder: Recorder) -> Iterator[Bar]:
    """A model whose parts alternate between torch's threads and ours, against the sum of its parts."""
    before = torch.get_num_threads()
    try:
        for count in sorted({1, before}):
            torch.set_num_threads(count)
            run = ModelRun(MODEL_PROVIDERS["ours"], MODELS["cifar10-study"], "forward")
            calls: dict[str, Call] = {"whole": run, **_parts(run)}
            times = recorder.interleave(calls)
            parts = sum(time.median for name, time in times.items() if name != "whole")
            note = f"{tables.seconds(times['whole'].median)}, {len(calls) - 1} parts"
            what = f"whole model / sum of its parts, {count} thread{'s' * (count > 1)}"
            yield Bar(what, times["whole"].median / parts, 1.1, at_least=False, note=note)
    finally:
        torch.set_num_threads(before)


def _parts(run: ModelRun) -> dict[str, Call]:
    """Every attention and MLP of the run's model, called alone with what the model gives it."""
    recorded: dict[str, Call] = {}
    hooks = []

    def record(name: str, module: torch.nn.Module) -> None:
        def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, object]) -> None:
            def call() -> None:
                with torch.no_grad():
                    module.forward(*arguments, **keywords)

            recorded[f"{name} {len(recorded)}"] = call

        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for name, module in run.module.named_modules():
        if isinstance(module, pk.CrossAttention | pk.SelfAttention | pk.FeedForward):
            record(name, module)
    run()
    for hook in hooks:
        hook.remove()
    return recorded


GROUPS = (attention, products, threads, official_tower, study_model, paper_model)
