"""What the tests of latent_attention and cross_attention share: inputs, layouts, and checks of either operator.

An `Attention` takes q, k, v of shape (batch, heads, rows, channels) and options.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse
from shapes import LatentShape, device_of
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.backends.reference.philox import dropout_scales

Attention = Callable[..., Tensor]
NAMES = ("out", "d_q", "d_k", "d_v")


def make_inputs(shape: LatentShape, *, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Float64 q, k, v and the gradient of out."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(shape.batch, shape.heads, *size, generator=g, dtype=torch.float64)  # noqa: E731
    return [
        spread * rand(shape.queries, shape.head_dim),
        rand(shape.keys, shape.head_dim),
        rand(shape.keys, shape.head_dim_v),
        rand(shape.queries, shape.head_dim_v),
    ]


def run(attention: Attention, inputs: list[Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """out and the gradients of q, k and v, on the CPU; the inputs' strides are kept."""
    device = device_of(backend)
    q, k, v = (tensor.detach().to(device).requires_grad_() for tensor in inputs[:3])
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    with pk.use_backend(backend):
        out = attention(q, k, v, **options)
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(device))
    return {name: value.cpu() for name, value in zip(NAMES, (out.detach(), *gradients), strict=True)}


def gradient_terms(
    inputs: list[Tensor], mask: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0, **_: Any
) -> dict[str, Tensor]:
    """The magnitudes of what d_q and d_k are sums of, which cancel where one key has all the weight."""
    q, k, v, d_out = (tensor.double() for tensor in inputs)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    weights = scores.softmax(-1).nan_to_num()
    d_weights = d_out.abs() @ v.abs().transpose(2, 3) / (1 - dropout_p)
    d_scores = abs(scale) * weights * (d_weights + (weights * d_weights).sum(-1, keepdim=True))
    return {"d_q": d_scores @ k.abs(), "d_k": d_scores.transpose(2, 3) @ q.abs()}


def check_against_reference(
    attention: Attention,
    inputs: list[Tensor],
    backend: str,
    dtype: torch.dtype,
    amplification: float = 1.0,
    **options: Any,
) -> None:
    typed = [tensor.to(dtype) for tensor in inputs]
    truth = run(attention, [tensor.double() for tensor in typed], "reference", **options)
    plain, actual = run(attention, typed, "reference", **options), run(attention, typed, backend, **options)
    terms = gradient_terms(typed, **options)
    for name, value in actual.items():
        assert value.dtype == dtype
        # With a single key, or one score far above all others, they are zero: differences of equal terms, each rounded.
        cancels = name in terms and truth[name].numel() and (amplification > 1 or truth[name].abs().max() < 1e-12)
        assert_no_worse(value, plain[name], truth[name], name, amplification, terms[name] if cancels else None)


# --- layouts ---------------------------------------------------------------------------------------------------------


def channels_strided(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs]


def misaligned(inputs: list[Tensor]) -> list[Tensor]:
    return [F.pad(tensor, (1, 2, 1, 0))[..., 1:, 1:-2] for tensor in inputs]


def expanded(inputs: list[Tensor]) -> list[Tensor]:
    """One head for all, one row for all, one channel for all, and the gradient of a sum."""
    q, k, v, gradient = inputs
    one = gradient.new_ones(()).expand(gradient.shape)
    return [q[:, :1].expand_as(q), k[:, :, :1].expand_as(k), v[..., :1].expand_as(v), one]


# --- checks ----------------------------------------------------------------------------------------------------------


def check_formula(attention: Attention, keys: list[int], **options: Any) -> None:
    """The reference against explicit loops over these of 5 keys."""
    q, k, v, _ = make_inputs(LatentShape(2, 2, 3, 5, 4, 3))
    with pk.use_backend("reference"):
        out = attention(q, k, v, scale=0.3, **options)
    for b, h, n in itertools.product(range(2), range(2), range(3)):
        scores = {m: 0.3 * (q[b, h, n] @ k[b, h, m]) for m in keys}
        total = sum(math.exp(score) for score in scores.values())
        expected = sum(math.exp(score) / total * v[b, h, m] for m, score in scores.items())
        torch.testing.assert_close(out[b, h, n], expected)


