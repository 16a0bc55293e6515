"""Separable attention as its formulas stand (docs/separable_attention.md), the weights in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_kernels.backends.reference.philox import dropout_scales

State = tuple[Tensor, list[Tensor], Tensor, Tensor]


def _form(channels: Tensor, tables: Sequence[Tensor], x: Tensor) -> Tensor:
    """channels . x + sum_k tables[k], over all tokens: (batch, rows, M)."""
    grid = x.shape[1:-1]
    total = (channels @ x.flatten(1, -2).transpose(1, 2)).unflatten(2, grid)
    for k, table in enumerate(tables):
        shape = [1] * len(grid)
        shape[k] = grid[k]
        total = total + table.unflatten(2, shape)
    return total.flatten(2)


def _sums(weights: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Weighted sum of x, and the weights' marginals along each axis."""
    grid = x.shape[1:-1]
    on_grid = weights.unflatten(2, grid)
    marginals = [
        on_grid.sum([d + 2 for d in range(len(grid)) if d != k]) if len(grid) > 1 else on_grid for k in range(len(grid))
    ]
    return weights @ x.flatten(1, -2), marginals


def _weights(
    a: Tensor, tables: Sequence[Tensor], x: Tensor, r: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The linear form, r as (batch, 1, M), the scores' log-sum-exp and their softmax."""
    form = _form(a, tables, x)
    factor = form.new_ones(1, 1, 1) if r is None else r.flatten(1)[:, None]
    scores = factor * form
    if mask is not None:
        scores = scores.masked_fill(~mask.flatten(1)[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    empty = lse == -torch.inf  # no token at all, or none but with a score of -inf
    return form, factor, lse, scores.softmax(-1).masked_fill(empty[..., None], 0.0)


def separable_attention_fwd(
    a: Tensor,
    tables: Sequence[Tensor],
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
) -> State:
    """acc, marginals, lse (float64) and total of separable attention; shapes as in ops.separable_attention."""
    x = x.to(a.dtype)
    _, factor, lse, p = _weights(a, tables, x, r, mask)
    if dropout_p > 0:
        p = p * dropout_scales(p.shape, dropout_p, seed, p.dtype, p.device)
    acc, marginals = _sums(p * factor, x)
    marginals = [marginal.transpose(1, 2).contiguous().transpose(1, 2) for marginal in marginals]
    return acc, marginals, lse.double(), p.sum(-1)


def separable_attention_bwd(
    a: Tensor,
    tables: Sequence[Tensor],
    x: Tensor,
    r: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    seed: int,
    saved: State,
    upstream: State,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of a, the tables, x and r, empty where not needed."""
    acc, marginals, _, total = saved
    d_acc, d_marginals, d_lse, d_total = upstream
    data = x.to(a.dtype)
    form, factor, _, p = _weights(a, tables, data, r, mask)
    keep = dropout_scales(p.shape, dropout_p, seed, p.dtype, p.device) if dropout_p > 0 else p.new_ones(1, 1, 1)

    u = _form(d_acc, d_marginals, data)
    delta = (d_acc * acc).sum(-1) + d_total * total - d_lse.to(a.dtype)
    for d_marginal, marginal in zip(d_marginals, marginals, strict=True):
        delta = delta + (d_marginal * marginal).sum(-1)
    d_scores = p * (keep * (factor * u + d_total[..., None]) - delta[..., None])
    d_scores = torch.where(p == 0, 0.0, d_scores) if mask is not None else d_scores

    needs_rows, needs_x, needs_r = needs
    d_a, d_tables, d_x, d_r = a.new_empty(0), [a.new_empty(0) for _ in tables], x.new_empty(0), a.new_empty(0)
    if needs_rows:
        d_a, d_tables = _sums(d_scores * factor, data)
        if a.shape[0] == 1:
            d_a, d_tables = d_a.sum(0, keepdim=True), [d.sum(0, keepdim=True) for d in d_tables]
        d_tables = [d.transpose(1, 2).contiguous().transpose(1, 2) for d in d_tables]
    if needs_x:
        d_x = (d_scores * factor).transpose(1, 2) @ a + (p * keep * factor).transpose(1, 2) @ d_acc
        d_x = d_x.to(x.dtype).reshape(x.shape)
    if needs_r:
        d_r = (d_scores * form + p * keep * u).sum(1).reshape(x.shape[:-1])
    return d_a, d_tables, d_x, d_r
