"""torch's fused attention in place of our kernel on a GPU, where it is expected, or was measured, to be faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.backends.layout import with_rows_first
from perceiver_kernels.backends.triton import tiles

OURS, TORCH = "triton", "torch"
DEVICES = ("cuda",)
# Up to which head dimension torch's is taken until it has been measured. In float32 it has no fast kernel.
TAKEN = {torch.bfloat16: 256, torch.float16: 256}
MAX_HEAD_DIM = 256


def not_taken_reason(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    head_dim: int,
    scale: float,
    dropout: bool,
    needs_grad: bool,
) -> str | None:
    """Why torch's attention must not run a call, however fast it may be, or None.

    Args:
        device, dtype: of the inputs.
        shape: batch, heads, queries, keys.
        head_dim: the wider of the two.
        scale: of the scores.
        dropout: whether weights are dropped.
        needs_grad: whether backward may follow.
    """
    if device not in DEVICES:
        return f"the device is {device}"
    if dtype not in (torch.float32, *TAKEN):
        return f"the dtype is {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}"
    if 0 in shape:
        return "there is nothing to attend to"
    if scale <= 0:
        return f"scale is {scale}, which its kernels take for positive"
    if dropout:
        return "its dropout is not that of the other backends"
    if needs_grad:
        return "its backward adds in an order that differs from run to run"
    return None


def default(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str:
    """TORCH or OURS, until they are measured; torch's fast kernels take values as wide as keys."""
    return TORCH if head_dim == head_dim_v <= TAKEN.get(dtype, 0) else OURS


def choose(q: Tensor, k: Tensor, v: Tensor, ours: Callable[[], Any] | None, scale: float) -> str:
    """TORCH or OURS for inputs that both can take: measured where autotuning is on (and `ours` is given), else default.

    A measured choice is remembered with those of tile sizes.
    """
    head_dims = (q.shape[3], v.shape[3])
    sizes = map(tiles.next_power_of_2, (q.shape[0] * q.shape[1], q.shape[2], k.shape[2]))
    runs = None if ours is None else {OURS: ours, TORCH: lambda: attention(q, k, v, scale)}
    return tiles.choose_by_name("latent_attention", (q.dtype, *head_dims, *sizes), default(q.dtype, *head_dims), runs)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(batch, heads, N, head_dim_v), in memory as (batch, N, heads, head_dim_v).

    A query without any finite score gets NaN where ours gives zeros; without a mask only infinite inputs, or products
    that overflow, make one.
    """
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return with_rows_first(out)
