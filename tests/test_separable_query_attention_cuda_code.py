"""What the CUDA kernels of separable_query_attention compile to; no GPU needed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from machine_code import built


class Expected(NamedTuple):
    """exponentials, products: in the whole code. A lane has one exponential for each of its pairs of a step, of two
    steps in backward, and in forward one for each row whose reference point moves.
    per_pair: the most instructions for a pair without data channels and dropout, where no reference point moves.
    """

    exponentials: int
    products: int
    per_pair: float


HALVES = {
    "fwd_kernelINS_{}ELi4ELi64E": Expected(32 + 8, 32, 10.5),
    "fwd_kernelINS_{}ELi2ELi128E": Expected(16 + 4, 32, 12.5),
    "bwd_queries_kernelINS_{}E": Expected(32, 32, 18),
    "bwd_keys_kernelINS_{}E": Expected(32, 32, 19.5),
    "bwd_values_kernelINS_{}E": Expected(32, 64, 10),
}
FLOATS = {
    "fwd_kernelIf": 16 + 4,
    "bwd_queries_kernelIf": 32,
    "bwd_keys_kernelIf": 32,
    "bwd_values_kernelIf": 32,
}


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("dtype", ["8BFloat16", "7Float16"])
@pytest.mark.parametrize("kernel", HALVES)
def test_16_bits_in_the_tensor_cores(kernel: str, dtype: str, arch: str) -> None:
    found, expected = built(f"separable_query_attention_{kernel.format(dtype)}", arch), HALVES[kernel]
    assert found.spills == 0
    assert found.operations["MUFU.EX2"] == expected.exponentials
    assert found.tensor_core == expected.products
    assert found.per_pair_at_best <= expected.per_pair


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("kernel", FLOATS)
def test_float32_outside_them(kernel: str, arch: str) -> None:
    found = built(f"separable_query_attention_{kernel}", arch)
    assert found.spills == 0
    assert found.operations["MUFU.EX2"] == FLOATS[kernel]
    assert found.tensor_core == 0
