"""Absorbed attention: scores in the context's own channels, without keys, values or encoded positions in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import native
from perceiver_kernels.backends.reference import absorbed_attention as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.dropout import seed_number, seed_tensor
from perceiver_kernels.ops.fourier_encode import FourierBands
from perceiver_kernels.ops.registration import define, register_pair
from perceiver_kernels.ops.validation import (
    COMPUTE_DTYPES,
    DTYPES,
    check_devices,
    check_floating,
    check_key_mask,
    check_rows,
)

OP = "absorbed_attention"
MAX_CHANNELS = 512  # of the kernels for GPUs

declare_gpu(OP, "triton", compute_dtypes=(torch.float32,), data_dtypes=GPU_DTYPES, channels=(1, MAX_CHANNELS))
declare_native(OP, native, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES)
declare_reference(OP, reference, compute_dtypes=COMPUTE_DTYPES, data_dtypes=DTYPES)


def absorbed_attention(
    a: Tensor,
    x: Tensor | None = None,
    positions: Tensor | None = None,
    bands: FourierBands | None = None,
    *,
    eps: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention that takes each token as its own key and value, its position's features made on the fly.

    z[m] = [x[m] ; features(positions[m])],  s[i, m] = r[m] * (a[i] . z[m]),  p = softmax over m of s,  w = p * r,
    acc[i] = sum over m of w[i, m] * z[m]; r[m] = 1 / sqrt(var(z[m]) + eps) is LayerNorm's, for an a whose channels have
    the mean 0 (the mean of z then drops out of the scores; out of acc, the caller takes it).

    Args:
        a: (batch or 1, rows, C), float32 or float64: this is the dtype of the computation. Batch 1 is not expanded.
            C = c + bands.num_channels.
        x: (batch, M, c), float32, float64, bfloat16 or float16, any strides; None: positions alone.
        positions: (batch or 1, M, axes), floating-point, float64 only with a float64 a. They get no gradient.
        bands: which features a position has, after the channels of x; given if and only if positions are.
        eps: LayerNorm's; None: r is 1.
        mask: bool (batch, M), True = attend. A row with nothing to attend to gets zeros and zero gradients.
        dropout_p: probability in [0, 1) of dropping an attention weight; the kept ones are divided by 1 - dropout_p.
        seed: of the dropout, from 0 to 2^63 - 1; by default drawn from torch's generator.

    Returns:
        acc (batch, rows, C), lse (batch, rows), the log of the sum of exp(s), -inf for a row with nothing to attend to,
        and total (batch, rows), the weights' sum: 1, or 0 for such a row; under dropout that of the kept, rescaled
        weights. All in a's dtype.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or positions require a gradient; the message names the argument.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: O(batch * rows * C) beyond the inputs, and on a GPU partial sums, so many times acc, in backward a's
        gradient, as the tokens are split into parts, until a GPU is filled. On the reference, the tokens,
        batch * M * C, and the weights, batch * rows * M, are stored in full. Backward is deterministic and recomputes
        the weights.
    Errors: angles are reduced exactly, so features are off by about 1e-7, up to some million radians.
    Source: docs/separable_attention.md; the softmax is streamed as in Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    _check(a, x, positions, bands, eps, mask)
    random = seed_tensor(dropout_p, seed)
    frequencies: list[float] = []
    options = (False, False, False)
    if bands is not None:
        frequencies = [f for axis in range(bands.num_axes) for f in bands.frequencies(axis)]
        options = (bands.order == "grouped", bands.concat_pos, bands.sine_only)
    acc, lse, total = torch.ops.perceiver_kernels.absorbed_attention_fwd(
        a, x, positions, mask, random, frequencies, *options, eps, dropout_p
    )
    return acc, lse.to(a.dtype), total


def _check(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    bands: FourierBands | None,
    eps: float | None,
    mask: Tensor | None,
) -> None:
    check_rows(a)
    if x is None and positions is None:
        raise ValueError("x and positions are None, must have one of them at least")
    if (positions is None) != (bands is None):
        given, missing = ("bands", "positions") if positions is None else ("positions", "bands")
        raise ValueError(f"{missing} is None, must be given as {given} is")
    channels = 0
    if x is not None:
        if x.dim() != 3:
            raise ValueError(f"x has {x.dim()} dimensions, must have 3: (batch, tokens, channels)")
        check_floating("x", x)
        channels = x.shape[2]
    if positions is not None and bands is not None:
        _check_positions(positions, bands, a, x)
        channels += bands.num_channels
    if channels < 1 or a.shape[2] != channels:
        raise ValueError(f"a has {a.shape[2]} channels, must have {max(channels, 1)}: those of x and of the features")
    batch = _batch(a, x, positions, mask)
    if a.shape[0] not in (1, batch):
        raise ValueError(f"a has batch {a.shape[0]}, must be 1 or {batch} as the tokens have")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps is {eps}, must be at least 0")
    check_key_mask(mask, batch, _tokens(x, positions), "tokens")
    check_devices([("x", x), ("positions", positions), ("mask", mask)], like=("a", a))


def _check_positions(positions: Tensor, bands: FourierBands, a: Tensor, x: Tensor | None) -> None:
    if positions.dim() != 3 or positions.shape[2] != bands.num_axes:
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}, must be (batch or 1, tokens, {bands.num_axes}) as bands say"
        )
    if positions.dtype not in (torch.float32, torch.bfloat16, torch.float16, a.dtype):
        raise ValueError(f"positions has dtype {positions.dtype}, must be float32, bfloat16, float16 or {a.dtype}")
    if torch.is_grad_enabled() and positions.requires_grad:
        raise ValueError("positions require a gradient, must not: there is none; encode them with fourier_encode")
    if x is not None and positions.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"positions has batch {positions.shape[0]}, must be 1 or {x.shape[0]} as x has")
    if x is not None and positions.shape[1] != x.shape[1]:
        raise ValueError(f"positions has {positions.shape[1]} tokens, must have {x.shape[1]} as x has")


def _tokens(x: Tensor | None, positions: Tensor | None) -> int:
    tokens = positions if x is None else x
    assert tokens is not None
    return tokens.shape[1]


def _batch(a: Tensor, x: Tensor | None, positions: Tensor | None, mask: Tensor | None) -> int:
    """x's batch; without x, that of whatever is not shared by all inputs."""
    if x is not None:
        return x.shape[0]
    assert positions is not None
    sizes = [positions.shape[0], *([] if mask is None else [mask.shape[0]]), a.shape[0]]
    return next((size for size in sizes if size != 1), 1)


