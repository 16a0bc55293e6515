"""What the references of attention share: the dtype of the computation, the softmax, dropout, and shared inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perceiver_kernels.backends.reference.philox import dropout_scales


def computed(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of the computation: float32, or float64 for float64."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores' log-sum-exp and their softmax, zeros where there is no finite score."""
    lse = scores.logsumexp(-1)
    return lse, scores.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0.0)


def balanced(d_scores: Tensor, p: Tensor, total: Tensor | float = 0.0) -> Tensor:
    """Gradients of scores whose rows sum to `total`, but for rounding, without what that has left (centring.py)."""
    return d_scores - (d_scores.sum(-1, keepdim=True) - total) * p


def kept(p: Tensor, dropout_p: float, seed: int, batch: int | None = None) -> Tensor:
    """What dropout multiplies the weights (batch, ..., tokens) with; a row of its generator counts all that is between.

    Args:
        batch: where the weights are those of a larger batch that shares them.
    """
    if dropout_p == 0:
        return p.new_ones(())
    shape = (p.shape[0] if batch is None else batch, *p.shape[1:])
    rows = torch.Size((shape[0], math.prod(shape[1:-1]), shape[-1]))
    return dropout_scales(rows, dropout_p, seed, p.dtype, p.device).view(shape)


def over_batch(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of an input, summed over the batch where that has one entry for all."""
    return gradient.sum(0, keepdim=True) if like.shape[0] == 1 else gradient
