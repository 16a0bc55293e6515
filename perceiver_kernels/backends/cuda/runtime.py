"""The compiled CUDA module: whether it can be used here, and where its kernels are launched."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@cache
def module() -> ModuleType:
    """The compiled CUDA module. Raises ImportError where this install has none."""
    return importlib.import_module("perceiver_kernels._cuda")


@cache
def unavailable() -> str | None:
    """Why the compiled CUDA module cannot be used, or None where it can. Asks no GPU: calls on CPUs ask this too."""
    if torch.version.hip:
        return "torch is built for ROCm, not for CUDA"
    try:
        module()
    except ModuleNotFoundError:
        return "the CUDA module is not built, see PERCEIVER_KERNELS_CUDA in docs/cuda.md"
    except ImportError as error:
        return f"the compiled CUDA module does not load: {error}"
    return None


def unusable(shared_memory: int) -> str | None:
    """Why the current GPU does not run kernels with so many bytes of shared memory, or None where it does."""
    if emulated() or not torch.cuda.is_initialized():  # then no tensor is on a GPU
        return None
    device = torch.cuda.current_device()
    reason, most = _limits_of(device)
    if reason is None and shared_memory > most:
        reason = f"blocks may need {shared_memory} bytes of shared memory, GPU {device} has {most}"
    return reason


@cache
def _limits_of(device: int) -> tuple[str | None, int]:
    """Why it does not run the module's kernels, and the bytes of shared memory that a block may have."""
    try:
        return None, module().probe()
    except RuntimeError as error:
        return f"GPU {device} does not run kernels built for {architectures()}: {error}", 0


def architectures() -> str:
    """GPUs that the module has code for, as nvcc names them."""
    return ", ".join(f"sm_{arch}" for arch in module().archs.split(";"))


def emulated() -> bool:
    """Whether this is the tests' build of the kernels for the host (tests/cuda_emulation)."""
    return not unavailable() and module().emulated


def devices_if_forced() -> tuple[str, ...]:
    """Where kernels run besides GPUs for whoever asks for them: emulation is there for proofs, not for work."""
    return ("cpu",) if emulated() else ()


def stream(tensor: Tensor) -> int:
    """The address of torch's current stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
