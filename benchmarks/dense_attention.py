"""Dense attention on a CPU: our operators against torch's attention, in turns, in the shapes of published Perceivers.

    python benchmarks/dense_attention.py [--mode forward|train] [--mask] [--dropout 0.1] [SHAPE ...]

It prints medians, rates in GFLOP/s and torch's time over ours: modules/dense.py has its rule from there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.modules import CrossAttention, dense

# batch, heads, queries, keys, head_dim, head_dim_v
SHAPES = {
    "language": (1, 8, 256, 2048, 32, 160),
    "language-equal": (1, 8, 256, 2048, 32, 32),
    "language-decoder": (1, 8, 2048, 256, 32, 96),
    "conv": (1, 1, 512, 3136, 322, 322),
    "learned": (1, 1, 512, 50176, 512, 512),
    "points": (1, 1, 512, 2000, 64, 64),
    "flow-decoder": (1, 1, 8192, 2048, 512, 512),
    "class-decoder": (1, 1, 1, 512, 1024, 1024),
    "text": (8, 8, 96, 512, 64, 64),
    "digits": (1, 1, 16, 784, 64, 64),
    "digits-batch": (8, 1, 32, 196, 64, 64),
    "quarter": (1, 4, 128, 512, 64, 64),
    "half": (1, 4, 256, 512, 64, 64),
}
# CrossAttention on its absorbed path: queries, tokens, channels, heads, head_dim
MODULES = {"module": (48, 2000, 387, 2, 64), "module-pixels": (32, 3136, 322, 8, 64)}


def medians(functions: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Of each function's times, in turns for so many seconds, and three times at least."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def with_gradients(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    upstream = torch.randn_like(function())
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(function(), leaves, upstream)


def operators(name: str, options: argparse.Namespace) -> tuple[list[Callable[[], Tensor]], list[Tensor], float]:
    """Ours and torch's on the same inputs, laid out as projections leave them, and their multiply-adds."""
    batch, heads, queries, keys, head_dim, head_dim_v = SHAPES[name]
    sizes = (queries, head_dim), (keys, head_dim), (keys, head_dim_v)
    q, k, v = (torch.randn(batch, rows, heads, channels).transpose(1, 2) for rows, channels in sizes)
    mask = torch.rand(batch, keys) < 0.7 if options.mask else None
    dropout_p, scale = options.dropout, head_dim**-0.5
    ours = lambda: pk.cross_attention(q, k, v, mask=mask, dropout_p=dropout_p)  # noqa: E731
    torchs = lambda: dense.attend_by_torch(q, k, v, mask, scale, dropout_p)  # noqa: E731
    per_pair = head_dim + head_dim_v + (3 * head_dim + 2 * head_dim_v if options.mode == "train" else 0)
    return [ours, torchs], [q, k, v], batch * heads * queries * keys * per_pair


def modules(name: str, options: argparse.Namespace) -> tuple[list[Callable[[], Tensor]], list[Tensor], float]:
    """A module by our operator, and with torch's attention."""
    queries, tokens, channels, heads, head_dim = MODULES[name]
    module = CrossAttention(64, channels, heads=heads, head_dim=head_dim, dropout=options.dropout)
    latents, context = torch.randn(1, queries, 64), torch.randn(1, tokens, channels)
    mask = torch.rand(1, tokens) < 0.7 if options.mask else None

    assert "path: absorbed" in module.explain(latents, context)

    def run(least_work: int) -> Tensor:
        dense.LEAST_WORK = least_work
        return module(latents, context, mask=mask)

    work = heads * queries * tokens * 2 * channels * (3.5 if options.mode == "train" else 1)
    return [lambda: run(0), lambda: run(1 << 60)], [latents, *module.parameters()], work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join([*SHAPES, *MODULES])}; all")
    parser.add_argument("--mode", choices=("forward", "train"), default="forward")
    parser.add_argument("--mask", action="store_true", help="hide about a third of the keys")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=2.0, help="per shape")
    options = parser.parse_args()
    for name in options.shapes or [*SHAPES, *MODULES]:
        functions, leaves, work = (operators if name in SHAPES else modules)(name, options)
        runs: list[Callable[[], Any]] = list(functions)
        if options.mode == "train":
            runs = [with_gradients(function, leaves) for function in functions]
        ours, torchs = medians(runs, options.seconds)
        rates = [2e-9 * work / taken for taken in (ours, torchs)]
        print(
            f"{name:18} ours {1e3 * ours:9.3f} ms, {rates[0]:6.1f} GFLOP/s   "
            f"torch {1e3 * torchs:9.3f} ms, {rates[1]:6.1f} GFLOP/s   {torchs / ours:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
