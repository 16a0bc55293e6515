"""Gradients where keys and values are much alike, as the latents of an untrained Perceiver are: against plain softmax.

There d_out . v of all keys and d_out . out nearly cancel, and what rounding leaves must not be multiplied with what the
keys have in common (backends/centring.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_no_worse
from shapes import available_backends, device_of
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.modules import dense
from perceiver_kernels.modules.segments import KeysAndValues, segmented_cross_attention
from perceiver_kernels.ops.absorbed_attention import absorbed_attention

HEAD_DIM, KEYS, QUERIES, GRID = 24, 150, 70, (7, 10)

Attention = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("fused_multiply_add")


def rand(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike(*size: int, seed: int, dim: int = -2) -> Tensor:
    """Entries along a dimension that differ from one another by a thousandth."""
    one = list(size)
    one[dim] = 1
    return rand(*one, seed=seed) + 1e-3 * rand(*size, seed=seed + 1)


def mask_of(masked: bool) -> Tensor | None:
    return torch.rand(2, KEYS, generator=torch.Generator().manual_seed(9)) < 0.7 if masked else None


def plain(scores: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask.view(mask.shape[0], *[1] * (scores.dim() - 2), -1), -torch.inf)
    return scores.softmax(-1) @ v


def gradients(attention: Attention, inputs: list[Tensor], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Of a sum over the outputs with random weights."""
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
    out = attention(*leaves)
    upstream = rand(*out.shape, seed=8).to(device, dtype)
    return [gradient.cpu() for gradient in torch.autograd.grad(out, leaves, upstream)]


def check(ours: Attention, formula: Attention, inputs: list[Tensor], backend: str) -> None:
    inputs = [tensor.float() for tensor in inputs]
    with pk.use_backend(backend):
        actual = gradients(ours, inputs, torch.float32, device_of(backend))
    expected, truth = (gradients(formula, inputs, dtype) for dtype in (torch.float32, torch.float64))
    for position, values in enumerate(zip(actual, expected, truth, strict=True)):
        assert_no_worse(*values, name=f"gradient of input {position}")


def backends_of(op: str) -> list[str]:
    return [backend for backend in available_backends(op) if backend != "cuda"]  # those kernels have 16 bits, or below


def query_key_value() -> list[Tensor]:
    return [rand(2, 2, QUERIES, HEAD_DIM, seed=1), *(alike(2, 2, KEYS, HEAD_DIM, seed=seed) for seed in (2, 4))]


def softmax_attention(mask: Tensor | None = None) -> Attention:
    return lambda q, k, v: plain(q @ k.transpose(-1, -2) * HEAD_DIM**-0.5, v, mask)


@pytest.mark.parametrize("backend", backends_of("latent_attention"))
def test_latent_attention(backend: str) -> None:
    check(pk.latent_attention, softmax_attention(), query_key_value(), backend)


@pytest.mark.parametrize("op", [pk.latent_attention, pk.cross_attention])
@pytest.mark.parametrize("large", [1, 20])
def test_large_keys_that_nobody_attends_to(op: Attention, large: int) -> None:
    """Queries that attend to small keys, which have nothing in common, do not get the large ones into their error."""
    q, k = 0.1 + rand(2, 2, QUERIES, HEAD_DIM, seed=1).abs(), rand(2, 2, KEYS, HEAD_DIM, seed=2)
    k[:, :, 7 : 7 + large] = -1e4
    inputs = [q, k, rand(2, 2, KEYS, HEAD_DIM, seed=4)]
    for backend in backends_of(op.__name__):
        check(op, softmax_attention(), inputs, backend)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", backends_of("cross_attention"))
def test_cross_attention(backend: str, masked: bool) -> None:
    mask = mask_of(masked)
    ours = lambda q, k, v: pk.cross_attention(q, k, v, mask=None if mask is None else mask.to(q.device))  # noqa: E731
    check(ours, softmax_attention(mask), query_key_value(), backend)


@pytest.mark.parametrize("queries", [3, 200])
def test_few_and_many_queries_on_the_native_kernel(queries: int) -> None:
    """Keys, or queries, are taken in parts."""
    inputs = [rand(2, 2, queries, HEAD_DIM, seed=1), *query_key_value()[1:]]
    check(pk.cross_attention, softmax_attention(), inputs, "auto")


