"""One case, every provider, one mode: same weights, same input, interleaved clocks, one truth."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from perceiver_kernels import graphs
from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.measure import (
    Error,
    Timing,
    available_memory,
    error,
    interleave,
    peak_extra_memory,
    synchronize,
)
from perceiver_kernels.benchmarking.plain import (
    CrossAttention,
    ExactCrossAttention,
    ExpertCrossAttention,
    Layer,
    PlainPerceiver,
)
from perceiver_kernels.benchmarking.providers import Provider

Progress = Callable[[str], None]

# Beyond this many pairs the truth covers the output of a few latents and no gradient: it would take minutes.
TRUTH_PAIRS = 10**8
TRUTH_LATENTS = 64


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much time and memory a comparison may take.

    Args:
        budget: seconds of interleaved rounds per case and mode.
        min_rounds: rounds that run whatever they cost.
        memory_limit: bytes a provider may be expected to need; the default is 60 % of what is available.
        errors: whether to compute the float64 truth.
        deadline: the time.time() from which nobody else is tried.
    """

    budget: float = 6.0
    min_rounds: int = 5
    memory_limit: int | None = None
    errors: bool = True
    deadline: float = math.inf

    def refuse(self, bytes_needed: int, device: str = "cpu") -> str | None:
        """Why a call of this size should not be tried now, or None."""
        if time.time() > self.deadline:
            return "no time left"
        limit = int(0.6 * available_memory(device)) if self.memory_limit is None else self.memory_limit
        if bytes_needed <= limit:
            return None
        return f"would need {tables.size(bytes_needed)}, the limit is {tables.size(limit)}"


QUICK = Effort(budget=1.0, min_rounds=2)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one provider did with one case in one mode; `refused` says why there is nothing else."""

    case: str
    mode: str
    provider: str
    refused: str | None = None
    timing: Timing | None = None
    first_call: float | None = None
    memory: int | None = None
    errors: dict[str, Error] = dataclasses.field(default_factory=dict)

    @property
    def worst_error(self) -> Error | None:
        """Of the output and every gradient, the one furthest off in root mean square."""
        return max(self.errors.values(), key=lambda distance: distance.rms, default=None)


class LayerRun:
    """A provider's layer with the weights of the case, rounded to the image's dtype, ready to be called repeatedly."""

    def __init__(self, layer: Layer, case: Case, image: Tensor, backward: bool = False) -> None:
        self.layer, self.image, self.backward = layer.to(image.device), image, backward
        with seeded():
            layer.layer.load_state_dict(CrossAttention(case).to(image.dtype).state_dict())
            latents = torch.randn(1, case.num_latents, case.latent_dim).to(image.dtype)
            size = (case.batch if backward else 0, case.num_latents, case.latent_dim)
            self.upstream = torch.randn(size, device=image.device).to(image.dtype)
        self.latents = nn.Parameter(latents.to(image.device, next(layer.parameters()).dtype))
        self.output = torch.empty(0)

    def __call__(self) -> None:
        if not self.backward:
            with torch.no_grad():
                self.output = self.layer(self.latents, self.image)
            return
        self.clear()
        self.output = self.layer(self.latents, self.image)
        self.output.backward(self.upstream.to(self.output.dtype))

    def parameters(self) -> dict[str, Tensor]:
        return {"latents": self.latents, **dict(self.layer.layer.named_parameters())}

    def clear(self) -> None:
        """Forgets output and gradients, so that they count as memory of the next call."""
        self.output = torch.empty(0)
        for parameter in self.parameters().values():
            parameter.grad = None

    def values(self) -> dict[str, Tensor]:
        """The output and, when it runs backward, the gradient of every parameter."""
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in self.parameters().items()}
        return {"output": self.output.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


class GraphedCall:
    """A call as one CUDA graph, so that nothing of its time is that of launching."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.graph, _ = graphs.capture(call)

    def __call__(self) -> None:
        self.graph.replay()


class GraphedRun(GraphedCall):
    """A run without gradients as one CUDA graph."""

    def __init__(self, run: LayerRun) -> None:
        super().__init__(run)
        self.run = run

    def clear(self) -> None:
        """The output is the graph's own memory and stays."""

    def values(self) -> dict[str, Tensor]:
        return self.run.values()


class PerceiverRun:
    """A provider's whole Perceiver, without gradients."""

    def __init__(self, perceiver: nn.Module, case: Case, image: Tensor) -> None:
        self.perceiver, self.image = perceiver.eval().to(image.device), image
        with seeded():
            perceiver.load_state_dict(PlainPerceiver(case, ExpertCrossAttention(case)).state_dict())
        self.output = torch.empty(0)

    def __call__(self) -> None:
        with torch.no_grad():
            self.output = self.perceiver(self.image)

    def clear(self) -> None:
        self.output = torch.empty(0)

    def values(self) -> dict[str, Tensor]:
        return {"output": self.output}


Run: TypeAlias = LayerRun | GraphedRun | PerceiverRun


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers for every provider, and the caller's generator as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def prepare(provider: Provider, case: Case, mode: str, image: Tensor) -> Run:
    """A provider's run of a case, its weights those of every other provider's; in 16 bit where the image is."""
    build = provider.perceiver if mode == "perceiver" else provider.layer
    assert build
    module = build(case) if image.dtype == torch.float32 else build(case).to(image.dtype)
    if isinstance(module, Layer):
        run = LayerRun(module, case, image, backward=mode == "forward+backward")
        return GraphedRun(run) if provider.graph else run
    return PerceiverRun(module, case, image)


