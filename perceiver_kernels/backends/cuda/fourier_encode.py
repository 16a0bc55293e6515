"""fourier_encode in CUDA C++: csrc/cuda/fourier_encode.cu."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.native import describe, describe_all


def fourier_encode_grid(tables: Sequence[Tensor], sections: Sequence[int], data: Tensor | None, out: Tensor) -> None:
    """Fills out (batch, S_1, ..., S_A, c + E) with [data | section after section, each axis's columns of the section].

    Args:
        tables: per axis (S_k, sum of sections).
        sections: widths of the column sections that every table consists of.
        data: (batch, S_1, ..., S_A, c).
        out: written to.
    """
    if not out.numel():
        return
    tables = [table.contiguous() for table in tables]
    runtime.module().fourier_encode_grid(
        describe_all(tables), list(sections), describe(data), describe(out), runtime.stream(out)
    )
