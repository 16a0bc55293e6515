"""A matrix product with bias, activation and residual in one pass: the projections and MLPs of the latent tower."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import matrix_product, native_linear
from perceiver_kernels.backends.reference import linear as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.registration import define, register_pair
from perceiver_kernels.ops.validation import DTYPES, autocast_dtype, check_floating, check_parameters, check_vector

OP = "linear"
ACTIVATIONS = ("gelu", "gelu_tanh", "geglu", "geglu_tanh")
# Multiplications that keep a GPU busy for less time than our launches take: an estimate, not measured yet.
_SMALL_ON_GPU = 1 << 33
# Elements of a result from which a fresh one comes page by page from the system: huge pages are faster then.
_MUCH = 1 << 23

declare_gpu(OP, "triton", compute_dtypes=GPU_DTYPES, data_dtypes=GPU_DTYPES)
declare_native(OP, native_linear, compute_dtypes=DTYPES, data_dtypes=DTYPES)
declare_reference(OP, reference, compute_dtypes=DTYPES, data_dtypes=DTYPES)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer, what follows it, and a residual.

    out = f(x @ weight^T + bias) + residual;  for geglu, f([a | b]) = a * gelu(b).

    Args:
        x: (..., in_features), floating-point, any strides.
        weight: (out_features, in_features) in x's dtype. Forms of it that a faster product needs are kept while it is
            unchanged: PERCEIVER_KERNELS_LINEAR.
        bias: (out_features,) in x's dtype.
        activation: None, "gelu" (of the error function), "gelu_tanh", "geglu" or "geglu_tanh".
        residual: the result's shape in x's dtype, added last.

    Returns:
        (..., out_features), half of that for geglu, in x's dtype. Under autocast in its dtype, as F.linear, plus the
        residual by torch's promotion; parameters and residual may then be of any floating dtype.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.
        RuntimeError: PERCEIVER_KERNELS_LINEAR forces a product that cannot be used; the message says why.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: the result; with an activation also the product, where a gradient is needed. Backward is deterministic.
    Small calls run as torch's own operators, one after the other, unless a backend or a product is forced.
    Numbers: 16-bit inputs are multiplied in float32 and rounded once where that is faster than their own products.
    """
    dtype = result_dtype(x)
    _check(x, weight, bias, activation, residual)
    kind = activation or "none"
    shape = (*x.shape[:-1], weight.shape[0] // 2 if kind.startswith("geglu") else weight.shape[0])
    rows = x.reshape(math.prod(shape[:-1]), x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape[0], shape[-1])
    if runs_composed(rows, weight):
        return reference.composed(x, weight, bias, residual, kind)
    own_dtype = compute_dtype(rows, weight, dtype)
    if kind == "none" and residual is None and _plain(rows, weight, own_dtype, dtype):
        return torch.nn.functional.linear(x, weight, bias)
    needs_grad = any(t is not None and t.requires_grad for t in (x, weight, bias))
    save_product = kind != "none" and needs_grad and torch.is_grad_enabled()
    final = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out, _ = torch.ops.perceiver_kernels.linear_fwd(rows, weight, bias, added, kind, own_dtype, final, save_product)
    return out.view(shape)


def compute_dtype(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in for a result in dtype: another one only by products of the CPU."""
    if rows.device.type != "cpu" or (not torch.compiler.is_compiling() and dispatch.current_backend() == "triton"):
        return dtype
    return matrix_product.compute_dtype(rows, weight, dtype)


def runs_composed(rows: Tensor, weight: Tensor) -> bool:
    """Whether the call is so small that torch's own operators, one after the other, are faster."""
    if torch.compiler.is_compiling() or dispatch.current_backend() != "auto":
        return False
    if rows.device.type == "cpu":
        return matrix_product.too_small(rows.shape[0], weight)
    return rows.device.type == "cuda" and small_on_gpu(rows.shape[0], weight)


def small_on_gpu(rows: int, weight: Tensor) -> bool:
    """Whether a GPU waits for launches, of which an operator of our own costs more than torch's."""
    return rows * weight.numel() < _SMALL_ON_GPU


def _plain(rows: Tensor, weight: Tensor, own_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether F.linear is as fast as anything, where nothing follows the product."""
    if torch.compiler.is_compiling() or dispatch.current_backend() != "auto":
        return False
    if rows.device.type != "cpu":
        return True
    if not own_dtype == dtype == rows.dtype == weight.dtype:
        return False
    return matrix_product.prefers_torch(rows, weight) and rows.shape[0] * weight.shape[0] < _MUCH


def explain(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> str:
    """Which backend would run this call of linear, and the others' reasons why not."""
    return dispatch.describe(_call(x, weight))


def result_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's, which leaves float64 alone."""
    dtype = autocast_dtype(x.device)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be None or one of {', '.join(ACTIVATIONS)}")
    check_floating("x", x)
    if weight.dim() != 2:
        raise ValueError(f"weight has {weight.dim()} dimensions, must have 2: (out_features, in_features)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be (..., {weight.shape[1]}) as weight has")
    width = weight.shape[0]
    if activation is not None and activation.startswith("geglu"):
        if width % 2:
            raise ValueError(f"weight has {width} rows, must have an even number for {activation}")
        width //= 2
    shape = (*x.shape[:-1], width)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, must be {shape} as the result has")
    check_vector("bias", bias, weight.shape[0], "weight has rows")
    check_parameters(x, weight=weight, bias=bias, residual=residual)


define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, ScalarType compute_dtype, "
    "ScalarType dtype, bool save_product) -> (Tensor out, Tensor product)"
)
define(
    "linear_bwd(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, Tensor product, str activation, bool needs_x, "
    "bool needs_weight, bool needs_bias) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)"
)


def _call(x: Tensor, weight: Tensor) -> dispatch.Call:
    return dispatch.Call(OP, x.device.type, weight.dtype, x.dtype)


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    save_product: bool,
) -> tuple[Tensor, Tensor]:
    backend = dispatch.select(_call(x, weight)).load()
    return backend.linear_fwd(x, weight, bias, residual, activation, compute_dtype, dtype, save_product)


def _bwd(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Tensor,
    activation: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.select(_call(x, weight)).load()
    return backend.linear_bwd(d_out, x, weight, bias, product, activation, (needs_x, needs_weight, needs_bias))


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    save_product: bool,
) -> tuple[Tensor, Tensor]:
    rows, features = x.shape[0], weight.shape[0]
    out = x.new_empty(rows, features // 2 if activation.startswith("geglu") else features, dtype=dtype)
    return out, x.new_empty((rows, features) if save_product else (0,), dtype=compute_dtype)


def _bwd_fake(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Tensor,
    activation: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bias = weight if bias is None else bias
    return (
        x.new_empty(x.shape if needs_x else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        bias.new_empty(bias.shape if needs_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.activation, *_ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 8
    x, weight, bias, product = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, *_rest = ctx.needs_input_grad
    d_residual = d_out.to(ctx.residual_dtype) if needs_residual else None
    if not (needs_x or needs_weight or needs_bias):
        return None, None, None, d_residual, None, None, None, None
    if ctx.activation == "none":  # in torch's operators, which have derivatives of their own
        d_product = d_out.to(product.dtype).contiguous()
        d_x = (d_product @ weight.to(product.dtype)).to(x.dtype) if needs_x else None
        d_weight = (d_product.t() @ x.to(product.dtype)).to(weight.dtype) if needs_weight else None
        d_bias = d_out.sum(0, dtype=torch.promote_types(d_out.dtype, torch.float32)) if needs_bias else None
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_x, d_weight, d_bias, d_residual, None, None, None, None
    d_x, d_weight, d_bias = torch.ops.perceiver_kernels.linear_bwd(
        d_out, x, weight, bias, product, ctx.activation, needs_x, needs_weight, needs_bias
    )
    return (
        d_x if needs_x else None,
        d_weight if needs_weight else None,
        d_bias if needs_bias else None,
        d_residual,
        *(None,) * 4,
    )


register_pair(OP, (_fwd, _bwd), (_fwd_fake, _bwd_fake), _setup_context, _backward, "F.linear and F.gelu")
