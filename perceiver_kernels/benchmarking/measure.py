"""The clock, the memory gauge and the error: how a call is measured, whoever provides it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every call, round by round of an interleaved run."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def median(self) -> float:
        return statistics.median(call for calls in self.rounds for call in calls)

    def quantile(self, fraction: float) -> float:
        """The time within which this fraction of the calls was done."""
        calls = sorted(call for calls in self.rounds for call in calls)
        return calls[min(len(calls) - 1, int(fraction * len(calls)))]

    def ratio(self, other: Timing) -> float:
        """How many times as long as `other`: the median over rounds, so that a slow spell of the machine hits both."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs)


# Calls that a visit queues on a GPU at most.
MAX_QUEUED = 100


def interleave(
    calls: Mapping[str, Call], *, budget: float, min_rounds: int = 3, visit: float = 0.03, device: str = "cpu"
) -> dict[str, Timing]:
    """Times several calls in turns, one visit each per round, so that they share the machine's good and bad moments.

    Args:
        calls: by name; already warmed up.
        budget: seconds; no round starts after it.
        min_rounds: rounds that run whatever they cost.
        visit: seconds that a visit repeats a fast call for; a slow one runs once.
        device: where the calls work: on "cuda" its events are the clock.
    """
    visited = _visit if device == "cpu" else _visit_gpu
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    start = time.perf_counter()
    done = 0
    while done < min_rounds or time.perf_counter() - start < budget:
        for name, call in calls.items():
            rounds[name].append(tuple(visited(call, visit)))
        done += 1
    return {name: Timing(tuple(visits)) for name, visits in rounds.items()}


def _visit(call: Call, seconds: float) -> Iterator[float]:
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        stop = time.perf_counter()
        yield stop - start
        if stop >= end:
            return


def _visit_gpu(call: Call, seconds: float) -> Iterator[float]:
    """A call that starts on an idle GPU says how many more to queue; where there are more, they alone count."""
    torch.cuda.synchronize()
    probe = _queued(call, 1)[0]
    more = min(MAX_QUEUED, int(seconds / max(probe, 1e-6)))
    yield from _queued(call, more) if more else (probe,)


def _queued(call: Call, count: int) -> list[float]:
    """Seconds between the events before and after each of `count` calls, queued one after the other."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e-3 for start, stop in events]


def synchronize(device: str) -> None:
    """Waits until what was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class Error:
    """Distance from the float64 truth, in units of the truth's root mean square."""

    rms: float
    maximum: float


def error(value: Tensor, truth: Tensor) -> Error:
    """How far `value` is from `truth`; NaN when it is not finite."""
    difference = value.detach().double() - truth.double()
    scale = truth.double().square().mean().sqrt()
    return Error((difference.square().mean().sqrt() / scale).item(), (difference.abs().max() / scale).item())


def peak_extra_memory(call: Call, device: str = "cpu") -> int | None:
    """Bytes of memory that `call` needs at its worst moment, beyond what the process held before; None where unknown.

    A GPU's are those of torch's tensors there.

    Linux keeps a high-water mark that a process may reset for itself. Where it may not, a thread samples; where there
    is no /proc, the mark since the process began is used, which says nothing unless the call raises it.
    """
    _release_freed_memory()
    if device == "cuda":
        return _peak_on_gpu(call)
    if not Path("/proc/self/statm").exists():
        return _growth_of_maximum(call)
    before = _resident()
    if _reset_high_water_mark():
        call()
        return max(0, _high_water_mark() - before)
    return max(0, _sampled_peak(call) - before)


def _peak_on_gpu(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _release_freed_memory() -> None:
    """Gives freed memory back to the system, lest a call use what an earlier one left and seem to need nothing."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water_mark() > 0
    except OSError:
        return False


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _sampled_peak(call: Call) -> int:
    """Watches the resident memory of this process from a thread, every millisecond."""
    peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak


def _growth_of_maximum(call: Call) -> int | None:
    try:
        import resource
    except ImportError:
        call()
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return growth * unit if growth else None


def available_memory(device: str = "cpu") -> int:
    """Bytes that this process may still take: what the system has left, or its control group, whichever is less."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    limits = [_memory_of_group(), _memory_of_system()]
    return min(limit for limit in limits if limit is not None)


def _memory_of_system() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30


def _memory_of_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return None
