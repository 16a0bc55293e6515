"""The tests on a GPU, in a process of their own; this file is also the pytest plugin that writes down what they did."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[2] / "tests"
RECORD = "PERCEIVER_KERNELS_TEST_RECORD"
# What runs kernels on a GPU: tests of its backends, and those that need one; not those of this check, nor what the host
# proves alone.
HOST = ("gpu_check", "gpu_providers", "cuda_build", "cuda_emulation", "cuda_code", "machine_code")
SELECTED = " and not ".join(("(triton or cuda or gpu)", *HOST))
SELECTED_TINY = "dropout_is_the_references"
SANITIZED = "test_cuda_sanitized.py"
WORKERS = 8
SHOWN = 20


def command(tiny: bool) -> list[str]:
    """pytest's command line; several processes share the GPU where pytest-xdist is there, for compilation's sake."""
    options = ["-q", "-p", __name__, "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if not tiny and importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= WORKERS:
        options += ["-n", str(WORKERS)]
    selected = [str(TESTS / "test_triton.py"), "-k", SELECTED_TINY] if tiny else [str(TESTS), "-k", SELECTED]
    return [sys.executable, "-m", "pytest", *options, *selected]


def sanitized_command() -> list[str]:
    """pytest's command line for a sanitizer, which slows kernels down: one call of every op that is in CUDA."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / SANITIZED), "-k", "any_order"]


def environment(record: Path, tiny: bool) -> dict[str, str]:
    """Of the tests' process: kernels compiled or interpreted, and products that repeat bit for bit."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {
        **own,
        RECORD: str(record),
        "TRITON_INTERPRET": "1" if tiny else "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def summary(record: Path) -> dict[str, Any]:
    """How many tests had which outcome, and what the first failures said; of those that got to run."""
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    failures = [line for line in lines if line["outcome"] in ("failed", "error")]
    skipped = Counter(line["message"] for line in lines if line["outcome"] == "skipped")
    return {
        **dict.fromkeys(("passed", "failed", "error", "skipped"), 0),
        **Counter(line["outcome"] for line in lines),
        "failures": [{"test": line["test"], "message": line["message"]} for line in failures[:SHOWN]],
        "skipped because": dict(skipped.most_common(SHOWN)),
    }


# --- the plugin -------------------------------------------------------------------------------------------------------


def write(test: str, outcome: str, said: str) -> None:
    # Of pytest-xdist's processes, the one that hears of all tests writes.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ[RECORD]).open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "message": said}) + "\n")


def message(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines() or [""]
    return lines[0 if crash else -1][:500]


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        write(report.nodeid, "failed" if report.when == "call" else "error", message(report))
    elif report.skipped:
        write(report.nodeid, "skipped", message(report))
    elif report.when == "call":
        write(report.nodeid, "passed", "")


def pytest_collectreport(report: Any) -> None:
    """Files that cannot be imported, say because a package is missing, are errors or skips; the others run."""
    if report.failed or report.skipped:
        write(report.nodeid, "error" if report.failed else "skipped", message(report))


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    """After a fault, a process can do nothing more on its GPU: one of several makes way for a fresh one."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)
