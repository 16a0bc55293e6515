"""The pre-norm MLP of a Perceiver block as one operator: LayerNorm, linear, GELU or GEGLU, linear, residual."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import native_feed_forward
from perceiver_kernels.backends.reference import feed_forward as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.linear import ACTIVATIONS, compute_dtype, result_dtype, runs_composed
from perceiver_kernels.ops.registration import define, register_pair
from perceiver_kernels.ops.validation import DTYPES, check_floating, check_parameters, check_vector

OP = "feed_forward"
# Of the rows that a program of LayerNorm holds at once.
MAX_CHANNELS = 16384

declare_gpu(OP, "triton", compute_dtypes=GPU_DTYPES, data_dtypes=GPU_DTYPES, channels=(1, MAX_CHANNELS))
declare_native(OP, native_feed_forward, compute_dtypes=DTYPES, data_dtypes=DTYPES)
declare_reference(OP, reference, compute_dtypes=DTYPES, data_dtypes=DTYPES)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    activation: str = "geglu",
    eps: float = 1e-5,
    residual: Tensor | None = None,
    save_hidden: bool = True,
) -> Tensor:
    """LayerNorm and a two-layer MLP.

    out = f(LayerNorm(x) @ weight_in^T + bias_in) @ weight_out^T + bias_out + residual;
    for geglu, f([a | b]) = a * gelu(b).

    Args:
        x: (..., dim), floating-point, any strides.
        norm_weight, norm_bias: (dim,) in x's dtype, or None, as in F.layer_norm.
        weight_in: (hidden, dim), and bias_in: (hidden,) or None, in x's dtype.
        weight_out: (out_features, hidden), for geglu (out_features, hidden / 2), and bias_out: (out_features,) or None.
        activation: "gelu" (of the error function), "gelu_tanh", "geglu" or "geglu_tanh".
        eps: of the LayerNorm.
        residual: (..., out_features) in x's dtype, added last.
        save_hidden: keep the first product for backward; otherwise backward computes it again: two ninths more
            multiply-adds for geglu, a sixth for gelu, and rows * hidden elements less memory.

    Returns:
        (..., out_features) in x's dtype; under autocast as `linear`.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        RuntimeError: PERCEIVER_KERNELS_LINEAR forces a product that cannot be used; the message says why.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: the result and tiles of some megabytes; where a gradient is needed and save_hidden, the first product.
        Backward is deterministic. Small calls run as torch's own operators, as those of `linear` do.
    Source: Shazeer 2020, arXiv:2002.05202 (GEGLU).
    """
    dtype = result_dtype(x)
    _check(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, activation, residual)
    shape = (*x.shape[:-1], weight_out.shape[0])
    rows = x.reshape(math.prod(shape[:-1]), x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape[0], shape[-1])
    parameters = (norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out)
    if runs_composed(rows, weight_in):
        return reference.composed(x, *parameters, residual, activation, eps)
    own_dtype = compute_dtype(rows, weight_in, dtype)
    final = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    out, _ = torch.ops.perceiver_kernels.feed_forward_fwd(
        rows, *parameters, added, activation, eps, own_dtype, final, save_hidden and needs_grad
    )
    return out.view(shape)


def explain(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight_in: Tensor, *_: Any, **__: Any
) -> str:
    """Which backend would run this call of feed_forward, and the others' reasons why not."""
    return dispatch.describe(_call(x, weight_in))


def _check(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    check_floating("x", x)
    for name, weight, columns in (("weight_in", weight_in, "dim"), ("weight_out", weight_out, "hidden")):
        if weight.dim() != 2:
            raise ValueError(f"{name} has {weight.dim()} dimensions, must have 2: (out_features, {columns})")
    if x.dim() < 1 or x.shape[-1] != weight_in.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be (..., {weight_in.shape[1]}) as weight_in has")
    hidden = weight_in.shape[0]
    if activation.startswith("geglu"):
        if hidden % 2:
            raise ValueError(f"weight_in has {hidden} rows, must have an even number for {activation}")
        hidden //= 2
    if weight_out.shape[1] != hidden:
        raise ValueError(
            f"weight_out has {weight_out.shape[1]} columns, must have {hidden}, the channels after {activation}"
        )
    check_vector("norm_weight", norm_weight, x.shape[-1], "x has channels")
    check_vector("norm_bias", norm_bias, x.shape[-1], "x has channels")
    check_vector("bias_in", bias_in, weight_in.shape[0], "weight_in has rows")
    check_vector("bias_out", bias_out, weight_out.shape[0], "weight_out has rows")
    shape = (*x.shape[:-1], weight_out.shape[0])
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, must be {shape} as the result has")
    check_parameters(
        x, norm_weight=norm_weight, norm_bias=norm_bias, weight_in=weight_in, bias_in=bias_in,
        weight_out=weight_out, bias_out=bias_out, residual=residual,
    )  # fmt: skip


_PARAMETERS = "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight_in, Tensor? bias_in, Tensor weight_out"
define(
    f"feed_forward_fwd({_PARAMETERS}, Tensor? bias_out, Tensor? residual, str activation, float eps, "
    "ScalarType compute_dtype, ScalarType dtype, bool save_hidden) -> (Tensor out, Tensor hidden)"
)
define(
    f"feed_forward_bwd(Tensor d_out, {_PARAMETERS}, Tensor hidden, str activation, float eps, bool[] needs) "
    "-> (Tensor d_x, Tensor d_norm_weight, Tensor d_norm_bias, Tensor d_weight_in, Tensor d_bias_in, "
    "Tensor d_weight_out)"
)


def _call(x: Tensor, weight: Tensor) -> dispatch.Call:
    return dispatch.Call(OP, x.device.type, weight.dtype, x.dtype, channels=x.shape[-1])


def _fwd(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight_in: Tensor, *rest: Any) -> Any:
    backend = dispatch.select(_call(x, weight_in)).load()
    return backend.feed_forward_fwd(x, norm_weight, norm_bias, weight_in, *rest)


def _bwd(
    d_out: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight_in: Tensor, *rest: Any
) -> Any:
    backend = dispatch.select(_call(x, weight_in)).load()
    return backend.feed_forward_bwd(d_out, x, norm_weight, norm_bias, weight_in, *rest)


def _fwd_fake(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor | None,
    activation: str,
    eps: float,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], weight_out.shape[0], dtype=dtype),
        x.new_empty((x.shape[0], weight_in.shape[0]) if save_hidden else (0,), dtype=compute_dtype),
    )


def _bwd_fake(
    d_out: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    hidden: Tensor,
    activation: str,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    tensors = (x, norm_weight, norm_bias, weight_in, bias_in, weight_out)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, bias_out, residual, ctx.activation, ctx.eps, _, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.dtypes = [None if t is None else t.dtype for t in (bias_out, residual)]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 13
    *tensors, hidden = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    gradients: list[Tensor | None] = [None] * 6
    if any(needs):
        found = torch.ops.perceiver_kernels.feed_forward_bwd(d_out, *tensors, hidden, ctx.activation, ctx.eps, needs)
        gradients = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
    needs_bias_out, needs_residual = ctx.needs_input_grad[6:8]
    wide = torch.promote_types(d_out.dtype, torch.float32)
    d_bias_out = d_out.sum(0, dtype=wide).to(ctx.dtypes[0]) if needs_bias_out else None
    d_residual = d_out.to(ctx.dtypes[1]) if needs_residual else None
    return *gradients, d_bias_out, d_residual, *(None,) * 5


register_pair(OP, (_fwd, _bwd), (_fwd_fake, _bwd_fake), _setup_context, _backward, "F.layer_norm, F.linear and F.gelu")
