"""Cross-attention by another library's linear maps: to tokens on grids as they are, to arrays the cheapest way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from perceiver_kernels.integrations.unbuilt import Unbuilt, built
from perceiver_kernels.modules import dense
from perceiver_kernels.modules.folding import choose_path, separable_cross_attention
from perceiver_kernels.modules.projection import project
from perceiver_kernels.modules.segments import GridTokens, KeysAndValues, Segment, segmented_cross_attention


@dataclass(frozen=True)
class Maps:
    """The plain layers around an attention; norm None: the tokens are normalised already."""

    key: nn.Linear
    value: nn.Linear
    norm: nn.LayerNorm | None
    heads: int
    scale: float
    dropout: nn.Dropout

    @property
    def dropout_p(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0

    @property
    def alike(self) -> bool:
        """Whether keys and values are of one width, and both have biases or neither."""
        key, value = self.key, self.value
        return key.out_features == value.out_features and (key.bias is None) == (value.bias is None)

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, n, heads * head_dim) -> (batch, heads, n, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend_to(query: Tensor, tokens: Tensor | Unbuilt, mask: Tensor | None, maps: Maps) -> Tensor:
    """The heads side by side, before the output projection.

    Args:
        query: (batch or 1, queries, heads * head_dim), projected.
        tokens: (batch, M, C), or segments of such an array.
        mask: bool (batch, M), True = attend.
    """
    segments = cast(tuple[Segment, ...], tokens.segments if isinstance(tokens, Unbuilt) else (tokens,))
    path = _path(query.shape[1], segments[0], maps) if len(segments) == 1 else "merged"
    if path == "projected":
        return attend_projected(query, built(tokens), mask, maps)
    first, key, value = segments[0], maps.key, maps.value
    norm = (None, None, None) if maps.norm is None else (maps.norm.weight, maps.norm.bias, maps.norm.eps)
    if path == "separable" and isinstance(first, GridTokens) and first.constant is None and maps.alike:
        return separable_cross_attention(
            query,
            first.data,
            first.grid,
            mask,
            heads=maps.heads,
            scale=maps.scale,
            norm_weight=norm[0],
            norm_bias=norm[1],
            eps=norm[2],
            kv_weight=torch.cat((key.weight, value.weight)),
            kv_bias=None if key.bias is None else torch.cat((key.bias, value.bias)),
            dropout_p=maps.dropout_p,
        )
    projections = KeysAndValues(key.weight, key.bias, value.weight, value.bias, *norm)
    options = {"scale": maps.scale, "dropout_p": maps.dropout_p}
    return segmented_cross_attention(query, segments, mask, projections, heads=maps.heads, **options)


def attend_projected(query: Tensor, tokens: Tensor, mask: Tensor | None, maps: Maps) -> Tensor:
    """The same with keys and values in memory."""
    tokens = tokens if maps.norm is None else maps.norm(tokens)
    q, k, v = map(maps.split_heads, (query, project(maps.key, tokens), project(maps.value, tokens)))
    out = dense.attend(q, k, v, mask, scale=maps.scale, dropout_p=maps.dropout_p)
    return out.transpose(1, 2).flatten(2)


def _path(queries: int, segment: Segment, maps: Maps) -> str:
    """The cheapest path to one segment."""
    batch, num_tokens, channels = segment.shape
    grid, data_channels = None, channels
    if isinstance(segment, GridTokens):
        grid, data_channels = segment.grid, segment.data_channels
    return choose_path(
        queries=queries,
        batch=batch,
        heads=maps.heads,
        head_dim=(maps.key.out_features + maps.value.out_features) // (2 * maps.heads),
        data_channels=data_channels,
        grid=grid,
        context_channels=channels,
        num_tokens=num_tokens,
    ).path
