"""Perceiver IO as it was released: inputs, an encoder, blocks of shared self-attention, and a decoder of queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.modules.attention import CrossAttention, SelfAttention
from perceiver_kernels.modules.decoder import OutputProjection
from perceiver_kernels.modules.decoding import decode
from perceiver_kernels.modules.feed_forward import FeedForward
from perceiver_kernels.modules.projection import is_plain
from perceiver_kernels.modules.queries import Queries
from perceiver_kernels.modules.segments import (
    GridTokens,
    Segment,
)


class Encoder(nn.Module):
    """Latents that read tokens: z = latents + attention(latents, tokens),  z = z + MLP(z).

    Args:
        num_latents, latent_dim: N latents of so many channels.
        token_dim: channels of a token, position features included.
        heads: of the attention.
        head_dim, head_dim_v: channels per head; both default to token_dim / heads.
    """

    def __init__(
        self,
        num_latents: int,
        latent_dim: int,
        token_dim: int,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.02 * torch.randn(num_latents, latent_dim))
        self.attention = _cross_attention(latent_dim, token_dim, heads, head_dim, head_dim_v)
        self.mlp = FeedForward(latent_dim, mult=1, activation="gelu")

    def forward(self, tokens: Segment | Sequence[Segment], mask: Tensor | None = None) -> Tensor:
        """Map tokens (batch, M, token_dim), `GridTokens` or several of these to latents (batch, N, latent_dim)."""
        latents = self.latents[None]
        context: Tensor | Sequence[Segment]
        if isinstance(tokens, GridTokens):
            # The tokens of one grid alone need no merging of partial states.
            context, grid = (tokens.data, tokens.grid) if tokens.constant is None else ((tokens,), None)
        else:
            context, grid = tokens, None
        x = self.attention(latents, context, grid=grid, mask=mask, residual=latents)
        return self.mlp(x, residual=x)


def _cross_attention(
    query_dim: int, context_dim: int, heads: int, head_dim: int | None, head_dim_v: int | None
) -> CrossAttention:
    return CrossAttention(
        query_dim,
        context_dim,
        heads=heads,
        head_dim=context_dim // heads if head_dim is None else head_dim,
        head_dim_v=context_dim // heads if head_dim_v is None else head_dim_v,
        qkv_bias=True,
    )


class LatentBlocks(nn.Module):
    """Self-attention and MLP, layer after layer, all of them again in every block.

    Args:
        dim: channels of a latent.
        layers: of a block.
        blocks: how often the same layers run.
        mult: hidden channels of the MLPs per channel.
        heads, head_dim, head_dim_v: of the attention; head_dim and head_dim_v default to dim / heads.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        *,
        blocks: int = 1,
        heads: int = 8,
        mult: int = 1,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        widths: dict[str, Any] = {
            "head_dim": dim // heads if head_dim is None else head_dim,
            "head_dim_v": dim // heads if head_dim_v is None else head_dim_v,
        }
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    SelfAttention(dim, heads=heads, qkv_bias=True, **widths),
                    FeedForward(dim, mult=mult, activation="gelu"),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.blocks):
            x = run_pairs(self.layers, x)
        return x


