"""python -m perceiver_kernels demo: a Perceiver on every pixel of a photograph, by each provider; table and picture."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from torch import Tensor

from perceiver_kernels.benchmarking import machine, tables
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.compare import Effort, Result, compare
from perceiver_kernels.benchmarking.providers import PROVIDERS
from perceiver_kernels.cli import photograph
from perceiver_kernels.cli.arguments import UserError, add_memory_limit, grid_size, progress

# perceiver-pytorch's usual model for images: 512 latents of 512, one cross head of 64, 64 bands; here of depth 1.
MODEL = Case("photograph", "every pixel of a photograph", (224, 224), 64, 224.0, 3, 512, 512)
WHOLE_EFFORT = Effort(budget=4.0, min_rounds=2)
LAYER_EFFORT = Effort(budget=2.0, min_rounds=2, errors=False)
SHOWN = ("perceiver-pytorch", "expert", "ours")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
HEADER = (
    "provider",
    "Perceiver",
    "times ours",
    "peak extra memory",
    "error (rms)",
    "its cross-attention",
    "times ours",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", type=Path, metavar="IMAGE", help="default: a photograph that scikit-image ships")
    add("--size", type=grid_size, metavar="HxW", help="resample it, such as to 2160x3840 (default: every pixel it has)")
    add("--out", type=Path, default=Path("demo.png"), metavar="FILE", help="the picture (default: demo.png)")
    add_memory_limit(parser)


def run(arguments: argparse.Namespace) -> int:
    check_output(arguments.out)
    name, pixels = photograph.load(arguments.image, arguments.size)
    height, width = pixels.shape[:2]
    case = dataclasses.replace(MODEL, shape=(height, width), max_freq=float(max(height, width)))
    print(
        f"{name}: {height} x {width} = {case.tokens:,} pixels, {case.channels} channels each once encoded\n"
        f"Perceiver: {case.num_latents} latents of {case.latent_dim}, depth 1, random weights, the same for everyone\n"
        f"machine: {machine.headline()}\n"
    )
    show = progress()
    image = pixels[None] * 2 - 1
    providers = [PROVIDERS[provider] for provider in SHOWN]
    whole_effort, layer_effort = (
        dataclasses.replace(effort, memory_limit=arguments.memory_limit) for effort in (WHOLE_EFFORT, LAYER_EFFORT)
    )
    whole = compare(case, "perceiver", providers, whole_effort, show, image)
    layers = compare(case, "forward", providers, layer_effort, show, image)
    print(f"\n{table(whole, layers)}\n")
    return draw(arguments.out, case, pixels, whole, layers)


def check_output(path: Path) -> None:
    """Finds out now, not after a minute's work, that the picture has nowhere to go."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--out is {path}, must end in one of {', '.join(PICTURES)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--out is {path}, must be a file in a folder that exists")


def table(whole: list[Result], layers: list[Result]) -> str:
    """One line per provider, and under it why some did not run."""
    rows = [row(result, layer, whole[-1], layers[-1]) for result, layer in zip(whole, layers, strict=True)]
    refusals = [f"{result.provider}: {result.refused}" for result in whole if result.refused]
    return "\n".join([tables.markdown(HEADER, rows), *refusals])


def row(whole: Result, layer: Result, ours: Result, our_layer: Result) -> list[str]:
    return [
        whole.provider,
        *timed(whole, ours),
        tables.size(whole.memory) if whole.timing else "-",
        f"{whole.worst_error.rms:.1e}" if whole.worst_error else "-",
        *timed(layer, our_layer),
    ]


def timed(result: Result, ours: Result) -> tuple[str, str]:
    """The median, and how many times ours it is."""
    if result.timing is None:
        return "-", "-"
    return tables.seconds(result.timing.median), tables.ratio(result.timing.ratio(ours.timing) if ours.timing else None)


def draw(path: Path, case: Case, pixels: Tensor, whole: list[Result], layers: list[Result]) -> int:
    try:
        from perceiver_kernels.cli import picture
    except ImportError as missing:
        print(f"no picture, because {missing.name} is not installed: pip install matplotlib")
        return 0
    try:
        picture.draw(path, case, pixels, whole, layers)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"picture: {path}")
    return 0
