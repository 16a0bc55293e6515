"""The same Perceiver in plain PyTorch: the expert path that this library is compared with, and the float64 truth.

Parameter names are those of perceiver-pytorch, so that one state dict serves every provider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_kernels.benchmarking.cases import Case


def axis_tables(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One table of features per axis, (S_k, 2 * num_bands + 1), each row [sin, cos, position]."""
    frequencies = torch.linspace(1.0, case.max_freq / 2, case.num_bands, dtype=torch.float64)
    tables = []
    for size in case.shape:
        positions = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)[:, None]
        angles = math.pi * positions * frequencies
        tables.append(torch.cat([angles.sin(), angles.cos(), positions], dim=-1).to(dtype))
    return tables


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
    """Multi-head attention from `x` to `context`, or to itself."""

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * head_dim, bias=qkv_bias)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=qkv_bias)
        self.to_out = nn.Linear(heads * head_dim, query_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = split_heads(self.to_q(x), self.heads).expand(context.shape[0], -1, -1, -1)
        k, v = (split_heads(part, self.heads) for part in self.to_kv(context).chunk(2, dim=-1))
        return self.project(F.scaled_dot_product_attention(q, k, v))

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

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(case.latent_dim)
        self.norm_context = nn.LayerNorm(case.channels)
        self.fn = Attention(case.latent_dim, case.channels, case.heads, case.head_dim)

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

    def __init__(self, case: Case, cached: bool = False) -> None:
        super().__init__()
        self.case, self.cached = case, cached
        self.layer = CrossAttention(case)
        if cached:
            self.positions = encode(torch.empty(1, *case.shape, 0), axis_tables(case)).view(1, *case.shape, -1)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        return self.layer(latents, self.tokens(image))

    def tokens(self, image: Tensor) -> Tensor:
        if not self.cached:
            return encode(image, axis_tables(self.case, image.dtype))
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
        tables = axis_tables(self.case, torch.float64)
        step = max(1, self.tokens_per_chunk // math.prod(self.case.shape[1:]))
        out, lse = torch.zeros((), dtype=torch.float64), torch.full((), -math.inf, dtype=torch.float64)
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


class PlainTower(nn.Module):
    """The latent tower of the released models: pre-norm self-attention and MLP, `layers` times, each with a residual.

    Maps (batch, N, dim) to (batch, N, dim); queries, keys and values have biases.
    """

    def __init__(self, dim: int, layers: int, heads: int, mult: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, dim, heads, dim // heads, qkv_bias=True)),
                    PreNorm(dim, MLP(dim, mult)),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.layers:
            attention, mlp = cast(nn.ModuleList, pair)
            x = x + attention(x)
            x = x + mlp(x)
        return x
