"""Latent attention under pytest-benchmark, beside torch's fused attention: forward, and backward alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import perceiver_kernels as pk

CASES = {
    "imagenet (8 heads, 512 latents, head_dim 128)": (1, 8, 512, 128),
    "perceiver-pytorch (8 heads, 512 latents, head_dim 64)": (1, 8, 512, 64),
    "batch of 64 (4 heads, 128 latents, head_dim 64)": (64, 4, 128, 64),
    "8 heads, 512 latents, head_dim 96": (1, 8, 512, 96),
    "8 heads, 512 latents, head_dim 161": (1, 8, 512, 161),
}
PROVIDERS = {"ours": pk.latent_attention, "torch": F.scaled_dot_product_attention}


def projected(case, dtype):
    """q, k and v as views of one packed projection."""
    batch, heads, latents, head_dim = CASES[case]
    packed = torch.randn(batch, latents, 3, heads, head_dim).to(dtype)
    return [part.transpose(1, 2).requires_grad_() for part in packed.unbind(2)]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark, case, dtype, provider):
    benchmark.group = f"{case}: forward, {dtype}"
    with torch.no_grad():
        benchmark(PROVIDERS[provider], *projected(case, dtype))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward(benchmark, case, dtype, provider):
    benchmark.group = f"{case}: backward, {dtype}"
    inputs = projected(case, dtype)
    out = PROVIDERS[provider](*inputs)
    upstream = torch.randn_like(out)
    benchmark(torch.autograd.grad, out, inputs, upstream, retain_graph=True)
