"""The check of a machine with an NVIDIA GPU: tests, roofline, operators, encoder, whole models, first calls, bars.

One command, within a budget of minutes, without a network, with nothing installed but torch and triton. Stages run in
processes of their own, one after the other; what fails, hangs or is missing becomes a value in the report. Without a
GPU everything runs at tiny sizes in Triton's interpreter, to show that it runs, and no figure is a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels import dispatch
from perceiver_kernels.backends import native
from perceiver_kernels.benchmarking import bars, gpu_bars, gpu_cases, gpu_first_call, gpu_tests, machine, tables
from perceiver_kernels.benchmarking.gpu_cases import name_of
from perceiver_kernels.benchmarking.interpreted import interpreted

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 480.0
PACKAGES = ("triton", "numpy", "perceiver-pytorch", "transformers", "pytest", "pytest-xdist", "hypothesis")
# Of the time that is left, what share each stage may have, later stages taking what earlier ones left over.
SHARES = {"roofline": 4, "tests": 20, "operators": 14, "encoder": 28, "models": 28, "first-calls": 8, "sanitizers": 8}
# Of its time, what a stage uses to start comparisons; the rest is for the one under way.
STARTING = 0.7

# Characters of a process's log that are shown where it did not end well.
LOG = 8000

NOT_MEASURED = "Triton's interpreter at tiny sizes: NO FIGURE HERE IS A MEASUREMENT"
METHOD = (
    "CUDA events around queued calls, after warm-up; providers in turns, ratios by round, medians and p20 ... p80; "
    "operators forward as CUDA graphs; inputs stay in the L2 cache from call to call, it is not flushed; memory by "
    "torch's allocator beyond what was held; errors against float64, of large cases over 64 latents of one image"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for."""

    out: Path
    budget: float
    tiny: bool
    compiled: bool
    stages: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check and writes the report; 1 where a bar, a test or a sanitizer fails, and --strict was given."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the report (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes in the interpreter, as without a GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--stages", nargs="+", choices=SHARES, default=tuple(SHARES), metavar="STAGE", help=", ".join(SHARES)
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a bar is missed or a test fails")
    given = parser.parse_args(argv)
    tiny = given.tiny or not torch.cuda.is_available()
    options = Options(given.out, given.budget, tiny, not (tiny or given.no_compile), tuple(given.stages))
    report = check(options)
    missed = any(bar["verdict"] == bars.VERDICTS[False] for bar in report["bars"])
    failed = missed or tests_failed(report) or sanitizers_failed(report)
    return 1 if given.strict and failed else 0


def check(options: Options) -> dict[str, Any]:
    """The report, written after every stage."""
    start = time.time()
    report: dict[str, Any] = {
        "interpreter": options.tiny,
        "environment": environment(options),
        "method": NOT_MEASURED if options.tiny else METHOD,
        "stages": {},
        "bars": [],
    }
    lines = [heading(report)]
    print(lines[0], flush=True)
    path = options.out / f"gpu-check-{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for done, name in enumerate(options.stages):
        shares = [SHARES[later] for later in options.stages[done:]]
        seconds = max(0.0, options.budget - (time.time() - start)) * shares[0] / sum(shares)
        print(f"\n## {name}, {seconds:.0f} s at most", flush=True)
        stage, text = staged(name, seconds, options, report)
        report["stages"][name] = stage
        lines.append(f"## {name}\n\n{text or stage['status']}")
        write(path, report, lines)
    plan = gpu_cases.tiny() if options.tiny else gpu_cases.full()
    measured = [
        for_reader(bar, options.tiny)
        for bar in gpu_bars.measured(report["stages"], plan.batch, name_of(plan.dtypes[1]))
    ]
    report["bars"] = [bars.record(bar) for bar in measured]
    report["seconds"] = time.time() - start
    lines += [f"## bars\n\n{tables.markdown(bars.HEADER, [bars.row(bar) for bar in measured])}", outcome(report)]
    print("", *lines[-2:], sep="\n\n")
    write(path, report, lines)
    print(f"\nwritten: {path} and {path.with_suffix('.md').name}")
    return report


