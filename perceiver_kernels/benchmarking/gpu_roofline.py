"""What a GPU can do at best, measured in the run: exponentials, bytes copied and products per second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_kernels.backends.gpu import multiprocessors
from perceiver_kernels.backends.triton import runtime
from perceiver_kernels.backends.triton.exponential import exp2
from perceiver_kernels.benchmarking.gpu_cases import Plan
from perceiver_kernels.benchmarking.measure import Call, interleave

BLOCK = 1024
STEPS = 16


@triton.jit
def exp2_rate_kernel(  # type: ignore[no-untyped-def]
    x, rounds, BLOCK: tl.constexpr, STEPS: tl.constexpr, COMPILED: tl.constexpr
):
    """x = 2^-x again and again, in registers: the special-function unit alone, without care for subnormal numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place)
    for _ in range(rounds):
        for _ in tl.static_range(STEPS):
            value = exp2(-value, COMPILED)
    tl.store(x + place, value)


def rates(plan: Plan, device: str, budget: float, min_rounds: int) -> dict[str, float]:
    """Exponentials, bytes read and written by a copy, and operations of square products, each per second."""
    programs = 16 * multiprocessors(torch.device(device)) if device == "cuda" else 2
    rounds = 64 if device == "cuda" else 1
    x = torch.rand(programs * BLOCK, device=device)
    source = torch.rand(plan.copied // 4, device=device)
    target = torch.empty_like(source)
    square = torch.rand(plan.product, plan.product, device=device) - 0.5
    half = square.to(plan.dtypes[1])
    products = torch.empty_like(square), torch.empty_like(half)

    def exponentiate() -> None:
        exp2_rate_kernel[(programs,)](x, rounds, BLOCK, STEPS, not runtime.interpreting(), num_warps=4)

    def multiply(a: Tensor, out: Tensor, tf32: bool = False) -> Call:
        def call() -> None:
            with tf32_allowed(tf32):
                torch.mm(a, a, out=out)

        return call

    calls: dict[str, Call] = {
        "exponentials": exponentiate,
        "bytes read and written": lambda: target.copy_(source),
        "float32 operations": multiply(square, products[0]),
        "tf32 operations": multiply(square, products[0], tf32=True),
        f"{str(plan.dtypes[1]).removeprefix('torch.')} operations": multiply(half, products[1]),
    }
    for call in calls.values():
        call()
    work = [x.numel() * rounds * STEPS, 2 * source.numel() * 4, *[2 * plan.product**3] * 3]
    timings = interleave(calls, budget=budget, min_rounds=min_rounds, device=device)
    return {name: amount / timings[name].median for name, amount in zip(calls, work, strict=True)}


@contextlib.contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Whether float32 products may run as TensorFloat-32; afterwards as before."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = allowed
    try:
        yield
    finally:
        settings.allow_tf32 = before