def run_pairs(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Attention and MLP of every layer, with residuals."""
    for pair in layers:
        attention, mlp = cast(nn.ModuleList, pair)
        x = attention(x, residual=x)
        x = mlp(x, residual=x)
    return x


class QueryDecoder(nn.Module):
    """Outputs for queries: y = attention(queries, latents) [+ queries],  y = y + MLP(y),  out = final(y).

    Args:
        queries_dim: channels of a query.
        latent_dim: channels of a latent.
        out_channels: of an output; None leaves the last linear map out.
        heads, head_dim, head_dim_v: of the attention; head_dim and head_dim_v default to latent_dim / heads.
        query_residual: whether the queries are added to the attention.
    """

    def __init__(
        self,
        queries_dim: int,
        latent_dim: int,
        out_channels: int | None,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        query_residual: bool = True,
    ) -> None:
        super().__init__()
        self.query_residual = query_residual
        self.attention = _cross_attention(queries_dim, latent_dim, heads, head_dim, head_dim_v)
        self.mlp = FeedForward(queries_dim, mult=1, activation="gelu")
        self.final: nn.Module = nn.Identity() if out_channels is None else nn.Linear(queries_dim, out_channels)

    def forward(
        self,
        queries: Queries,
        latents: Tensor,
        indices: Tensor | None = None,
        final: nn.Module | OutputProjection | None = None,
        **given: Tensor,
    ) -> Tensor:
        """Outputs (batch, O, out_channels) of all queries, or (batch, P, out_channels) of those at indices (P,).

        `final` takes the place of this decoder's own last map; what else is given goes to the builder of the queries.
        """
        on_grid = queries.on_grid(**given) if indices is None else None
        return decode(
            self.attention,
            queries(len(latents), indices, **given) if on_grid is None else on_grid,
            latents,
            mlp=self.mlp,
            final=self.final if final is None else final,
            query_residual=self.query_residual,
        )


class OfficialPerceiver(nn.Module):
    """A released Perceiver IO of one input and one set of queries.

    Args:
        inputs: the input becomes tokens (inputs.py).
        encoder, blocks, decoder: the three stages.
        queries: what the decoder asks.
        raw_queries: whether the queries are made of the tokens' data: the queries' `inputs` then are what `inputs`
            gives before its position features.
        single: whether there is one query, whose output is then (batch, out_channels).
        out_scale: factor of the outputs.
    """

    def __init__(
        self,
        inputs: nn.Module,
        encoder: Encoder,
        blocks: LatentBlocks,
        queries: Queries,
        decoder: QueryDecoder,
        *,
        raw_queries: bool = False,
        single: bool = False,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.encoder = encoder
        self.blocks = blocks
        self.queries = queries
        self.decoder = decoder
        self.raw_queries = raw_queries
        self.single = single
        self.out_scale = out_scale

    def forward(self, data: Any, mask: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
        """Outputs (batch, O, out_channels), or (batch, out_channels) of a single query.

        Args:
            data: as `inputs` takes it.
            mask: bool (batch, M), True = attend.
            indices: (P,), int64: which queries; None for all of them.
        """
        tokens = self.inputs(data)
        latents = self.blocks(self.encoder(tokens, mask))
        given = {"inputs": cast(GridTokens, tokens).data} if self.raw_queries else {}
        out = self.decoder(self.queries, latents, indices, **given)
        if self.out_scale != 1:
            out = out * self.out_scale
        return out[:, 0] if self.single else out


class OfficialLanguageModel(nn.Module):
    """The released masked language model, whose outputs are compared with the embeddings of its inputs."""

    def __init__(
        self, inputs: nn.Module, encoder: Encoder, blocks: LatentBlocks, queries: Queries, decoder: QueryDecoder
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.encoder = encoder
        self.blocks = blocks
        self.queries = queries
        self.decoder = decoder
        self.bias = nn.Parameter(torch.zeros(cast(Any, inputs).embeddings.num_embeddings))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
        """Map tokens (batch, n), int64, to logits (batch, O, vocabulary), or of the places at indices (P,) alone.

        mask: bool (batch, n), True = attend. There is an output for every place of the longest input.
        """
        latents = self.blocks(self.encoder(self.inputs(tokens), mask))
        out = self.decoder(self.queries, latents, indices)
        return nn.functional.linear(out, cast(Any, self.inputs).embeddings.weight, self.bias)


class OfficialAutoencoder(nn.Module):
    """The released multimodal autoencoder: every modality is decoded by the same decoder, from queries of its own.

    Args:
        inputs: of several modalities (`PaddedModalities`).
        queries: by modality, all of the decoder's channels.
        heads: by modality, a linear map of the decoder's outputs.
    """

    def __init__(
        self,
        inputs: nn.Module,
        encoder: Encoder,
        blocks: LatentBlocks,
        queries: Mapping[str, Queries],
        decoder: QueryDecoder,
        heads: Mapping[str, nn.Linear],
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.encoder = encoder
        self.blocks = blocks
        self.queries = nn.ModuleDict(queries)
        self.decoder = decoder
        self.heads = nn.ModuleDict(heads)

    def forward(
        self, modalities: Mapping[str, Tensor], indices: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs (batch, O, channels) by modality, or of the queries at indices[modality] where that is given."""
        latents = self.blocks(self.encoder(self.inputs(modalities)))
        indices = {} if indices is None else indices
        return {
            name: self.decoder(queries, latents, indices.get(name), final=self._head(name))
            for name, queries in self.queries.items()
        }

    def _head(self, name: str) -> nn.Module | OutputProjection:
        """The decoder's last map and the modality's after it as one: between them are more channels."""
        final, head = self.decoder.final, self.heads[name]
        if not (is_plain(final) and is_plain(head)):
            return nn.Sequential(final, head)
        with torch.autocast(head.weight.device.type, enabled=False):
            bias = head.bias if final.bias is None else F.linear(final.bias, head.weight, head.bias)
            return OutputProjection(head.weight @ final.weight, bias)
