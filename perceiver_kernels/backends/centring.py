"""What keys have in common, taken off their queries' gradients: a softmax does not see it, but rounding does.

The gradients of a row's scores sum to zero over the keys, but for rounding: they are differences of numbers that were
rounded apart, d_out . v of each key and d_out . out. Where keys are much alike, as the latents of an untrained
Perceiver are, that rest times what keys have in common would be most of the queries' gradient, and every key would
share in it.
So backward takes off again the rest times the mean key from a query's gradient, and the mean from those of the keys.

Numbers of 16 bits are left as they are: rounding a difference once more costs as much as it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def centred_for_backward(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Keys less their mean, if autograd will follow an attention that is not ours."""
    follows = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return k - mean_over_keys(k, mask) if follows and k.dtype in WIDE else k


def without_mean(gradient: Tensor, mask: Tensor | None, dim: int = 2) -> Tensor:
    """Gradients of keys less the mean that rounding has left of their sum.

    Args:
        mask: bool (batch, keys), those that are attended to; the others' gradients are zero, and stay so.
        dim: that of the keys.
    """
    if gradient.dtype not in WIDE:
        return gradient
    if mask is not None and mask.shape[0] != gradient.shape[0]:  # the gradient of what all inputs share
        mask = mask.any(0, keepdim=True)
    mean = mean_over_keys(gradient, mask, dim)
    return gradient - (mean if mask is None else torch.where(_along(mask, gradient, dim), mean, 0.0))


def mean_over_keys(tensor: Tensor, mask: Tensor | None, dim: int = 2) -> Tensor:
    """The mean over the attended keys, which have a dimension of their own and keep it; zero where not finite."""
    if mask is None:
        mean = tensor.mean(dim, keepdim=True)
    else:
        attended = _along(mask, tensor, dim)
        count = attended.sum(dim, keepdim=True).clamp_(min=1)
        mean = torch.where(attended, tensor, 0.0).sum(dim, keepdim=True) / count
    return mean.nan_to_num(0.0, 0.0, 0.0)


def without_rest(d_a: Tensor, rest: Tensor, acc: Tensor, total: Tensor) -> Tensor:
    """Gradients of queries (batch, rows, C) less what rounding has left of a sum of their scores' gradients.

    Args:
        rest: (batch, rows), what it has left.
        acc, total: (batch, rows, C) and (batch, rows), the queries' weighted sum of keys, and the weights' sum.
    """
    share = torch.where(total == 0, 0.0, rest.to(d_a.dtype) / total)
    return d_a - share[..., None] * acc


def _along(mask: Tensor, tensor: Tensor, dim: int) -> Tensor:
    shape = [mask.shape[0]] + [1] * (tensor.dim() - 1)
    shape[dim] = mask.shape[1]
    return mask.view(shape)
