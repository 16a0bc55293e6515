"""Tokens in segments: several grids and arrays under one softmax, none of the grids' features in memory.

Each segment gives a partial state of the attention, its own softmax with the logarithm of its sum, and the states merge
(docs/separable_attention.md, "Merging"). Channels that are the same for all tokens of a grid, as a modality's embedding
or its padding, count once per position of the first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.modules import dense
from perceiver_kernels.modules.decoder import GridQueries, reciprocal_deviation
from perceiver_kernels.modules.folding import separable_obstacle
from perceiver_kernels.ops.absorbed_attention import absorbed_attention
from perceiver_kernels.ops.separable_attention import merge_weights, separable_attention


class GridTokens(GridQueries):
    """The tokens [data ; Fourier features of the position ; constant] of all positions of a grid, not built.

    Args:
        grid: where the tokens stand and which features a position has.
        data: (batch, *grid.shape, c) or (batch, M, c), floating-point, any strides.
        constant: (n,), channels that are the same for every token, such as a modality's embedding; None: n = 0.

    Raises:
        ValueError: data or constant is not as described; the message names it.
    """

    data: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.data, Tensor):
            raise ValueError(f"data is a {type(self.data).__name__}, must be a tensor")
        super().__post_init__()

    @property
    def shape(self) -> torch.Size:
        """That of the tokens written out: (batch, M, c + E + n)."""
        return torch.Size((self.batch, self.grid.num_positions, self.num_channels))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def materialize(self) -> Tensor:
        """The tokens written out, (batch, M, c + E + n), in the data's dtype."""
        return self.encode(self.device, self.dtype)


Segment: TypeAlias = GridTokens | Tensor


def check_segments(segments: Sequence[Segment], channels: int) -> None:
    """Raise a ValueError unless these are segments of one batch on one device, with tokens of so many channels."""
    if not segments:
        raise ValueError("context is an empty sequence, must have at least one segment")
    first = segments[0]
    for i, segment in enumerate(segments):
        if not isinstance(segment, (GridTokens, Tensor)):
            raise ValueError(f"context[{i}] is a {type(segment).__name__}, must be GridTokens or a tensor")
        shape = tuple(segment.shape)
        if len(shape) != 3 or shape[2] != channels or shape[0] != first.shape[0] or not shape[1]:
            expected = f"({first.shape[0]}, tokens, {channels})"
            raise ValueError(f"context[{i}] has tokens of shape {shape}, must be {expected}, as the first's batch is")
        if segment.device != first.device:
            raise ValueError(f"context[{i}] is on {segment.device}, must be on {first.device} as the first is")
        if not segment.dtype.is_floating_point:
            raise ValueError(f"context[{i}] has dtype {segment.dtype}, must be floating-point")


