"""Separable attention under pytest-benchmark: the kernel alone, and the layer around it beside its peers."""

from __future__ import annotations

import pytest
import torch

import perceiver_kernels as pk
from perceiver_kernels.benchmarking.cases import CASES
from perceiver_kernels.benchmarking.compare import Effort, prepare
from perceiver_kernels.benchmarking.encoder_bars import kernel_arguments
from perceiver_kernels.benchmarking.providers import PROVIDERS

KERNEL_CASES = ("imagenet", "cifar10", "multimodal-video", "photo-4k")
LAYER_CASES = ("imagenet", "imagenet-official", "cifar10", "mnist")


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel(benchmark, case):
    benchmark.group = f"{case}: kernel"
    a, tables, x, r = kernel_arguments(CASES[case])
    benchmark(pk.separable_attention, a, tables, x, r)


@pytest.mark.parametrize("case", ("imagenet", "cifar10"))
def test_kernel_backward(benchmark, case):
    benchmark.group = f"{case}: kernel, backward"
    a, tables, x, r = kernel_arguments(CASES[case])
    rows = [a.requires_grad_(), *(table.requires_grad_() for table in tables)]
    state = pk.separable_attention(a, tables, x, r)
    upstream = [torch.ones_like(part) for part in (state.acc, *state.marginals)]
    benchmark(torch.autograd.grad, (state.acc, *state.marginals), rows, upstream, retain_graph=True)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ("forward", "forward+backward"))
@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer(benchmark, case, mode, provider):
    chosen = PROVIDERS[provider]
    refused = chosen.missing() or Effort().refuse(chosen.bytes_needed(CASES[case], mode))
    if refused:
        pytest.skip(refused)
    benchmark.group = f"{case}: layer, {mode}"
    run = prepare(chosen, CASES[case], mode, CASES[case].image())
    run()  # the first call compiles, where something compiles
    benchmark(run)
