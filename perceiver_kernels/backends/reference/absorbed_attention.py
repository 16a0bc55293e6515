"""Absorbed attention as its formulas stand, tokens and weights in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_kernels.backends.reference.attention import balanced, kept, over_batch, softmax
from perceiver_kernels.backends.reference.fourier_encode import point_features

State = tuple[Tensor, Tensor, Tensor]
Features = tuple[Sequence[float], bool, bool, bool]  # frequencies, grouped, concat_pos, sine_only


def _tokens(
    x: Tensor | None, positions: Tensor | None, features: Features, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """z = [x ; features of the positions] (batch or 1, M, C), zeros where nobody attends."""
    parts = [] if x is None else [x.to(dtype)]
    if positions is not None:
        encoded = point_features(positions.double().flatten(0, 1), *features)
        encoded = encoded.to(dtype).unflatten(0, positions.shape[:2])
        parts.append(encoded if x is None else encoded.expand(x.shape[0], -1, -1))
    z = torch.cat(parts, 2)
    return z if mask is None else z.masked_fill(~mask[..., None], 0.0)


def _factor(z: Tensor, eps: float | None) -> Tensor:
    """r of every token, (batch or 1, 1, M)."""
    if eps is None:
        return z.new_ones(1, 1, 1)
    return (z.var(2, correction=0) + eps).rsqrt()[:, None]


def _weights(a: Tensor, z: Tensor, r: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """a . z, the scores' log-sum-exp and their softmax."""
    form = a @ z.transpose(1, 2)
    scores = r * form
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return form, *softmax(scores)


def absorbed_attention_fwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    features: Features,
    mask: Tensor | None,
    eps: float | None,
    dropout_p: float,
    seed: int,
) -> State:
    """acc (batch, rows, C) and total (batch, rows) in a's dtype, lse (batch, rows) in float64."""
    z = _tokens(x, positions, features, mask, a.dtype)
    r = _factor(z, eps)
    _, lse, p = _weights(a, z, r, mask)
    p = p * kept(p, dropout_p, seed)
    return (p * r) @ z, lse.double(), p.sum(-1)


def absorbed_attention_bwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    features: Features,
    mask: Tensor | None,
    eps: float | None,
    dropout_p: float,
    seed: int,
    saved: State,
    upstream: State,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of a and x, empty where not needed."""
    acc, _, total = saved
    d_acc, d_lse, d_total = upstream
    z = _tokens(x, positions, features, mask, a.dtype)
    r = _factor(z, eps)
    form, _, p = _weights(a, z, r, mask)
    keep = kept(p, dropout_p, seed)

    u = d_acc @ z.transpose(1, 2)
    delta = (d_acc * acc).sum(-1) + d_total * total - d_lse.to(a.dtype)
    d_scores = balanced(p * (keep * (r * u + d_total[..., None]) - delta[..., None]), p, d_lse.to(a.dtype)[..., None])
    if mask is not None:
        d_scores = d_scores.masked_fill(~mask[:, None], 0.0)
    needs_a, needs_x = needs
    d_a, d_x = a.new_empty(0), a.new_empty(0)
    if needs_a:
        d_a = over_batch((d_scores * r) @ z, a)
    if needs_x and x is not None:
        d_z = (d_scores * r).transpose(1, 2) @ a + (p * keep * r).transpose(1, 2) @ d_acc
        if eps is not None:
            d_r = (d_scores * form + p * keep * u).sum(1)
            d_z = d_z - (d_r * r[:, 0] ** 3)[..., None] * (z - z.mean(2, keepdim=True)) / z.shape[2]
        if mask is not None:
            d_z = d_z.masked_fill(~mask[..., None], 0.0)
        d_x = d_z[..., : x.shape[2]].to(x.dtype).contiguous()
    return d_a, d_x
