"""The stages of the GPU check that time something, each in a process of its own: a fault or a hang costs no other.

`python -m perceiver_kernels.benchmarking.gpu_stages STAGE FILE` prints tables, and keeps its records in the file after
every one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.benchmarking import compare, encoder_bars, gpu_cases, gpu_providers, models, tables
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.compare import Effort, GraphedCall, Result
from perceiver_kernels.benchmarking.gpu_cases import AttentionShape, EncoderComparison, ModelComparison, Plan, name_of
from perceiver_kernels.benchmarking.interpreted import interpreted
from perceiver_kernels.benchmarking.measure import Call, Timing, interleave
from perceiver_kernels.ops.separable_attention import attend_to_grid

Record = dict[str, Any]
TITLES = ("op", "case", "dtype", "mode")
SDPA = {**gpu_providers.SDPA_BACKENDS, "math": SDPBackend.MATH}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a stage measures.

    Args:
        tiny: on the CPU, in the interpreter, at tiny sizes: its figures are no measurements.
        compiled: whether torch.compile takes part.
        deadline: the time.time() after which no further comparison starts.
        exponentials: per second, where the roofline is known.
    """

    tiny: bool
    compiled: bool
    deadline: float
    exponentials: float | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def plan(self) -> Plan:
        return gpu_cases.tiny() if self.tiny else gpu_cases.full()

    @property
    def effort(self) -> Effort:
        if self.tiny:
            return Effort(budget=0.0, min_rounds=1, deadline=self.deadline)
        return Effort(budget=0.8, min_rounds=3, deadline=self.deadline)