def materialized(segments: Sequence[Segment]) -> Tensor:
    """The tokens of all segments written out, (batch, M, C)."""
    parts = [part.materialize() if isinstance(part, GridTokens) else part for part in segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class KeysAndValues(NamedTuple):
    """LayerNorm of the tokens and the linear maps to keys and values.

    key_weight: (heads * head_dim, C), value_weight: (heads * head_dim_v, C), and both biases or neither. norm_weight
    and norm_bias: (C,) or None, as in F.layer_norm; eps None: there is no LayerNorm.
    """

    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float | None = None

    def bias_of_values(self) -> Tensor | None:
        """That of keys adds the same to all scores of a row: it has a gradient, which is zero, and no other effect."""
        if self.key_bias is None or self.value_bias is None:
            return self.value_bias
        return torch.cat((self.key_bias, self.value_bias))[self.key_bias.shape[0] :]


class PartialState(NamedTuple):
    """The attention over some of the tokens: sums (batch, rows, head_dim_v) of weights times values without biases, and
    the rows' lse and total (batch, rows)."""

    sums: Tensor
    lse: Tensor
    total: Tensor

    def merge(self, other: PartialState) -> PartialState:
        """The state over the union of two disjoint sets of tokens."""
        lse, mine, theirs = merge_weights(self.lse, other.lse)
        mine, theirs = mine.to(self.sums.dtype), theirs.to(self.sums.dtype)
        sums = mine[..., None] * self.sums + theirs[..., None] * other.sums
        return PartialState(sums, lse, mine * self.total + theirs * other.total)


def segmented_cross_attention(
    query: Tensor,
    segments: Sequence[Segment],
    mask: Tensor | None,
    projections: KeysAndValues,
    *,
    heads: int,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * q K^T) V over the tokens of all segments together.

    Keys of arrays are projected by way of the query, values after the attention.

    Args:
        query: (batch or 1, queries, heads * head_dim), projected; batch 1 is not expanded.
        segments: one or more `GridTokens`, or arrays (batch, M, C).
        mask: bool (batch, tokens of all segments), True = attend. Rows with nothing to attend to get zeros.
        projections: how the tokens become keys and values.

    Returns:
        (batch, queries, heads * head_dim_v) in the query's dtype.
    """
    if len(segments) == 1 and isinstance(segments[0], Tensor):
        plain = mask is None and dropout_p == 0
        if (
            dense.torch_reason(query.device, absorbed_sizes(segments[0].shape, heads * query.shape[1], plain))
            is not None
        ):
            return _attend_by_torch(query, segments[0], mask, projections, heads, scale, dropout_p)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        *tensors, eps = projections
        parameters = KeysAndValues(*(None if p is None else p.to(dtype) for p in tensors), eps)  # type: ignore
        folded = _Folded(scale * query.to(dtype), parameters, heads, dropout_p)
        sizes = [segment.shape[1] for segment in segments]
        masks = [None] * len(sizes) if mask is None else mask.split(sizes, 1)
        states = [folded.attend(segment, allowed) for segment, allowed in zip(segments, masks, strict=True)]
        out = folded.finish(reduce(PartialState.merge, states))
    return out.to(query.dtype)


def absorbed_sizes(tokens: Sequence[int], rows: int, plain: bool) -> dense.Sizes:
    """Of attention in the channels of tokens (batch, M, C), by the rows of all heads; plain: as there."""
    batch, count, channels = tokens
    return dense.Sizes(batch, 1, rows, count, channels, channels, plain)


def _attend_by_torch(
    query: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    projections: KeysAndValues,
    heads: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The same over one array by torch's attention, which wants LayerNorm's result in memory."""
    key_weight, _, value_weight, _, norm_weight, norm_bias, eps = projections
    batch, _, channels = tokens.shape
    tokens = tokens.to(key_weight.dtype)
    normed = tokens if eps is None else F.layer_norm(tokens, (channels,), norm_weight, norm_bias, eps)
    query = query.unflatten(2, (heads, -1)).transpose(1, 2)
    absorbed = (query @ key_weight.unflatten(0, (heads, -1))).flatten(1, 2).expand(batch, -1, -1)  # batch, rows, C
    value_bias = projections.bias_of_values()
    if value_bias is not None:  # a channel of ones sums the weights: 0 for masked rows, and not 1 under dropout
        normed, absorbed = F.pad(normed, (0, 1), value=1.0), F.pad(absorbed, (0, 1))
    shared = normed[:, None]
    weighted = dense.attend_by_torch(absorbed[:, None], shared, shared, mask, scale, dropout_p)
    weighted = weighted.squeeze(1).unflatten(1, (heads, -1))
    out = weighted[..., :channels] @ value_weight.unflatten(0, (heads, -1)).transpose(1, 2)
    if value_bias is not None:
        out = out + weighted[..., channels:] * value_bias.unflatten(0, (heads, 1, -1))
    return out.transpose(1, 2).flatten(2)


class _Folded:
    """Queries and projections with LayerNorm's gain and centring folded into the weights."""

    def __init__(self, query: Tensor, projections: KeysAndValues, heads: int, dropout_p: float) -> None:
        key_weight, _, value_weight, _, norm_weight, norm_bias, self.eps = projections
        value_bias = projections.bias_of_values()
        self.heads, self.dropout_p, self.dtype = heads, dropout_p, query.dtype
        self.constant = value_bias if norm_bias is None else F.linear(norm_bias, value_weight, value_bias)
        weights = [key_weight, value_weight]
        if norm_weight is not None:
            weights = [weight * norm_weight for weight in weights]
        if self.eps is not None:
            weights = [weight - weight.mean(1, keepdim=True) for weight in weights]
        self.key_weight, self.value_weight = weights
        self.query = query.unflatten(2, (heads, -1)).transpose(1, 2)  # batch or 1, heads, queries, head_dim

    def attend(self, segment: Segment, mask: Tensor | None) -> PartialState:
        if isinstance(segment, GridTokens):
            if separable_obstacle(segment.grid, segment.data.shape[-1]) is None:
                return self._attend_to_grid(segment, mask)
            segment = segment.materialize()
        return self._attend_to_tokens(segment, mask)

    def _attend_to_grid(self, tokens: GridTokens, mask: Tensor | None) -> PartialState:
        grid = tokens.grid
        x = tokens.data.reshape(tokens.data.shape[0], *grid.shape, tokens.data_channels)
        keys, values = (
            self._summands(tokens, weight).unflatten(1, (self.heads, -1)).transpose(0, 1)
            for weight in (self.key_weight, self.value_weight)
        )  # heads, entries, head_dim
        form = (self.query @ keys.transpose(1, 2)).flatten(1, 2)
        a, *tables = form.split((x.shape[-1], *grid.shape), 2)
        r = None if self.eps is None else reciprocal_deviation(tokens, self.eps, x.device, self.dtype)
        on_grid = None if mask is None else mask.reshape(x.shape[:-1])
        state = separable_attention(a, tables, x, r, mask=on_grid, dropout_p=self.dropout_p)
        weighted = torch.cat((state.acc, *state.marginals), 2).unflatten(1, (self.heads, -1)) @ values
        return PartialState(weighted.flatten(1, 2), state.lse, state.total)

    def _summands(self, tokens: GridTokens, weight: Tensor) -> Tensor:
        """Projected: what the tokens are sums of. A token has one position on the first axis, and the constant once."""
        data_channels, constant = tokens.data.shape[-1], tokens.constant
        on_grid = data_channels + tokens.grid.num_channels
        projected = F.linear(tokens.grid.summands(data_channels, weight.device, weight.dtype), weight[:, :on_grid])
        if constant is None:
            return projected
        first = tokens.grid.shape[0]
        data, axis, rest = projected.split((data_channels, first, projected.shape[0] - data_channels - first))
        return torch.cat((data, axis + weight[:, on_grid:] @ constant.to(weight.dtype), rest))

    def _attend_to_tokens(self, tokens: Tensor, mask: Tensor | None) -> PartialState:
        absorbed = (self.query @ self.key_weight.unflatten(0, (self.heads, -1))).flatten(1, 2)
        acc, lse, total = absorbed_attention(absorbed, tokens, eps=self.eps, mask=mask, dropout_p=self.dropout_p)
        weighted = acc.unflatten(1, (self.heads, -1)) @ self.value_weight.unflatten(0, (self.heads, -1)).transpose(1, 2)
        return PartialState(weighted.flatten(1, 2), lse, total)

    def finish(self, state: PartialState) -> Tensor:
        """The heads side by side, (batch, queries, heads * head_dim_v), and what each weight adds."""
        out, total = (part.unflatten(1, (self.heads, -1)).transpose(1, 2) for part in (state.sums, state.total))
        if self.constant is not None:
            out = out + total[..., None] * self.constant.unflatten(0, (self.heads, -1))
        return out.flatten(2)
