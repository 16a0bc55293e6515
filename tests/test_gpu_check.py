"""The GPU check runs through in the interpreter, and what fails, hangs or is missing becomes a value in its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from perceiver_kernels import dispatch
from perceiver_kernels.benchmarking import gpu_bars, gpu_cases, gpu_check, gpu_stages, gpu_tests, measure
from perceiver_kernels.benchmarking.interpreted import interpreted

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


def run(out: Path, *arguments: str, **variables: str) -> tuple[dict[str, Any], str]:
    """The report and the printed text of a run at tiny sizes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--tiny", "--out", str(out), *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (report,) = out.glob("*.json")
    assert report.with_suffix(".md").read_text().count("## ") >= 2
    return json.loads(report.read_text()), done.stdout


def test_everything_runs_through(tmp_path: Path) -> None:
    report, printed = run(tmp_path, "--budget", "3000")
    assert report["interpreter"] and "NO FIGURE HERE IS A MEASUREMENT" in printed and "expert-flash" in printed
    assert {"gpu", "torch", "packages", "commit", "compiled CPU module", "backends", "command"} <= set(
        report["environment"]
    )
    stages = report["stages"]
    assert list(stages) == list(gpu_check.SHARES)
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(stages, "done")

    (tests,) = stages["tests"]["records"]
    assert tests["passed"] > 0 and tests["failed"] == tests["error"] == 0
    (roofline,) = stages["roofline"]["records"]
    assert len(roofline["rates"]) == 5 and all(rate > 0 for rate in roofline["rates"].values())
    plan = gpu_cases.tiny()
    for name, count in (("encoder", len(plan.encoder)), ("models", len(plan.models))):
        assert len(stages[name]["records"]) == count
        for record in stages[name]["records"]:
            results = {result["provider"]: result for result in record["results"]}
            assert results["ours"]["timing"]["median"] > 0 and results["ours"]["times_ours"] == 1
            assert all(result["timing"] or result["refused"] for result in results.values())
    encoder = {result["provider"]: result for result in stages["encoder"]["records"][0]["results"]}
    assert encoder["ours"]["errors"]["output"]["rms"] < 1e-2
    assert encoder["expert-cudnn"]["refused"].startswith("failed: RuntimeError")
    operators = {record["op"] for record in stages["operators"]["records"]}
    assert operators == {"separable_attention", "latent_attention", "fourier_encode"}
    assert all(record["results"]["forward"]["ours"]["per_second"] for record in stages["operators"]["records"])
    assert [record["caches"] for record in stages["first-calls"]["records"]] == ["cold", "warm"]

    (sanitizers,) = stages["sanitizers"]["records"]
    assert sanitizers == {"left out": "needs a GPU"}

    assert len(report["bars"]) == 8
    for bar in report["bars"]:
        assert bar["value"] is None and bar["verdict"] == "not measured" and "no measurement" in bar["note"]
    without_transformers = [bar["what"] for bar in report["bars"] if "nothing" in bar["note"]]
    assert all("transformers" in what for what in without_transformers)


def test_the_check_runs_where_the_cpu_module_was_not_built(tmp_path: Path) -> None:
    hidden = "import sys\nsys.modules['perceiver_kernels._cpu'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    out = tmp_path / "out"
    report, _ = run(out, "--stages", "operators", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert report["environment"]["compiled CPU module"].startswith("the compiled CPU module does not load")
    assert report["stages"]["operators"]["status"] == "done"


OPTIONS = gpu_check.Options(Path(), 10.0, tiny=True, compiled=False, stages=("encoder",))


def test_a_stage_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "child_environment", lambda options: 1 / 0)
    stage, text = gpu_check.staged("encoder", 1.0, OPTIONS, {"stages": {}})
    assert stage["status"] == "failed: ZeroDivisionError: division by zero" and stage["records"] == [] and text == ""


@pytest.mark.parametrize("status", [0, 9])
def test_sanitizers_say_what_they_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int) -> None:
    """A script stands in for the tool: it writes the log that is asked for."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"""#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = --log-file ] && echo "========= ERROR SUMMARY: {status} errors" > "$2"; shift; done
exit {status}
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    options = gpu_check.Options(Path(), 10.0, tiny=False, compiled=False, stages=("sanitizers",))
    stage, text = gpu_check.staged("sanitizers", 20.0, options, {"stages": {}})
    assert [record["tool"] for record in stage["records"]] == ["memcheck", "racecheck"]
    assert all(record["said"] == f"========= ERROR SUMMARY: {status} errors" for record in stage["records"])
    assert gpu_check.sanitizers_failed({"stages": {"sanitizers": stage}}) == bool(status) and "racecheck" in text


