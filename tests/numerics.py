"""The one tolerance policy: how much worse than plain PyTorch in the same dtype a result may be, against float64.

And torch's switch for products of TensorFloat-32, which tests turn for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """factor: of the plain path's error; ulps: allowance in eps * scale; rms: cap on the relative RMS error."""

    factor: float
    ulps: float
    rms: float


# The table. Loosening an entry needs a reason beside it.
TOLERANCES = {
    # The truth is itself float64, so plain's error reads zero and the truth's own rounding counts as ours. Against
    # 80-bit arithmetic, d_a of separable attention on 150 x 130 tokens is off by 129 units in plain, by 22 in ours.
    torch.float64: Tolerance(2.0, 256.0, 1e-11),
    torch.float32: Tolerance(2.0, 16.0, 2e-5),
    torch.bfloat16: Tolerance(2.0, 2.0, 2e-2),
    torch.float16: Tolerance(2.0, 2.0, 4e-3),
}


def error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error."""
    return (value.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def root_mean_square(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item()


def assert_no_worse(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    name: str = "result",
    amplification: float = 1.0,
    terms: Tensor | None = None,
) -> None:
    """actual is finite where truth is, and its error is at most twice plain's plus a few units in the last place.

    Args:
        actual: the result under test.
        plain: the same computed by plain PyTorch in the same dtype.
        truth: the same in float64.
        amplification: for scores in the thousands: a weight's relative error is eps times its score.
        terms: the sum of the magnitudes of what each element is the sum of. Where terms cancel, as those of a steep
            softmax's gradient do, their rounding says nothing of the little that is left.
    """
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, must be {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(actual.isfinite(), finite), (
        f"{name} is not finite where it must be, or finite where it must not be"
    )
    size = (truth if terms is None else terms)[finite].abs()
    actual, plain, truth = actual[finite], plain[finite], truth[finite]
    if not truth.numel():
        return
    tolerance = TOLERANCES[actual.dtype]
    units = tolerance.ulps * amplification * torch.finfo(actual.dtype).eps * size.max().item()
    bound = tolerance.factor * error(plain, truth) + units
    assert error(actual, truth) <= bound, f"{name}: error {error(actual, truth):.3g}, must be at most {bound:.3g}"
    norm = root_mean_square(size) or 1.0
    rms, plain_rms = (root_mean_square(value.double() - truth) / norm for value in (actual, plain))
    cap = max(tolerance.rms * amplification, tolerance.factor * plain_rms)
    assert rms <= cap, f"{name}: relative RMS error {rms:.3g}, must be at most {cap:.3g}"


@contextmanager
def tf32_allowed(allowed: bool = True) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, allowed
    try:
        yield
    finally:
        settings.allow_tf32 = before
