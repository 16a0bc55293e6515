"""Attention to dense tokens on the faster of two ways: our operators, or torch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.backends import centring, native
from perceiver_kernels.ops.cross_attention import MAX_HEAD_DIM, cross_attention

# From how many rows (queries, in all heads that share their keys) and multiply-adds on ours is not slower on a CPU:
# with less, packing the keys and the call itself cost more than they save. benchmarks/dense_attention.py measures it.
LEAST_ROWS = 48
LEAST_WORK = 1 << 26
# From so many rows, tokens and channels on torch's products of large blocks are faster by some percent, unless there
# is a mask or dropout.
LARGE = 1024
WIDE = 512


@dataclass(frozen=True)
class Sizes:
    """What the choice depends on. rows: queries of all heads that share their tokens; plain: no mask, no dropout."""

    batch: int
    heads: int
    rows: int
    tokens: int
    head_dim: int
    head_dim_v: int
    plain: bool

    @property
    def work(self) -> int:
        return self.batch * self.heads * self.rows * self.tokens * (self.head_dim + self.head_dim_v)

    @property
    def large(self) -> bool:
        return min(self.rows, self.tokens) >= LARGE and self.head_dim == self.head_dim_v >= WIDE


def torch_reason(device: torch.device, sizes: Sizes) -> str | None:
    """Why torch's attention runs a call of these sizes; None where ours does."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if _native_unavailable():
        return "there is no compiled CPU module"
    widest = max(sizes.head_dim, sizes.head_dim_v)
    if widest > MAX_HEAD_DIM:
        return f"head_dim is {widest}, more than {MAX_HEAD_DIM}"
    if sizes.rows < LEAST_ROWS:
        return f"{sizes.rows} queries are fewer than {LEAST_ROWS}"
    if sizes.work < LEAST_WORK:
        return f"{sizes.work / 1e6:.1f} M multiply-adds are fewer than {LEAST_WORK / 1e6:.1f} M"
    if sizes.large and sizes.plain:
        return f"{sizes.rows} queries x {sizes.tokens} tokens of head_dim {widest} suit it"
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
        keys: (batch or 1, heads, M, head_dim).
        values: (batch or 1, heads, M, head_dim_v); head_dim_v may differ from head_dim.
        mask: bool (batch, M), True = attend. Inputs whose mask is False everywhere get zeros.
        scale: of the scores.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (batch, heads, N, head_dim_v).
    """
    _, heads, tokens, head_dim = keys.shape
    batch = query.shape[0] if keys.shape[0] == 1 else keys.shape[0]
    query, keys, values = (tensor.expand(batch, -1, -1, -1) for tensor in (query, keys, values))
    plain = mask is None and dropout_p == 0
    sizes = Sizes(batch, heads, query.shape[2], tokens, head_dim, values.shape[3], plain)
    if torch_reason(query.device, sizes) is None:
        return cross_attention(query, keys, values, mask=mask, scale=scale, dropout_p=dropout_p)
    return attend_by_torch(query, keys, values, mask, scale, dropout_p)


def attend_by_torch(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """The same by torch's attention."""
    keys = centring.centred_for_backward(query, keys, mask)
    if mask is None:
        return F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout_p, scale=scale)
    all_masked = ~mask.any(dim=-1)[:, None, None, None]
    # No kernel sees a row without keys, which not every backend defines; what it gives instead is overwritten below.
    allowed = mask[:, None, None, :] | all_masked
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(all_masked, 0.0)
