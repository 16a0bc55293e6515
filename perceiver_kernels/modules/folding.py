"""LayerNorm, keys and values folded around separable attention, and the choice between the paths of cross-attention.

A token is z = [x ; features of its position on each axis]: a sum of data channels and one row of features per axis.
Keys and values are linear in LayerNorm(z), so those summands are projected instead of the tokens: there is one per
position of an axis, not one per position of the grid (docs/separable_attention.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.ops.separable_attention import MAX_AXES, MAX_CHANNELS, attend_to_grid
from perceiver_kernels.ops.separable_layer_norm import separable_layer_norm

# Cost of one exponential in multiply-adds, and the longest single axis whose (rows, positions) table is worth it.
EXPONENTIAL_COST = 10
LONGEST_SINGLE_AXIS = 4096


@dataclass(frozen=True)
class PathChoice:
    """The path that runs a cross-attention, and what each path would cost in multiply-adds or why it cannot run."""

    path: str
    costs: dict[str, int | str]

    def describe(self) -> str:
        lines = [f"path: {self.path}"]
        for path, cost in self.costs.items():
            lines.append(f"  {path}: {cost if isinstance(cost, str) else f'{cost / 1e9:.3f} G multiply-adds'}")
        return "\n".join(lines)


def choose_path(
    *,
    queries: int,
    batch: int,
    heads: int,
    head_dim: int,
    data_channels: int,
    grid: FourierGrid | None,
    context_channels: int,
    num_tokens: int,
) -> PathChoice:
    """The cheapest path: "separable", "absorbed" (query taken into the context's channels, no keys) or "projected".

    The cost model, per batch entry and (row, token) pair, an exponential counting as EXPONENTIAL_COST multiply-adds:
        separable   2 c + 2 A                      (c data channels, A axes)
        absorbed    2 C                            (C context channels)
        projected   2 head_dim, and 2 C heads head_dim per token for keys and values
    """
    pairs = batch * heads * queries * num_tokens
    projections = 2 * batch * num_tokens * context_channels * heads * head_dim
    costs: dict[str, int | str] = {
        "separable": separable_obstacle(grid, data_channels)
        or pairs * (2 * data_channels + 2 * (grid.num_axes if grid else 0) + EXPONENTIAL_COST),
        "absorbed": pairs * (2 * context_channels + EXPONENTIAL_COST),
        "projected": pairs * (2 * head_dim + EXPONENTIAL_COST) + projections,
    }
    # A list of pairs: torch.compile of torch 2.9 follows neither a generator nor a key here.
    _, path = min([(cost, path) for path, cost in costs.items() if not isinstance(cost, str)])
    return PathChoice(path, costs)


def separable_obstacle(grid: FourierGrid | None, data_channels: int) -> str | None:
    """Why the separable path cannot run, or None where it can."""
    if grid is None:
        return "no, the context is not data on a grid with per-axis features"
    if not 1 <= data_channels <= MAX_CHANNELS:
        return f"no, the data has {data_channels} channels, must have 1 to {MAX_CHANNELS}"
    if not 1 <= grid.num_axes <= MAX_AXES:
        return f"no, the grid has {grid.num_axes} axes, must have 1 to {MAX_AXES}"
    if grid.num_axes == 1 and grid.num_positions >= LONGEST_SINGLE_AXIS:
        return f"no, a single axis of {grid.num_positions} positions has as large a table as its scores"
    return None


def separable_cross_attention(
    query: Tensor,
    data: Tensor,
    grid: FourierGrid,
    mask: Tensor | None,
    *,
    heads: int,
    scale: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    kv_weight: Tensor,
    kv_bias: Tensor | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * q K^T) V with K, V = kv_weight LayerNorm([data ; encoding]) + kv_bias, none of them built.

    Args:
        query: (batch or 1, queries, heads * head_dim), projected; batch 1 is not expanded.
        data: (batch, *grid.shape, c) or (batch, M, c).
        mask: bool (batch, M) or (batch, *grid.shape), True = attend.
        norm_weight, norm_bias: LayerNorm of the tokens; eps None means that there is none.
        kv_weight: (2 * heads * head_dim, c + grid.num_channels), keys first.

    Returns:
        (batch, queries, heads * head_dim) in the query's dtype.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        parameters = [None if p is None else p.to(dtype) for p in (kv_weight, kv_bias, norm_weight, norm_bias)]
        result = _separable(query.to(dtype), data, grid, mask, parameters, heads, scale, eps, dropout_p)
    return result.to(query.dtype)


def _separable(
    query: Tensor,
    data: Tensor,
    grid: FourierGrid,
    mask: Tensor | None,
    parameters: list[Tensor | None],
    heads: int,
    scale: float,
    eps: float | None,
    dropout_p: float,
) -> Tensor:
    kv_weight, kv_bias, norm_weight, norm_bias = parameters
    assert kv_weight is not None
    x = data.reshape(data.shape[0], *grid.shape, data.shape[-1])
    on_grid = None if mask is None else mask.reshape(x.shape[:-1])
    r = None
    if eps is not None:
        sums, squares = grid.feature_sums(query.device, query.dtype)
        r = separable_layer_norm(x, sums, squares, feature_channels=grid.num_channels, eps=eps)

    # LayerNorm's gain and centring go into the weights, its bias into a constant.
    weight = kv_weight if norm_weight is None else kv_weight * norm_weight
    if eps is not None:
        weight = weight - weight.mean(1, keepdim=True)
    projected = F.linear(grid.summands(x.shape[-1], query.device, query.dtype), weight)
    keys, values = projected.unflatten(1, (2, heads, -1)).permute(1, 2, 0, 3)  # heads, entries, head_dim
    q = (scale * query).unflatten(2, (heads, -1)).permute(0, 2, 3, 1)  # batch or 1, heads, head_dim, queries
    form = (keys @ q).transpose(1, 2).flatten(2)
    weighted, total = attend_to_grid(form, x, r, mask=on_grid, dropout_p=dropout_p)
    out = weighted.unflatten(2, (heads, -1)).permute(0, 2, 3, 1) @ values  # batch, heads, queries, head_dim
    out = out.transpose(1, 2).flatten(2)

    constant = kv_bias if norm_bias is None else F.linear(norm_bias, kv_weight, kv_bias)
    if constant is None:
        return out
    constant = constant.chunk(2)[1]
    if mask is None and dropout_p == 0:
        return out + constant  # the weights' total is 1
    total = total.unflatten(1, (heads, -1)).transpose(1, 2)  # batch, queries, heads
    return out + (total[..., None] * constant.unflatten(0, (heads, -1))).flatten(2)