def test_each_backend_is_timed_where_several_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        types.SimpleNamespace(backend=name, devices=("cuda",), unavailable=lambda: None) for name in ("cuda", "triton")
    ]
    entries.append(types.SimpleNamespace(backend="native", devices=("cpu",), unavailable=lambda: None))
    monkeypatch.setattr(dispatch, "declarations", lambda op: entries)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen: list[str] = []

    def build() -> measure.Call:
        return lambda: seen.append(dispatch.current_backend())

    calls = [("forward", "copy", build), ("forward", "ours, free positions", build)]
    timed = list(gpu_stages.by_each_backend("fourier_encode", lambda: iter(calls)))
    names = ["copy", "ours, free positions", "ours-cuda, free positions", "ours-triton, free positions"]
    assert [name for _, name, _ in timed] == names
    for _, _, made in timed:
        made()()
    assert seen == ["auto", "auto", "cuda", "triton"]


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("print('fine')", "done", ""),
        ("raise SystemExit('out of order')", "exit status 1", "out of order"),
        ("import os; os.abort()", "exit status -6", ""),
        ("import time; time.sleep(60)", "stopped after 1 s", ""),
    ],
    ids=["done", "failed", "aborted", "hanging"],
)
def test_how_a_process_ended(program: str, status: str, said: str) -> None:
    start = time.perf_counter()
    ended, last = gpu_check.finished(
        [sys.executable, "-S", "-c", program], dict(os.environ), 1.0 if "60" in program else 30
    )
    assert ended == status and last.endswith(said)
    assert time.perf_counter() - start < 30


def test_what_took_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    program = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 2; touch {tmp_path}/late'])"
    assert gpu_check.finished([sys.executable, "-S", "-c", program], dict(os.environ), 0.5)[0].startswith("stopped")
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_a_stage_without_time_leaves_its_comparisons_out(tmp_path: Path) -> None:
    variables = gpu_check.child_environment(OPTIONS)
    setting = {"tiny": True, "compiled": False, "deadline": 0.0}
    file = tmp_path / "records.json"
    module = "perceiver_kernels.benchmarking.gpu_stages"
    command = [sys.executable, "-m", module, "encoder", str(file), "--setting", json.dumps(setting)]
    assert gpu_check.finished(command, variables, 60.0)[0] == "done"
    records = [entry["record"] for entry in json.loads(file.read_text())]
    assert len(records) == len(gpu_cases.tiny().encoder)
    assert {record["left out"] for record in records} == {"no time left"}


def test_the_tests_summary_counts_what_ran(tmp_path: Path) -> None:
    record = tmp_path / "tests.jsonl"
    assert gpu_tests.summary(record)["passed"] == 0
    lines = [
        ("a", "passed", ""),
        ("b", "failed", "1 is not 2"),
        ("c", "skipped", "no GPU"),
        ("d", "error", "no such file"),
    ]
    record.write_text("".join(json.dumps({"test": t, "outcome": o, "message": m}) + "\n" for t, o, m in lines))
    summary = gpu_tests.summary(record)
    assert [summary[kind] for kind in ("passed", "failed", "error", "skipped")] == [1, 1, 1, 1]
    assert summary["failures"][0] == {"test": "b", "message": "1 is not 2"}
    assert summary["skipped because"] == {"no GPU": 1}


def test_a_missing_package_costs_only_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "test_needs.py").write_text("import no_such_package\n")
    (tmp_path / "test_fine.py").write_text("def test_gpu_one(): pass\n\ndef test_gpu_two(): assert 1 == 2\n")
    record = tmp_path / "tests.jsonl"
    command = [*gpu_tests.command(tiny=True)[:-3], str(tmp_path), "-k", gpu_tests.SELECTED]
    gpu_check.finished(command, gpu_tests.environment(record, tiny=True), 60.0)
    summary = gpu_tests.summary(record)
    assert [summary[kind] for kind in ("passed", "failed", "error")] == [1, 1, 1]
    assert "no_such_package" in str(summary["failures"])