def write(path: Path, report: dict[str, Any], lines: list[str]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n\n".join(lines) + "\n")


def heading(report: dict[str, Any]) -> str:
    about = report["environment"]
    chip, commit = about["gpu"], about["commit"]
    chip = chip["name"] if isinstance(chip, dict) else "no GPU"
    line = f"# {chip}, torch {about['torch']}, triton {about['packages']['triton']}, commit {commit}"
    return f"{line}\n\n{report['method']}"


def outcome(report: dict[str, Any]) -> str:
    """How every stage ended, and the whole in a line."""
    rows = [[name, stage["status"], f"{stage['seconds']:.0f} s"] for name, stage in report["stages"].items()]
    tests = report["stages"].get("tests", {}).get("records", [])
    counts = (
        ", ".join(f"{tests[0][kind]} {kind}" for kind in ("passed", "failed", "error", "skipped")) if tests else "none"
    )
    lines = [tables.markdown(("stage", "ended", "time"), rows), f"\ntests: {counts}; {report['seconds']:.0f} s in all"]
    return "\n".join([*lines, *([NOT_MEASURED] if report["interpreter"] else [])])


def tests_failed(report: dict[str, Any]) -> bool:
    records = report["stages"].get("tests", {}).get("records", [])
    return any(record["failed"] or record["error"] for record in records)


def sanitizers_failed(report: dict[str, Any]) -> bool:
    records = report["stages"].get("sanitizers", {}).get("records", [])
    return any(record.get("ended", "done").startswith("exit") for record in records)


def for_reader(bar: bars.Bar, tiny: bool) -> bars.Bar:
    """In the interpreter no bar has a value: what was computed is a note."""
    if not tiny:
        return bar
    computed = "nothing" if bar.value is None else bar.show(bar.value)
    note = "; ".join(filter(None, [f"interpreter, no measurement: {computed}", bar.note]))
    return dataclasses.replace(bar, value=None, note=note)


# --- stages -----------------------------------------------------------------------------------------------------------


def staged(name: str, seconds: float, options: Options, report: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A stage's status, seconds and records, and its tables; whatever went wrong is its status."""
    start = time.time()
    others = {"tests": tests, "first-calls": first_calls, "sanitizers": sanitizers}
    run = others.get(name, partial(timing, name))
    with tempfile.TemporaryDirectory() as folder:
        try:
            status, records, text = run(Path(folder), seconds, options, report)
        except Exception as failure:
            status, records, text = f"failed: {type(failure).__name__}: {failure}", [], ""
    return {"status": status, "seconds": time.time() - start, "records": records}, text


Stage = tuple[str, list[dict[str, Any]], str]


def timing(name: str, folder: Path, seconds: float, options: Options, report: dict[str, Any]) -> Stage:
    """One of gpu_stages, in its own process."""
    file = folder / "records.json"
    roofline = report["stages"].get("roofline", {}).get("records", [])
    setting = {
        "tiny": options.tiny,
        "compiled": options.compiled,
        "deadline": time.time() + STARTING * seconds,
        "exponentials": roofline[0]["rates"]["exponentials"] if roofline else None,
    }
    module = "perceiver_kernels.benchmarking.gpu_stages"
    command = [sys.executable, "-m", module, name, str(file), "--setting", json.dumps(setting)]
    status, log = finished(command, child_environment(options), seconds)
    done = json.loads(file.read_text()) if file.exists() else []
    if status != "done":
        print(f"\n{status}\n{log}", flush=True)
        status = f"{status}: {last_line(log)}"
    return status, [entry["record"] for entry in done], "\n\n".join(entry["text"] for entry in done)


def tests(folder: Path, seconds: float, options: Options, report: dict[str, Any]) -> Stage:
    """Tests of level 8: everything that has a kernel for GPUs, on this one."""
    if not gpu_tests.TESTS.is_dir():
        return "no tests here: not a checkout", [], ""
    record = folder / "tests.jsonl"
    status, log = finished(gpu_tests.command(options.tiny), gpu_tests.environment(record, options.tiny), seconds)
    summary = gpu_tests.summary(record)
    if not any(summary[kind] for kind in ("passed", "failed", "error", "skipped")):
        status = f"{status}: {last_line(log)}"
    elif status == "exit status 1":
        status = "done"  # tests failed, which the record says
    return status, [summary], "```\n" + json.dumps(summary, indent=1) + "\n```"


def first_calls(folder: Path, seconds: float, options: Options, report: dict[str, Any]) -> Stage:
    """Seconds of first calls in fresh processes: no compiled kernel on disk, then those of the first process."""
    end = time.time() + seconds
    variables = child_environment(options) | {"TRITON_CACHE_DIR": str(folder / "kernels")}
    records: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for which in ("cold", "warm"):
        done = subprocess.run(
            gpu_first_call.command(options.tiny),
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, end - time.time()),
        )
        if done.returncode:
            return f"failed: {last_line(done.stderr)}", records, ""
        took = json.loads(done.stdout.splitlines()[-1])
        records.append({"caches": which, "seconds": took})
        rows += [[f"{which}: {what}", tables.seconds(value)] for what, value in took.items()]
    text = tables.markdown(("kernels on disk", "seconds"), rows)
    print(text, flush=True)
    return "done", records, text


def sanitizers(folder: Path, seconds: float, options: Options, report: dict[str, Any]) -> Stage:
    """compute-sanitizer over a call of every op's CUDA kernels: wrong accesses, and races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    missing = "needs a GPU" if options.tiny else None if tool else "compute-sanitizer is not on the PATH"
    if missing or not tool:
        return "done", [{"left out": missing}], f"left out: {missing}"
    records: list[dict[str, Any]] = []
    for kind in ("memcheck", "racecheck"):
        log = folder / f"{kind}.log"
        command = [
            tool,
            "--tool",
            kind,
            "--kernel-name",
            "kns=_kernel",
            "--error-exitcode",
            "9",
            "--log-file",
            str(log),
        ]
        variables = gpu_tests.environment(folder / "sanitized.jsonl", options.tiny)
        ended, _ = finished([*command, *gpu_tests.sanitized_command()], variables, seconds / 2)
        said = log.read_text()[-LOG:] if log.exists() else ""
        records.append({"tool": kind, "ended": ended, "said": last_line(said), "log": "" if ended == "done" else said})
    text = tables.markdown(("tool", "ended", "said"), [[r["tool"], r["ended"], r["said"]] for r in records])
    print(text, flush=True)
    return "done", records, text


def finished(command: list[str], variables: dict[str, str], seconds: float) -> tuple[str, str]:
    """Runs a command and all that it starts for so many seconds at most: how it ended, and the end of its log."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=errors, start_new_session=True)
        try:
            status = process.wait(seconds)
            ended = "done" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        errors.seek(0)
        return ended, errors.read()[-LOG:].strip()


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:500] if lines else ""


