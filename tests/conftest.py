"""Test-wide settings: fixed seeds, and uninitialised memory full of NaN, so that an unwritten element fails."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
