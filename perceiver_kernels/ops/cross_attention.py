"""Cross-attention: few queries and many keys, or the reverse, of any head_dim, without a score matrix in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import centring, native
from perceiver_kernels.backends.layout import rows_first
from perceiver_kernels.backends.reference import cross_attention as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.dropout import seed_number, seed_tensor
from perceiver_kernels.ops.registration import define, register_pair
from perceiver_kernels.ops.validation import COMPUTE_DTYPES, DTYPES, autocast, check_devices, check_key_mask, check_qkv

OP = "cross_attention"
MAX_HEAD_DIM = 1024

declare_gpu(OP, "triton", compute_dtypes=(torch.float32,), data_dtypes=GPU_DTYPES, channels=(1, MAX_HEAD_DIM))
declare_native(OP, native, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES, channels=(1, MAX_HEAD_DIM))
declare_reference(OP, reference, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Exact softmax attention for few queries and many keys, or the reverse.

    out = softmax(scale * q @ k^T) @ v, accumulated in float32 (float64 for float64 inputs).

    Args:
        q: (batch, heads, queries, head_dim), float32, float64, bfloat16 or float16; any strides.
        k: (batch, heads, keys, head_dim), in q's dtype.
        v: (batch, heads, keys, head_dim_v), in q's dtype; head_dim_v may differ from head_dim, and neither needs to be
            a multiple of anything.
        mask: bool (batch, keys), True = attend. A query with nothing to attend to gets zeros and zero gradients.
        scale: defaults to head_dim ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; the kept ones are divided by 1 - dropout_p.
        seed: of the dropout, from 0 to 2^63 - 1; by default drawn from torch's generator.

    Returns:
        (batch, heads, queries, head_dim_v), in q's dtype: a transposed view of (batch, queries, heads, head_dim_v),
        which the next projection reads without a copy. Under torch.autocast, inputs that are not float64 are cast as
        scaled_dot_product_attention casts them.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: O(queries + keys) beyond the inputs, the score matrix is never stored; on the reference, all of it is.
        Backward is deterministic and recomputes the weights.
    Source: Jaegle et al. 2021, arXiv:2103.03206; Dao 2023, arXiv:2307.08691.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    check_key_mask(mask, k.shape[0], k.shape[2], "keys of k")
    check_devices([("mask", mask)], like=("k", k))
    random = seed_tensor(dropout_p, seed)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return torch.ops.perceiver_kernels.cross_attention_fwd(q, k, v, mask, random, scale, dropout_p)[0]


def _call(q: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> dispatch.Call:
    return dispatch.Call(
        OP,
        q.device.type,
        torch.float64 if q.dtype == torch.float64 else torch.float32,
        q.dtype,
        channels=max(q.shape[3], v.shape[3]),
        mask=mask is not None,
        dropout=dropout_p > 0,
    )


def explain(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any) -> str:
    """Which backend would run this call of cross_attention, and the others' reasons why not."""
    return dispatch.describe(_call(q, v, mask, dropout_p))


define(
    "cross_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? random, float scale, float dropout_p) "
    "-> (Tensor out, Tensor lse)"
)
define(
    "cross_attention_bwd(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? random, float scale, float dropout_p, "
    "Tensor out, Tensor lse, Tensor d_out) -> (Tensor d_q, Tensor d_k, Tensor d_v)"
)


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, random: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    backend = dispatch.select(_call(q, v, mask, dropout_p)).load()
    return backend.cross_attention_fwd(q, k, v, mask, scale, dropout_p, seed_number(random))


def _bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    random: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.select(_call(q, v, mask, dropout_p)).load()
    return backend.cross_attention_bwd(q, k, v, mask, out, lse, d_out, scale, dropout_p, seed_number(random))


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return rows_first(q, q.shape[2], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _bwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (rows_first(tensor, tensor.shape[2], tensor.shape[3]) for tensor in (q, k, v))
    return d_q, d_k, d_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, mask, random, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(q, k, v, mask, random, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 7
    q, k, v, mask, random, out, lse = ctx.saved_tensors
    d_q, d_k, d_v = torch.ops.perceiver_kernels.cross_attention_bwd(
        q, k, v, mask, random, ctx.scale, ctx.dropout_p, out, lse, d_out
    )
    if ctx.needs_input_grad[1]:
        d_k = centring.without_mean(d_k, mask)
    gradients = (d_q, d_k, d_v)
    wanted = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None)


register_pair(OP, (_fwd, _bwd), (_fwd_fake, _bwd_fake), _setup_context, _backward)
