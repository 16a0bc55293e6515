"""LayerNorm's reciprocal standard deviation of tokens [data ; per-axis features] that are never built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import native
from perceiver_kernels.backends.reference import separable_layer_norm as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.registration import define, differentiate, implement
from perceiver_kernels.ops.validation import COMPUTE_DTYPES, DTYPES

OP = "separable_layer_norm"
MAX_AXES = 4
DATA_DTYPES = (*DTYPES, torch.uint8)

declare_gpu(OP, "triton", compute_dtypes=(torch.float32,), data_dtypes=(*GPU_DTYPES, torch.uint8), axes=(1, MAX_AXES))
declare_native(OP, native, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DATA_DTYPES, axes=(1, MAX_AXES))
declare_reference(OP, reference, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DATA_DTYPES)


def separable_layer_norm(
    x: Tensor,
    sums: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    feature_channels: int,
    eps: float = 1e-5,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
) -> Tensor:
    """r = 1 / sqrt(var + eps) of every token [x * x_scale + x_shift ; features of its grid position].

    Args:
        x: (batch, S_1, ..., S_A, c), any strides; floating or uint8.
        sums: per axis (S_k,), sum of the features of each position; float32 or float64: the dtype of the computation.
        squares: per axis (S_k,), sum of the squared features.
        feature_channels: number of features of a token, over all axes.
        eps: added to the variance, as in torch.nn.LayerNorm.
        x_scale, x_shift: (c,), optional normalisation of raw data.

    Returns:
        (batch, S_1, ..., S_A) in the dtype of sums; differentiable in x, sums and squares.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the argument.

    Source: docs/separable_attention.md; computed without cancellation.
    """
    grid = tuple(s.shape[0] for s in sums)
    if tuple(x.shape[1:-1]) != grid:
        expected_x = f"(batch, {', '.join(map(str, grid))}, channels) as sums say"
        raise ValueError(f"x has shape {tuple(x.shape)}, must be {expected_x}")
    if len(squares) != len(sums):
        raise ValueError(f"squares has {len(squares)} entries, must have {len(sums)} as sums has")
    vectors = [(f"sums[{k}]", s, s.shape[:1]) for k, s in enumerate(sums)]
    vectors += [(f"squares[{k}]", s, sums[k].shape) for k, s in enumerate(squares)]
    vectors += [(n, v, x.shape[-1:]) for n, v in (("x_scale", x_scale), ("x_shift", x_shift)) if v is not None]
    for name, vector, shape in vectors:
        if vector.shape != shape or vector.dtype != sums[0].dtype or vector.device != x.device:
            raise ValueError(
                f"{name} is {tuple(vector.shape)}, {vector.dtype} on {vector.device}, must be {tuple(shape)}, "
                f"{sums[0].dtype} on {x.device}"
            )
    return torch.ops.perceiver_kernels.separable_layer_norm(
        x, list(sums), list(squares), x_scale, x_shift, feature_channels, eps
    )


define(
    "separable_layer_norm(Tensor x, Tensor[] sums, Tensor[] squares, Tensor? x_scale, Tensor? x_shift, "
    "int feature_channels, float eps) -> Tensor"
)


def _fwd(
    x: Tensor,
    sums: list[Tensor],
    squares: list[Tensor],
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    feature_channels: int,
    eps: float,
) -> Tensor:
    call = dispatch.Call(OP, x.device.type, sums[0].dtype, x.dtype, len(sums), x.shape[-1])
    backend = dispatch.select(call).load()
    return backend.separable_layer_norm_fwd(x, sums, squares, x_scale, x_shift, feature_channels, eps)


def _fake(
    x: Tensor,
    sums: list[Tensor],
    squares: list[Tensor],
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    feature_channels: int,
    eps: float,
) -> Tensor:
    return sums[0].new_empty(x.shape[:-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sums, _, x_scale, x_shift, feature_channels, _ = inputs
    if any(vector is not None and vector.requires_grad for vector in (x_scale, x_shift)):
        raise ValueError("x_scale or x_shift requires a gradient, but only x, sums and squares have one")
    ctx.save_for_backward(x, *sums, x_scale, x_shift, output)
    ctx.axes, ctx.feature_channels = len(sums), feature_channels


def _backward(ctx: Any, d_r: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    sums, (x_scale, x_shift, r) = rest[: ctx.axes], rest[ctx.axes :]
    needs_x, needs_sums, needs_squares, *_ = ctx.needs_input_grad
    width = x.shape[-1] + ctx.feature_channels
    data = reference.normalised(x.to(r.dtype), x_scale, x_shift)
    mean = (data.sum(-1) + reference.on_grid(sums)) / width
    d_variance = d_r * r**3 / (-2 * width)  # of the variance times the channels
    d_x = None
    if needs_x:
        d_x = 2 * d_variance[..., None] * (data - mean[..., None])
        d_x = (d_x if x_scale is None else d_x * x_scale).to(x.dtype)
    d_sums = _marginals(-2 * mean * d_variance, needs_sums)
    return d_x, d_sums, _marginals(d_variance, needs_squares), None, None, None, None


def _marginals(values: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Per axis that needs it the sums over the batch and all other axes of values (batch, S_1, ..., S_A)."""
    axes = range(1, values.dim())
    return [
        values.sum([0, *(axis for axis in axes if axis != k)]) if need else None
        for k, need in zip(axes, needs, strict=True)
    ]


implement("separable_layer_norm", _fwd, _fake)
differentiate("separable_layer_norm", _setup_context, _backward)
