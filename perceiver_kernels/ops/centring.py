"""Keys relative to their mean, for gradients: a softmax does not see what all scores of a row have in common.

The gradients of a row's scores sum to zero over the keys, but for rounding: they are the differences of numbers that
were rounded apart, d_out . v of each key and d_out . out. Where keys are much alike, as the latents of an untrained
Perceiver are, that little remainder times what keys have in common would be most of the queries' gradient; and all
keys would share in it. Relative to their mean, keys have nothing in common, and gradients without theirs no remainder.

Numbers of 16 bits are left alone: rounding a difference once more costs as much as it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def mean_over_keys(tensor: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """The mean of a (batch or 1, heads, ..) tensor over the keys, which have their dimension kept; 0 if not finite.

    Args:
        mask: bool (batch, keys): which of them count.
    """
    if mask is None:
        mean = tensor.mean(dim, keepdim=True)
    else:
        attended = _along(mask, tensor, dim)
        count = attended.sum(dim, keepdim=True).clamp_(min=1)
        mean = torch.where(attended, tensor, 0.0).sum(dim, keepdim=True) / count
    return mean.nan_to_num(0.0, 0.0, 0.0)


def without_mean(gradient: Tensor, mask: Tensor | None, dim: int = 2) -> Tensor:
    """Gradients of keys, of which those that count sum to zero, without what rounding has left of their sum."""
    if gradient.dtype not in WIDE:
        return gradient
    mean = mean_over_keys(gradient, mask, dim)
    return gradient.sub_(mean if mask is None else torch.where(_along(mask, gradient, dim), mean, 0.0))


def centred(q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Keys (batch, heads, M, head_dim) without their mean, and the log-sum-exp (batch, heads, N) of their scores."""
    if k.dtype not in WIDE:
        return k, lse
    mean = mean_over_keys(k, mask, 2)
    return k - mean, lse - scale * (q @ mean.transpose(2, 3))[..., 0]


def _along(mask: Tensor, tensor: Tensor, dim: int) -> Tensor:
    shape = [mask.shape[0]] + [1] * (tensor.dim() - 1)
    shape[dim] = mask.shape[1]
    return mask.view(shape)


def centred_for_gradients(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Keys without their mean where a gradient of scores will follow, for attention whose backward is not ours."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return k - mean_over_keys(k, mask, 2) if wanted and k.dtype in WIDE else k
