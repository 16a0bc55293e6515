"""Latent attention as its formula stands, the weights in full."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.layout import with_rows_first
from perceiver_kernels.backends.reference.philox import dropout_scales


def _computed(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of the computation: float32, or float64 for float64."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def _weights(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The scores' log-sum-exp and their softmax, zeros for a query without any finite score."""
    scores = scale * (q @ k.transpose(2, 3))
    lse = scores.logsumexp(-1)
    return lse, scores.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0.0)


def _keep(weights: Tensor, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies the weights with; a row of its generator is head * queries + query."""
    if dropout_p == 0:
        return weights.new_ones(1, 1, 1, 1)
    rows = weights.flatten(1, 2).shape
    return dropout_scales(rows, dropout_p, seed, weights.dtype, weights.device).view(weights.shape)


def latent_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, N, head_dim_v) in q's dtype, lse (batch, heads, N) in that of the computation."""
    dtype = q.dtype
    q, k, v = _computed(q, k, v)
    lse, p = _weights(q, k, scale)
    return with_rows_first(((p * _keep(p, dropout_p, seed)) @ v).to(dtype)), lse


def latent_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtype."""
    dtype = q.dtype
    q, k, v, out, d_out = _computed(q, k, v, out, d_out)
    _, p = _weights(q, k, scale)
    keep = _keep(p, dropout_p, seed)
    delta = (d_out * out).sum(-1, keepdim=True)
    d_scores = scale * p * (keep * (d_out @ v.transpose(2, 3)) - delta)
    gradients = d_scores @ k, d_scores.transpose(2, 3) @ q, (p * keep).transpose(2, 3) @ d_out
    d_q, d_k, d_v = (with_rows_first(gradient.to(dtype)) for gradient in gradients)
    return d_q, d_k, d_v