def check_growing_and_falling_scores(
    attention: Attention, backend: str, shape: LatentShape, dtype: torch.dtype = torch.float32
) -> None:
    """The running maximum moves with every block of keys, or never; a score above all others, last.

    Scores reach 200 to 700; measured as needed: 22 by native, 6 by triton.
    """
    q, k, v, gradient = make_inputs(shape)
    place = torch.arange(float(shape.keys), dtype=torch.float64)
    for values in (place, -place, (place == shape.keys - 1) * 900.0):
        # Of several channels the others are zero.
        k = F.pad(values[:, None], (0, shape.head_dim - 1)).expand_as(k)
        check_against_reference(
            attention, [torch.full_like(q, 0.7), k, v, gradient], backend, dtype, amplification=32.0
        )


def check_dropout_mask(attention: Attention, backend: str, size: tuple[int, int, int, int]) -> None:
    """With equal scores and the identity as values, the output is the mask of (batch, heads, queries, keys)."""
    batch, heads, queries, keys = size
    device = device_of(backend)
    q, k = torch.zeros(batch, heads, queries, 1, device=device), torch.zeros(batch, heads, keys, 1, device=device)
    v = torch.eye(keys, device=device).expand(batch, heads, keys, keys)
    with pk.use_backend(backend):
        out, other = (attention(q, k, v, dropout_p=0.3, seed=seed).cpu() for seed in (11, 12))
    scales = dropout_scales(torch.Size((batch, heads * queries, keys)), 0.3, 11, torch.float32, torch.device("cpu"))
    assert torch.equal(out != 0, scales.view(out.shape) != 0)
    assert not torch.equal(out, other)


