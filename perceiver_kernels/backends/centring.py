"""What keys have in common, kept out of gradients: a softmax does not see it, but rounding does.

The gradients of a row's scores sum to zero over the keys, but for rounding. Where keys are much alike, what is left
times what they have in common would be most of the queries' gradient, and every key would share in it: it is taken off
again (docs/dense_attention.md, "Keys that are much alike").
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of 16 bits are left as they are: rounding a difference once more costs as much as it saves.
WIDE = (torch.float32, torch.float64)


def without_mean(gradient: Tensor, mask: Tensor | None, dim: int = 2) -> Tensor:
    """Gradients of keys, fresh ones, less the mean that rounding has left of their sum.

    Args:
        mask: bool (batch, keys), those that are attended to; the others' gradients are zero, and stay so.
        dim: that of the keys.
    """
    if gradient.dtype not in WIDE or not gradient.numel():
        return gradient
    # In place, unless second derivatives are asked for, which are refused.
    result = gradient.clone() if torch.is_grad_enabled() else gradient
    if mask is None:
        return result.sub_(gradient.mean(dim, keepdim=True))
    if mask.shape[0] != gradient.shape[0]:  # the gradient of what all inputs share
        mask = mask.any(0, keepdim=True)
    shape = [mask.shape[0]] + [1] * (gradient.dim() - 1)
    shape[dim] = mask.shape[1]
    attended = mask.view(shape).to(gradient.dtype)
    mean = gradient.sum(dim, keepdim=True) / attended.sum(dim, keepdim=True).clamp(min=1)
    return result.addcmul_(mean, attended, value=-1)


def common_key(k: Tensor, mask: Tensor | None) -> Tensor:
    """What attended keys (batch, heads, M, head_dim) have in common: their mean, in channels where it is no chance.

    The mean of some large keys among many small ones would be an error for queries that attend to the small ones. Where
    it is larger than the keys' deviation, most keys are near it.
    """
    if mask is None:
        count: Tensor | int = max(k.shape[2], 1)
    else:
        k = k.masked_fill(~mask[:, None, :, None], 0.0)
        count = mask.sum(1).clamp(min=1)[:, None, None, None]
    mean, mean_square = k.sum(2, keepdim=True) / count, k.detach().square().sum(2, keepdim=True) / count
    return torch.where(2 * mean.square() > mean_square, mean, 0.0)


def without_rest(d_a: Tensor, rest: Tensor, acc: Tensor, total: Tensor) -> Tensor:
    """Gradients of queries (batch, rows, C) less what rounding has left of a sum of their scores' gradients.

    Args:
        rest: (batch, rows), what it has left.
        acc, total: (batch, rows, C) and (batch, rows), the queries' weighted sum of keys, and the weights' sum.
    """
    share = torch.where(total == 0, 0.0, rest.to(d_a.dtype) / total)
    return d_a - share[..., None] * acc
