"""What flash-perceiver imports from flash-attn, for machines without it: names, parameters and results are the same.

Only what flash-perceiver asks for is here; any other argument is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.integrations.flash_attention import attend, run_block
from perceiver_kernels.modules.projection import project


class RotaryEmbedding(nn.Module):
    """Turns a head's first dim channels, their first half with the second, by angles position / base^(2i / dim)."""

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim = dim
        self.base = base

    def rotate(self, x: Tensor) -> Tensor:
        """Map (batch, heads, N, head_dim) to the same."""
        positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float64)
        exponents = torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float64) / self.dim
        angles = positions[:, None] * self.base**-exponents
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second, rest = x.split((self.dim // 2, self.dim // 2, x.shape[-1] - self.dim), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class MHA(nn.Module):
    """Multi-head attention of x to itself (Wqkv), or with cross_attn to x_kv (Wq, Wkv).

    use_flash_attn changes nothing but how an input without a key to attend to is treated, which follows from the form
    of its mask: packed sequences give zeros, key_padding_mask attends as if it were not there.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        use_flash_attn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse(others)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, must divide embed_dim {embed_dim}")
        if cross_attn and rotary_emb_dim:
            raise ValueError(f"rotary_emb_dim is {rotary_emb_dim}, must be 0 for cross-attention, as in flash-attn")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.cross_attn = cross_attn
        self.dropout = dropout
        self.softmax_scale = softmax_scale
        self.use_flash_attn = use_flash_attn
        self.rotary_emb = RotaryEmbedding(rotary_emb_dim, rotary_emb_base) if rotary_emb_dim else None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, 2 * embed_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_proj_bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    def set_flash_attn(self, use_flash_attn: bool) -> None:
        self.use_flash_attn = use_flash_attn

    def forward(self, x: Tensor, x_kv: Tensor | None = None, **lengths_or_mask: Any) -> Tensor:
        """As `attend`, which see."""
        return attend(self, x, x_kv, **lengths_or_mask)


class ParallelMHA(nn.Module):
    """Attention over several processes, which flash-perceiver names but does not use."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("ParallelMHA needs flash-attn, which is not installed")


class Mlp(nn.Module):
    """fc2( activation( fc1(x) ) )."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse(others)
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        self.activation = activation
        self.fc1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.fc2, self.activation(project(self.fc1, x)))


class GatedMlp(nn.Module):
    """fc2( a * activation(b) ) with [a ; b] = fc1(x); the hidden channels are rounded up to a multiple."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.sigmoid,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse(others)
        hidden_features = 8 * in_features // 3 if hidden_features is None else hidden_features
        hidden_features = -(-hidden_features // multiple_of) * multiple_of
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = project(self.fc1, x).chunk(2, dim=-1)
        return project(self.fc2, values * self.activation(gates))


class Block(nn.Module):
    """r = x [+ residual],  r = mixer(norm1(r)) + r,  and the pair (mlp(norm2(r)), r)."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[..., nn.Module] | None = None,
        mlp_cls: Callable[..., nn.Module] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse(others)
        self.mixer = MHA(dim, dim // 64) if mixer_cls is None else mixer_cls(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim) if mlp_cls is None else mlp_cls(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return run_block(self, hidden_states, residual, mixer_kwargs)


def unpad_input(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack the entries of (batch, length, ...) where the mask is True; also their places, lengths summed, longest."""
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    cumulative = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, cumulative, int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed entries back to their places of (batch, seqlen, ...); zeros elsewhere."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return out.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))


def _refuse(arguments: dict[str, Any]) -> None:
    given = [name for name, value in arguments.items() if value not in (None, False, 0, 0.0)]
    if given:
        name = given[0]
        raise NotImplementedError(f"{name} is {arguments[name]!r}: that needs flash-attn, which is not installed")
