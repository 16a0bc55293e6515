"""Attention to dense tokens on the faster of two ways: our operators, or torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.backends import native
from perceiver_kernels.ops.cross_attention import MAX_HEAD_DIM, cross_attention

# From how many rows (queries, in all heads that share their keys) and multiply-adds on ours is not slower on a CPU:
# with less, packing the keys and the call itself cost more than they save. benchmarks/dense_attention.py measures it.
LEAST_ROWS = 48
LEAST_WORK = 1 << 26


def torch_reason(
    device: torch.device, *, batch: int, heads: int, rows: int, tokens: int, head_dim: int, head_dim_v: int
) -> str | None:
    """Why torch's attention runs a call of these sizes; None where ours does."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if _native_unavailable():
        return "there is no compiled CPU module"
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim is {max(head_dim, head_dim_v)}, more than {MAX_HEAD_DIM}"
    if rows < LEAST_ROWS:
        return f"{rows} queries are fewer than {LEAST_ROWS}"
    work = batch * heads * rows * tokens * (head_dim + head_dim_v)
    if work < LEAST_WORK:
        return f"{work / 1e6:.1f} M multiply-adds are fewer than {LEAST_WORK / 1e6:.1f} M"
    return None


def _native_unavailable() -> bool:
    # torch.compile cannot trace the import that this tries: there the module is taken to be available.
    return not torch.compiler.is_compiling() and native.cpu_unavailable() is not None


def describe(reason: str | None, op: str) -> str:
    """One line on what runs, for `explain`."""
    if reason is None:
        return f"attention: {op}"
    return f"attention: torch's scaled_dot_product_attention, {reason}"


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """softmax(scale * query @ keys^T) @ values, on the way that is faster for these shapes.

    Args:
        query: (batch or 1, heads, N, head_dim).
        keys: (batch, heads, M, head_dim).
        values: (batch, heads, M, head_dim_v); head_dim_v may differ from head_dim.
        mask: bool (batch, M), True = attend. Inputs whose mask is False everywhere get zeros.
        scale: of the scores.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (batch, heads, N, head_dim_v).
    """
    batch, heads, tokens, head_dim = keys.shape
    query = query.expand(batch, -1, -1, -1)
    sizes = {"batch": batch, "heads": heads, "rows": query.shape[2], "tokens": tokens}
    if not torch_reason(query.device, **sizes, head_dim=head_dim, head_dim_v=values.shape[3]):
        return cross_attention(query, keys, values, mask=mask, scale=scale, dropout_p=dropout_p)
    return attend_by_torch(query, keys, values, mask, scale, dropout_p)


def attend_by_torch(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """The same by torch's attention."""
    if mask is None:
        return F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout_p, scale=scale)
    all_masked = ~mask.any(dim=-1)[:, None, None, None]
    # No kernel sees a row without keys, which not every backend defines; what it gives instead is overwritten below.
    allowed = mask[:, None, None, :] | all_masked
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(all_masked, 0.0)
