"""linear and its activations, as the formula stands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(product: Tensor, activation: str) -> Tensor:
    """f(product); gated: the first half of the channels times f of the second."""
    if activation == "none":
        return product
    approximate = "tanh" if activation.endswith("_tanh") else "none"
    if activation.startswith("geglu"):
        values, gates = product.chunk(2, dim=-1)
        return values * F.gelu(gates, approximate=approximate)
    return F.gelu(product, approximate=approximate)


def activate_backward(product: Tensor, d_out: Tensor, activation: str) -> Tensor:
    """Gradient of the product, of the same shape and dtype."""
    if activation == "none":
        return d_out
    approximate = "tanh" if activation.endswith("_tanh") else "none"
    if activation.startswith("geglu"):
        values, gates = product.chunk(2, dim=-1)
        d_gates = torch.ops.aten.gelu_backward(d_out * values, gates, approximate=approximate)
        return torch.cat((d_out * F.gelu(gates, approximate=approximate), d_gates), dim=-1)
    return torch.ops.aten.gelu_backward(d_out, product, approximate=approximate)


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """The whole in torch's own differentiable operators; x of any shape."""
    out = activate(F.linear(x, weight, bias), activation)
    return out if residual is None else out + residual


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    save_product: bool,
) -> tuple[Tensor, Tensor]:
    """out (rows, channels) in dtype, and x @ weight^T in compute_dtype where it is to be saved, else empty."""
    x, weight = x.to(compute_dtype), weight.to(compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    product = F.linear(x, weight) if save_product else x.new_empty(0)
    biased = F.linear(x, weight, bias) if not save_product else product if bias is None else product + bias
    out = activate(biased, activation).to(dtype)
    if residual is not None:
        out = out + residual.to(dtype)
    # An operator's results must not share memory.
    return (out.clone() if out is product else out), product


def linear_bwd(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, empty where not needed; a product that was not saved is computed again."""
    needs_x, needs_weight, needs_bias = needs
    compute_dtype = product.dtype
    own_x, own_weight = x.to(compute_dtype), weight.to(compute_dtype)
    if activation != "none":
        product = product if product.dim() == 2 else F.linear(own_x, own_weight)
        product = product if bias is None else product + bias.to(compute_dtype)
    d_product = activate_backward(product, d_out.to(compute_dtype), activation)
    return (
        (d_product @ own_weight).to(x.dtype) if needs_x else x.new_empty(0),
        (d_product.t() @ own_x).to(weight.dtype) if needs_weight else weight.new_empty(0),
        d_product.sum(0).to(weight.dtype if bias is None else bias.dtype) if needs_bias else weight.new_empty(0),
    )
