"""Whether Triton can be used here and how its kernels are launched; imports no Triton, so that asking costs nothing."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from perceiver_kernels.backends.gpu import tf32_allowed

# Products followed by sums become fused multiply-adds, whatever this release of Triton does by itself.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why Triton cannot be used, or None where it can."""
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def unusable(shared_memory: int) -> str | None:
    """None: Triton compiles for whatever GPU there is, and chooses tiles by its memory."""
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU; Triton reads it when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def devices_if_forced() -> tuple[str, ...]:
    """Where kernels run besides GPUs for whoever asks for them: the interpreter is there for proofs, not for work."""
    return ("cpu",) if interpreting() else ()


def input_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 in full, or as TensorFloat-32 where torch's own products may be."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"
