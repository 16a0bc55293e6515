"""Separable attention of queries on a grid as its formulas stand (docs/separable_attention.md), the weights in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_kernels.backends.layout import with_rows_first
from perceiver_kernels.backends.reference.philox import dropout_scales

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _over_queries(form: Tensor, x: Tensor | None, grid: Sequence[int]) -> Tensor:
    """x . channels + sum_k tables[k] of a form (batch or 1, heads, entries, N), for all queries: (.., heads, M, N)."""
    channels, *tables = form.split((0 if x is None else x.shape[2], *grid), 2)
    total = form.new_zeros(1)
    for k, table in enumerate(tables):
        shape = [1] * len(grid)
        shape[k] = grid[k]
        total = total + table.unflatten(2, shape)
    total = total.flatten(2, -2)
    return total if x is None else total + x[:, None] @ channels


def _left_out(tensor: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """The tensor with zeros for the keys, along a dimension, that nothing attends to."""
    if mask is None:
        return tensor
    shape = [mask.shape[0]] + [1] * (tensor.dim() - 1)
    shape[dim] = mask.shape[1]
    return tensor.masked_fill(~mask.view(shape), 0.0)


def _weights(
    form: Tensor, h: Tensor | None, x: Tensor | None, r: Tensor | None, mask: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The form over queries, r as (.., 1, M, 1), the scores' log-sum-exp, and their softmax (.., heads, M, N)."""
    form = _over_queries(_left_out(form, mask, 3), x, grid)
    factor = form.new_ones(1, 1, 1, 1) if r is None else r[:, None, :, None]
    scores = factor * form
    if h is not None:
        scores = scores + _left_out(h, mask, 2)[:, :, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return form, factor, lse, scores.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0.0)


def _keep(p: Tensor, batch: int, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies the weights with; a row of its generator is head * M + query."""
    if dropout_p == 0:
        return p.new_ones(1, 1, 1, 1)
    _, heads, queries, keys = p.shape
    scales = dropout_scales(torch.Size((batch, heads * queries, keys)), dropout_p, seed, p.dtype, p.device)
    return scales.view(batch, heads, queries, keys)


def separable_query_attention_fwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, M, head_dim_v) in v's dtype, lse (batch, heads, M) in that of the computation."""
    _, _, lse, p = _weights(form, h, x, r, mask, grid)
    values = _left_out(v.to(form.dtype), mask, 2)
    out = (p * _keep(p, v.shape[0], dropout_p, seed)) @ values
    return with_rows_first(out.to(v.dtype)), lse.expand(v.shape[0], -1, -1).contiguous()


def separable_query_attention_bwd(
    form: Tensor,
    v: Tensor,
    h: Tensor | None,
    x: Tensor | None,
    r: Tensor | None,
    mask: Tensor | None,
    grid: Sequence[int],
    dropout_p: float,
    seed: int,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> Gradients:
    """Gradients of the form, v, h, x and r, empty where not needed."""
    over_queries, factor, _, p = _weights(form, h, x, r, mask, grid)
    keep = _keep(p, v.shape[0], dropout_p, seed)
    values, d_out = _left_out(v.to(form.dtype), mask, 2), d_out.to(form.dtype)
    delta = (d_out * out.to(form.dtype)).sum(-1, keepdim=True)
    d_scores = _left_out(p * (keep * (d_out @ values.transpose(2, 3)) - delta), mask, 3)
    d_over_queries = factor * d_scores

    needs_form, needs_v, needs_h, needs_x, needs_r = needs
    d_form, d_v, d_h, d_x, d_r = form.new_empty(0), v.new_empty(0), *(form.new_empty(0) for _ in range(3))
    if needs_form:
        on_grid = d_over_queries.unflatten(2, tuple(grid))
        axes = range(len(grid))
        marginals = [on_grid.sum([2 + d for d in axes if d != k]) if len(grid) > 1 else on_grid for k in axes]
        channels = [] if x is None else [x[:, None].transpose(2, 3) @ d_over_queries]
        d_form = _summed(torch.cat((*channels, *marginals), 2), form.shape[0])
    if needs_v:
        d_v = _left_out((p * keep).transpose(2, 3) @ d_out, mask, 2).to(v.dtype)
    if needs_h and h is not None:
        d_h = _summed(d_scores.sum(2), h.shape[0])
    if needs_x and x is not None:
        k = _left_out(form, mask, 3)[:, :, : x.shape[2]]
        d_x = _summed((d_over_queries @ k.transpose(2, 3)).sum(1), x.shape[0])
    if needs_r and r is not None:
        # A score of -inf weighs nothing, whatever it is multiplied with.
        d_r = _summed(torch.where(p == 0, 0.0, d_scores * over_queries).sum((1, 3)), r.shape[0])
    return d_form, d_v, d_h, d_x, d_r


def _summed(gradient: Tensor, batch: int) -> Tensor:
    """Over the batch where the input had none."""
    return gradient.sum(0, keepdim=True) if batch == 1 else gradient
