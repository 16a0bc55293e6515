"""One case, every provider, one mode: same weights, same input, interleaved clocks, one truth."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.measure import (
    Error,
    Timing,
    available_memory,
    error,
    interleave,
    peak_extra_memory,
)
from perceiver_kernels.benchmarking.plain import ExactCrossAttention, cross_attention
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
    """

    budget: float = 6.0
    min_rounds: int = 5
    memory_limit: int | None = None
    errors: bool = True

    def refuse(self, bytes_needed: int) -> str | None:
        """Why a call of this size should not be tried, or None."""
        limit = int(0.6 * available_memory()) if self.memory_limit is None else self.memory_limit
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


class Run:
    """A provider's module with the weights of the case, ready to be called again and again."""

    def __init__(self, module: nn.Module, case: Case, mode: str) -> None:
        self.module, self.mode = module, mode
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module.layer.load_state_dict(cross_attention(case).state_dict())
            self.latents = nn.Parameter(torch.randn(1, case.num_latents, case.latent_dim))
            self.upstream = torch.randn(case.batch, case.num_latents, case.latent_dim)
        self.image = case.image()
        self.output = torch.empty(0)

    def __call__(self) -> None:
        if self.mode == "forward":
            with torch.no_grad():
                self.output = self.module(self.latents, self.image)
            return
        self.clear()
        self.output = self.module(self.latents, self.image)
        self.output.backward(self.upstream.to(self.output.dtype))

    def parameters(self) -> dict[str, Tensor]:
        return {"latents": self.latents, **dict(self.module.layer.named_parameters())}

    def clear(self) -> None:
        """Forgets output and gradients, so that they count as memory of the next call."""
        self.output = torch.empty(0)
        for parameter in self.parameters().values():
            parameter.grad = None

    def values(self) -> dict[str, Tensor]:
        """The output, and in the backward mode the gradient of every parameter, by name."""
        values = {"output": self.output.detach()}
        gradients = {f"grad {name}": parameter.grad for name, parameter in self.parameters().items()}
        return values | {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def truth(case: Case, mode: str) -> dict[str, Tensor]:
    """The float64 values of Run.values(), or of what TRUTH_PAIRS leaves of them."""
    if case.pairs <= TRUTH_PAIRS:
        run = Run(ExactCrossAttention(case), case, mode)
        run()
    else:
        run = Run(ExactCrossAttention(case), case, "forward")
        run.latents = nn.Parameter(run.latents[:, :TRUTH_LATENTS])
        run()
    return run.values()


def errors(values: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, Error]:
    """The distance of each value from its truth; of an output, over the latents whose truth is known."""
    shared = [name for name in true if name in values]
    return {name: error(values[name][:, : true[name].shape[1]] if name == "output" else values[name], true[name]) for name in shared}


def compare(
    case: Case, mode: str, providers: Iterable[Provider], effort: Effort, progress: Progress = lambda line: None
) -> list[Result]:
    """Measures every provider on one case, in the order given; what cannot run is a result that says why."""
    results: dict[str, Result] = {}
    runs: dict[str, Run] = {}
    for provider in providers:
        progress(f"{case.name}, {mode}: {provider.name}")
        refused = provider.missing() or effort.refuse(provider.bytes_needed(case, mode))
        if refused:
            results[provider.name] = Result(case.name, mode, provider.name, refused)
            continue
        try:
            runs[provider.name], results[provider.name] = first_calls(provider, case, mode)
        except Exception as failure:  # one peer that fails must not cost the figures of the others
            reason = f"failed: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            results[provider.name] = Result(case.name, mode, provider.name, reason)
    if effort.errors and runs:
        progress(f"{case.name}, {mode}: float64 truth")
        true = truth(case, mode)
        for name, run in runs.items():
            results[name] = dataclasses.replace(results[name], errors=errors(run.values(), true))
    progress(f"{case.name}, {mode}: interleaved timing")
    for name, timing in interleave(runs, budget=effort.budget, min_rounds=effort.min_rounds).items() if runs else ():
        results[name] = dataclasses.replace(results[name], timing=timing)
    return list(results.values())


def first_calls(provider: Provider, case: Case, mode: str) -> tuple[Run, Result]:
    """Builds a provider's run and measures what only early calls show: first-call time and peak memory.

    A miniature of the case runs first, to load the libraries that a first call would otherwise be charged for.
    """
    if not provider.compiled:
        Run(provider.layer(case.small()), case.small(), mode)()
    run = Run(provider.layer(case), case, mode)
    first_call = 0.0

    def call() -> None:
        nonlocal first_call
        start = time.perf_counter()
        run()
        first_call = first_call or time.perf_counter() - start

    if provider.compiled:
        call()
        run.clear()
    memory = peak_extra_memory(call)
    return run, Result(case.name, mode, provider.name, first_call=first_call, memory=memory)


HEADER = ["provider", "median", "p20 ... p80", "times ours", "peak extra memory", "error (rms)", "pairs/s", "of exp limit"]


def table(results: Sequence[Result], pairs: int, exponentials: float | None) -> str:
    """The comparison as text; `pairs` per call against `exponentials` per second is the roofline."""
    ours = next((result.timing for result in results if result.provider == "ours"), None)
    rows = []
    for result in results:
        if result.timing is None:
            rows.append([f"{result.provider}: {result.refused}"] + ["-"] * (len(HEADER) - 1))
            continue
        speed = pairs / result.timing.median
        spread = f"{tables.seconds(result.timing.quantile(0.2))} ... {tables.seconds(result.timing.quantile(0.8))}"
        rows.append(
            [
                result.provider,
                tables.seconds(result.timing.median),
                spread,
                tables.ratio(result.timing.ratio(ours) if ours else None),
                tables.size(result.memory),
                f"{result.worst_error.rms:.1e}" if result.worst_error else "-",
                tables.rate(speed, ""),
                f"{speed / exponentials:.1%}" if exponentials else "-",
            ]
        )
    return tables.markdown(HEADER, rows)
