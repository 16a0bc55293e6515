"""Machine code of latent_attention in CUDA C++: tensor cores, no spills, registers for the blocks that are to fit."""

from __future__ import annotations

from collections import Counter

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.cuda_module() is None, reason="the CUDA module is not built")

# Instructions of the busiest loop per exponential: a pair and thread in forward, of which rare branches are a quarter.
BACKWARD = {
    ("bwd_queries", 64): (128, 14),
    ("bwd_queries", 128): (208, 18.5),
    ("bwd_keys", 64): (168, 15),
    ("bwd_keys", 128): (255, 22),
}
FORWARD = {("80", 64): (136, 14), ("80", 128): (208, 19), ("90a", 64): (128, 11.5), ("90a", 128): (168, 14.5)}


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
    # Products of warpgroups where there are any: for 64 channels 4 steps of the scores and 4 of the sums.
    kinds = {operation.split(".")[0] for operation in found.operations}
    assert ("HGMMA" in kinds, "HMMA" in kinds) == (arch == "90a", arch == "80")
    if arch == "90a":
        assert (
            sum(count for operation, count in found.operations.items() if operation.startswith("HGMMA"))
            == head_dim // 8
        )


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
