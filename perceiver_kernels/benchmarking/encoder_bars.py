"""The bars of the encoder: cross-attention to every pixel, its kernel, its encoding, and the import."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.benchmarking import compare, machine, tables
from perceiver_kernels.benchmarking.bars import Bar, Recorder, percent
from perceiver_kernels.benchmarking.cases import CASES, Case
from perceiver_kernels.benchmarking.measure import Call
from perceiver_kernels.benchmarking.providers import PROVIDERS, perceiver_pytorch_encoding

EXPERTS = ("expert", "expert-compiled")


def layer(recorder: Recorder) -> Iterator[Bar]:
    """Encoder cross-attention of ImageNet, 224 x 224, one head of 64."""
    limits = {"forward": (45.0, 25.0), "forward+backward": (35.0, 20.0)}
    for mode, (peer_limit, expert_limit) in limits.items():
        results = recorder.compare("imagenet", mode, "perceiver-pytorch", *EXPERTS, "expert-cached", "ours")
        yield speedup(f"layer, {mode}: perceiver-pytorch / ours", results, ("perceiver-pytorch",), peer_limit)
        yield speedup(f"layer, {mode}: expert / ours", results, EXPERTS, expert_limit)
        for peer in ("perceiver-pytorch", "expert"):
            yield error_bar(f"layer, {mode}: our error / {peer}'s", results["ours"], results[peer])


def one_wide_head(recorder: Recorder) -> Iterator[Bar]:
    """The same with one head of 261, the official model."""
    results = recorder.compare("imagenet-official", "forward", *EXPERTS, "ours")
    yield speedup("layer with one head of 261, forward: expert / ours", results, EXPERTS, 40.0)


def speedup(what: str, results: dict[str, compare.Result], peers: tuple[str, ...], limit: float) -> Bar:
    """How many times as long the fastest of `peers` takes."""
    ours = results["ours"].timing
    timings = [(name, results[name].timing) for name in peers]
    ratios = [(timing.ratio(ours), name) for name, timing in timings if timing and ours]
    if not ratios:
        reasons = [f"{name} {results[name].refused}" for name in (*peers, "ours") if results[name].refused]
        return Bar(what, None, limit, at_least=True, note="; ".join(reasons))
    value, name = min(ratios)
    return Bar(what, value, limit, at_least=True, note=f"the fastest is {name}" if len(peers) > 1 else "")


def error_bar(what: str, ours: compare.Result, peer: compare.Result) -> Bar:
    """The worst ratio of errors against float64, over the output and every gradient."""
    shared = [name for name in ours.errors if name in peer.errors]
    ratios = [(ours.errors[name].rms / peer.errors[name].rms, name) for name in shared]
    value, name = max(ratios, default=(None, "not measured"))
    return Bar(what, value, 1.5, at_least=False, note=f"worst: {name}")


def kernel_arguments(case: Case) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """a, tables, x and r of separable attention, of the sizes and magnitudes that a layer gives them."""
    generator = torch.Generator().manual_seed(0)
    rows = case.heads * case.num_latents

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a = 0.1 * normal(1, rows, case.data_channels)
    axes = [
        0.3 * normal(1, size, rows).transpose(1, 2) for size in case.shape
    ]  # rows contiguous, as the layer has them
    r = 1 + 0.1 * torch.rand(case.batch, case.tokens, generator=generator)
    return a, axes, case.image().flatten(1, -2), r


def kernel(recorder: Recorder) -> Iterator[Bar]:
    """Separable attention alone, against the bare vector exponential of the same run."""
    for name, limit in (("imagenet", 1 / 3), ("photo-4k", 1 / 4)):
        case = CASES[name]
        speed, exponentials = kernel_speed(recorder, case)
        yield Bar(
            f"kernel alone, {' x '.join(map(str, case.shape))}: pairs/s of the exponential's rate",
            speed / exponentials if exponentials else None,
            limit,
            at_least=True,
            show=percent,
            note=f"{tables.rate(speed)} of {tables.rate(exponentials)} per second",
        )


def kernel_speed(recorder: Recorder, case: Case) -> tuple[float, float | None]:
    """Pairs per second of separable attention, and exponentials per second measured in turns with it."""
    a, axes, x, r = kernel_arguments(case)
    rates: list[float | None] = []

    def exponentiate() -> None:
        rates.append(machine.exponentials_per_second())

    def attend() -> None:
        pk.separable_attention(a, axes, x, r)

    # Visits as long as an exponential's, so that both run on a warm machine.
    timing = recorder.interleave({"exponentials": exponentiate, "kernel": attend}, visit=0.1)["kernel"]
    known = [rate for rate in rates if rate is not None]
    return case.pairs / timing.median, statistics.median(known) if known else None


def between_gemms(recorder: Recorder) -> Iterator[Bar]:
    """Separable attention between two of torch's matrix products."""
    a, axes, x, r = kernel_arguments(CASES["imagenet"])
    data, weight = torch.randn(512, 1024), torch.randn(1024, 1024)

    def gemm() -> None:
        F.linear(data, weight)

    def gemms() -> None:
        gemm()
        gemm()

    def attend() -> None:
        pk.separable_attention(a, axes, x, r)

    def mixed() -> None:
        gemm()
        attend()
        gemm()

    times = recorder.interleave({"gemms": gemms, "kernel": attend, "mixed": mixed})
    extra = times["mixed"].median - times["gemms"].median
    note = f"{tables.seconds(extra)} of {tables.seconds(times['mixed'].median)} together"
    yield Bar("kernel between GEMMs / alone", extra / times["kernel"].median, 1.1, at_least=False, note=note)