def child_environment(options: Options) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if options.tiny else "0"}


# --- environment ------------------------------------------------------------------------------------------------------


def environment(options: Options) -> dict[str, Any]:
    """The machine, the software and what will run; a failed probe is its own value."""
    return machine.describe() | {
        "gpu": machine.probe(gpu),
        "driver": machine.probe(driver),
        "cuda": torch.version.cuda,
        "packages": {name: machine.probe(partial(version, name)) for name in PACKAGES},
        "compiled CPU module": native.cpu_unavailable() or "loads",
        "backends": machine.probe(partial(backends, options.tiny)),
        "float32 products may be TensorFloat-32": torch.backends.cuda.matmul.allow_tf32,
        "command": shlex.join(sys.argv),
    }


def gpu() -> dict[str, Any] | str:
    if not torch.cuda.is_available():
        return "none"
    found = torch.cuda.get_device_properties(0)
    names = ("name", "multi_processor_count", "total_memory", "L2_cache_size")
    return {name: getattr(found, name, None) for name in names} | {"capability": f"{found.major}.{found.minor}"}


def driver() -> str:
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return (
        f"{fields}: " + subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def backends(tiny: bool) -> dict[str, str]:
    """Which backend runs each op on float32 and on bfloat16 data."""
    chosen: dict[str, str] = {}
    with interpreted() if tiny else contextlib.nullcontext():
        for op in sorted({declaration.op for declaration in dispatch.declarations()}):
            calls = [dispatch.Call(op, "cuda", torch.float32, dtype) for dtype in (torch.float32, torch.bfloat16)]
            chosen[op] = ", ".join(dict.fromkeys(selected(call) for call in calls))
    return chosen


def selected(call: dispatch.Call) -> str:
    find: Callable[[dispatch.Call], dispatch.Declaration] = dispatch.select
    return str(machine.probe(lambda: find(call).backend))
