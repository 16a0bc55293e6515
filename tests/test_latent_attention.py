"""Latent attention: reference against loops, every backend against the float64 reference, registration, bad input."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cuda_emulation
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import Build, figures
from numerics import assert_no_worse
from shapes import (
    LatentShape,
    available_backends,
    declared,
    device_of,
    dtypes_of,
    emulated,
    fitted,
    interpreted,
    latent_shapes,
)
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.backends import torch_attention
from perceiver_kernels.backends.reference.philox import dropout_scales
from perceiver_kernels.backends.triton import runtime, tiles
from perceiver_kernels.ops.latent_attention import OP, latent_attention

BACKENDS = [backend for backend in available_backends(OP) if backend != "reference"]
DROPOUT = [backend for backend in BACKENDS if declared(OP, backend).dropout]
DOUBLE = [backend for backend in available_backends(OP) if torch.float64 in dtypes_of(OP, backend)]
SHAPES = [(backend, shape) for backend in BACKENDS for shape in latent_shapes(backend)]
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


def wide_dtypes(backend: str) -> list[torch.dtype]:
    """Of float64 and float32, what the backend takes; else its first dtype."""
    dtypes = dtypes_of(OP, backend)
    return [dtype for dtype in (torch.float64, torch.float32) if dtype in dtypes] or dtypes[:1]


def single(backend: str) -> torch.dtype:
    """float32, or the first dtype of a backend without it."""
    return wide_dtypes(backend)[-1]


def dropout_of(backend: str) -> dict[str, Any]:
    """Options with dropout, where the backend has it."""
    return {"dropout_p": 0.1, "seed": 1} if declared(OP, backend).dropout else {}


def widest(inputs: list[Tensor], backend: str) -> list[Tensor]:
    return [tensor.to(wide_dtypes(backend)[0]) for tensor in inputs]


def run(inputs: list[Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """out and the gradients of q, k and v, where the backend runs; the inputs' strides are kept."""
    q, k, v = (tensor.detach().to(device_of(backend)).requires_grad_() for tensor in inputs[:3])
    with pk.use_backend(backend):
        out = latent_attention(q, k, v, **options)
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(q.device))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def check_against_reference(
    inputs: list[Tensor], backend: str, dtype: torch.dtype, amplification: float = 1.0, **options: Any
) -> None:
    typed = [tensor.to(dtype) for tensor in inputs]
    truth = run([tensor.double() for tensor in typed], "reference", **options)
    plain, actual = run(typed, "reference", **options), run(typed, backend, **options)
    for name, value in actual.items():
        assert value.dtype == dtype
        value = value.cpu()
        # With a single key, or one score far above all others, they are zero.
        if name in ("d_q", "d_k") and truth[name].numel() and truth[name].abs().max() < 1e-12:
            check_zero(value, typed)
            continue
        assert_no_worse(value, plain[name], truth[name], name, amplification)


def check_zero(value: Tensor, inputs: list[Tensor]) -> None:
    """A softmax over one key is 1, whatever the score: its gradients are differences of equal terms, each rounded."""
    q, k, v, d_out = (tensor.double().abs() for tensor in inputs)
    term = 2 * (d_out @ v.transpose(2, 3)).max() * max(q.max(), k.max())
    assert value.abs().max() <= 16 * torch.finfo(value.dtype).eps * term


# --- the reference against explicit loops ---------------------------------------------------------------------------


