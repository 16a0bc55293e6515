"""fourier_encode in CUDA C++: csrc/cuda/fourier_encode.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
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


def fourier_encode_points(
    positions: Tensor, frequencies: Sequence[float], grouped: bool, concat_pos: bool, sine_only: bool, out: Tensor
) -> None:
    """Fills out (P, E) with sin(pi f x), cos(pi f x) and x of positions (P, A), rounded once to its dtype.

    Args:
        positions: (P, A).
        frequencies: axis after axis, as many for each.
        grouped: [pos of all axes | sin of all | cos of all], else [sin, cos, pos] axis after axis.
        concat_pos: whether the positions themselves are features.
        sine_only: leaves the cosines out.
        out: written to.
    """
    if not out.numel():
        return
    split = _split_doubles(tuple(frequencies), positions.device)
    runtime.module().fourier_encode_points(
        describe(split), max(map(abs, frequencies)), grouped, concat_pos, sine_only, describe(positions), describe(out),
        runtime.stream(out),
    )  # fmt: skip


@cache  # for good: CUDA graphs read it whenever they are replayed
def _split_doubles(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """(2, frequencies) in float32: twice each as a number and what rounding it left over."""
    exact = 2.0 * torch.tensor(frequencies, dtype=torch.float64, device="cpu")
    high = exact.float()
    return torch.stack((high, (exact - high.double()).float())).to(device)