def test_the_published_sizes_start_with_what_the_bars_need() -> None:
    plan = gpu_cases.full()
    layers = [(entry.case.name, entry.mode) for entry in plan.encoder[:3]]
    assert layers == [("imagenet", "forward"), ("imagenet", "forward+backward"), ("imagenet-official", "forward")]
    assert all(entry.case.batch == plan.batch and entry.compiled for entry in plan.encoder[:3])
    seen = {(entry.case.batch, entry.dtype, entry.mode) for entry in plan.encoder if entry.case.name == "imagenet"}
    assert len(seen) == 3 * 2 * 2
    assert len(plan.encoder) == len({(e.case, e.dtype, e.mode) for e in plan.encoder}) == 26
    assert [entry.mode for entry in plan.models[:2]] == ["forward-bfloat16", "train-step-bfloat16"]
    assert {entry.model.input_shape[0] for entry in plan.models} == {1, 8, 64}
    assert len(plan.models) == 3 * 3 * 4


def timed(**seconds: float) -> list[dict[str, Any]]:
    ours = seconds["ours"]
    return [
        {"provider": name.replace("_", "-"), "timing": {"median": s}, "times_ours": s / ours}
        for name, s in seconds.items()
    ]


def test_bars_from_records() -> None:
    at = {"batch": 64, "dtype": "bfloat16"}
    forward = timed(ours=1.0, expert_flash=3.0, expert_compiled=2.5)
    both = timed(ours=2.0, expert_flash=6.0, expert_compiled=7.0)
    attention = {"SDPA flash": {"times_ours": 1.2}, "SDPA math": {"times_ours": 9.0}, "ours": {"times_ours": 1.0}}
    attention["SDPA cudnn"] = {"refused": "failed"}
    stages = {
        "roofline": {"records": [{"rates": {"exponentials": 4e12}}]},
        "operators": {
            "records": [
                {"op": "separable_attention", **at, "results": {"forward": {"ours": {"per_second": 2e12}}}},
                {"op": "latent_attention", **at, "head_dim": 64, "results": {"forward": attention}},
            ]
        },
        "encoder": {
            "records": [
                {"case": "imagenet", **at, "mode": "forward", "pairs": 10**12, "results": forward},
                {"case": "imagenet", **at, "mode": "forward+backward", "results": both},
                {"case": "imagenet-official", **at, "mode": "forward", "left out": "no time left"},
            ]
        },
        "models": {
            "records": [
                {
                    "case": "imagenet-released",
                    "batch": 64,
                    "mode": "forward-bfloat16",
                    "results": timed(ours=1.0, plain_compiled=1.6, plain=4.0),
                }
            ]
        },
    }
    measured = gpu_bars.measured(stages, 64, "bfloat16")
    assert [bar.value for bar in measured] == [2e12, 2.5, 3.0, None, 1.6, None, 1.2, None]
    notes = [bar.note for bar in measured]
    assert notes[0] == "50% of the bare exponential's rate, 1.00 T in the layer"
    assert "expert-compiled" in notes[1] and "expert-flash" in notes[2] and notes[3] == "no time left"
    assert "plain-compiled" in notes[4] and "SDPA flash" in notes[6]


def test_bars_of_nothing_are_not_measured() -> None:
    assert {bar.value for bar in gpu_bars.measured({}, 64, "bfloat16")} == {None}


def test_ops_run_on_triton_in_the_interpreter_where_they_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # also where there is a GPU: nothing is launched
    with interpreted():
        for op in sorted({entry.op for entry in dispatch.declarations()}):
            call = dispatch.Call(op, "cpu", torch.float32, torch.float32)
            declared = {entry.backend for entry in dispatch.declarations(op)}
            assert dispatch.select(call).backend == ("triton" if "triton" in declared else "reference")
    assert dispatch.current_backend() == "auto"


class Events:
    """Stands in for a GPU that takes a second for every call, and counts what is queued between synchronisations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.seconds, self.queued, self.batches = seconds, 0, []
        events = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = events.queued

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * events.seconds * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def call(self) -> None:
        self.queued += 1

    def synchronize(self) -> None:
        self.batches.append(self.queued)


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (0.01, 3), (1e-6, measure.MAX_QUEUED)])
def test_fast_calls_are_queued_and_slow_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, seconds: float, calls: int
) -> None:
    gpu = Events(monkeypatch, seconds)
    timings = measure.interleave({"one": gpu.call}, budget=0.0, min_rounds=2, visit=0.0305, device="cuda")
    assert [len(visit) for visit in timings["one"].rounds] == [calls, calls]
    assert timings["one"].median == pytest.approx(seconds)
    assert gpu.batches[:2] == [0, 1]
