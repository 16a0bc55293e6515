"""The layers that flash-perceiver takes from flash-attn, computed by this library's operators from their parameters.

Sequences are (batch, length, channels), or packed one after the other as (total, channels) with cumulative lengths.
"""

# The attributes of another library's modules have no types.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.integrations.parts import Part, all_stock, pre_norm_mlp
from perceiver_kernels.modules import dense
from perceiver_kernels.modules.projection import project
from perceiver_kernels.ops.latent_attention import latent_attention


def attend(
    mha: Any,
    x: Tensor,
    x_kv: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """MHA: attention of x to itself, or to x_kv.

    Args:
        mha: with Wq and Wkv (cross_attn), or Wqkv; out_proj, num_heads, head_dim, dropout, softmax_scale.
        x: (batch, N, embed_dim), or packed.
        x_kv: (batch, M, kv_dim), or packed; for cross_attn only.
        key_padding_mask: bool (batch, M), True = attend. It lowers scores by 10,000, so that an input without any True
            attends as if it had no mask.
        cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k: cumulative lengths (batch + 1,) and the longest, of packed
            x and x_kv. A sequence without keys gives zeros.

    Returns:
        As x.
    """
    if mha.cross_attn:
        q, (k, v) = project(mha.Wq, x), project(mha.Wkv, x if x_kv is None else x_kv).chunk(2, dim=-1)
    else:
        q, k, v = project(mha.Wqkv, x).chunk(3, dim=-1)
    rows = mask = None
    if cu_seqlens is not None and max_seqlen is not None:
        packed_like_x = cu_seqlens_k is None or max_seqlen_k is None
        rows = _occupied(cu_seqlens, max_seqlen)
        mask = rows if packed_like_x else _occupied(cu_seqlens_k, max_seqlen_k)
        q, k, v = _unpacked(q, rows), _unpacked(k, mask), _unpacked(v, mask)
    elif key_padding_mask is not None:
        mask = key_padding_mask | ~key_padding_mask.any(dim=1, keepdim=True)
    q, k, v = (part.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    if getattr(mha, "rotary_emb", None) is not None:
        q, k = mha.rotary_emb.rotate(q), mha.rotary_emb.rotate(k)
    options = {"scale": mha.softmax_scale, "dropout_p": mha.dropout if mha.training else 0.0}
    among = mask is None and not mha.cross_attn
    out = latent_attention(q, k, v, **options) if among else dense.attend(q, k, v, mask, **options)
    out = out.transpose(1, 2).flatten(2)
    return project(mha.out_proj, out if rows is None else out[rows])


def _occupied(cu_seqlens: Any, max_seqlen: Any) -> Tensor:
    """Bool (batch, max_seqlen): where there are entries of the sequences."""
    lengths = cu_seqlens.diff()
    return torch.arange(max_seqlen, device=lengths.device) < lengths[:, None]


def _unpacked(x: Tensor, occupied: Tensor) -> Tensor:
    """(total, channels) as (batch, max_seqlen, channels), zeros where there is nothing."""
    out = x.new_zeros(*occupied.shape, x.shape[-1])
    return out.index_put((occupied,), x)


def normed_mlp(norm: nn.LayerNorm, mlp: Any, x: Tensor) -> Tensor:
    """Mlp with GELU, or GatedMlp with a sigmoid gate, of LayerNorm(x)."""
    if activation_of(mlp) == "gelu":
        return pre_norm_mlp(x, norm, mlp.fc1, mlp.fc2, activation="gelu")
    return gated_mlp(mlp, norm(x))


def gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """fc2( a * sigmoid(b) ) with [a ; b] = fc1(x)."""
    return project(mlp.fc2, F.glu(project(mlp.fc1, x), dim=-1))


def activation_of(mlp: Any) -> str | None:
    """ "gelu", "glu", or None for what is computed otherwise."""
    if getattr(mlp, "return_residual", False):
        return None
    gated = mlp.fc1.out_features == 2 * mlp.fc2.in_features
    if gated:
        return "glu" if mlp.activation in (F.sigmoid, torch.sigmoid) else None
    return "gelu" if mlp.activation is F.gelu else None


def run_block(
    block: Any, hidden_states: Tensor, residual: Tensor | None, mixer_kwargs: dict[str, Any] | None
) -> tuple[Tensor, Tensor]:
    """Block: r = x [+ residual],  r = mixer(norm1(r)) + r,  and the pair (mlp(norm2(r)), r)."""
    residual = hidden_states if residual is None else hidden_states + residual
    residual = block.mixer(block.norm1(residual), **(mixer_kwargs or {})) + residual
    if all_stock(parts_of_block(block)) and activation_of(block.mlp) is not None:
        return normed_mlp(block.norm2, block.mlp, residual), residual
    return block.mlp(block.norm2(residual)), residual


def parts_of_attention(mha: Any) -> Iterator[Part]:
    for name in (*(("Wq", "Wkv") if mha.cross_attn else ("Wqkv",)), "out_proj"):
        yield Part(name, getattr(mha, name, None), nn.Linear)


def parts_of_mlp(mlp: Any) -> Iterator[Part]:
    for name in ("fc1", "fc2"):
        yield Part(name, getattr(mlp, name, None), nn.Linear)


def parts_of_block(block: Any) -> Iterator[Part]:
    yield Part("norm2", block.norm2, nn.LayerNorm)
    yield Part("mlp", block.mlp, type(block.mlp))
    yield from parts_of_mlp(block.mlp)
