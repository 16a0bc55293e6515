"""Whole models: forward, forward under bfloat16 autocast and training steps, and where their time goes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels import presets
from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.compare import Effort, Progress, Result, seeded
from perceiver_kernels.benchmarking.measure import Timing, error, interleave, peak_extra_memory
from perceiver_kernels.benchmarking.plain import PlainModel, PlainOfficial, PlainTower
from perceiver_kernels.benchmarking.providers import needs_compiler, needs_perceiver_pytorch
from perceiver_kernels.modules.official import LatentBlocks, run_pairs

# Modes may end in the dtype of autocast, as "forward-bfloat16" does.
MODEL_MODES = ("forward", "forward-bfloat16", "train-step")


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model.

    Args:
        input_shape: (batch, *axes, channels), of a tower (batch, N, dim).
        arguments: of the constructor: perceiver-pytorch's Perceiver and ours, PlainTower's or PlainOfficial's.
        tower: whether it is the latent tower alone.
        truth: whether the float64 truth of a forward pass takes seconds rather than minutes.
        official: whether it is the released model.
    """

    name: str
    what: str
    input_shape: tuple[int, ...]
    arguments: dict[str, Any]
    tower: bool = False
    truth: bool = True
    official: bool = False

    @property
    def kind(self) -> str:
        return "tower" if self.tower else "official" if self.official else "perceiver"

    def data(self) -> Tensor:
        """The input, the same at every call."""
        return torch.rand(self.input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _perceiver(name: str, what: str, input_shape: tuple[int, ...], truth: bool = True, **arguments: Any) -> Model:
    axes = {"input_axis": len(input_shape) - 2, "input_channels": input_shape[-1]}
    return Model(name, what, input_shape, arguments | axes, truth=truth)


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
            **presets.imagenet_paper.arguments,
        ),
        _perceiver(
            "audioset-paper",
            "AudioSet, waveform in segments of 128, two cross-attends",
            (1, 480, 128),
            **presets.audioset_paper.arguments,
        ),
        _perceiver(
            "cifar10-study",
            "CIFAR-10, a batch of 64",
            (64, 32, 32, 3),
            **presets.cifar10_study.arguments,
        ),
        _perceiver(
            "mnist-study",
            "MNIST, a batch of 64",
            (64, 28, 28, 1),
            **presets.mnist_study.arguments,
        ),
    )
}