def check_dropout_draws_from_torch_s_generator(attention: Attention) -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 2, 8, 64, 4, 4))
    torch.manual_seed(5)
    first, second = (attention(q, k, v, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(attention(q, k, v, dropout_p=0.3), first)
    assert not torch.equal(first, second)


def check_two_runs_are_equal(
    attention: Attention, backend: str, shape: LatentShape, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    inputs = [tensor.to(dtype) for tensor in make_inputs(shape)]
    first, second = (run(attention, inputs, backend, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def check_nan_reaches_what_depends_on_it(
    attention: Attention, backend: str, which: int, shape: LatentShape, dtype: torch.dtype = torch.float32
) -> None:
    """NaN in the first of two heads: where it is in the reference, and nowhere in the other head."""
    inputs = [tensor.to(dtype) for tensor in make_inputs(shape)]
    inputs[which][0, 0, 17, 3] = math.nan
    actual, expected = run(attention, inputs, backend), run(attention, inputs, "reference")
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert value[:, 1].isfinite().all()


def check_infinity_does_no_harm_elsewhere(
    attention: Attention, backend: str, which: int, value: float, shape: LatentShape, dtype: torch.dtype = torch.float32
) -> None:
    inputs = [tensor.to(dtype) for tensor in make_inputs(shape)]
    inputs[which][0, 0, 7, 3] = value
    actual, expected = run(attention, inputs, backend), run(attention, inputs, "reference")
    assert torch.equal(actual["out"].isfinite(), expected["out"].isfinite())
    for result in actual.values():
        assert result[:, 1].isfinite().all()


def check_scores_of_minus_infinity_give_zeros(
    attention: Attention, backend: str, shape: LatentShape, dtype: torch.dtype = torch.float32
) -> None:
    """In the first of two heads."""
    inputs = [tensor.to(dtype) for tensor in make_inputs(shape)]
    inputs[0].abs_()
    inputs[1][0, 0] = -math.inf
    out = run(attention, inputs, backend)["out"]
    assert (out[0, 0] == 0).all()
    assert (out[0, 1] != 0).all()


def check_zeros(attention: Attention, backend: str, shape: LatentShape, dtype: torch.dtype) -> None:
    """Of nothing come zeros, in the shapes of the inputs."""
    inputs = [tensor.to(dtype) for tensor in make_inputs(shape)]
    for value, like in zip(run(attention, inputs, backend).values(), (inputs[3], *inputs[:3]), strict=True):
        assert value.shape == like.shape
        assert (value == 0).all()


def check_results_lie_as_the_projections_read_them(
    attention: Attention, backend: str, shape: LatentShape, dtype: torch.dtype = torch.float32
) -> None:
    inputs = [tensor.to(dtype) for tensor in make_inputs(shape)]
    for value in run(attention, inputs, backend).values():
        assert value.transpose(1, 2).is_contiguous()


def check_compiles_whole_with_dynamic_shapes(attention: Attention, masked: bool) -> None:
    def f(qkv: Tensor, options: dict[str, Tensor]) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return attention(q, k, v, **options).transpose(1, 2).flatten(2).square().sum() * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows in (12, 33):
        leaves = [torch.randn(2, rows, 3, 4, 8, generator=torch.Generator().manual_seed(rows)) for _ in range(2)]
        options = {"mask": torch.arange(rows).expand(2, rows) % 3 > 0} if masked else {}
        results = [g(leaf.requires_grad_(), options) for g, leaf in zip((f, compiled), leaves, strict=True)]
        torch.testing.assert_close(results[0], results[1])
        gradients = [torch.autograd.grad(result, leaf) for result, leaf in zip(results, leaves, strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1])


def check_autocast_casts_as_torch_does(attention: Attention) -> None:
    q, k, v, _ = (tensor.float() for tensor in make_inputs(LatentShape(1, 2, 9, 9, 8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inputs in ((q, k, v), (q.bfloat16(), k, v), (q.double(), k.double(), v.double())):
            ours, theirs = attention(*inputs), F.scaled_dot_product_attention(*inputs)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def check_second_derivatives_are_refused(attention: Attention) -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 1, 3, 4, 2, 2))
    out = attention(q.requires_grad_(), k, v)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{attention.__name__} has no second derivatives"):
        gradient.sum().backward()


BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 5, 4)}, "q has 3 dimensions, must have 4"),
    ({"k": torch.zeros(2, 7, 4)}, "k has 3 dimensions, must have 4"),
    ({"v": torch.zeros(6)}, "v has 1 dimensions, must have 4"),
    ({"q": torch.zeros(2, 3, 5, 0), "k": torch.zeros(2, 3, 7, 0)}, "q has head_dim 0, must have at least 1"),
    ({"v": torch.zeros(2, 3, 7, 0)}, "v has head_dim 0, must have at least 1"),
    ({"q": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, "q has dtype torch.int64, must be float32, float64"),
    ({"k": torch.zeros(2, 3, 7, 4).double()}, "k has dtype torch.float64, must be torch.float32 as q has"),
    ({"v": torch.zeros(2, 3, 7, 6).half()}, "v has dtype torch.float16, must be torch.float32 as q has"),
    ({"k": torch.zeros(2, 3, 7, 4, device="meta")}, "k is on meta, must be on cpu as q is"),
    ({"v": torch.zeros(2, 3, 7, 6, device="meta")}, "v is on meta, must be on cpu as q is"),
    ({"k": torch.zeros(1, 3, 7, 4)}, "k has batch 1, must be 2 as q has"),
    ({"v": torch.zeros(2, 1, 7, 6)}, "v has 1 heads, must have 3 as q has"),
    ({"k": torch.zeros(2, 3, 7, 5)}, "k has head_dim 5, must have 4 as q has"),
    ({"v": torch.zeros(2, 3, 8, 6)}, "v has 8 tokens, must have 7 as k has"),
    ({"dropout_p": 1.0}, "dropout_p is 1.0, must be at least 0 and less than 1"),
    ({"dropout_p": math.nan}, "dropout_p is nan, must be at least 0 and less than 1"),
    ({"seed": -1}, r"seed is -1, must be from 0 to 2\^63 - 1"),
]


def check_bad_input(attention: Attention, changes: dict[str, Any], message: str) -> None:
    inputs = {"q": torch.zeros(2, 3, 5, 4), "k": torch.zeros(2, 3, 7, 4), "v": torch.zeros(2, 3, 7, 6)}
    with pytest.raises(ValueError, match=message):
        attention(**{**inputs, **changes})