def test_reference_is_the_formula() -> None:
    q, k, v, _ = make_inputs(LatentShape(2, 2, 3, 5, 4, 3))
    with pk.use_backend("reference"):
        out = latent_attention(q, k, v, scale=0.3)
    for b, h, n in itertools.product(range(2), range(2), range(3)):
        scores = [0.3 * (q[b, h, n] @ k[b, h, m]) for m in range(5)]
        total = sum(math.exp(score) for score in scores)
        expected = sum(math.exp(score) / total * v[b, h, m] for m, score in enumerate(scores))
        torch.testing.assert_close(out[b, h, n], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_is_torch_s(dtype: torch.dtype) -> None:
    q, k, v, _ = (tensor.to(dtype) for tensor in make_inputs(LatentShape(2, 3, 17, 29, 16, 16)))
    with pk.use_backend("reference"):
        torch.testing.assert_close(latent_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", DOUBLE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(backend: str, dropout_p: float) -> None:
    q, k, v, _ = make_inputs(LatentShape(2, 2, 5, 7, 3, 4))
    f = lambda *leaves: latent_attention(*leaves, dropout_p=dropout_p, seed=3)  # noqa: E731
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(f, [tensor.requires_grad_() for tensor in (q, k, v)])


# --- every backend against the float64 reference ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    [(backend, shape, dtype) for backend, shape in SHAPES for dtype in dtypes_of(OP, backend)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_shape_grid(backend: str, shape: LatentShape, dtype: torch.dtype) -> None:
    check_against_reference(make_inputs(shape), backend, dtype)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_scale(backend: str, scale: float) -> None:
    inputs = make_inputs(fitted(LatentShape(1, 2, 17, 37, 8, 8), backend))
    check_against_reference(inputs, backend, single(backend), scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_torch(backend: str) -> None:
    """The bound of the tolerance table with torch's fused attention as the plain path."""
    small = interpreted(backend) or emulated(backend)
    shape = LatentShape(1, 1, 70, 256, 64, 64) if small else LatentShape(1, 4, 512, 512, 64, 64)
    inputs = [tensor.to(single(backend)) for tensor in make_inputs(shape)]
    truth, actual = run([tensor.double() for tensor in inputs], "reference"), run(inputs, backend)
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    out = F.scaled_dot_product_attention(q, k, v)
    plain = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])), strict=True))
    for name, value in actual.items():
        assert_no_worse(value.cpu(), plain[name], truth[name], name)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    queries=st.integers(1, 200),
    keys=st.integers(1, 200),
    head_dim=st.integers(1, 256),
    head_dim_v=st.integers(1, 256),
    spread=st.sampled_from([0.1, 1.0]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if not interpreted(b) and not emulated(b)])
def test_any_shape(
    backend: str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    head_dim_v: int,
    spread: float,
    dropout_p: float,
    seed: int,
) -> None:
    shape = fitted(LatentShape(batch, heads, queries, keys, head_dim, head_dim_v), backend)
    options = {"dropout_p": dropout_p if backend in DROPOUT else 0.0, "seed": seed}
    check_against_reference(make_inputs(shape, spread=spread, seed=seed), backend, wide_dtypes(backend)[0], **options)


def packed_projection(inputs: list[Tensor]) -> list[Tensor]:
    """q, k and v as views of one (batch, rows, 3, heads, head_dim); the gradient as a view of (batch, rows, ...)."""
    packed = torch.stack([tensor.transpose(1, 2) for tensor in inputs[:3]], 2)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    return [q, k, v, inputs[3].transpose(1, 2).contiguous().transpose(1, 2)]


def channels_strided(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs]


def misaligned(inputs: list[Tensor]) -> list[Tensor]:
    return [F.pad(tensor, (1, 2, 1, 0))[..., 1:, 1:-2] for tensor in inputs]


