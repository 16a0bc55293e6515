"""Dropout's seed on its way from an op's arguments to a kernel: a tensor, so that a compiled graph draws a new one."""

from __future__ import annotations

import torch
from torch import Tensor


def seed_tensor(dropout_p: float, seed: int | None = None) -> Tensor | None:
    """The call's seed, given or drawn from torch's generator, in a tensor of one element on the CPU; None for 0.

    Raises:
        ValueError: dropout_p or seed is out of range.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, must be at least 0 and less than 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, must be from 0 to 2^63 - 1")
    if dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (1,), device="cpu") if seed is None else torch.tensor([seed], device="cpu")


def seed_number(random: Tensor | None) -> int:
    """The number in a tensor that seed_tensor gave, for a kernel; 0 where nothing is dropped."""
    return 0 if random is None else int(random)
