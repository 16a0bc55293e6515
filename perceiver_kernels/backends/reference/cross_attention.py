"""Cross-attention as its formula stands, the weights in full."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.layout import with_rows_first
from perceiver_kernels.backends.reference.attention import balanced, computed, kept, softmax


def _masked(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros where nobody attends: zero weights alone would let a NaN through."""
    if mask is None:
        return k, v
    hidden = ~mask[:, None, :, None]
    return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The scores' log-sum-exp and their softmax, zeros for a query without any finite score."""
    scores = scale * (q @ k.transpose(2, 3))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return softmax(scores)


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, head_dim_v) in q's dtype, lse (batch, heads, queries) in that of the computation."""
    dtype = q.dtype
    q, k, v = computed(q, k, v)
    k, v = _masked(k, v, mask)
    lse, p = _weights(q, k, mask, scale)
    return with_rows_first(((p * kept(p, dropout_p, seed)) @ v).to(dtype)), lse


def cross_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtype."""
    dtype = q.dtype
    q, k, v, out, d_out = computed(q, k, v, out, d_out)
    k, v = _masked(k, v, mask)
    _, p = _weights(q, k, mask, scale)
    keep = kept(p, dropout_p, seed)
    delta = (d_out * out).sum(-1, keepdim=True)
    d_scores = scale * balanced(p * (keep * (d_out @ v.transpose(2, 3)) - delta), p)
    d_k, d_v = d_scores.transpose(2, 3) @ q, (p * keep).transpose(2, 3) @ d_out
    if mask is not None:
        d_scores = d_scores.masked_fill(~mask[:, None, None], 0.0)
        d_k, d_v = _masked(d_k, d_v, mask)
    d_q, d_k, d_v = (with_rows_first(gradient.to(dtype)) for gradient in (d_scores @ k, d_k, d_v))
    return d_q, d_k, d_v