def expanded(inputs: list[Tensor]) -> list[Tensor]:
    """One head for all, one row for all, one channel for all, and the gradient of a sum."""
    q, k, v, gradient = inputs
    one = gradient.new_ones(()).expand(gradient.shape)
    return [q[:, :1].expand_as(q), k[:, :, :1].expand_as(k), v[..., :1].expand_as(v), one]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for b in BACKENDS for dtype in dtypes_of(OP, b) if dtype in (torch.float32, dtypes_of(OP, b)[-1])],
    ids=str,
)
@pytest.mark.parametrize("layout", [packed_projection, channels_strided, misaligned, expanded])
def test_strides(backend: str, layout: Callable[[list[Tensor]], list[Tensor]], dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in make_inputs(fitted(LatentShape(2, 3, 37, 37, 24, 24), backend))]
    strided = layout(inputs)
    assert any(not tensor.is_contiguous() for tensor in strided)
    actual, expected = run(strided, backend), run([tensor.contiguous() for tensor in strided], backend)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
    check_against_reference(strided, backend, dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_results_lie_as_the_projections_read_them(backend: str) -> None:
    inputs = make_inputs(fitted(LatentShape(2, 3, 5, 7, 4, 6), backend))
    for value in run(widest(inputs, backend), backend).values():
        assert value.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_asked_for(backend: str) -> None:
    inputs = widest(make_inputs(fitted(LatentShape(1, 2, 5, 7, 4, 6), backend)), backend)
    q, k, v, gradient = (tensor.to(device_of(backend)) for tensor in inputs)
    with pk.use_backend(backend):
        out = latent_attention(q, k.requires_grad_(), v)
        (d_k,) = torch.autograd.grad(out, k, gradient)
        assert not latent_attention(q, k.detach(), v).requires_grad
    assert torch.equal(d_k, run([q, k, v, gradient], backend)["d_k"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_the_thousands(backend: str) -> None:
    for spread in (300.0, 1e4):
        inputs = make_inputs(fitted(LatentShape(1, 2, 40, 300, 16, 16), backend), spread=spread)
        for dtype in wide_dtypes(backend):
            check_against_reference(inputs, backend, dtype, amplification=spread)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_grow_and_fall_from_block_to_block(backend: str) -> None:
    """The running maximum moves with every block of keys, or never; a score above all others, first and last."""
    q, k, v, gradient = make_inputs(fitted(LatentShape(1, 1, 5, 700, 1, 8), backend))
    for keys in (torch.arange(700.0), -torch.arange(700.0), (torch.arange(700.0) == 699) * 900.0):
        # Of several channels the others are 0.
        inputs = [torch.full_like(q, 0.7), F.pad(keys.double()[:, None], (0, k.shape[3] - 1))[None, None], v, gradient]
        # In 16 bits weights are rounded before they meet values, and what that does to delta meets keys of 700.
        amplification = 100.0 if single(backend) == torch.float32 else 12.0
        check_against_reference(inputs, backend, single(backend), amplification)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_scores_far_below_zero(backend: str) -> None:
    """What pads the last tile of keys must not count, be it above every true score."""
    dtype = single(backend)
    q, k, v, _ = (tensor.to(dtype) for tensor in make_inputs(fitted(LatentShape(1, 1, 5, 3, 4, 4), backend)))
    q, k = torch.full_like(q, -100.0), 100 + k
    with pk.use_backend("reference"):
        truth, plain = latent_attention(q.double(), k.double(), v.double()), latent_attention(q, k, v)
    with pk.use_backend(backend):
        out = latent_attention(*(tensor.to(device_of(backend)) for tensor in (q, k, v)))
    assert_no_worse(out.cpu(), plain, truth, amplification=2e4 if dtype == torch.float32 else 10.0)


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
@pytest.mark.parametrize(
    ("backend", "shape"), [case for b in DROPOUT for case in [c for c in SHAPES if c[0] == b][:8]], ids=str
)
def test_dropout_is_the_same_on_every_backend(backend: str, shape: LatentShape, dropout_p: float) -> None:
    inputs = make_inputs(shape)
    for dtype in wide_dtypes(backend):
        check_against_reference(inputs, backend, dtype, dropout_p=dropout_p, seed=2**40 + 7)


@pytest.mark.parametrize("backend", ["reference", *DROPOUT])
def test_dropout_mask_is_that_of_its_counters(backend: str) -> None:
    """With equal scores and the identity as values, the output is the mask."""
    batch, heads, queries, keys = (2, 2, 40, 70) if interpreted(backend) else (2, 3, 100, 200)
    device = device_of(backend)
    q, k = torch.zeros(batch, heads, queries, 1, device=device), torch.zeros(batch, heads, keys, 1, device=device)
    v = torch.eye(keys, device=device).expand(batch, heads, keys, keys)
    with pk.use_backend(backend):
        out = latent_attention(q, k, v, dropout_p=0.3, seed=11)
        other = latent_attention(q, k, v, dropout_p=0.3, seed=12)
    scales = dropout_scales(torch.Size((batch, heads * queries, keys)), 0.3, 11, torch.float32, q.device)
    assert torch.equal(out != 0, scales.view(out.shape) != 0)
    assert not torch.equal(out, other)
    # Each weight is kept with probability 0.7.
    deviation = math.sqrt(0.3 * 0.7 / out.numel())
    assert abs((out != 0).float().mean().item() - 0.7) < 5 * deviation


def test_dropout_draws_from_torch_s_generator() -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 2, 8, 64, 4, 4))
    torch.manual_seed(5)
    first, second = (latent_attention(q, k, v, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(latent_attention(q, k, v, dropout_p=0.3), first)
    assert not torch.equal(first, second)


# --- determinism, NaN, nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend: str) -> None:
    inputs = make_inputs(fitted(LatentShape(2, 2, 40, 70, 8, 8), backend))
    inputs = [tensor.to(single(backend)) for tensor in inputs]
    first, second = (run(inputs, backend, **dropout_of(backend)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.skipif(not emulated("cuda"), reason="no emulation of CUDA")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_order_of_blocks_and_threads_changes_nothing(head_dim: int) -> None:
    inputs = [tensor.half() for tensor in make_inputs(LatentShape(1, 2, 70, 130, head_dim, head_dim))]
    results = []
    try:
        for seed in (0, 1, 2):
            cuda_emulation.shuffle(seed)
            results.append(run(inputs, "cuda"))
    finally:
        cuda_emulation.shuffle(0)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.skipif(not emulated("cuda"), reason="no emulation of CUDA")
def test_forward_by_products_of_warps() -> None:
    """On GPUs other than sm_90 warps multiply for themselves; elsewhere these tests run products of warpgroups."""
    code = (
        "import conftest, torch; import test_latent_attention as t\n"
        "for shape in (t.LatentShape(1, 2, 70, 130, 64, 64), t.LatentShape(1, 1, 65, 70, 128, 128)):\n"
        "    for dtype in (torch.bfloat16, torch.float16):\n"
        "        t.check_against_reference(t.make_inputs(shape), 'cuda', dtype)\n"
    )
    environment = {**os.environ, cuda_emulation.ARCH: "800", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("shape", [LatentShape(1, 3, 300, 400, 32, 40), LatentShape(7, 5, 20, 33, 8, 8)], ids=str)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if "cpu" in declared(OP, backend).devices])
def test_the_number_of_threads_changes_nothing(backend: str, shape: LatentShape) -> None:
    inputs = [tensor.float() for tensor in make_inputs(shape)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 5, 16):
            torch.set_num_threads(count)
            results.append(run(inputs, backend, dropout_p=0.1, seed=1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_what_depends_on_it_and_nothing_else(backend: str, which: int) -> None:
    inputs = make_inputs(fitted(LatentShape(1, 2, 30, 140, 8, 8), backend))
    inputs = [tensor.to(single(backend)) for tensor in inputs]
    inputs[which][0, 0, 17, 3] = math.nan
    actual, expected = run(inputs, backend), run(inputs, "reference")
    for name, value in actual.items():
        assert torch.equal(value.isnan().cpu(), expected[name].isnan()), name
        assert value[:, 1].isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_inputs_do_no_harm_elsewhere(backend: str, which: int, value: float) -> None:
    inputs = make_inputs(fitted(LatentShape(1, 2, 30, 140, 8, 8), backend))
    inputs = [tensor.to(single(backend)) for tensor in inputs]
    inputs[which][0, 0, 17, 3] = value
    actual, expected = run(inputs, backend), run(inputs, "reference")
    assert torch.equal(actual["out"].isfinite().cpu(), expected["out"].isfinite())
    for result in actual.values():
        assert result[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_queries_whose_scores_are_all_minus_infinity_get_zeros(backend: str) -> None:
    inputs = widest(make_inputs(fitted(LatentShape(1, 2, 4, 150, 1, 3), backend)), backend)
    inputs[0].abs_()
    inputs[1][0, 0] = -math.inf
    out = run(inputs, backend)["out"]
    assert (out[0, 0] == 0).all()
    assert (out[0, 1] != 0).all()


@pytest.mark.parametrize(
    "shape",
    [LatentShape(0, 2, 3, 4, 5, 6), LatentShape(2, 0, 3, 4, 5, 6), LatentShape(2, 2, 0, 4, 5, 6)],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_in_nothing_out(backend: str, shape: LatentShape) -> None:
    inputs = widest(make_inputs(fitted(shape, backend)), backend)
    for value, like in zip(run(inputs, backend).values(), (inputs[3], *inputs[:3]), strict=True):
        assert value.shape == like.shape
        assert (value == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_keys_give_zeros(backend: str) -> None:
    results = run(widest(make_inputs(fitted(LatentShape(2, 2, 3, 0, 5, 6), backend)), backend), backend)
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512"])
def test_every_instruction_set(level: str) -> None:
    """Each level that this processor runs passes the same cases in a process that is forced to it."""
    from perceiver_kernels import _cpu

    if level not in _cpu.isa_levels():
        pytest.skip(f"this processor does not run {level}")
    code = (
        "from perceiver_kernels import _cpu; import test_latent_attention as t\n"
        f"assert _cpu.isa() == {level!r}\n"
        "for backend, shape in t.SHAPES:\n"
        "    for dtype in t.dtypes_of(t.OP, backend) if backend == 'native' else ():\n"
        "        t.check_against_reference(t.make_inputs(shape), 'native', dtype)\n"
        "        t.check_against_reference(t.channels_strided(t.make_inputs(shape)), 'native', dtype, dropout_p=0.2,"
        " seed=1)\n"
    )
    environment = {**os.environ, "PERCEIVER_KERNELS_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, dtype) for b in available_backends(OP) for dtype in dtypes_of(OP, b)], ids=str
)
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(fitted(LatentShape(2, 2, 5, 7, 4, 6), backend))
    q, k, v, _ = (tensor.to(device_of(backend), dtype).requires_grad_() for tensor in inputs)
    dropouts = ((None, 0.0), (torch.tensor([3]), 0.5)) if declared(OP, backend).dropout else ((None, 0.0),)
    with pk.use_backend(backend):
        for random, dropout_p in dropouts:
            torch.library.opcheck(
                torch.ops.perceiver_kernels.latent_attention_fwd.default, (q, k, v, random, 0.5, dropout_p)
            )


def test_compiles_whole_with_dynamic_shapes() -> None:
    def f(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return latent_attention(q, k, v).transpose(1, 2).flatten(2).square().sum() * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows in (12, 33):
        leaves = [torch.randn(2, rows, 3, 4, 8, generator=torch.Generator().manual_seed(rows)) for _ in range(2)]
        results = [g(leaf.requires_grad_()) for g, leaf in zip((f, compiled), leaves, strict=True)]
        torch.testing.assert_close(results[0], results[1])
        gradients = [torch.autograd.grad(result, leaf) for result, leaf in zip(results, leaves, strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_autocast_casts_as_torch_does() -> None:
    q, k, v, _ = (tensor.float() for tensor in make_inputs(LatentShape(1, 2, 9, 9, 8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inputs in ((q, k, v), (q.bfloat16(), k, v), (q.double(), k.double(), v.double())):
            ours, theirs = latent_attention(*inputs), F.scaled_dot_product_attention(*inputs)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
        compiled = torch.compile(lambda *inputs: latent_attention(*inputs), fullgraph=True)
        assert compiled(q, k, v).dtype == torch.bfloat16
    leaf = q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = latent_attention(leaf, k, v)
    assert torch.autograd.grad(out.float().sum(), leaf)[0].dtype == torch.float32


def test_second_derivatives_are_refused() -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 1, 3, 4, 2, 2))
    out = latent_attention(q.requires_grad_(), k, v)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="latent_attention has no second derivatives"):
        gradient.sum().backward()


def test_explain_and_the_limit_of_the_native_kernel() -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 1, 3, 4, 257, 2))
    assert "native: no, channels is 257, must be from 1 to 256" in pk.explain(latent_attention, q, k, v)
    assert "native: runs this call" in pk.explain("latent_attention", q[..., :256], k[..., :256], v)
    with pk.use_backend("native"), pytest.raises(dispatch.BackendError, match="channels is 257"):
        latent_attention(q, k, v)
    torch.testing.assert_close(latent_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


# --- torch's attention in the place of a backend --------------------------------------------------------------------


CALL: dict[str, Any] = {
    "device": "cuda", "dtype": torch.bfloat16, "shape": (1, 2, 30, 40), "head_dim": 64, "scale": 0.125,
    "dropout": False, "needs_grad": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "the device is cpu"),
        ({"dtype": torch.float64}, "the dtype is float64"),
        ({"head_dim": 257}, "head_dim is 257"),
        ({"scale": 0.0}, "scale is 0.0, which its kernels take for positive"),
        ({"shape": (1, 2, 30, 0)}, "there is nothing to attend to"),
        ({"dropout": True}, "its dropout is not that of the other backends"),
        ({"needs_grad": True}, "its backward adds in an order that differs from run to run"),
        ({"dtype": torch.float32}, None),
        ({}, None),
    ],
    ids=str,
)
def test_which_calls_torch_may_run(changes: dict[str, Any], reason: str | None) -> None:
    assert torch_attention.not_taken_reason(**{**CALL, **changes}) == reason


def test_torch_is_expected_to_be_faster_in_16_bits() -> None:
    assert [torch_attention.default(dtype, 64, 64) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
        "torch", "torch", "triton"
    ]  # fmt: skip
    assert torch_attention.default(torch.bfloat16, 257, 257) == "triton"
    assert torch_attention.default(torch.bfloat16, 64, 32) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_s_attention_gives_the_same(dtype: torch.dtype) -> None:
    """Were there anything in its place: results, gradients and layout are the operator's."""
    q, k, v, gradient = packed_projection([t.to(dtype) for t in make_inputs(LatentShape(2, 3, 37, 37, 24, 24))])
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = torch_attention.attention(*leaves, 0.3)
    assert out.transpose(1, 2).is_contiguous()
    actual = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, gradient)), strict=True))
    expected = run([q, k, v, gradient], "reference", scale=0.3)
    truth = run([tensor.double() for tensor in (q, k, v, gradient)], "reference", scale=0.3)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value.double(), truth[name], **tolerance)


def test_torch_s_attention_runs_in_the_place_of_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch_attention, "TAKEN", {torch.bfloat16: 256, torch.float32: 64})
    calls: list[Any] = []
    attention = torch_attention.attention
    monkeypatch.setattr(torch_attention, "attention", lambda *inputs: calls.append(inputs) or attention(*inputs))
    q, k, v, _ = (tensor.float() for tensor in make_inputs(LatentShape(1, 2, 9, 12, 8, 8)))
    torch.testing.assert_close(latent_attention(q, k, v), run([q, k, v, q], "reference")["out"])
    assert len(calls) == 1
    text = pk.explain(latent_attention, q, k, v)
    assert "torch's scaled_dot_product_attention: runs this call" in text
    assert "native: would do" in text and "native: runs" not in text
    with pk.use_backend("reference"):
        latent_attention(q, k, v)
        assert "attention: no, the backend asked for is 'reference'" in pk.explain(latent_attention, q, k, v)
    latent_attention(q.clone().requires_grad_(), k, v)
    latent_attention(q, k, v, dropout_p=0.5)
    latent_attention(*(tensor.expand(-1, -1, -1, 65) for tensor in (q[..., :1], k[..., :1], v[..., :1])))
    assert len(calls) == 1


def test_torch_s_attention_is_measured_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(tiles, "_choices", {})
    monkeypatch.setenv(tiles.AUTOTUNE, "1")
    times = iter((2.0, 1.0))
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: run() is None or next(times))
    q, k, v, _ = (tensor.float() for tensor in make_inputs(LatentShape(1, 2, 9, 12, 8, 8)))
    assert "would do, but is not expected" in pk.explain(latent_attention, q, k, v)
    latent_attention(q, k, v)
    assert list(tiles._choices.values()) == ["torch"]
    assert "attention: runs this call" in pk.explain(latent_attention, q, k, v)


# --- machine code, without a GPU ------------------------------------------------------------------------------------

STRIDES = ("batch", "head", "row")
POINTERS = {
    "fwd": ("q", "k", "v", "out"),
    "bwd_queries": ("q", "k", "v", "out", "d_out", "d_q"),
    "bwd_keys": ("q", "k", "v", "d_out", "d_k", "d_v"),
}


def build(kernel: str, dtype: torch.dtype, head_dim: int, arch: int) -> Build:
    """As launched on inputs that fill the GPU."""
    kernels = importlib.import_module("perceiver_kernels.backends.triton.latent_attention")
    choice = kernels.default_tiles(kernel, dtype, head_dim, rows=1 << 20, multiprocessors=132)
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    strided = ("q", "k", "v") if kernel == "fwd" else ("q", "k", "v", "d_out")
    strides = tuple(f"{tensor}_{stride}" for tensor in strided for stride in STRIDES)
    signature = {
        **dict.fromkeys(POINTERS[kernel], kind),
        **dict.fromkeys(("lse",) if kernel == "fwd" else ("lse", "delta"), "*fp32"),
        **dict.fromkeys((*strides, "heads", "queries", "keys"), "i32"),
        **dict.fromkeys(("score_scale",) if kernel == "fwd" else ("score_scale", "scale"), "fp32"),
        "seed": "i64", "threshold": "i64", "keep_scale": "fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "DIM": head_dim, "DIM_V": head_dim, "WIDTH": head_dim, "WIDTH_V": head_dim, "ROWS": choice.rows,
        "COLUMNS": choice.columns, "EVEN": True, "DROPOUT": False, "PRECISION": "ieee", "COMPILED": True,
        **({"NEGATIVE": False} if kernel == "fwd" else {}),
    }  # fmt: skip
    name = f"latent_attention:latent_attention_{kernel}_kernel"
    return Build(name, signature, constants, arch, choice.warps, choice.stages, (*strides, "queries", "keys"))


@pytest.mark.skipif(bool(runtime.unavailable()), reason="no Triton")
@pytest.mark.parametrize(
    ("kernel", "dtype", "head_dim", "arch", "per_pair"),
    [
        ("fwd", torch.bfloat16, 64, 90, 9),
        ("fwd", torch.bfloat16, 128, 80, 16),
        ("fwd", torch.float32, 64, 80, 130),
        ("bwd_queries", torch.bfloat16, 64, 90, 9),
        ("bwd_queries", torch.bfloat16, 128, 80, 23),
        ("bwd_queries", torch.float32, 128, 90, 520),
        ("bwd_keys", torch.bfloat16, 64, 90, 13),
        ("bwd_keys", torch.bfloat16, 256, 80, 45),
        ("bwd_keys", torch.float32, 128, 90, 700),
    ],
    ids=str,
)
def test_machine_code(kernel: str, dtype: torch.dtype, head_dim: int, arch: int, per_pair: float) -> None:
    """Nothing is spilled; 16-bit products run on tensor cores; instructions per pair and thread stay what they are."""
    found = figures(build(kernel, dtype, head_dim, arch))
    assert found.spills == 0
    assert (found.tensor_core > 0) == (dtype == torch.bfloat16)
    assert found.per_pair <= per_pair


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    inputs = {"q": torch.zeros(2, 3, 5, 4), "k": torch.zeros(2, 3, 7, 4), "v": torch.zeros(2, 3, 7, 6)}
    with pytest.raises(ValueError, match=message):
        latent_attention(**{**inputs, **changes})
