"""The same Perceiver in plain PyTorch: the expert path that this library is compared with, and the float64 truth.

Parameter names are those of perceiver-pytorch, so that one state dict serves every provider.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_kernels.benchmarking.cases import Case


def axis_tables(
    case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> list[Tensor]:
    """One table of features per axis, (S_k, 2 * num_bands + 1), each row [sin, cos, position]."""
    frequencies = torch.linspace(1.0, case.max_freq / 2, case.num_bands, dtype=torch.float64, device=device)
    tables = []
    for size in case.shape:
        positions = torch.linspace(-1.0, 1.0, size, dtype=torch.float64, device=device)[:, None]
        angles = math.pi * positions * frequencies
        tables.append(torch.cat([angles.sin(), angles.cos(), positions], dim=-1).to(dtype))
    return tables


kept_tables = functools.lru_cache(maxsize=16)(axis_tables)


def encode(image: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Tokens (batch, M, C) of an image (batch, *shape, c): its channels, then each axis's features, in one write."""
    blocks = [image]
    for axis, table in enumerate(tables):
        shape = [1] * image.ndim
        shape[axis + 1], shape[-1] = table.shape
        blocks.append(table.view(shape).expand(*image.shape[:-1], -1))
    return torch.cat(blocks, dim=-1).flatten(1, -2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, n, heads * head_dim) -> (batch, heads, n, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`, or to itself; `attend` maps the heads' q, k and v to results."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * head_dim, bias=qkv_bias)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=qkv_bias)
        self.to_out = nn.Linear(heads * head_dim, query_dim)
        self.attend = F.scaled_dot_product_attention

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = split_heads(self.to_q(x), self.heads).expand(context.shape[0], -1, -1, -1)
        k, v = (split_heads(part, self.heads) for part in self.to_kv(context).chunk(2, dim=-1))
        return self.project(self.attend(q, k, v))

    def project(self, heads: Tensor) -> Tensor:
        """The output projection of (batch, heads, n, head_dim)."""
        return self.to_out(heads.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """x * gelu(gate), the halves of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The gated MLP of perceiver-pytorch, four times as wide as its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 8 * dim), GEGLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class MLP(nn.Module):
    """Linear, GELU, linear: the MLP of the released models."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, mult * dim), nn.GELU(), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    """LayerNorm, then `fn`."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class CrossAttention(nn.Module):
    """LayerNorm of the latents and of the tokens, then attention from the former to the latter."""

    def __init__(self, case: Case, qkv_bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(case.latent_dim)
        self.norm_context = nn.LayerNorm(case.channels)
        self.fn = Attention(case.latent_dim, case.channels, case.heads, case.head_dim, qkv_bias)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        return self.fn(self.norm(latents), self.norm_context(tokens))


class Layer(nn.Module):
    """What a provider builds of a case: called with (latents, image), its parameters those of `layer`."""

    layer: nn.Module


class ExpertCrossAttention(Layer):
    """The best plain PyTorch: per-axis tables, one write of the tokens, one projection to K and V, fused attention.

    Sines and cosines are taken once per axis, never per pixel. With `cached`, even the (M, E) array of positions is
    made beforehand and outlives the call.
    """

    layer: CrossAttention
    positions: Tensor

    def __init__(self, case: Case, cached: bool = False) -> None:
        super().__init__()
        self.case, self.cached = case, cached
        self.layer = CrossAttention(case)
        if cached:
            positions = encode(torch.empty(1, *case.shape, 0), axis_tables(case)).view(1, *case.shape, -1)
            self.register_buffer("positions", positions, persistent=False)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        return self.layer(latents, self.tokens(image))

    def tokens(self, image: Tensor) -> Tensor:
        if not self.cached:
            return encode(image, axis_tables(self.case, image.dtype, image.device))
        positions = self.positions.expand(*image.shape[:-1], -1)
        return torch.cat([image, positions], dim=-1).flatten(1, -2)


class ExactCrossAttention(Layer):
    """The truth: float64, tokens a few rows of the grid at a time, parts merged by their logsumexp.

    Checkpointing keeps the memory of the backward pass to one chunk, so that the large cases have a truth too.
    """

    layer: CrossAttention
    tokens_per_chunk = 1 << 14

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.layer = CrossAttention(case).double()

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        attention = self.layer.fn
        q = split_heads(attention.to_q(self.layer.norm(latents.double())), self.case.heads)
        tables = axis_tables(self.case, torch.float64, image.device)
        step = max(1, self.tokens_per_chunk // math.prod(self.case.shape[1:]))
        out, lse = image.new_zeros((), dtype=torch.float64), image.new_full((), -math.inf, dtype=torch.float64)
        for part, table in zip(image.split(step, dim=1), tables[0].split(step), strict=True):
            part_out, part_lse = checkpoint(self.attend, q, part, [table, *tables[1:]], use_reentrant=False)
            merged = torch.logaddexp(lse, part_lse)
            out = out * (lse - merged).exp() + part_out * (part_lse - merged).exp()
            lse = merged
        return attention.project(out)

    def attend(self, q: Tensor, image: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Attention over one chunk, (batch, heads, N, head_dim), and its scores' logsumexp, (batch, heads, N, 1)."""
        tokens = self.layer.norm_context(encode(image.double(), tables))
        k, v = (split_heads(part, self.case.heads) for part in self.layer.fn.to_kv(tokens).chunk(2, dim=-1))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        return (scores - lse).exp() @ v, lse


class PlainPerceiver(nn.Module):
    """A Perceiver of depth 1 with one self-attention, its state dict that of perceiver-pytorch's.

    Args:
        cross: either module above; the parameters of its `layer` become layers.0.cross_attn.
    """

    def __init__(self, case: Case, cross: ExpertCrossAttention | ExactCrossAttention, num_classes: int = 1000) -> None:
        super().__init__()
        dim = case.latent_dim
        self.latents = nn.Parameter(torch.randn(case.num_latents, dim))
        cross_ff, self_ff = PreNorm(dim, FeedForward(dim)), PreNorm(dim, FeedForward(dim))
        self_attention = PreNorm(dim, Attention(dim, dim, heads=8, head_dim=64))
        self_attentions = nn.ModuleList([nn.ModuleList([self_attention, self_ff])])
        block = {"cross_attn": cross.layer, "cross_ff": cross_ff, "self_attns": self_attentions}
        self.layers = nn.ModuleList([nn.ModuleDict(block)])
        self.to_logits = nn.Sequential(nn.Identity(), nn.LayerNorm(dim), nn.Linear(dim, num_classes))
        # In a tuple, so that the layer's parameters are not registered a second time.
        self.steps = (cross, cross_ff, self_attention, self_ff)

    def forward(self, image: Tensor) -> Tensor:
        cross, *steps = self.steps
        x = self.latents[None]
        x = cross(x, image) + x
        for step in steps:
            x = step(x) + x
        return self.to_logits(x.mean(dim=1))


class Residuals(nn.ModuleList):
    """Modules one after the other, each adding to what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = x + module(x)
        return x


def tower_layers(dim: int, layers: int, heads: int, mult: int) -> nn.ModuleList:
    """Pre-norm self-attention and MLP of the released models; queries, keys and values have biases."""
    return nn.ModuleList(
        Residuals(
            [
                PreNorm(dim, Attention(dim, dim, heads, dim // heads, qkv_bias=True)),
                PreNorm(dim, MLP(dim, mult)),
            ]
        )
        for _ in range(layers)
    )


class PlainTower(nn.Module):
    """The latent tower of the released models, (batch, N, dim) -> (batch, N, dim)."""

    def __init__(self, dim: int, layers: int, heads: int, mult: int) -> None:
        super().__init__()
        self.layers = tower_layers(dim, layers, heads, mult)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PlainOfficial(nn.Module):
    """The released ImageNet model: one cross-attention, `layers` tied over `blocks`, a decoder of one query.

    Cross-attentions have one head as wide as a token, and of the decoder as wide as a latent. Maps (batch, *shape, 3)
    to (batch, num_classes). Features stand axis after axis in a token; the per-axis tables are kept.

    Args:
        case: the encoder's cross-attention.
    """

    def __init__(self, case: Case, layers: int, blocks: int, heads: int, num_classes: int = 1000) -> None:
        super().__init__()
        dim = case.latent_dim
        self.case, self.blocks = case, blocks
        self.latents = nn.Parameter(torch.randn(case.num_latents, dim))
        self.cross = CrossAttention(case, qkv_bias=True)
        self.cross_ff = PreNorm(dim, MLP(dim, 1))
        self.layers = tower_layers(dim, layers, heads, mult=1)
        self.query = nn.Parameter(torch.randn(1, dim))
        # A case without axes: its tokens are data, here the latents, alone.
        self.decoder = CrossAttention(Case("decoder", "", (), 0, 0.0, dim, 1, dim, 1, dim), qkv_bias=True)
        self.decoder_ff = PreNorm(dim, MLP(dim, 1))
        self.to_logits = nn.Linear(dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.latents[None]
        x = x + self.cross(x, encode(image, kept_tables(self.case, image.dtype, image.device)))
        x = x + self.cross_ff(x)
        for _ in range(self.blocks):
            for layer in self.layers:
                x = layer(x)
        query = self.query[None]
        query = query + self.decoder(query, x)
        query = query + self.decoder_ff(query)
        return self.to_logits(query[:, 0])


class PlainModel(nn.Module):
    """perceiver-pytorch's whole Perceiver with SDPA, by its arguments and with its names of parameters.

    Tokens are built once per call. What this library's benchmarks do not use of it is left out: masks, dropout.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        num_freq_bands: int,
        max_freq: float,
        depth: int,
        input_channels: int,
        num_latents: int,
        latent_dim: int,
        cross_heads: int = 1,
        cross_dim_head: int = 64,
        latent_heads: int = 8,
        latent_dim_head: int = 64,
        self_per_cross_attn: int = 1,
        weight_tie_layers: bool = False,
        num_classes: int = 1000,
        **_: Any,
    ) -> None:
        super().__init__()
        case = Case("", "", tuple(shape), num_freq_bands, max_freq, input_channels, num_latents, latent_dim)
        self.case = case = dataclasses.replace(case, heads=cross_heads, head_dim=cross_dim_head)
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))

        def pair() -> Residuals:
            attention = Attention(latent_dim, latent_dim, latent_heads, latent_dim_head)
            return Residuals([PreNorm(latent_dim, attention), PreNorm(latent_dim, FeedForward(latent_dim))])

        def block() -> nn.ModuleDict:
            self_attns = nn.ModuleList(pair() for _ in range(self_per_cross_attn))
            cross_ff = PreNorm(latent_dim, FeedForward(latent_dim))
            return nn.ModuleDict({"cross_attn": CrossAttention(case), "cross_ff": cross_ff, "self_attns": self_attns})

        blocks = [block() for _ in range(min(depth, 2) if weight_tie_layers else depth)]
        self.layers = nn.ModuleList(blocks + blocks[-1:] * (depth - len(blocks)))
        self.to_logits = nn.Sequential(nn.Identity(), nn.LayerNorm(latent_dim), nn.Linear(latent_dim, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        tokens = encode(image, kept_tables(self.case, image.dtype, image.device))
        x = self.latents[None]
        for block in self.layers:
            parts = cast(nn.ModuleDict, block)
            x = x + parts["cross_attn"](x, tokens)
            x = x + parts["cross_ff"](x)
            for pair in cast(nn.ModuleList, parts["self_attns"]):
                x = pair(x)
        return self.to_logits(x.mean(dim=1))
