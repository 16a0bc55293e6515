"""python -m perceiver_kernels env: what was built, found, and will run; a failure becomes a value in the report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from perceiver_kernels.backends.cuda import runtime as cuda
from perceiver_kernels.benchmarking import machine

PEERS = ("perceiver-pytorch", "transformers", "flash-perceiver", "perceiver-io")
OPTIONAL = ("numpy", "matplotlib", "pillow", "scikit-image", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    print("\n".join(report()))
    return 0


def report() -> list[str]:
    """The lines of the report, section by section."""
    lines: list[str] = []
    for title, section in SECTIONS.items():
        lines += ["", title] if lines else [title]
        facts = machine.probe(section)
        facts = facts if isinstance(facts, dict) else {"": facts}
        lines += [f"  {name:22} {value}" for name, value in facts.items()]
    return lines


def extension() -> dict[str, Any]:
    """The compiled CPU module."""
    return {
        "module": machine.probe(lambda: machine.native().__file__),
        "instruction sets": machine.probe(lambda: ", ".join(machine.native().isa_levels())),
        "in use": machine.probe(lambda: machine.native().isa()),
        "forced": os.environ.get("PERCEIVER_KERNELS_CPU_ISA") or "no (PERCEIVER_KERNELS_CPU_ISA)",
        "threads": machine.probe(lambda: machine.native().threading()),
    }


def cuda_extension() -> dict[str, Any]:
    """The compiled CUDA module."""
    return {
        "module": machine.probe(lambda: cuda.module().__file__),
        "built for": machine.probe(lambda: cuda.architectures()),
        "runs": machine.probe(lambda: "emulated on the CPU, for tests" if cuda.emulated() else "on GPUs"),
        "usable": machine.probe(lambda: cuda.unavailable() or cuda.unusable(0) or gpu()),
    }


def gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "yes, but torch sees no GPU"


def backends() -> dict[str, Any]:
    """Which backend runs each op, for float32 on the CPU."""
    from perceiver_kernels import dispatch

    asked = {"asked for": machine.probe(dispatch.current_backend)}
    ops = sorted({declaration.op for declaration in dispatch.declarations()})
    return asked | {op: machine.probe(partial(chosen_backend, op)) for op in ops}


def chosen_backend(op: str) -> str:
    """The backend of a plain call, and what keeps the others from it."""
    from perceiver_kernels import dispatch

    call = dispatch.Call(op, "cpu", compute_dtype=torch.float32, data_dtype=torch.float32)
    others = [
        f"{entry.backend}: {'; '.join(reasons)}"
        for entry in dispatch.declarations(op)
        if (reasons := entry.not_supported_reasons(call))
    ]
    return "  ".join([dispatch.select(call).backend, *(f"({other})" for other in others)])


def packages(names: tuple[str, ...]) -> Callable[[], dict[str, Any]]:
    def versions() -> dict[str, Any]:
        return {name: machine.probe(partial(version, name)) for name in names}

    return versions


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "machine": machine.describe,
    "compiled extension": extension,
    "compiled CUDA extension": cuda_extension,
    "backends, for float32 on the CPU": backends,
    "peers": packages(PEERS),
    "optional packages": packages(OPTIONAL),
}
