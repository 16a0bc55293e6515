"""Test-wide settings: fixed seeds, and uninitialised memory full of NaN, so that an unwritten element fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import cuda_emulation
import pytest
import torch

# Kernels for GPUs run on the host where there is no GPU: in Triton's interpreter, which looks at this when they are
# imported, and compiled by g++.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if cuda_emulation.compiler():
        cuda_emulation.install()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """With deterministic algorithms on, torch fills what torch.empty returns with NaN or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def fused_multiply_add() -> Iterator[None]:
    """The interpreter's fma rounds the product too; a GPU's does not, and kernels reduce angles by that."""
    from perceiver_kernels.backends.triton import runtime

    if runtime.unavailable() or not runtime.interpreting():
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(_: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", create_fma)
        yield
