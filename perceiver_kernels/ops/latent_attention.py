"""Latent attention: exact self-attention among latents, forward and backward without a score matrix in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import centring, native, torch_attention
from perceiver_kernels.backends.layout import rows_first
from perceiver_kernels.backends.reference import latent_attention as reference
from perceiver_kernels.backends.triton import runtime
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.dropout import seed_number, seed_tensor
from perceiver_kernels.ops.registration import define, register_pair
from perceiver_kernels.ops.validation import COMPUTE_DTYPES, DTYPES, autocast, check_qkv

OP = "latent_attention"
MAX_HEAD_DIM = 256

declare_gpu(
    OP,
    "cuda",
    compute_dtypes=(torch.float32,),
    data_dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128),
    dropout=False,
)
declare_gpu(OP, "triton", compute_dtypes=(torch.float32,), data_dtypes=GPU_DTYPES, channels=(1, MAX_HEAD_DIM))
declare_native(OP, native, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES, channels=(1, MAX_HEAD_DIM))
declare_reference(OP, reference, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES)


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Exact softmax attention of moderate length, as among latents.

    out = softmax(scale * q @ k^T) @ v, accumulated in float32 (float64 for float64 inputs).

    Args:
        q: (batch, heads, N, head_dim), float32, float64, bfloat16 or float16; any strides, so that views of a packed
            projection are read where they stand.
        k: (batch, heads, M, head_dim), in q's dtype.
        v: (batch, heads, M, head_dim_v), in q's dtype. head_dim and head_dim_v need not be multiples of anything.
        scale: defaults to head_dim ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; the kept ones are divided by 1 - dropout_p.
        seed: of the dropout, from 0 to 2^63 - 1; by default drawn from torch's generator.

    Returns:
        (batch, heads, N, head_dim_v), in q's dtype: a transposed view of (batch, N, heads, head_dim_v), which the next
        projection reads without a copy. A query whose scores are all -inf, or without keys, gets zeros (from torch's
        attention NaN in the first case, which takes infinite inputs). Under
        torch.autocast, inputs that are not float64 are cast as scaled_dot_product_attention casts them.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: O(N + M) beyond the inputs. Backward is deterministic and recomputes the weights.
    On a GPU, 16-bit calls without dropout that need no gradient are run by torch's scaled_dot_product_attention, unless
    a backend is forced or the call compiled; PERCEIVER_KERNELS_AUTOTUNE=1 measures whether that or ours is faster.
    Source: Jaegle et al. 2021, arXiv:2103.03206; Dao 2023, arXiv:2307.08691.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    random = seed_tensor(dropout_p, seed)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if _by_torch(q, k, v, dropout_p, scale, measure=True):
        return torch_attention.attention(q, k, v, scale)
    return torch.ops.perceiver_kernels.latent_attention_fwd(q, k, v, random, scale, dropout_p)[0]


def _call(q: Tensor, v: Tensor, dropout_p: float) -> dispatch.Call:
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    head_dims = q.shape[3], v.shape[3]
    return dispatch.Call(
        OP, q.device.type, compute_dtype, q.dtype,
        channels=max(head_dims), dropout=dropout_p > 0, head_dims=head_dims,
    )  # fmt: skip


def _by_torch(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float, *, measure: bool) -> bool:
    """Whether torch's attention runs the call, in the place of a backend."""
    if torch.compiler.is_compiling() or _not_by_torch(q, k, v, dropout_p, scale):
        return False

    def ours() -> Any:
        return torch.ops.perceiver_kernels.latent_attention_fwd(q, k, v, None, scale, 0.0)

    can_measure = measure and not runtime.unavailable()
    return torch_attention.choose(q, k, v, ours if can_measure else None, scale) == torch_attention.TORCH


def _not_by_torch(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float) -> str | None:
    """Why torch's attention must not run the call, or None where it may."""
    if dispatch.current_backend() != "auto":
        return f"the backend asked for is {dispatch.current_backend()!r}"
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    shape, head_dim = (*q.shape[:3], k.shape[2]), max(q.shape[3], v.shape[3])
    dropout = dropout_p > 0
    return torch_attention.not_taken_reason(q.device.type, q.dtype, shape, head_dim, scale, dropout, needs_grad)


def explain(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, **_: Any) -> str:
    """What would run this call of latent_attention, and why nothing else would."""
    scale = 1.0 if scale is None else scale
    call, torchs = _call(q, v, dropout_p), "torch's scaled_dot_product_attention"
    if _by_torch(q, k, v, dropout_p, scale, measure=False):
        return dispatch.describe(call, instead=torchs)
    reason = _not_by_torch(q, k, v, dropout_p, scale)
    line = f"no, {reason}" if reason else "would do, but is not expected or measured to be faster"
    header, *lines = dispatch.describe(call).split("\n")
    return "\n".join([header, f"  {torchs}: {line}", *lines])


define(
    "latent_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? random, float scale, float dropout_p) "
    "-> (Tensor out, Tensor lse)"
)
define(
    "latent_attention_bwd(Tensor q, Tensor k, Tensor v, Tensor? random, float scale, float dropout_p, Tensor out, "
    "Tensor lse, Tensor d_out) -> (Tensor d_q, Tensor d_k, Tensor d_v)"
)


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, random: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    backend = dispatch.select(_call(q, v, dropout_p)).load()
    return backend.latent_attention_fwd(q, k, v, scale, dropout_p, seed_number(random))


def _bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.select(_call(q, v, dropout_p)).load()
    return backend.latent_attention_bwd(q, k, v, out, lse, d_out, scale, dropout_p, seed_number(random))


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, random: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return rows_first(q, q.shape[2], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _bwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (rows_first(tensor, tensor.shape[2], tensor.shape[3]) for tensor in (q, k, v))
    return d_q, d_k, d_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, random, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(q, k, v, random, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 6
    q, k, v, random, out, lse = ctx.saved_tensors
    d_q, d_k, d_v = torch.ops.perceiver_kernels.latent_attention_bwd(
        q, k, v, random, ctx.scale, ctx.dropout_p, out, lse, d_out
    )
    if ctx.needs_input_grad[1]:
        d_k = centring.without_mean(d_k, None)
    gradients = (d_q, d_k, d_v)
    wanted = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None)


register_pair(OP, (_fwd, _bwd), (_fwd_fake, _bwd_fake), _setup_context, _backward)
