"""Latent attention as its formula stands: that of cross-attention, where no key is masked."""

from __future__ import annotations

from torch import Tensor

from perceiver_kernels.backends.reference.cross_attention import cross_attention_bwd, cross_attention_fwd


def latent_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, N, head_dim_v) in q's dtype, lse (batch, heads, N) in that of the computation."""
    return cross_attention_fwd(q, k, v, None, scale, dropout_p, seed)


def latent_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtype."""
    return cross_attention_bwd(q, k, v, None, out, lse, d_out, scale, dropout_p, seed)
