"""Separable attention of queries on a grid as its formulas stand (docs/separable_attention.md), the weights in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_kernels.backends.layout import with_rows_first
from perceiver_kernels.backends.reference.attention import kept, over_batch, softmax
from perceiver_kernels.backends.reference.grids import marginals, spread

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _over_queries(form: Tensor, x: Tensor | None, grid: Sequence[int]) -> Tensor:
    """x . channels + sum_k tables[k] of a form (batch or 1, heads, entries, N), for all queries: (.., heads, M, N)."""
    channels, *tables = form.split((0 if x is None else x.shape[2], *grid), 2)
    total = sum(spread(tables), form.new_zeros(())).flatten(2, -2)
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
    return form, factor, *softmax(scores)


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
    out = (p * kept(p, dropout_p, seed, v.shape[0])) @ values
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
    keep = kept(p, dropout_p, seed, v.shape[0])
    values, d_out = _left_out(v.to(form.dtype), mask, 2), d_out.to(form.dtype)
    delta = (d_out * out.to(form.dtype)).sum(-1, keepdim=True)
    d_scores = _left_out(p * (keep * (d_out @ values.transpose(2, 3)) - delta), mask, 3)
    d_over_queries = factor * d_scores

    needs_form, needs_v, needs_h, needs_x, needs_r = needs
    d_form, d_v, d_h, d_x, d_r = form.new_empty(0), v.new_empty(0), *(form.new_empty(0) for _ in range(3))
    if needs_form:
        channels = [] if x is None else [x[:, None].transpose(2, 3) @ d_over_queries]
        d_form = over_batch(torch.cat((*channels, *marginals(d_over_queries, grid)), 2), form)
    if needs_v:
        d_v = _left_out((p * keep).transpose(2, 3) @ d_out, mask, 2).to(v.dtype)
    if needs_h and h is not None:
        d_h = over_batch(d_scores.sum(2), h)
    if needs_x and x is not None:
        k = _left_out(form, mask, 3)[:, :, : x.shape[2]]
        d_x = over_batch((d_over_queries @ k.transpose(2, 3)).sum(1), x)
    if needs_r and r is not None:
        # A score of -inf weighs nothing, whatever it is multiplied with.
        d_r = over_batch(torch.where(p == 0, 0.0, d_scores * over_queries).sum((1, 3)), r)
    return d_form, d_v, d_h, d_x, d_r
