"""Fourier encoding under pytest-benchmark: the array of every position, materialised, beside perceiver-pytorch's."""

from __future__ import annotations

import pytest

from perceiver_kernels.benchmarking.cases import CASES
from perceiver_kernels.benchmarking.encoder_bars import encoding_calls


@pytest.mark.parametrize("how", ("ours", "ours, into a given array", "copy", "perceiver-pytorch"))
@pytest.mark.parametrize("case", ("imagenet", "multimodal-video", "audioset-mel"))
def test_encode(benchmark, case, how):
    benchmark.group = f"{case}: encoded positions, a batch of 8"
    calls = encoding_calls(CASES[case], batch=8)
    if how not in calls:
        pytest.skip("perceiver-pytorch is not installed")
    benchmark(calls[how])
