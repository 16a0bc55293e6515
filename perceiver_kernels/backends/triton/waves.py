"""Sines and cosines of free positions: one reduction of the angle, to half turns, for both waves of a frequency."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sine_and_cosine(x, high, low):
    """sin(pi f x) and cos(pi f x), f = high + low: off by about 1e-7 for f x up to some millions, by 2^-47 f x beyond.

    f x is reduced by half turns before it is rounded.
    """
    # fma instead of *: a product might fuse with the sums that follow, and would be another number in each.
    product = tl.fma(x, high, 0.0)
    rest = tl.fma(x, low, tl.fma(x, high, -1.0 * product))
    turns = product - 2.0 * tl.floor(0.5 * product + 0.5)
    halves = tl.floor(2.0 * (turns + rest) + 0.5)
    t = (turns - 0.5 * halves) + rest  # -1/4 to 1/4
    s = t * t
    # Interpolations in Chebyshev's nodes; errors of 1.1e-8 and 0.9e-8.
    sine = t * 3.14159274 + t * s * (-5.16771221 + s * (2.54998493 - 0.591611743 * s))
    cosine = 1.0 + s * (-4.93480206 + s * (4.05871058 + s * (-1.33513784 + 0.232125416 * s)))
    quadrant = halves.to(tl.int32)
    odd = quadrant & 1 == 1
    return _negated(tl.where(odd, cosine, sine), quadrant), _negated(tl.where(odd, sine, cosine), quadrant + 1)


@triton.jit
def _negated(x, quadrant):
    """-x in the third and fourth quadrant: its sign bit flipped."""
    return (x.to(tl.int32, bitcast=True) ^ ((quadrant << 30) & -0x80000000)).to(tl.float32, bitcast=True)


@cache  # for good: captured graphs read it whenever they are replayed
def split_frequencies(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """(2, frequencies) in float32: each as a number and what rounding it left over."""
    exact = torch.tensor(frequencies, dtype=torch.float64, device="cpu")
    high = exact.float()
    return torch.stack((high, (exact - high.double()).float())).to(device)