def _call(a: Tensor, x: Tensor | None, mask: Tensor | None, dropout_p: float) -> dispatch.Call:
    data_dtype = a.dtype if x is None else x.dtype
    return dispatch.Call(
        OP, a.device.type, a.dtype, data_dtype, channels=a.shape[2], mask=mask is not None, dropout=dropout_p > 0
    )


def explain(
    a: Tensor, x: Tensor | None = None, *_: Any, mask: Tensor | None = None, dropout_p: float = 0.0, **__: Any
) -> str:
    """Which backend would run this call of absorbed_attention, and the others' reasons why not."""
    return dispatch.describe(_call(a, x, mask, dropout_p))


_ARGUMENTS = (
    "Tensor a, Tensor? x, Tensor? positions, Tensor? mask, Tensor? random, float[] frequencies, bool grouped, "
    "bool concat_pos, bool sine_only, float? eps, float dropout_p"
)
define(f"absorbed_attention_fwd({_ARGUMENTS}) -> (Tensor acc, Tensor lse, Tensor total)")
define(
    f"absorbed_attention_bwd({_ARGUMENTS}, Tensor acc, Tensor lse, Tensor total, Tensor d_acc, Tensor d_lse, "
    "Tensor d_total, bool needs_a, bool needs_x) -> (Tensor d_a, Tensor d_x)"
)


def _fwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    random: Tensor | None,
    frequencies: list[float],
    grouped: bool,
    concat_pos: bool,
    sine_only: bool,
    eps: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = dispatch.select(_call(a, x, mask, dropout_p)).load()
    features = (frequencies, grouped, concat_pos, sine_only)
    return backend.absorbed_attention_fwd(a, x, positions, features, mask, eps, dropout_p, seed_number(random))


def _bwd(
    a: Tensor,
    x: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    random: Tensor | None,
    frequencies: list[float],
    grouped: bool,
    concat_pos: bool,
    sine_only: bool,
    eps: float | None,
    dropout_p: float,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    backend = dispatch.select(_call(a, x, mask, dropout_p)).load()
    features = (frequencies, grouped, concat_pos, sine_only)
    saved, upstream, needs = rest[:3], rest[3:6], rest[6:]
    return backend.absorbed_attention_bwd(
        a, x, positions, features, mask, eps, dropout_p, seed_number(random), saved, upstream, needs
    )


def _fwd_fake(
    a: Tensor, x: Tensor | None, positions: Tensor | None, mask: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, channels = _batch(a, x, positions, mask), a.shape[1], a.shape[2]
    return (
        a.new_empty(batch, rows, channels),
        a.new_empty(batch, rows, dtype=torch.float64),
        a.new_empty(batch, rows),
    )


def _bwd_fake(a: Tensor, x: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_a, needs_x = rest[-2:]
    d_x = a.new_empty(0) if x is None or not needs_x else x.new_empty(x.shape)
    return a.new_empty(a.shape if needs_a else 0), d_x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    a, x, positions, mask, random, *ctx.options = inputs
    ctx.save_for_backward(a, x, positions, mask, random, *output)
    ctx.needs = (a.requires_grad, x is not None and x.requires_grad)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    a, x, positions, mask, random, *output = ctx.saved_tensors
    upstream = [
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(output, gradients, strict=True)
    ]
    results = torch.ops.perceiver_kernels.absorbed_attention_bwd(
        a, x, positions, mask, random, *ctx.options, *output, *upstream, *ctx.needs
    )
    d_a, d_x = (result if needed else None for result, needed in zip(results, ctx.needs, strict=True))
    return d_a, d_x, *(None,) * 9


register_pair(OP, (_fwd, _bwd), (_fwd_fake, _bwd_fake), _setup_context, _backward)