class LibraryOfficial(nn.Module):
    """PlainOfficial of this library's modules; same names of parameters."""

    def __init__(self, case: Case, layers: int, blocks: int, heads: int, num_classes: int = 1000) -> None:
        super().__init__()
        dim, width = case.latent_dim, case.channels
        self.blocks = blocks
        self.grid = pk.FourierGrid(shape=case.shape, num_bands=case.num_bands, max_freq=case.max_freq)
        self.latents = nn.Parameter(torch.randn(case.num_latents, dim))
        self.cross = pk.CrossAttention(dim, width, heads=1, head_dim=width, qkv_bias=True)
        self.cross_ff = pk.FeedForward(dim, mult=1, activation="gelu")
        self.layers = LatentBlocks(dim, layers, heads=heads).layers
        self.query = nn.Parameter(torch.randn(1, dim))
        self.decoder = pk.CrossAttention(dim, dim, heads=1, head_dim=dim, qkv_bias=True)
        self.decoder_ff = pk.FeedForward(dim, mult=1, activation="gelu")
        self.to_logits = nn.Linear(dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        latents, query = self.latents[None], self.query[None]
        x = self.cross(latents, image, grid=self.grid, residual=latents)
        x = self.cross_ff(x, residual=x)
        for _ in range(self.blocks):
            x = run_pairs(self.layers, x)
        query = self.decoder(query, x, residual=query)
        query = self.decoder_ff(query, residual=query)
        return self.to_logits(query[:, 0])


def _ours(model: Model) -> nn.Module:
    build = {"tower": LatentBlocks, "official": LibraryOfficial, "perceiver": pk.Perceiver}[model.kind]
    return build(**model.arguments)


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
    if model.kind == "perceiver":
        return PlainModel(shape=model.input_shape[1:-1], **model.arguments)
    return (PlainTower if model.tower else PlainOfficial)(**model.arguments)


@dataclasses.dataclass(frozen=True)
class ModelProvider:
    """A way to run a model.

    Args:
        build: makes it, with our names of parameters.
        tower: whether it is for the latent tower, for everything but it, or, None, for both.
        missing: why it cannot run here, or None.
        ready: what becomes of the built module and the data it will get, before it runs.
    """

    name: str
    what: str
    build: Callable[[Model], nn.Module]
    tower: bool | None
    missing: Callable[[], str | None] = lambda: None
    ready: Callable[[nn.Module, Tensor], nn.Module] = lambda module, data: module


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

    def __init__(self, provider: ModelProvider, model: Model, mode: str, device: str = "cpu") -> None:
        with torch.device(device):  # where parameters are made, a GPU's in no time
            self.module = provider.build(model)
            with seeded():
                self.module.load_state_dict(_ours(model).state_dict())
                self.upstream = torch.randn(model.input_shape) if model.tower else torch.empty(0)
        self.module.to(device)
        self.data = model.data().to(device)
        self.labels = torch.arange(len(self.data), device=device) % 10
        trains = mode.startswith("train-step")
        self.module.train(trains)
        self.module = provider.ready(self.module, self.data)
        name = mode.rpartition("-")[2]
        self.autocast_dtype = getattr(torch, name) if "float" in name else None
        fused = True if device == "cuda" else None
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=fused) if trains else None
        self.output = torch.empty(0)

    def __call__(self) -> None:
        if self.optimizer is None:
            with torch.no_grad(), self.autocast():
                self.output = self.module(self.data)
            return
        # Gradients stay allocated, so that the peak of a step is what it needs beyond them.
        self.optimizer.zero_grad(set_to_none=False)
        with self.autocast():
            output = self.module(self.data)
            tower = self.upstream.numel() > 0
            loss = (output * self.upstream).mean() if tower else F.cross_entropy(output, self.labels)
        loss.backward()
        self.optimizer.step()
        self.output = loss.detach()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.data.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


def compare_models(
    model: Model,
    mode: str,
    providers: Iterable[str | ModelProvider],
    effort: Effort,
    progress: Progress = lambda line: None,
    device: str = "cpu",
) -> list[Result]:
    """Measures providers on one model in one mode, in turns; what cannot run is a result that says why."""
    results: dict[str, Result] = {}
    runs: dict[str, ModelRun] = {}
    for entry in providers:
        provider = MODEL_PROVIDERS[entry] if isinstance(entry, str) else entry
        name = provider.name
        if provider.tower not in (None, model.tower):
            continue
        refused = provider.missing() or effort.refuse(0, device)
        progress(f"{model.name}, {mode}: {name}" + (f" left out: {refused}" if refused else ""))
        if not refused:
            try:
                run = ModelRun(provider, model, mode, device)
                run()
                results[name] = Result(model.name, mode, name, memory=peak_extra_memory(run, device))
                runs[name] = run
                continue
            except Exception as failure:  # one peer that fails must not cost the figures of the others
                refused = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
        results[name] = Result(model.name, mode, name, refused)
    true = _truth(model, mode, device) if effort.errors and runs else None
    if true is not None:
        for name, run in runs.items():
            distance = error(run.output[: len(true)], true)
            results[name] = dataclasses.replace(results[name], errors={"output": distance})
    if runs:
        progress(f"{model.name}, {mode}: interleaved timing")
        rounds = min(3, effort.min_rounds)
        timings = interleave(runs, budget=effort.budget, min_rounds=rounds, device=device)
        for name, timing in timings.items():
            results[name] = dataclasses.replace(results[name], timing=timing)
    return list(results.values())


# Of a larger batch, the truth covers the first inputs.
TRUTH_BATCH = 8


def _truth(model: Model, mode: str, device: str = "cpu") -> Tensor | None:
    """The float64 output of the plain model, or None for a training step and where it would take too long."""
    if mode.startswith("train-step") or not model.truth:
        return None
    run = ModelRun(MODEL_PROVIDERS["plain"], model, "forward", device)
    run.module.double()
    run.data = run.data[:TRUTH_BATCH].double()
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
