"""How ops declare their backends: what all declarations for a kind of backend share stands here, once.

What an op's own declaration adds are dispatch.Declaration's fields: dtypes, axes, channels, mask, dropout.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from perceiver_kernels import dispatch
from perceiver_kernels.backends import native

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def declare_gpu(
    op: str, *backends: str, shared_memory: Callable[[dispatch.Call], int] = lambda call: 0, **supported: Any
) -> None:
    """Backends for GPUs: each a package backends.<backend> with a module per op, imported at the first call of it.

    The package's module `runtime` says why it is unavailable here or on a GPU, where a call's blocks of threads may
    need so many bytes of shared memory, and where it runs for those who ask for it.
    """
    for backend in backends:
        package = f"perceiver_kernels.backends.{backend}"
        runtime = importlib.import_module(f"{package}.runtime")
        dispatch.declare(
            dispatch.Declaration(
                op,
                backend,
                load=functools.partial(importlib.import_module, f"{package}.{op}"),
                devices=("cuda",),
                unavailable=runtime.unavailable,
                unusable=functools.partial(_unusable, runtime, shared_memory),
                devices_if_forced=runtime.devices_if_forced,
                **supported,
            )
        )


def _unusable(runtime: ModuleType, shared_memory: Callable[[dispatch.Call], int], call: dispatch.Call) -> str | None:
    return runtime.unusable(shared_memory(call))


def declare_native(op: str, module: ModuleType, **supported: Any) -> None:
    """Compiled code for CPUs, called by a module's functions."""
    dispatch.declare(
        dispatch.Declaration(
            op, "native", load=lambda: module, devices=("cpu",), unavailable=native.cpu_unavailable, **supported
        )
    )


def declare_reference(op: str, module: ModuleType, **supported: Any) -> None:
    """Pure PyTorch, which runs on every device."""
    dispatch.declare(dispatch.Declaration(op, "reference", load=lambda: module, devices=("any",), **supported))
