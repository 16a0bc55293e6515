"""The compiled CUDA module: whether it can be used here, and where its kernels are launched."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)


@lru_cache(maxsize=1)
def module() -> ModuleType:
    """The compiled CUDA module. Raises ImportError where this install has none."""
    return importlib.import_module("perceiver_kernels._cuda")


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the compiled CUDA module cannot be used, or None where it can."""
    if torch.version.hip:
        return "torch is built for ROCm, not for CUDA"
    try:
        module()
    except ModuleNotFoundError:
        return "the CUDA module is not built: there was no nvcc"
    except ImportError as error:
        return f"the compiled CUDA module does not load: {error}"
    if emulated() or not torch.cuda.is_available():
        return None
    found = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if found < LEAST_CAPABILITY:
        return f"a GPU has compute capability {found[0]}.{found[1]}, must have {LEAST_CAPABILITY[0]}.0 or more"
    return None


def emulated() -> bool:
    """Whether this is the tests' build of the kernels for the host (tests/cuda_emulation)."""
    return module().emulated


def devices_if_forced() -> tuple[str, ...]:
    """Where kernels run besides GPUs for whoever asks for them: emulation is there for proofs, not for work."""
    return ("cpu",) if not unavailable() and emulated() else ()


def stream(tensor: Tensor) -> int:
    """The address of torch's current stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; in emulation few, so that small shapes are divided too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
