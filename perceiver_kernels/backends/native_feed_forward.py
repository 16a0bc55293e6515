"""feed_forward on a CPU: tile after tile of rows through LayerNorm, both products and what follows each."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends import native
from perceiver_kernels.backends.matrix_product import product as multiply
from perceiver_kernels.backends.native_linear import Gradient, channels_contiguous, epilogue_bias, tiles
from perceiver_kernels.backends.reference.feed_forward import normalised, wide
from perceiver_kernels.backends.scratch import scratch


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
    rows, hidden, width = x.shape[0], weight_in.shape[0], weight_out.shape[0]
    out = native.empty_large(x, (rows, width), dtype)
    saved = native.empty_mapped(x, (rows, hidden) if save_hidden else (0,), compute_dtype)
    added_in, added_out = epilogue_bias(bias_in, compute_dtype), epilogue_bias(bias_out, compute_dtype)
    residual = None if residual is None else channels_contiguous(residual)
    for first, last in tiles(rows, hidden, compute_dtype):
        target = saved[first:last] if save_hidden else scratch("product", last - first, hidden, compute_dtype)
        normed = normalised(x[first:last], norm_weight, norm_bias, eps, wide(compute_dtype))[0].to(compute_dtype)
        product = multiply(normed, weight_in, target)
        if save_hidden and product is not target:
            product = target.copy_(product)
        inner = scratch("inner", last - first, weight_out.shape[1], compute_dtype)
        native.linear_epilogue_fwd(product, added_in, None, activation, inner)
        target = out[first:last]
        product = multiply(inner, weight_out, target if dtype == compute_dtype else None)
        if product is target and added_out is residual is None:
            continue
        added = None if residual is None else residual[first:last]
        native.linear_epilogue_fwd(product, added_out, added, "none", target)
    return out, saved


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
    """Gradients of x, norm_weight, norm_bias, weight_in, bias_in and weight_out, empty where not needed.

    A hidden product that was not saved is computed again, tile by tile.
    """
    needs_x, needs_norm_weight, needs_norm_bias, needs_in, needs_bias_in, needs_out = needs
    compute_dtype = hidden.dtype
    own_in, own_out = weight_in.to(compute_dtype), weight_out.to(compute_dtype)
    added_in = epilogue_bias(bias_in, compute_dtype)
    wide_weight, wide_bias = (None if p is None else p.to(wide(compute_dtype)) for p in (norm_weight, norm_bias))
    norm_mask = [needs_x, needs_norm_weight, needs_norm_bias]
    parts = list(tiles(x.shape[0], weight_in.shape[0], compute_dtype))
    d_x = native.empty_large(x, x.shape if needs_x and len(parts) != 1 else (0,), x.dtype)
    d_norm_weight = Gradient(wide_weight if needs_norm_weight else None)
    d_norm_bias = Gradient(wide_bias if needs_norm_bias else None)
    d_in, d_out_weight = Gradient(own_in if needs_in else None), Gradient(own_out if needs_out else None)
    d_bias_in = Gradient(added_in if needs_bias_in else None)
    for first, last in parts:
        own_x = x[first:last].to(wide(compute_dtype))
        normed, mean, rstd = normalised(own_x, wide_weight, wide_bias, eps, own_x.dtype)
        normed = normed.to(compute_dtype)
        if hidden.dim() == 2:
            product = hidden[first:last]
        else:
            target = scratch("product", last - first, weight_in.shape[0], compute_dtype)
            product = multiply(normed, weight_in, target)
        upstream = d_out[first:last].to(compute_dtype).contiguous()
        if needs_out:
            inner = scratch("inner", last - first, weight_out.shape[1], compute_dtype)
            native.linear_epilogue_fwd(product, added_in, None, activation, inner)
            d_out_weight.add_product(upstream, inner)
        if not (needs_in or needs_bias_in or any(norm_mask)):
            continue
        d_product = scratch("d_product", last - first, weight_in.shape[0], compute_dtype)
        d_inner = torch.mm(upstream, own_out, out=scratch("inner", last - first, weight_out.shape[1], compute_dtype))
        d_bias = None if added_in is None or not needs_bias_in else torch.empty_like(added_in)
        native.linear_epilogue_bwd(product, added_in, d_inner, activation, d_product, d_bias)
        d_bias_in.add(d_bias)
        d_in.add_product(d_product, normed)
        if any(norm_mask):
            d_normed = torch.mm(d_product, own_in, out=scratch("d_normed", last - first, x.shape[1], compute_dtype))
            d_rows, *d_norm = torch.ops.aten.native_layer_norm_backward(
                d_normed.to(own_x.dtype), own_x, x.shape[1:], mean, rstd, wide_weight, wide_bias, norm_mask
            )
            d_norm_weight.add(d_norm[0])
            d_norm_bias.add(d_norm[1])
            if needs_x and len(parts) == 1:
                d_x = d_rows.to(x.dtype)
            elif needs_x:
                d_x[first:last] = d_rows
    none = x.new_empty(0)
    parameters = (norm_weight, norm_bias, weight_in, bias_in, weight_out)
    gradients = (d_norm_weight, d_norm_bias, d_in, d_bias_in, d_out_weight)
    return d_x, *(
        gradient.total(none if parameter is None else parameter)
        for gradient, parameter in zip(gradients, parameters, strict=True)
    )
