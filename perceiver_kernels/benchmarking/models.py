"""Whole models: forward, forward under bfloat16 autocast and training steps, and where their time goes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.compare import Effort, Progress, Result, seeded
from perceiver_kernels.benchmarking.measure import Timing, error, interleave, peak_extra_memory
from perceiver_kernels.benchmarking.plain import PlainTower
from perceiver_kernels.benchmarking.providers import needs_compiler, needs_perceiver_pytorch

MODEL_MODES = ("forward", "forward-bfloat16", "train-step")


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model.

    Args:
        input_shape: (batch, *axes, channels), of a tower (batch, N, dim).
        arguments: of the constructor: perceiver-pytorch's Perceiver and ours, or PlainTower's.
        tower: whether it is the latent tower alone.
        truth: whether the float64 truth of a forward pass takes seconds rather than minutes.
    """

    name: str
    what: str
    input_shape: tuple[int, ...]
    arguments: dict[str, Any]
    tower: bool = False
    truth: bool = True

    def data(self) -> Tensor:
        """The input, the same at every call."""
        return torch.rand(self.input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _perceiver(name: str, what: str, input_shape: tuple[int, ...], truth: bool = True, **arguments: Any) -> Model:
    axes = {"input_axis": len(input_shape) - 2, "input_channels": input_shape[-1]}
    return Model(name, what, input_shape, axes | arguments, truth=truth)


_PAPER: dict[str, Any] = {
    "num_latents": 512,
    "latent_dim": 1024,
    "latent_heads": 8,
    "latent_dim_head": 128,
    "num_freq_bands": 64,
}

# Shapes: Jaegle et al. 2021, arXiv:2103.03206, and the released models; batch 1 but for the studies.
MODELS = {
    model.name: model
    for model in (
        Model(
            "official-tower",
            "ImageNet, the released model's latent tower",
            (1, 512, 1024),
            {"dim": 1024, "layers": 48, "heads": 8, "mult": 1},
            tower=True,
        ),
        _perceiver(
            "imagenet-paper",
            "ImageNet, 8 cross-attends and 48 self layers, tied",
            (1, 224, 224, 3),
            truth=False,
            **_PAPER,
            max_freq=224.0,
            depth=8,
            self_per_cross_attn=6,
            weight_tie_layers=True,
        ),
        _perceiver(
            "audioset-raw",
            "AudioSet, waveform in segments of 128, two cross-attends",
            (1, 480, 128),
            **_PAPER,
            max_freq=480.0,
            depth=2,
            self_per_cross_attn=8,
            num_classes=527,
        ),
        _perceiver(
            "cifar10-study",
            "CIFAR-10, a batch of 64",
            (64, 32, 32, 3),
            num_freq_bands=64,
            max_freq=32.0,
            depth=1,
            self_per_cross_attn=4,
            num_latents=128,
            latent_dim=256,
            latent_heads=4,
            num_classes=10,
        ),
        _perceiver(
            "mnist-study",
            "MNIST, a batch of 64",
            (64, 28, 28, 1),
            num_freq_bands=4,
            max_freq=28.0,
            depth=6,
            self_per_cross_attn=4,
            num_latents=16,
            latent_dim=64,
            num_classes=10,
        ),
    )
}


class LibraryTower(nn.Module):
    """PlainTower of this library's modules; same names of parameters."""

    def __init__(self, dim: int, layers: int, heads: int, mult: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    pk.SelfAttention(dim, heads=heads, head_dim=dim // heads, qkv_bias=True),
                    pk.FeedForward(dim, mult=mult, activation="gelu"),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.layers:
            attention, mlp = cast(nn.ModuleList, pair)
            x = attention(x, residual=x)
            x = mlp(x, residual=x)
        return x


def _ours(model: Model) -> nn.Module:
    return LibraryTower(**model.arguments) if model.tower else pk.Perceiver(**model.arguments)


def _perceiver_pytorch(model: Model) -> nn.Module:
    from perceiver_pytorch import Perceiver

    return Perceiver(**model.arguments)


def _compiled(build: Callable[[Model], nn.Module]) -> Callable[[Model], nn.Module]:
    def built(model: Model) -> nn.Module:
        module = build(model)
        module.compile(dynamic=False)
        return module

    return built


def _plain(model: Model) -> nn.Module:
    return PlainTower(**model.arguments)


@dataclasses.dataclass(frozen=True)
class ModelProvider:
    """A way to run a model: how it is built, which kind it is for, and why it cannot run here, or None."""

    name: str
    what: str
    build: Callable[[Model], nn.Module]
    tower: bool | None
    missing: Callable[[], str | None] = lambda: None


MODEL_PROVIDERS = {
    provider.name: provider
    for provider in (
        ModelProvider("plain", "plain PyTorch with SDPA", _plain, True),
        ModelProvider("plain-compiled", "the same under torch.compile", _compiled(_plain), True, needs_compiler),
        ModelProvider("perceiver-pytorch", "as it is", _perceiver_pytorch, False, needs_perceiver_pytorch),
        ModelProvider(
            "perceiver-pytorch-compiled",
            "the same under torch.compile",
            _compiled(_perceiver_pytorch),
            False,
            lambda: needs_perceiver_pytorch() or needs_compiler(),
        ),
        ModelProvider("ours", "this library", _ours, None),
    )
}


class ModelRun:
    """A provider's model in one mode, its weights those of every other provider's, ready to be called."""

    def __init__(self, provider: ModelProvider, model: Model, mode: str) -> None:
        with seeded():
            self.module = provider.build(model)
            self.module.load_state_dict(_ours(model).state_dict())
            self.upstream = torch.randn(model.input_shape) if model.tower else torch.empty(0)
        self.data, self.mode = model.data(), mode
        self.labels = torch.arange(len(self.data)) % 10
        self.module.train(mode == "train-step")
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4) if mode == "train-step" else None
        self.output = torch.empty(0)

    def __call__(self) -> None:
        if self.optimizer is None:
            autocast = self.mode == "forward-bfloat16"
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                self.output = self.module(self.data)
            return
        # Gradients stay allocated, so that the peak of a step is what it needs beyond them.
        self.optimizer.zero_grad(set_to_none=False)
        output = self.module(self.data)
        loss = F.cross_entropy(output, self.labels) if self.upstream.numel() == 0 else (output * self.upstream).mean()
        loss.backward()
        self.optimizer.step()
        self.output = loss.detach()


def compare_models(
    model: Model, mode: str, names: Iterable[str], effort: Effort, progress: Progress = lambda line: None
) -> list[Result]:
    """Measures providers on one model in one mode, in turns; what cannot run is a result that says why."""
    results: dict[str, Result] = {}
    runs: dict[str, ModelRun] = {}
    for name in names:
        provider = MODEL_PROVIDERS[name]
        if provider.tower not in (None, model.tower):
            continue
        refused = provider.missing()
        progress(f"{model.name}, {mode}: {name}" + (f" left out: {refused}" if refused else ""))
        if not refused:
            try:
                run = ModelRun(provider, model, mode)
                run()
                results[name] = Result(model.name, mode, name, memory=peak_extra_memory(run))
                runs[name] = run
                continue
            except Exception as failure:  # one peer that fails must not cost the figures of the others
                refused = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
        results[name] = Result(model.name, mode, name, refused)
    true = _truth(model, mode) if effort.errors and runs else None
    if true is not None:
        for name, run in runs.items():
            results[name] = dataclasses.replace(results[name], errors={"output": error(run.output, true)})
    if runs:
        progress(f"{model.name}, {mode}: interleaved timing")
        for name, timing in interleave(runs, budget=effort.budget, min_rounds=min(3, effort.min_rounds)).items():
            results[name] = dataclasses.replace(results[name], timing=timing)
    return list(results.values())


def _truth(model: Model, mode: str) -> Tensor | None:
    """The float64 output of the plain model, or None for a training step and where it would take too long."""
    peer = MODEL_PROVIDERS["plain" if model.tower else "perceiver-pytorch"]
    if mode == "train-step" or peer.missing() or not model.truth:
        return None
    run = ModelRun(peer, model, "forward")
    run.module.double()
    run.data = run.data.double()
    run()
    return run.output


# --- where the time goes --------------------------------------------------------------------------------------------

# What the parts of a model are called in a profile. An operator of this library counts with all that it calls.
PARTS = {
    "cross-attention": ("perceiver_kernels::separable",),
    "MLPs": ("perceiver_kernels::feed_forward",),
    "latent attention": ("perceiver_kernels::latent_attention", "aten::scaled_dot_product_attention"),
    "projections": ("perceiver_kernels::linear", "aten::linear", "aten::addmm", "aten::mm"),
    "LayerNorm": ("aten::layer_norm", "aten::native_layer_norm", "NativeLayerNormBackward"),
    "optimizer": ("Optimizer.step",),
}


@contextlib.contextmanager
def _counted(module: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the multiply-adds of forward passes, part by part, the encoder's pairs left out."""
    work = dict.fromkeys(("projections", "latent attention", "MLPs"), 0)

    def count(part: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        batch, latents, _ = output.shape
        products = batch * latents * sum(p.numel() for p in part.parameters() if p.dim() == 2)
        if isinstance(part, pk.FeedForward):
            work["MLPs"] += products
        elif isinstance(part, pk.SelfAttention):
            work["projections"] += products
            work["latent attention"] += 2 * batch * latents**2 * part.fn.to_q.out_features
        elif isinstance(part, pk.CrossAttention):
            work["projections"] += batch * latents * 2 * part.fn.to_q.weight.numel()

    hooks = [
        part.register_forward_hook(count)
        for part in module.modules()
        if isinstance(part, pk.FeedForward | pk.SelfAttention | pk.CrossAttention)
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def multiply_adds(model: Model) -> int:
    """Of a forward pass: its projections, latent attention and MLPs, the encoder's pairs left out."""
    run = ModelRun(MODEL_PROVIDERS["ours"], model, "forward")
    with _counted(run.module) as work:
        run()
    return sum(work.values())


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of a model: seconds of a call, and multiply-adds per second where the part is made of products."""

    part: str
    seconds: float
    rate: float | None


def profile(run: ModelRun) -> list[Share]:
    """Where the time of a call of our model goes, in torch's profiler; backward counts with its forward's part."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _counted(run.module) as work, torch.profiler.profile(activities=activities) as recorded:
        run()
    seconds = dict.fromkeys((*PARTS, "other"), 0.0)
    for event, part in _attributed(recorded.events()):
        seconds[part] += (event.self_cpu_time_total if part == "other" else event.cpu_time_total) * 1e-6
    passes = 1 if run.optimizer is None else 3
    return [
        Share(part, time, passes * work[part] / time if part in work and time else None)
        for part, time in seconds.items()
        if time
    ]


def _attributed(events: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """The outermost events of every part, and under "other" those that no part covers."""
    part_of: dict[int, str | None] = {}

    def part(event: Any) -> str | None:
        if event is None:
            return None
        if id(event) not in part_of:
            own = next((name for name, marks in PARTS.items() if any(mark in event.name for mark in marks)), None)
            part_of[id(event)] = part(event.cpu_parent) or own
        return part_of[id(event)]

    for event in events:
        own = part(event)
        if own is None:
            yield event, "other"
        elif part(event.cpu_parent) is None:
            yield event, own


def profile_table(shares: Sequence[Share], best: float) -> str:
    """Each part's share, and its multiply-adds per second against those of the best matrix product."""
    total = sum(share.seconds for share in shares)
    rows = [
        [
            share.part,
            tables.seconds(share.seconds),
            f"{share.seconds / total:.0%}",
            "-" if share.rate is None else f"{tables.rate(2 * share.rate)}FLOP/s",
            "-" if share.rate is None else f"{share.rate / best:.0%}",
        ]
        for share in sorted(shares, key=lambda share: -share.seconds)
    ]
    return tables.markdown(("part", "time", "share", "achieved", "of the best product"), rows)


def model_table(results: Sequence[Result]) -> str:
    """The comparison as text, and under it why some did not run."""
    ours = next((result.timing for result in results if result.provider == "ours"), None)
    rows = [_row(result, result.timing, ours) for result in results if result.timing]
    refusals = [f"{result.provider}: {result.refused}" for result in results if result.refused]
    header = ("provider", "median", "p20 ... p80", "times ours", "peak extra memory", "error (rms)")
    return "\n".join([tables.markdown(header, rows), *refusals])


def _row(result: Result, timing: Timing, ours: Timing | None) -> list[str]:
    return [
        result.provider,
        tables.seconds(timing.median),
        f"{tables.seconds(timing.quantile(0.2))} ... {tables.seconds(timing.quantile(0.8))}",
        tables.ratio(timing.ratio(ours) if ours else None),
        tables.size(result.memory),
        f"{result.worst_error.rms:.1e}" if result.worst_error else "-",
    ]
