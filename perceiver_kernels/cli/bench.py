"""python -m perceiver_kernels bench: this machine's table of cases, providers and modes, or of the bars."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.benchmarking import bars, compare, machine, tables
from perceiver_kernels.benchmarking.cases import CASES, MODES
from perceiver_kernels.benchmarking.providers import PROVIDERS
from perceiver_kernels.cli.arguments import UserError, add_memory_limit, progress

DEFAULT_CASES = ("imagenet",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = "\n".join(f"  {case.name:18} {case.what}" for case in CASES.values())
    who = "\n".join(f"  {provider.name:18} {provider.what}" for provider in PROVIDERS.values())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"cases (or all):\n{known}\n\nproviders:\n{who}"
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(DEFAULT_CASES)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS), metavar="PROVIDER")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and nothing compiled")
    parser.add_argument("--no-errors", action="store_true", help="leave out the float64 truth")
    parser.add_argument("--bars", action="store_true", help="measure what this library holds itself to")
    parser.add_argument("--strict", action="store_true", help="with --bars: exit with 1 where a bar is missed")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to a file")
    add_memory_limit(parser)


def run(arguments: argparse.Namespace) -> int:
    names = list(CASES) if arguments.cases == ["all"] else arguments.cases or list(DEFAULT_CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise UserError(f"no case {unknown[0]!r}; there are {', '.join(CASES)}, and all")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UserError(f"--threads is {arguments.threads}, must be at least 1")
        torch.set_num_threads(arguments.threads)
    effort = compare.QUICK if arguments.quick else compare.Effort()
    effort = dataclasses.replace(effort, memory_limit=arguments.memory_limit, errors=not arguments.no_errors)
    report: dict[str, Any] = {"machine": machine.describe()}
    print(f"{machine.headline()}, float32")
    missed = measure_bars(effort, report) if arguments.bars else measure_cases(names, arguments, effort, report)
    if arguments.json:
        write(arguments.json, report)
    return 1 if missed and arguments.strict else 0


def measure_cases(
    names: list[str], arguments: argparse.Namespace, effort: compare.Effort, report: dict[str, Any]
) -> int:
    """Prints a table per case and mode; nothing of it can be missed."""
    show = progress()
    providers = [PROVIDERS[name] for name in arguments.providers if not (arguments.quick and PROVIDERS[name].compiled)]
    rates = report["rates"] = {
        "exponentials per second": machine.exponentials_per_second(),
        "bytes copied per second": machine.copy_bandwidth(),
        "multiply-adds of a matrix product per second": machine.gemm_flops() / 2,
    }
    print(", ".join(f"{tables.rate(value)} {what}" for what, value in rates.items()))
    report["results"] = []
    for name in names:
        for mode in arguments.modes:
            case = CASES[name]
            results = compare.compare(case, mode, providers, effort, show)
            report["results"] += [compare.record(result) for result in results]
            grid = " x ".join(map(str, case.shape))
            print(f"\n{name}: {case.what}; {grid} x {case.channels}, {case.num_latents} x {case.latent_dim}, {mode}\n")
            print(compare.table(results, case.pairs, rates["exponentials per second"]), flush=True)
    return 0


def measure_bars(effort: compare.Effort, report: dict[str, Any]) -> int:
    """Prints the table of bars and returns how many were missed."""
    recorder = bars.Recorder(effort, progress())
    measured = list(bars.all_bars(recorder))
    print(tables.markdown(bars.HEADER, [bars.row(bar) for bar in measured]))
    report["results"] = [compare.record(result) for result in recorder.results]
    report["bars"] = [bars.record(bar) for bar in measured]
    return sum(bar.passed is False for bar in measured)


def write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    print(f"\nwritten: {path}")