def large_image(recorder: Recorder) -> Iterator[Bar]:
    """A whole Perceiver of depth 1 on 3840 x 2160 pixels."""
    memory = recorder.compare("photo-4k", "perceiver", "ours")["ours"].memory
    yield Bar("4K photograph, whole Perceiver: peak extra memory", memory, 600e6, at_least=False, show=tables.size)

    large, small = CASES["photo-4k"], CASES["imagenet"]
    runs = {case.name: compare.prepare(PROVIDERS["ours"], case, "forward", case.image()) for case in (small, large)}
    times = recorder.interleave(runs)
    growth = times[large.name].ratio(times[small.name]) * small.tokens / large.tokens
    note = f"{tables.seconds(times[large.name].median)} for {large.tokens / 1e6:.1f} M pixels"
    yield Bar("4K photograph, cross-attention: time per pixel / at 224 x 224", growth, 1.2, at_least=False, note=note)


def encoding(recorder: Recorder) -> Iterator[Bar]:
    """The encoded positions of 224 x 224 pixels and a batch of 8, materialised."""
    case = CASES["imagenet"]
    times = recorder.interleave(encoding_calls(case, batch=8))
    peer, into = times.get("perceiver-pytorch"), times["ours, into a given array"]
    value = peer.ratio(times["ours"]) if peer else None
    yield Bar("fourier_encode: perceiver-pytorch / ours", value, 4.0, at_least=True)
    what = "fourier_encode into a given array: of copy bandwidth"
    yield Bar(what, times["copy"].ratio(into), 0.5, at_least=True, show=percent)


def encoding_calls(case: Case, batch: int) -> dict[str, Call]:
    """Ways to fill (batch, M, E) with the encoded positions of a case, and a copy of as many bytes."""
    grid = pk.FourierGrid(shape=case.shape, num_bands=case.num_bands, max_freq=case.max_freq)
    out = torch.empty(batch, case.tokens, grid.num_channels)
    source = torch.ones_like(out)
    calls: dict[str, Call] = {
        "ours": lambda: grid.encode(batch=batch),
        "ours, into a given array": lambda: grid.encode(out=out),
        "copy": lambda: out.copy_(source),
    }
    if PROVIDERS["perceiver-pytorch"].missing() is None:
        calls["perceiver-pytorch"] = lambda: perceiver_pytorch_encoding(case, batch).contiguous()
    return calls


def import_time(recorder: Recorder) -> Iterator[Bar]:
    """The import of this library, with torch imported already, in fresh processes."""
    program = (
        "import torch, time; start = time.perf_counter(); import perceiver_kernels; print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", program]
    seconds = [float(subprocess.check_output(command, text=True)) for _ in range(recorder.effort.min_rounds)]
    value = statistics.median(seconds)
    yield Bar("import perceiver_kernels after torch", value, 0.3, at_least=False, show=tables.seconds)


GROUPS = (layer, one_wide_head, kernel, between_gemms, large_image, encoding, import_time)
