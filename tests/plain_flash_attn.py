"""flash-attn's layers as flash-perceiver uses them, in plain PyTorch: what its stand-ins are compared with.

A sequence of a packed batch is attended to on its own; a padded one has its masked scores lowered by 10,000.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MHA(nn.Module):
    def __init__(
        self, embed_dim: int, num_heads: int, cross_attn: bool = False, qkv_proj_bias: bool = True,
        out_proj_bias: bool = True, dropout: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        rotary_emb_dim: int = 0, use_flash_attn: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.rotary_emb_dim, self.use_flash_attn = cross_attn, rotary_emb_dim, use_flash_attn
        self.dwconv = self.return_residual = self.checkpointing = False
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias)
            self.Wkv = nn.Linear(embed_dim, 2 * embed_dim, bias=qkv_proj_bias)
        else:
            self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_proj_bias)
        self.drop = nn.Dropout(dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias)

    def set_flash_attn(self, use_flash_attn: bool) -> None:
        self.use_flash_attn = use_flash_attn

    def forward(
        self, x: Tensor, x_kv: Tensor | None = None, key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = self.project(x, x_kv)
        if cu_seqlens is not None and cu_seqlens_k is not None:
            rows, keys = ([*pairwise(bounds)] for bounds in (cu_seqlens.tolist(), cu_seqlens_k.tolist()))
            parts = [self.attend(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in zip(rows, keys, strict=True)]
            return self.out_proj(torch.cat(parts).flatten(1))
        lowered = None if key_padding_mask is None else -10000.0 * ~key_padding_mask[:, None, None]
        return self.out_proj(self.attend(q, k, v, lowered).flatten(2))

    def project(self, x: Tensor, x_kv: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values (..., length, heads, head_dim), turned by their positions if so configured."""
        parts = (self.Wq(x), *self.Wkv(x_kv).chunk(2, -1)) if self.cross_attn else self.Wqkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        return (self.rotated(q), self.rotated(k), v) if self.rotary_emb_dim else (q, k, v)

    def rotated(self, x: Tensor) -> Tensor:
        """As complex numbers x_i + j x_(i + dim / 2), multiplied by exp(j position / 10000^(2 i / dim))."""
        half = self.rotary_emb_dim // 2
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lowered: Tensor | None = None) -> Tensor:
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        scores = scale * torch.einsum("...nhd,...mhd->...hnm", q, k)
        weights = self.drop((scores if lowered is None else scores + lowered).softmax(-1))
        return torch.einsum("...hnm,...mhd->...nhd", weights, v)


class ParallelMHA(nn.Module):
    pass


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int | None = None) -> None:
        super().__init__()
        self.return_residual = False
        self.activation = F.gelu
        self.fc1 = nn.Linear(in_features, hidden_features or 4 * in_features)
        self.fc2 = nn.Linear(hidden_features or 4 * in_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, multiple_of: int = 128) -> None:
        super().__init__()
        hidden_features = (hidden_features + multiple_of - 1) // multiple_of * multiple_of
        self.return_residual = False
        self.activation = F.sigmoid
        self.fc1 = nn.Linear(in_features, 2 * hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.fc1(x).chunk(2, -1)
        return self.fc2(values * self.activation(gates))


class Block(nn.Module):
    def __init__(self, dim: int, mixer_cls: Any, mlp_cls: Any) -> None:
        super().__init__()
        self.prenorm, self.fused_dropout_add_ln = True, False
        self.return_residual = self.residual_in_fp32 = False
        self.mixer = mixer_cls(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = mlp_cls(dim)
        self.dropout1, self.dropout2 = nn.Dropout(0.0), nn.Dropout(0.0)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, mixer_subset: Any = None, mixer_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        residual = self.dropout1(hidden_states) + (0 if residual is None else residual)
        residual = self.dropout2(self.mixer(self.norm1(residual), **(mixer_kwargs or {}))) + residual
        return self.mlp(self.norm2(residual)), residual


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    lengths = [0, *mask.sum(1).tolist()]
    return x[mask], mask.flatten().nonzero()[:, 0], torch.tensor(lengths).cumsum(0).int(), max(lengths)


def pad_input(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    out = torch.zeros(batch * length, x.shape[-1], dtype=x.dtype)
    return out.index_copy(0, indices, x).view(batch, length, -1)
