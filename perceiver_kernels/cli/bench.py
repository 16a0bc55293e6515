"""python -m perceiver_kernels bench: this machine's table of cases, providers and modes, or of the bars."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.benchmarking import (
    bars,
    compare,
    decoder_bars,
    encoder_bars,
    integration_bars,
    machine,
    parity_bars,
    tables,
    tower_bars,
)
from perceiver_kernels.benchmarking.cases import CASES, MODES
from perceiver_kernels.benchmarking.models import (
    MODEL_MODES,
    MODEL_PROVIDERS,
    MODELS,
    ModelRun,
    compare_models,
    model_table,
    profile,
    profile_table,
)
from perceiver_kernels.benchmarking.providers import PROVIDERS
from perceiver_kernels.cli.arguments import UserError, add_memory_limit, progress

DEFAULT_CASES = ("imagenet",)
BARS = {
    "encoder": encoder_bars.GROUPS,
    "tower": tower_bars.GROUPS,
    "decoder": decoder_bars.GROUPS,
    "integrations": integration_bars.GROUPS,
    "parity": parity_bars.GROUPS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known, models, who, model_who = (
        "\n".join(f"  {entry.name:27} {entry.what}" for entry in entries.values())
        for entries in (CASES, MODELS, PROVIDERS, MODEL_PROVIDERS)
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"encoder cross-attentions (or all):\n{known}\n\nwhole models (or all-models):\n{models}\n\n"
        f"providers:\n{who}\n\nof whole models:\n{model_who}"
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(DEFAULT_CASES)}")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=(*MODES, *dict.fromkeys(MODEL_MODES[1:])),
        metavar="MODE",
        help=f"of {', '.join(MODES)}; of whole models {', '.join(MODEL_MODES)}; default: all",
    )
    everyone = list(PROVIDERS | MODEL_PROVIDERS)
    parser.add_argument("--providers", nargs="+", choices=everyone, default=everyone, metavar="PROVIDER")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and nothing compiled")
    parser.add_argument("--no-errors", action="store_true", help="leave out the float64 truth")
    parser.add_argument(
        "--bars",
        nargs="?",
        const="all",
        choices=("all", *BARS),
        help="measure what this library holds itself to: of the encoder, of the latent tower, of the decoder, of other "
        "libraries' models accelerated, of the exactness of these, or all",
    )
    parser.add_argument("--strict", action="store_true", help="with --bars: exit with 1 where a bar is missed")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to a file")
    add_memory_limit(parser)


def run(arguments: argparse.Namespace) -> int:
    every = {"all": list(CASES), "all-models": list(MODELS)}
    names = [name for asked in arguments.cases or DEFAULT_CASES for name in every.get(asked, [asked])]
    unknown = [name for name in names if name not in CASES | MODELS]
    if unknown:
        raise UserError(f"no case {unknown[0]!r}; there are {', '.join((*CASES, *MODELS, *every))}")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UserError(f"--threads is {arguments.threads}, must be at least 1")
        torch.set_num_threads(arguments.threads)
    effort = compare.QUICK if arguments.quick else compare.Effort()
    effort = dataclasses.replace(effort, memory_limit=arguments.memory_limit, errors=not arguments.no_errors)
    report: dict[str, Any] = {"machine": machine.describe()}
    print(f"{machine.headline()}, float32")
    missed = 0
    if arguments.bars:
        missed = measure_bars(arguments.bars, effort, report)
    else:
        measure_cases(names, arguments, effort, report)
    if arguments.json:
        write(arguments.json, report)
    return 1 if missed and arguments.strict else 0


def measure_cases(
    names: list[str], arguments: argparse.Namespace, effort: compare.Effort, report: dict[str, Any]
) -> None:
    """Prints a table per case and mode."""
    rates = report["rates"] = {
        "exponentials per second": machine.exponentials_per_second(),
        "bytes copied per second": machine.copy_bandwidth(),
        "multiply-adds of a matrix product per second": machine.gemm_flops() / 2,
    }
    print(", ".join(f"{tables.rate(value)} {what}" for what, value in rates.items()))
    report["results"] = []
    for name in names:
        measure = measure_layer if name in CASES else measure_model
        known = MODES if name in CASES else MODEL_MODES
        for mode in known if arguments.modes is None else [mode for mode in arguments.modes if mode in known]:
            results = measure(name, mode, arguments, effort, rates)
            report["results"] += [compare.record(result) for result in results]


def measure_layer(
    name: str, mode: str, arguments: argparse.Namespace, effort: compare.Effort, rates: dict[str, Any]
) -> list[compare.Result]:
    """One encoder cross-attention in one mode."""
    case = CASES[name]
    asked = [PROVIDERS[provider] for provider in arguments.providers if provider in PROVIDERS]
    providers = [provider for provider in asked if not (arguments.quick and provider.compiled)]
    results = compare.compare(case, mode, providers, effort, progress())
    grid = " x ".join(map(str, case.shape))
    print(f"\n{name}: {case.what}; {grid} x {case.channels}, {case.num_latents} x {case.latent_dim}, {mode}\n")
    print(compare.table(results, case.pairs, rates["exponentials per second"]), flush=True)
    return results


def measure_model(
    name: str, mode: str, arguments: argparse.Namespace, effort: compare.Effort, rates: dict[str, Any]
) -> list[compare.Result]:
    """One whole model in one mode, and where our time goes."""
    model = MODELS[name]
    asked = [provider for provider in arguments.providers if provider in MODEL_PROVIDERS]
    providers = [provider for provider in asked if not (arguments.quick and "compiled" in provider)]
    results = compare_models(model, mode, providers, effort, progress())
    print(f"\n{name}: {model.what}; {' x '.join(map(str, model.input_shape))}, {mode}\n")
    print(model_table(results), flush=True)
    if any(result.provider == "ours" and result.timing for result in results):
        run = ModelRun(MODEL_PROVIDERS["ours"], model, mode)
        run()
        print("\n" + profile_table(profile(run), rates["multiply-adds of a matrix product per second"]), flush=True)
    return results


def measure_bars(which: str, effort: compare.Effort, report: dict[str, Any]) -> int:
    """Prints the table of bars and returns how many were missed."""
    recorder = bars.Recorder(effort, progress())
    groups = [group for name, some in BARS.items() if which in (name, "all") for group in some]
    measured = list(bars.measured(groups, recorder))
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
