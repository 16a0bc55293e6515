"""feed_forward as the formula stands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.backends.reference import linear
from perceiver_kernels.backends.reference.linear import activate, linear_bwd, linear_fwd


def normalised(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x in dtype, its means and its reciprocal standard deviations."""
    norm_weight, norm_bias = (None if p is None else p.to(dtype) for p in (norm_weight, norm_bias))
    return torch.native_layer_norm(x.to(dtype), x.shape[1:], norm_weight, norm_bias, eps)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of LayerNorm: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def composed(
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
) -> Tensor:
    """The whole in torch's own differentiable operators; x of any shape."""
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    inner = linear.composed(normed, weight_in, bias_in, None, activation)
    return linear.composed(inner, weight_out, bias_out, residual, "none")


def feed_forward_fwd(
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
    """out (rows, out_features) in dtype, and the first product in compute_dtype where it is to be saved, else empty."""
    normed = normalised(x, norm_weight, norm_bias, eps, wide(compute_dtype))[0].to(compute_dtype)
    inner, hidden = linear_fwd(normed, weight_in, bias_in, None, activation, compute_dtype, compute_dtype, save_hidden)
    return linear_fwd(inner, weight_out, bias_out, residual, "none", compute_dtype, dtype, False)[0], hidden


def feed_forward_bwd(
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
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight, norm_bias, weight_in, bias_in and weight_out, empty where not needed."""
    needs_x, needs_norm_weight, needs_norm_bias, needs_in, needs_bias_in, needs_out = needs
    dtype = hidden.dtype
    own_x = x.to(wide(dtype))
    normed, mean, rstd = normalised(own_x, norm_weight, norm_bias, eps, own_x.dtype)
    normed = normed.to(dtype)
    product = hidden if hidden.dim() == 2 else F.linear(normed, weight_in.to(dtype))
    inner = activate(product if bias_in is None else product + bias_in.to(dtype), activation)
    d_inner, d_weight_out, _ = linear_bwd(d_out, inner, weight_out, None, inner, "none", (True, needs_out, False))
    d_normed, d_in, d_bias_in = linear_bwd(
        d_inner, normed, weight_in, bias_in, product, activation, (True, needs_in, needs_bias_in)
    )
    norm = [None if p is None else p.to(own_x.dtype) for p in (norm_weight, norm_bias)]
    needs_norm = [needs_x, needs_norm_weight, needs_norm_bias]
    d_norm = torch.ops.aten.native_layer_norm_backward(
        d_normed.to(own_x.dtype), own_x, x.shape[1:], mean, rstd, *norm, needs_norm
    )
    leading = (
        d.to(like.dtype) if need and like is not None else x.new_empty(0)
        for d, like, need in zip(d_norm, (x, norm_weight, norm_bias), needs_norm, strict=True)
    )
    return *leading, d_in, d_bias_in, d_weight_out
