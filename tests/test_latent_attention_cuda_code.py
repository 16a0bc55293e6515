"""Machine code of latent_attention in CUDA C++: tensor cores, no spills, registers for the blocks that are to fit."""

from __future__ import annotations

import math
from collections import Counter

import machine_code
import pytest

# Registers, which leave a multiprocessor the blocks that are to fit (two whatever there are), and instructions of the
# busiest loop per exponential: a pair and thread; of forward's, rare branches are a quarter.
BACKWARD = {
    ("bwd_queries", 64): (128, 14),
    ("bwd_queries", 128): (208, 18.5),
    ("bwd_keys", 64): (168, 15),
    ("bwd_keys", 128): (math.inf, 22),
}
FORWARD = {("80", 64): (152, 14), ("80", 128): (208, 19), ("90a", 64): (128, 11.5), ("90a", 128): (168, 14.5)}


def figures(kernel: str, dtype: str, head_dim: int, arch: str) -> machine_code.Figures:
    return machine_code.built(f"latent_attention_{kernel}_kernelIN", arch, f"{dtype}ELi{head_dim}E")


@pytest.mark.parametrize("dtype", ["8BFloat16", "7Float16"])
@pytest.mark.parametrize(("arch", "head_dim"), FORWARD)
def test_forward(arch: str, head_dim: int, dtype: str) -> None:
    found = figures("fwd", dtype, head_dim, arch)
    registers, per_pair = FORWARD[arch, head_dim]
    assert found.spills == 0
    assert found.registers <= registers
    assert found.per_pair <= per_pair
    products: Counter[str] = Counter()
    for operation, count in found.operations.items():
        products[operation.partition(".")[0]] += count
    # Of warpgroups where there are any: for 64 channels 4 steps of the scores and 4 of the sums.
    assert products["HGMMA"] == (head_dim // 8 if arch == "90a" else 0)
    assert products["HMMA"] == (0 if arch == "90a" else head_dim)


@pytest.mark.parametrize("dtype", ["8BFloat16", "7Float16"])
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(("kernel", "head_dim"), BACKWARD)
def test_backward(kernel: str, head_dim: int, arch: str, dtype: str) -> None:
    found = figures(kernel, dtype, head_dim, arch)
    registers, per_pair = BACKWARD[kernel, head_dim]
    assert found.spills == 0
    assert found.registers <= registers
    assert found.per_pair <= per_pair
    assert found.tensor_core > 0
