"""Latent attention: reference against loops, every backend against the float64 reference, registration, bad input."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import dense_attention
import pytest
import torch
import torch.nn.functional as F
from another_process import INSTRUCTION_SETS, check_at
from dense_attention import BAD_INPUT, NAMES, channels_strided, expanded, make_inputs, misaligned
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import Build, figures, needs_triton
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
from perceiver_kernels.backends.triton import tiles
from perceiver_kernels.ops.latent_attention import OP, latent_attention

BACKENDS = [backend for backend in available_backends(OP) if backend != "reference"]
DROPOUT = [backend for backend in BACKENDS if declared(OP, backend).dropout]
DOUBLE = [backend for backend in available_backends(OP) if torch.float64 in dtypes_of(OP, backend)]
SHAPES = [(backend, shape) for backend in BACKENDS for shape in latent_shapes(backend)]


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


run = partial(dense_attention.run, latent_attention)
check_against_reference = partial(dense_attention.check_against_reference, latent_attention)


# --- the reference against explicit loops ---------------------------------------------------------------------------


def test_reference_is_the_formula() -> None:
    dense_attention.check_formula(latent_attention, keys=[0, 1, 2, 3, 4])


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
    shape = fitted(LatentShape(2, 3, 5, 7, 4, 6), backend)
    dense_attention.check_results_lie_as_the_projections_read_them(latent_attention, backend, shape, single(backend))


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
    """Scores reach 1200 and 40,000, and a weight is off by eps times its score.

    Outputs and d_v of 200 other seeds by native and 20 by triton needed 74 and 2379 times the units of the table.
    """
    for spread, amplification in ((300.0, 128.0), (1e4, 4096.0)):
        inputs = make_inputs(fitted(LatentShape(1, 2, 40, 300, 16, 16), backend), spread=spread)
        for dtype in wide_dtypes(backend):
            check_against_reference(inputs, backend, dtype, amplification=amplification)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_grow_and_fall_from_block_to_block(backend: str) -> None:
    shape = fitted(LatentShape(1, 1, 5, 700, 1, 8), backend)
    dense_attention.check_growing_and_falling_scores(latent_attention, backend, shape, single(backend))


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
    assert_no_worse(out.cpu(), plain, truth)


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
    size = (2, 2, 40, 70) if interpreted(backend) else (2, 3, 100, 200)
    dense_attention.check_dropout_mask(latent_attention, backend, size)


def test_dropout_draws_from_torch_s_generator() -> None:
    dense_attention.check_dropout_draws_from_torch_s_generator(latent_attention)


# --- determinism, NaN, nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend: str) -> None:
    shape, dtype = fitted(LatentShape(2, 2, 40, 70, 8, 8), backend), single(backend)
    dense_attention.check_two_runs_are_equal(latent_attention, backend, shape, dtype, **dropout_of(backend))


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
    shape, dtype = fitted(LatentShape(1, 2, 30, 140, 8, 8), backend), single(backend)
    dense_attention.check_nan_reaches_what_depends_on_it(latent_attention, backend, which, shape, dtype)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_inputs_do_no_harm_elsewhere(backend: str, which: int, value: float) -> None:
    shape, dtype = fitted(LatentShape(1, 2, 30, 140, 8, 8), backend), single(backend)
    dense_attention.check_infinity_does_no_harm_elsewhere(latent_attention, backend, which, value, shape, dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_queries_whose_scores_are_all_minus_infinity_get_zeros(backend: str) -> None:
    shape = fitted(LatentShape(1, 2, 4, 150, 1, 3), backend)
    dense_attention.check_scores_of_minus_infinity_give_zeros(latent_attention, backend, shape, single(backend))


@pytest.mark.parametrize(
    "shape",
    [
        LatentShape(0, 2, 3, 4, 5, 6),
        LatentShape(2, 0, 3, 4, 5, 6),
        LatentShape(2, 2, 0, 4, 5, 6),
        LatentShape(2, 2, 3, 0, 5, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_in_zeros_out(backend: str, shape: LatentShape) -> None:
    dense_attention.check_zeros(latent_attention, backend, fitted(shape, backend), single(backend))


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_every_instruction_set(level: str) -> None:
    """Each level that this processor runs passes the same cases."""
    check_at(
        level,
        "test_latent_attention",
        """
        for backend, shape in t.SHAPES:
            for dtype in t.dtypes_of(t.OP, backend) if backend == "native" else ():
                t.check_against_reference(t.make_inputs(shape), "native", dtype)
                strided = t.channels_strided(t.make_inputs(shape))
                t.check_against_reference(strided, "native", dtype, dropout_p=0.2, seed=1)
        """,
    )


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
    dense_attention.check_compiles_whole_with_dynamic_shapes(latent_attention, masked=False)


def test_autocast_casts_as_torch_does() -> None:
    dense_attention.check_autocast_casts_as_torch_does(latent_attention)
    q, k, v, _ = (tensor.float() for tensor in make_inputs(LatentShape(1, 2, 9, 9, 8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(lambda *inputs: latent_attention(*inputs), fullgraph=True)
        assert compiled(q, k, v).dtype == torch.bfloat16
    leaf = q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = latent_attention(leaf, k, v)
    assert torch.autograd.grad(out.float().sum(), leaf)[0].dtype == torch.float32


def test_second_derivatives_are_refused() -> None:
    dense_attention.check_second_derivatives_are_refused(latent_attention)


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


@needs_triton
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


@pytest.mark.parametrize(("changes", "message"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    dense_attention.check_bad_input(latent_attention, changes, message)