@pytest.mark.parametrize("masked", [False, True])
def test_few_queries_are_left_to_the_formula(masked: bool) -> None:
    """In place of torch's attention; what masked keys hold does not matter."""
    mask = mask_of(masked)
    q, k, v = query_key_value()
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 1e6)
    ours = lambda q, k, v: dense.attend_by_torch(q, k, v, mask, HEAD_DIM**-0.5, 0.0)  # noqa: E731
    check(ours, softmax_attention(mask), [q[:, :, :HEAD_DIM], k, v], "auto")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("backend", backends_of("absorbed_attention"))
def test_absorbed_attention(backend: str, eps: float | None, masked: bool) -> None:
    """Of the queries: a token's gradient is mostly that of a value, which does not cancel."""
    mask, tokens = mask_of(masked), alike(2, KEYS, HEAD_DIM, seed=2).float()
    a = rand(2, QUERIES, HEAD_DIM, seed=1) / HEAD_DIM**0.5

    def ours(a: Tensor) -> Tensor:
        a = a - a.mean(2, keepdim=True)
        here = None if mask is None else mask.to(a.device)
        acc, lse, _ = absorbed_attention(a, tokens.to(a.device, a.dtype), eps=eps, mask=here)
        return torch.cat((acc - acc.mean(2, keepdim=True), lse[..., None]), 2)

    def formula(a: Tensor) -> Tensor:
        a = a - a.mean(2, keepdim=True)
        z = tokens.to(a.dtype)
        z = z if eps is None else torch.nn.functional.layer_norm(z, (HEAD_DIM,), eps=eps)
        scores = a @ z.transpose(1, 2)
        hidden = scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)
        out = plain(scores, z, mask)
        return torch.cat((out - out.mean(2, keepdim=True), hidden.logsumexp(2, keepdim=True)), 2)

    check(ours, formula, [a], backend)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_cross_attention_in_the_contexts_channels(few: bool, masked: bool) -> None:
    mask, context = mask_of(masked), alike(2, KEYS, 512, seed=2).float()
    kv_weight, kv_bias = rand(2 * HEAD_DIM, 512, seed=4).float() / 512**0.5, rand(2 * HEAD_DIM, seed=5).float()

    def ours(query: Tensor, weight: Tensor) -> Tensor:
        weights, biases = weight.chunk(2), kv_bias.to(query.dtype).chunk(2)
        projections = KeysAndValues(weights[0], biases[0], weights[1], biases[1])
        tokens = [context.to(query.dtype)]
        return segmented_cross_attention(query, tokens, mask, projections, heads=1, scale=1.0)

    def formula(query: Tensor, weight: Tensor) -> Tensor:
        k, v = torch.nn.functional.linear(context.to(query.dtype), weight, kv_bias.to(query.dtype)).chunk(2, -1)
        return plain(query @ k.transpose(1, 2), v, mask)

    check(ours, formula, [rand(2, 2 if few else QUERIES, HEAD_DIM, seed=1), kv_weight], "auto")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", available_backends("separable_query_attention"))
def test_queries_on_a_grid(backend: str, masked: bool) -> None:
    """Of the keys' terms; natively also of the queries' data and factors."""
    mask = mask_of(masked)
    channels = 3
    tables = [alike(2, 2, KEYS, size, seed=seed) for size, seed in zip(GRID, (2, 4), strict=True)]
    k, v, h = (
        alike(2, 2, KEYS, channels, seed=6),
        alike(2, 2, KEYS, HEAD_DIM, seed=10),
        1e-3 * rand(2, 2, KEYS, seed=12),
    )
    x, r = rand(2, *GRID, channels, seed=13), 1 + rand(2, *GRID, seed=14) ** 2
    of_queries = backend == "native"
    inputs = [*tables, k, h, v, *([x, r] if of_queries else [])]

    def both(rows: Tensor, columns: Tensor, k: Tensor, h: Tensor, v: Tensor, *queries: Tensor) -> list[Tensor]:
        x_, r_ = queries or (x.to(v), r.to(v))
        return [rows, columns, k, h, v, x_, r_]

    def ours(*given: Tensor) -> Tensor:
        rows, columns, k, h, v, x, r = both(*given)
        here = None if mask is None else mask.to(v.device)
        return pk.separable_query_attention([rows, columns], v, h=h, k=k, x=x, r=r, mask=here)

    def formula(*given: Tensor) -> Tensor:
        rows, columns, k, h, v, x, r = both(*given)
        terms = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(3).transpose(2, 3)  # batch, heads, queries, keys
        form = terms + x.flatten(1, 2)[:, None] @ k.transpose(2, 3)
        return plain(r.flatten(1)[:, None, :, None] * form + h[:, :, None], v, mask)

    check(ours, formula, inputs, backend)
