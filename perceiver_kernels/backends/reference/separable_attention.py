"""Separable attention as its formulas stand (docs/separable_attention.md), the weights in full."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.reference.attention import kept, over_batch, softmax
from perceiver_kernels.backends.reference.grids import marginals, spread

State = tuple[Tensor, Tensor, Tensor]


def _over_tokens(form: Tensor, x: Tensor) -> Tensor:
    """channels . x + sum_k tables[k] of a form (batch, entries, rows), over all tokens: (batch, rows, M)."""
    grid = x.shape[1:-1]
    channels, *tables = form.transpose(1, 2).split((x.shape[-1], *grid), 2)
    total = (channels @ x.flatten(1, -2).transpose(1, 2)).unflatten(2, grid)
    return sum(spread(tables), total).flatten(2)


def _sums(weights: Tensor, x: Tensor) -> Tensor:
    """Weighted sum of x, and the weights' marginals along each axis, as a form (batch, entries, rows)."""
    return torch.cat((weights @ x.flatten(1, -2), *marginals(weights, x.shape[1:-1])), 2).transpose(1, 2).contiguous()


def _weights(form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The form over tokens, r as (batch, 1, M), the scores' log-sum-exp and their softmax."""
    form = _over_tokens(form, x)
    factor = form.new_ones(1, 1, 1) if r is None else r.flatten(1)[:, None]
    scores = factor * form
    if mask is not None:
        scores = scores.masked_fill(~mask.flatten(1)[:, None], -torch.inf)
    return form, factor, *softmax(scores)


def separable_attention_fwd(
    form: Tensor, x: Tensor, r: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int
) -> State:
    """sums, lse (float64) and total of separable attention; shapes as in ops.separable_attention.attend_to_grid."""
    x = x.to(form.dtype)
    _, factor, lse, p = _weights(form, x, r, mask)
    p = p * kept(p, dropout_p, seed)
    return _sums(p * factor, x), lse.double(), p.sum(-1)


def separable_attention_bwd(
    form: Tensor,
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
    saved: State,
    upstream: State,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the form, x and r, empty where not needed."""
    sums, _, total = saved
    d_sums, d_lse, d_total = upstream
    data = x.to(form.dtype)
    scores, factor, _, p = _weights(form, data, r, mask)
    keep = kept(p, dropout_p, seed)

    u = _over_tokens(d_sums, data)
    delta = (d_sums * sums).sum(1) + d_total * total - d_lse.to(form.dtype)
    d_scores = p * (keep * (factor * u + d_total[..., None]) - delta[..., None])
    d_scores = torch.where(p == 0, 0.0, d_scores) if mask is not None else d_scores

    needs_form, needs_x, needs_r = needs
    d_form, d_x, d_r = form.new_empty(0), x.new_empty(0), form.new_empty(0)
    if needs_form:
        d_form = over_batch(_sums(d_scores * factor, data), form)
    if needs_x:
        channels = x.shape[-1]
        d_x = (d_scores * factor).transpose(1, 2) @ form[:, :channels].transpose(1, 2)
        d_x = d_x + (p * keep * factor).transpose(1, 2) @ d_sums[:, :channels].transpose(1, 2)
        d_x = d_x.to(x.dtype).reshape(x.shape)
    if needs_r:
        d_r = (d_scores * scores + p * keep * u).sum(1).reshape(x.shape[:-1])
    return d_form, d_x, d_r
