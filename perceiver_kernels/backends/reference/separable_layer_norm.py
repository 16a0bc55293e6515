"""LayerNorm statistics of tokens [data ; per-axis features], as the formula stands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def on_grid(per_axis: Sequence[Tensor]) -> Tensor:
    """Sum over axes of one value per position: (S_1, ..., S_A)."""
    total = per_axis[0]
    for values in per_axis[1:]:
        total = total[..., None] + values
    return total


def normalised(x: Tensor, x_scale: Tensor | None, x_shift: Tensor | None) -> Tensor:
    """x * x_scale + x_shift, each where given."""
    x = x if x_scale is None else x * x_scale
    return x if x_shift is None else x + x_shift


def separable_layer_norm_fwd(
    x: Tensor,
    sums: Sequence[Tensor],
    squares: Sequence[Tensor],
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    feature_channels: int,
    eps: float,
) -> Tensor:
    """(batch, S_1, ..., S_A): 1 / sqrt(variance + eps), the mean subtracted before squaring."""
    data = normalised(x.to(sums[0].dtype), x_scale, x_shift)
    width = x.shape[-1] + feature_channels
    feature_sum, feature_square = on_grid(sums), on_grid(squares)
    mean = (data.sum(-1) + feature_sum) / width
    features = feature_square - 2 * mean * feature_sum + feature_channels * mean**2
    variance = ((data - mean[..., None]).square().sum(-1) + features) / width
    return (variance + eps).rsqrt()
