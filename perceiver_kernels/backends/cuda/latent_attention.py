"""latent_attention in CUDA C++: csrc/cuda/latent_attention.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.native import describe, describe_all, rows_first

TILE_ROWS = 64
VECTOR_BYTES = 16


def latent_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """out (batch, heads, N, head_dim), in memory as (batch, N, heads, head_dim), and lse (batch, heads, N)."""
    q, k, v = (_readable(tensor) for tensor in (q, k, v))
    out, lse = rows_first(q, q.shape[2], q.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    runtime.module().latent_attention_fwd(describe_all((q, k, v)), scale, describe_all((out, lse)), runtime.stream(q))
    return out, lse


def latent_attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in memory as (batch, rows, heads, head_dim)."""
    q, k, v, out, d_out = (_readable(tensor) for tensor in (q, k, v, out, d_out))
    lse = lse.contiguous()
    d_q, d_k, d_v = (rows_first(tensor, *tensor.shape[2:]) for tensor in (q, k, v))
    batch, heads, queries = lse.shape
    statistics = lse.new_empty(batch, heads, -(-queries // TILE_ROWS) * TILE_ROWS, 2)
    runtime.module().latent_attention_bwd(
        describe_all((q, k, v)), scale, describe_all((out, lse)), describe(d_out), describe(statistics),
        describe_all((d_q, d_k, d_v)), runtime.stream(q),
    )  # fmt: skip
    return d_q, d_k, d_v


def _readable(tensor: Tensor) -> Tensor:
    """The tensor where its rows are whole vectors at multiples of their size, else a copy of which that is true."""
    vector = VECTOR_BYTES // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
    aligned = tensor.data_ptr() % VECTOR_BYTES == 0 and all(stride % vector == 0 for stride in strides)
    return tensor if aligned and tensor.stride(3) == 1 else tensor.clone(memory_format=torch.contiguous_format)