def progress(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def with_ratios(results: list[Result]) -> list[Record]:
    """The results as records, with how many times as long as ours each took, by the rounds of the run."""
    ours = next((result.timing for result in results if result.provider == "ours"), None)
    return [
        compare.record(result) | {"times_ours": result.timing.ratio(ours) if ours and result.timing else None}
        for result in results
    ]


# --- stages: each yields records and how they read --------------------------------------------------------------------


def roofline(setting: Setting) -> Iterator[tuple[Record, str]]:
    """What the GPU can do at best."""
    from perceiver_kernels.benchmarking import gpu_roofline

    rates = gpu_roofline.rates(setting.plan, setting.device, setting.effort.budget, setting.effort.min_rounds)
    rows = [[name, f"{tables.rate(value)}/s"] for name, value in rates.items()]
    yield {"rates": rates}, tables.markdown(("at best", "per second"), rows)


def encoder(setting: Setting) -> Iterator[tuple[Record, str]]:
    """Encoder cross-attention, from raw pixels to latents, by everyone."""
    for entry in setting.plan.encoder:
        case, dtype = entry.case, name_of(entry.dtype)
        about = {"case": case.name, "batch": case.batch, "dtype": dtype, "mode": entry.mode}
        yield attempt(partial(encoder_comparison, entry), about, setting)


def encoder_comparison(entry: EncoderComparison, setting: Setting) -> tuple[Record, str]:
    providers = gpu_providers.encoder_providers(entry.mode, compiled=setting.compiled and entry.compiled)
    image = entry.case.image().to(setting.device, entry.dtype)
    results = compare.compare(entry.case, entry.mode, providers, setting.effort, progress, image)
    record = {"pairs": entry.case.pairs, "results": with_ratios(results)}
    return record, compare.table(results, entry.case.pairs, setting.exponentials)


def whole_models(setting: Setting) -> Iterator[tuple[Record, str]]:
    """Whole models, forward and AdamW steps."""
    for entry in setting.plan.models:
        about = {"case": entry.model.name, "batch": entry.model.input_shape[0], "mode": entry.mode}
        yield attempt(partial(model_comparison, entry), about, setting)


def model_comparison(entry: ModelComparison, setting: Setting) -> tuple[Record, str]:
    providers = gpu_providers.model_providers(entry.model, entry.mode, compiled=setting.compiled and entry.compiled)
    results = models.compare_models(entry.model, entry.mode, providers, setting.effort, progress, setting.device)
    return {"results": with_ratios(results)}, models.model_table(results)


def attempt(measure: Callable[[Setting], tuple[Record, str]], about: Record, setting: Setting) -> tuple[Record, str]:
    """A comparison's record and table, or why there is none."""
    title = ", ".join(str(value) if name in TITLES else f"{name} {value}" for name, value in about.items())
    if time.time() > setting.deadline:
        return about | {"left out": "no time left"}, f"{title}: no time left"
    progress(title)
    release()
    try:
        record, table = measure(setting)
    except Exception as failure:  # one comparison that fails must not cost the others
        left_out = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
        return about | {"left out": left_out}, f"{title}: {left_out}"
    return about | record, f"{title}\n\n{table}"


def release() -> None:
    """Forgets what earlier comparisons compiled and allocated."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def operators(setting: Setting) -> Iterator[tuple[Record, str]]:
    """The operators alone: separable attention, latent attention and the written-out encoding."""
    plan = setting.plan
    for case, dtype in itertools.product(plan.kernel, plan.dtypes):
        about = {"op": "separable_attention", "batch": case.batch, "dtype": name_of(dtype)}
        calls = partial(by_each_backend, "separable_attention", partial(separable_calls, case, dtype, setting.device))
        yield attempt(partial(timed, calls, {"forward": case.pairs, "backward": case.pairs}), about, setting)
    for shape in plan.attention:
        about = {"op": "latent_attention", **dataclasses.asdict(shape), "dtype": name_of(shape.dtype)}
        products = 2 * shape.batch * shape.heads * shape.latents**2 * shape.head_dim
        calls = partial(by_each_backend, "latent_attention", partial(attention_calls, shape, setting.device))
        yield attempt(partial(timed, calls, {"forward": 2 * products, "backward": 5 * products}), about, setting)
    for dtype in plan.dtypes:
        case = plan.encoding
        about = {"op": "fourier_encode", "batch": case.batch, "dtype": name_of(dtype)}
        written = (case.channels - case.data_channels) * case.batch * case.tokens * dtype.itemsize
        calls = partial(by_each_backend, "fourier_encode", partial(encoding_calls, case, dtype, setting.device))
        yield attempt(partial(timed, calls, {"forward": written}), about, setting)


# (direction, provider, how the call is made)
Calls = Iterator[tuple[str, str, Callable[[], Call]]]


def by_each_backend(op: str, calls: Callable[[], Calls]) -> Calls:
    """The calls, those of ours also by each backend by itself, where several have kernels for this GPU."""
    entries = [entry for entry in dispatch.declarations(op) if "cuda" in entry.devices and not entry.unavailable()]
    several = torch.cuda.is_available() and len(entries) > 1
    for direction, provider, build in calls():
        yield direction, provider, build
        for entry in entries if several and provider.startswith("ours") else ():
            yield direction, provider.replace("ours", f"ours-{entry.backend}", 1), partial(forced, entry.backend, build)


def forced(backend: str, build: Callable[[], Call]) -> Call:
    """The call by this backend or not at all."""
    with pk.use_backend(backend):
        call = build()

    def run() -> None:
        with pk.use_backend(backend):
            call()

    return run


def timed(calls: Callable[[], Calls], work: Mapping[str, int], setting: Setting) -> tuple[Record, str]:
    """Times calls in turns; forward ones as CUDA graphs, free of launching. `work` is what a call of a direction does:
    pairs, floating-point operations, bytes written."""
    results: dict[str, dict[str, Any]] = {direction: {} for direction in work}
    ready: dict[str, dict[str, Call]] = {direction: {} for direction in work}
    graphs = setting.device == "cuda"
    for direction, provider, build in calls():
        try:
            call = build()
            call()
            ready[direction][provider] = graphed(call) if graphs and direction == "forward" else call
        except Exception as failure:  # what a backend does not do is its result
            refused = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
            results[direction][provider] = {"refused": refused}
    rows, refusals = [], []
    for direction, these in ready.items():
        refusals += [f"{direction}, {name}: {entry['refused']}" for name, entry in results[direction].items()]
        rounds = setting.effort.min_rounds
        timings = interleave(these, budget=0.3, min_rounds=rounds, device=setting.device) if these else {}
        ours = timings.get("ours")
        for provider, timing in timings.items():
            speed, ratio = work[direction] / timing.median, timing.ratio(ours) if ours else None
            graph = isinstance(these[provider], GraphedCall)
            entry = {"timing": compare.summary(timing), "per_second": speed, "times_ours": ratio, "graph": graph}
            results[direction][provider] = entry
            rows.append(operator_row(direction, provider, timing, speed, ratio))
    header = ("direction", "provider", "median", "p20 ... p80", "per second", "times ours")
    text = "\n".join([tables.markdown(header, rows), *refusals])
    return {"results": results, "work": dict(work)}, text


def graphed(call: Call) -> Call:
    """The call as a CUDA graph, or as it is where it cannot be one: its record says which."""
    try:
        return GraphedCall(call)
    except Exception as failure:
        progress(f"not as a CUDA graph: {type(failure).__name__}: {failure}".splitlines()[0])
        return call


def operator_row(direction: str, provider: str, timing: Timing, speed: float, ratio: float | None) -> list[str]:
    spread = f"{tables.seconds(timing.quantile(0.2))} ... {tables.seconds(timing.quantile(0.8))}"
    return [direction, provider, tables.seconds(timing.median), spread, tables.rate(speed), tables.ratio(ratio)]


def without_gradients(function: Callable[[], object]) -> Call:
    def call() -> None:
        with torch.no_grad():
            function()

    return call


def backward_of(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Call:
    out = function(*leaves)
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def separable_calls(case: Case, dtype: torch.dtype, device: str) -> Calls:
    """The kernel on what a layer gives it, data in a dtype; backward is that of the rows' side."""
    a, axes, x, r = encoder_bars.kernel_arguments(case)
    form = torch.cat([part.transpose(1, 2) for part in (a, *axes)], 1).to(device)
    x = x.unflatten(1, case.shape).to(device, dtype)
    r = r.unflatten(1, case.shape).to(device)
    leaf = form.clone().requires_grad_()
    yield "forward", "ours", lambda: without_gradients(lambda: attend_to_grid(form, x, r))
    yield "backward", "ours", lambda: backward_of(lambda form: attend_to_grid(form, x, r)[0], (leaf,))


def attention_calls(shape: AttentionShape, device: str) -> Calls:
    """latent_attention and each of SDPA's backends, on the same q, k and v."""
    size = (3, shape.batch, shape.heads, shape.latents, shape.head_dim)
    q, k, v = torch.randn(size, device=device).to(shape.dtype)
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_())

    def by(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    everyone = {"ours": pk.latent_attention} | {f"SDPA {name}": by(backend) for name, backend in SDPA.items()}
    for name, attend in everyone.items():
        yield "forward", name, partial(without_gradients, partial(attend, q, k, v))
        yield "backward", name, partial(backward_of, attend, leaves)


def encoding_calls(case: Case, dtype: torch.dtype, device: str) -> Calls:
    """The encoded positions of a batch, from a grid and from free positions, and a copy of as many bytes."""
    grid = pk.FourierGrid(shape=case.shape, num_bands=case.num_bands, max_freq=case.max_freq)
    out = torch.empty(case.batch, case.tokens, grid.num_channels, device=device, dtype=dtype)
    source = torch.ones_like(out)
    positions = torch.rand(case.batch, case.tokens, len(case.shape), device=device)

    def free() -> Tensor:
        return pk.fourier_encode(positions, case.num_bands, case.max_freq, out=out)

    yield "forward", "copy", lambda: without_gradients(lambda: out.copy_(source))
    yield "forward", "ours", lambda: without_gradients(lambda: grid.encode(out=out))
    yield "forward", "ours, free positions", lambda: without_gradients(free)


STAGES: dict[str, Callable[[Setting], Iterator[tuple[Record, str]]]] = {
    "roofline": roofline,
    "operators": operators,
    "encoder": encoder,
    "models": whole_models,
}


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--setting", type=json.loads, required=True)
    arguments = parser.parse_args()
    setting = Setting(**arguments.setting)
    if setting.compiled:
        # The compilations of a comparison count against one limit, past which torch would run uncompiled, unasked.
        torch._dynamo.config.recompile_limit = 64
    done: list[Record] = []
    with interpreted() if setting.tiny else contextlib.nullcontext():
        for record, text in STAGES[arguments.stage](setting):
            print(f"\n{text}", flush=True)
            done.append({"record": record, "text": text})
            arguments.file.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
