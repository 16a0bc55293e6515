"""Keys that nothing attends to, for kernels of queries on a grid that know no mask: zeros, and a bias of -inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def without_masked_keys(
    form: Tensor, v: Tensor, h: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The form, contiguous, v, and the keys' bias in powers of two, contiguous, as kernels take them."""
    bias = None if h is None else h * math.log2(math.e)
    if mask is not None:
        left_out = ~mask[:, None]
        form, v = form.masked_fill(left_out[:, :, None], 0.0), v.masked_fill(left_out[..., None], 0.0)
        bias = form.new_zeros(1, v.shape[1], 1) if bias is None else bias
        bias = bias.masked_fill(left_out, -torch.inf)
    return form.contiguous(), v, None if bias is None else bias.contiguous()


def zero_masked_keys(gradient: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Zeros for the keys, along a dimension, that nothing attends to, whatever came upstream; in place."""
    if mask is None:
        return gradient
    shape = [mask.shape[0]] + [1] * (gradient.dim() - 1)
    shape[dim] = mask.shape[1]
    return gradient.masked_fill_(~mask.view(shape), 0.0)
