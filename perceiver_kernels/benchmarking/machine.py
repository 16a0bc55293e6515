"""The machine a figure was measured on: what it is, and how fast it can exponentiate, copy and multiply at best."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import perceiver_kernels


def describe() -> dict[str, Any]:
    """What a reader of a figure needs to know about the machine and the software; a failed probe becomes its value."""
    return {
        "cpu": probe(cpu_model),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": probe(lambda: native().isa()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "perceiver_kernels": perceiver_kernels.__version__,
        "commit": probe(git_commit),
    }


def headline() -> str:
    """The machine in one line."""
    return "{cpu}, {threads} threads on {cores} cores, {isa}, torch {torch}".format(**describe())


def probe(question: Callable[[], Any]) -> Any:
    """The answer, or what went wrong."""
    try:
        return question()
    except Exception as failure:
        return f"failed: {type(failure).__name__}: {failure}"


def native() -> ModuleType:
    """The compiled extension; ImportError where it was not built."""
    return importlib.import_module("perceiver_kernels._cpu")


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, marked when the tree has changes; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def exponentials_per_second(seconds: float = 0.1) -> float | None:
    """The bare vector exponential on all of torch's threads at once; None without the extension."""
    try:
        return native().exp_rate(seconds, torch.get_num_threads())
    except (ImportError, AttributeError):
        return None


def copy_bandwidth(elements: int = 1 << 26, repeats: int = 5) -> float:
    """Bytes per second of torch's copy from one array to another, each byte counted once."""
    source = torch.ones(elements)
    target = torch.empty_like(source).copy_(source)
    return elements * source.element_size() / _best(lambda: target.copy_(source), repeats)


def gemm_flops(size: int = 1536, repeats: int = 5) -> float:
    """Floating-point operations per second of torch's float32 matrix product."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    torch.mm(a, b)
    return 2 * size**3 / _best(lambda: torch.mm(a, b), repeats)


def _best(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
