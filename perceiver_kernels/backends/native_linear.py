"""linear on a CPU: tile after tile of rows, a product and then its epilogue while the tile is still in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from perceiver_kernels.backends import native
from perceiver_kernels.backends.matrix_product import product as multiply
from perceiver_kernels.backends.scratch import scratch

_TILE_BYTES = 1 << 24
_FEWEST_ROWS = 256


def tiles(rows: int, width: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Stretches [first, last) of rows whose products of this width fit a cache, but are enough for a fast product."""
    size = max(_FEWEST_ROWS, _TILE_BYTES // (max(1, width) * dtype.itemsize))
    count = max(1, -(-rows // size))
    even = -(-rows // count)
    for first in range(0, rows, max(1, even)):
        yield first, min(rows, first + even)


def epilogue_bias(bias: Tensor | None, compute_dtype: torch.dtype) -> Tensor | None:
    """The bias as the epilogue reads it: contiguous, float64 for a float64 product, else float32."""
    wanted = torch.float64 if compute_dtype == torch.float64 else torch.float32
    return None if bias is None else bias.to(wanted).contiguous()


def channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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
    rows, features = x.shape[0], weight.shape[0]
    gated = native.ACTIVATION_CODES[activation][1]
    out = native.empty_large(x, (rows, features // 2 if gated else features), dtype)
    saved = native.empty_mapped(x, (rows, features) if save_product else (0,), compute_dtype)
    bias = epilogue_bias(bias, compute_dtype)
    residual = None if residual is None else channels_contiguous(residual)
    for first, last in tiles(rows, features, compute_dtype):
        if save_product:
            target = saved[first:last]
        elif out.shape[1] == features and dtype == compute_dtype:
            target = out[first:last]
        else:
            target = scratch("product", last - first, features, compute_dtype)
        product = multiply(x[first:last].to(compute_dtype), weight, target)
        if save_product and product is not target:
            product = target.copy_(product)
        elif product.data_ptr() == out[first:last].data_ptr() and bias is residual is None and activation == "none":
            continue
        native.linear_epilogue_fwd(
            product, bias, None if residual is None else residual[first:last], activation, out[first:last]
        )
    return out, saved


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
    compute_dtype, own_weight, d_out = product.dtype, weight.to(product.dtype), channels_contiguous(d_out)
    added = epilogue_bias(bias, compute_dtype)
    d_x = x.new_empty(x.shape if needs_x else 0, dtype=compute_dtype)
    d_weight = Gradient(own_weight if needs_weight else None)
    d_bias = Gradient(added if needs_bias else None)
    for first, last in tiles(x.shape[0], weight.shape[0], compute_dtype):
        own_x = x[first:last].to(compute_dtype)
        tile = product[first:last] if product.dim() == 2 else _again(own_x, weight)
        d_product = scratch("d_product", last - first, weight.shape[0], compute_dtype)
        sums = torch.empty_like(added) if needs_bias and added is not None else None
        native.linear_epilogue_bwd(tile, added, d_out[first:last], activation, d_product, sums)
        if needs_x:
            torch.mm(d_product, own_weight, out=d_x[first:last])
        d_weight.add_product(d_product, own_x)
        d_bias.add(sums)
    return d_x.to(x.dtype), d_weight.total(weight), d_bias.total(weight if bias is None else bias)


def _again(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(x, weight, scratch("product", x.shape[0], weight.shape[0], x.dtype))


class Gradient:
    """A parameter's gradient, summed over tiles in their order; empty where it is not needed (`like` is None)."""

    def __init__(self, like: Tensor | None) -> None:
        self._like = like
        self._sum: Tensor | None = None

    def add(self, part: Tensor | None) -> None:
        """Adds one tile's gradient, which from then on belongs to this sum."""
        if self._like is not None and part is not None:
            self._sum = part if self._sum is None else self._sum.add_(part)

    def add_product(self, d_product: Tensor, x: Tensor) -> None:
        """Adds d_product^T @ x."""
        if self._like is not None:
            if self._sum is None:
                memory = native.empty_mapped(x, (d_product.shape[1], x.shape[1]), x.dtype)
                self._sum = torch.mm(d_product.t(), x, out=memory)
            else:
                self._sum.addmm_(d_product.t(), x)

    def total(self, like: Tensor) -> Tensor:
        """The sum in the dtype of the parameter."""
        if self._like is None:
            return like.new_empty(0)
        return torch.zeros_like(like) if self._sum is None else self._sum.to(like.dtype)