def truth(case: Case, mode: str, image: Tensor) -> dict[str, Tensor]:
    """The float64 values of a run, or of a layer beyond TRUTH_PAIRS the output of a few latents of the first image."""
    run: LayerRun | PerceiverRun
    if mode == "perceiver":
        run = PerceiverRun(PlainPerceiver(case, ExactCrossAttention(case)).double(), case, image)
    else:
        whole = case.pairs <= TRUTH_PAIRS
        if not whole:
            case, image = dataclasses.replace(case, batch=1), image[:1]
        run = LayerRun(ExactCrossAttention(case), case, image, backward=whole and mode == "forward+backward")
        if not whole:
            run.latents = nn.Parameter(run.latents[:, :TRUTH_LATENTS])
    run()
    return run.values()


def errors(values: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, Error]:
    """The distance of each value from its truth; of an output, over the latents whose truth is known."""
    known = {name: value for name, value in values.items() if name in true}
    known["output"] = known["output"][: len(true["output"]), : true["output"].shape[1]]
    return {name: error(value, true[name]) for name, value in known.items()}


def compare(
    case: Case,
    mode: str,
    providers: Iterable[Provider],
    effort: Effort,
    progress: Progress = lambda line: None,
    image: Tensor | None = None,
) -> list[Result]:
    """Measures every provider on one case, in the order given; what cannot run is a result that says why.

    Args:
        case: what runs; `mode`: one of MODES.
        providers: who runs it. Those who have no whole Perceiver are left out where that is the mode.
        effort: how much time and memory it may take.
        progress: is told what is going on.
        image: the data, (batch, *shape, c); by default random. Its device and dtype are those of the comparison.
    """
    image = case.image() if image is None else image
    device = image.device.type
    results: dict[str, Result] = {}
    runs: dict[str, Run] = {}
    for provider in providers:
        if mode == "perceiver" and provider.perceiver is None:
            continue
        refused = provider.missing() or effort.refuse(provider.bytes_needed(case, mode), device)
        progress(f"{case.name}, {mode}: {provider.name}" + (f" left out: {refused}" if refused else ""))
        if not refused:
            try:
                runs[provider.name], results[provider.name] = first_calls(provider, case, mode, image)
                continue
            except Exception as failure:  # one peer that fails must not cost the figures of the others
                refused = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
        results[provider.name] = Result(case.name, mode, provider.name, refused)
    if effort.errors and runs:
        progress(f"{case.name}, {mode}: float64 truth")
        true = truth(case, mode, image)
        for name, run in runs.items():
            results[name] = dataclasses.replace(results[name], errors=errors(run.values(), true))
    if runs:
        progress(f"{case.name}, {mode}: interleaved timing")
        timings = interleave(runs, budget=effort.budget, min_rounds=effort.min_rounds, device=device)
        for name, timing in timings.items():
            results[name] = dataclasses.replace(results[name], timing=timing)
    return list(results.values())


def first_calls(provider: Provider, case: Case, mode: str, image: Tensor) -> tuple[Run, Result]:
    """Builds a provider's run and measures what only early calls show: first-call time and peak memory.

    On a CPU, a miniature of the case runs first, to load libraries that a first call would otherwise be charged for.
    """
    if image.device.type == "cpu" and not provider.compiled and case.small() != case:
        prepare(provider, case.small(), mode, case.small().image().to(image))()
    run = prepare(provider, case, mode, image)
    calls: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        run()
        synchronize(image.device.type)
        calls.append(time.perf_counter() - start)

    if provider.compiled:
        call()
        run.clear()
    memory = peak_extra_memory(call, image.device.type)
    return run, Result(case.name, mode, provider.name, first_call=calls[0], memory=memory)


HEADER = (
    "provider",
    "median",
    "p20 ... p80",
    "times ours",
    "peak extra memory",
    "error (rms)",
    "pairs/s",
    "of exp",
)


def table(results: Sequence[Result], pairs: int, exponentials: float | None) -> str:
    """The comparison as text, and under it why some did not run.

    Args:
        results: of one case in one mode.
        pairs: (row, token) pairs of a call, each of which costs an exponential at least.
        exponentials: what this machine can do of them per second, where known.
    """
    ours = next((result.timing for result in results if result.provider == "ours"), None)
    rows = [row(result, result.timing, ours, pairs, exponentials) for result in results if result.timing]
    refusals = [f"{result.provider}: {result.refused}" for result in results if result.refused]
    return "\n".join([tables.markdown(HEADER, rows), *refusals])


def row(result: Result, timing: Timing, ours: Timing | None, pairs: int, exponentials: float | None) -> list[str]:
    """One provider's line of the table."""
    speed = pairs / timing.median
    return [
        result.provider,
        tables.seconds(timing.median),
        f"{tables.seconds(timing.quantile(0.2))} ... {tables.seconds(timing.quantile(0.8))}",
        tables.ratio(timing.ratio(ours) if ours else None),
        tables.size(result.memory),
        f"{result.worst_error.rms:.1e}" if result.worst_error else "-",
        tables.rate(speed),
        f"{speed / exponentials:.1%}" if exponentials else "-",
    ]


def record(result: Result) -> dict[str, Any]:
    """A result as it is kept in a file: the summary of its timing, not every call."""
    kept = dataclasses.asdict(dataclasses.replace(result, timing=None))
    kept["timing"] = result.timing and summary(result.timing)
    return kept


def summary(timing: Timing) -> dict[str, float]:
    """A timing as it is kept in a file."""
    return {
        "median": timing.median,
        "p20": timing.quantile(0.2),
        "p80": timing.quantile(0.8),
        "rounds": len(timing.rounds),
        "calls": sum(map(len, timing.rounds)),
    }
