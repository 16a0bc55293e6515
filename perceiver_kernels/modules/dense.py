"""Attention to dense tokens on the faster of two ways: our operators, or torch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.backends import centring, native
from perceiver_kernels.ops.cross_attention import MAX_HEAD_DIM, cross_attention
from perceiver_kernels.ops.validation import autocast_dtype

# From how many rows (queries, in all heads that share their keys) and multiply-adds on ours is not slower on a CPU:
# with less, packing the keys and the call itself cost more than they save. benchmarks/dense_attention.py measures it.
LEAST_ROWS = 48
LEAST_WORK = 1 << 26
# From so many rows, tokens and channels on torch's products of large blocks are faster by some percent, unless there
# is a mask or dropout. Its gradients are less exact.
LARGE = 1024
WIDE = 512
# So many scores are kept for backward without a thought.
SMALL = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """What the choice depends on.

    rows: queries of all heads that share their tokens; plain: no mask, no dropout, no gradients to follow.
    """

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
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * query @ keys^T) @ values, on the way that is faster for these shapes.

    Args:
        query: (batch or 1, heads, N, head_dim).
        keys: (batch or 1, heads, M, head_dim).
        values: (batch or 1, heads, M, head_dim_v); head_dim_v may differ from head_dim.
        mask: bool (batch, M), True = attend. Inputs whose mask is False everywhere get zeros.
        scale: of the scores; None: head_dim^-1/2.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (batch, heads, N, head_dim_v).
    """
    _, heads, tokens, head_dim = keys.shape
    batch = query.shape[0] if keys.shape[0] == 1 else keys.shape[0]
    query, keys, values = (tensor.expand(batch, -1, -1, -1) for tensor in (query, keys, values))
    plain = mask is None and dropout_p == 0 and not needs_gradients(query, keys)
    sizes = Sizes(batch, heads, query.shape[2], tokens, head_dim, values.shape[3], plain)
    if torch_reason(query.device, sizes) is None:
        return cross_attention(query, keys, values, mask=mask, scale=scale, dropout_p=dropout_p)
    return attend_by_torch(query, keys, values, mask, scale, dropout_p)


def attend_by_torch(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, dropout_p: float
) -> Tensor:
    """The same by torch's attention; few queries, whose gradients will follow, by the formula.

    The gradients of torch's attention lose digits where keys are much alike (docs/dense_attention.md).
    """
    allowed = all_masked = None
    if mask is not None:
        all_masked = ~mask.any(dim=-1)[:, None, None, None]
        # No kernel sees a row without keys, which not every backend defines; what it gives instead is overwritten.
        allowed = mask[:, None, None, :] | all_masked
    rows, (tokens, channels) = query.shape[:3].numel(), keys.shape[2:]
    few = query.shape[2] <= channels or rows * tokens <= SMALL  # scores that take less memory than the keys, or little
    if few and needs_gradients(query, keys) and (autocast_dtype(query.device) or query.dtype) in centring.WIDE:
        scale = channels**-0.5 if scale is None else scale
        # What keys have in common is the same for all scores of a row, and so for their gradients.
        shift = query @ centring.common_key(keys, mask).transpose(2, 3)
        scores = scale * (query @ keys.transpose(2, 3) - shift)
        weights = (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1)
        out = F.dropout(weights, dropout_p) @ values
    else:
        out = F.scaled_dot_product_attention(query, keys, values, allowed, dropout_p, scale=scale)
    return out if all_masked is None else out.masked_fill(all_masked, 0.0)


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether autograd will ask for gradients of any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
