"""Cross-attention: reference against loops, every backend against the float64 reference, registration, bad input."""

from __future__ import annotations

import dataclasses
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
from shapes import CROSS_SHAPES, LatentShape, available_backends, device_of, dtypes_of
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.ops.cross_attention import OP, cross_attention, explain
from perceiver_kernels.ops.latent_attention import latent_attention

BACKENDS = [backend for backend in available_backends(OP) if backend != "reference"]
DOUBLE = [backend for backend in available_backends(OP) if torch.float64 in dtypes_of(OP, backend)]
SMALL = LatentShape(2, 2, 5, 7, 4, 6)


TYPED_BACKENDS = [(backend, dtype) for backend in BACKENDS for dtype in dtypes_of(OP, backend)]


def make_mask(shape: LatentShape) -> Tensor:
    """About two thirds of the keys, and of the last input none."""
    mask = torch.rand(shape.batch, shape.keys, generator=torch.Generator().manual_seed(1)) < 0.67
    if shape.batch > 1:
        mask[-1] = False
    return mask


run = partial(dense_attention.run, cross_attention)
check_against_reference = partial(dense_attention.check_against_reference, cross_attention)


# --- the reference against explicit loops ---------------------------------------------------------------------------


def test_reference_is_the_formula() -> None:
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    dense_attention.check_formula(cross_attention, keys=[0, 1, 3], mask=mask)


def test_reference_is_latent_attention_s_and_torch_s() -> None:
    q, k, v, _ = make_inputs(LatentShape(2, 3, 17, 29, 16, 16))
    mask = torch.rand(2, 29) < 0.5
    with pk.use_backend("reference"):
        assert torch.equal(cross_attention(q, k, v), latent_attention(q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        torch.testing.assert_close(cross_attention(q, k, v, mask=mask), expected)


@pytest.mark.parametrize("backend", DOUBLE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(backend: str, dropout_p: float) -> None:
    leaves = [tensor.requires_grad_() for tensor in make_inputs(SMALL)[:3]]
    f = lambda *leaves: cross_attention(*leaves, mask=make_mask(SMALL), dropout_p=dropout_p, seed=3)  # noqa: E731
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(f, leaves)


# --- every backend against the float64 reference ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", CROSS_SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), TYPED_BACKENDS, ids=str)
def test_shape_grid(backend: str, dtype: torch.dtype, shape: LatentShape) -> None:
    check_against_reference(make_inputs(shape), backend, dtype)


@pytest.mark.parametrize("shape", CROSS_SHAPES[1:7], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_dropout(backend: str, shape: LatentShape) -> None:
    options = {"mask": make_mask(shape), "dropout_p": 0.3, "seed": 2**40 + 7}
    check_against_reference(make_inputs(shape), backend, torch.float32, **options)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, most) for most in (2, 2, 20, 40, 20, 20)]),
    spread=st.sampled_from([0.1, 1.0]),
    masked=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_small_shape(
    backend: str, sizes: tuple[int, ...], spread: float, masked: bool, dropout_p: float, seed: int
) -> None:
    shape = LatentShape(*sizes)
    options = {"mask": make_mask(shape) if masked else None, "dropout_p": dropout_p, "seed": seed}
    check_against_reference(make_inputs(shape, spread=spread, seed=seed), backend, torch.float32, **options)


def heads_last(inputs: list[Tensor]) -> list[Tensor]:
    """As projections leave them; rows of 16 channels are loaded as whole vectors."""
    return [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]


@pytest.mark.parametrize("layout", [channels_strided, misaligned, expanded, heads_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, layout: Callable[[list[Tensor]], list[Tensor]]) -> None:
    strided = layout([tensor.float() for tensor in make_inputs(LatentShape(2, 2, 17, 9, 16, 16))])
    assert any(not tensor.is_contiguous() for tensor in strided)
    mask = make_mask(LatentShape(2, 2, 17, 9, 16, 16)).t().contiguous().t()
    check_against_reference(strided, backend, torch.float32, mask=mask)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_results_lie_as_the_projections_read_them(backend: str) -> None:
    dense_attention.check_results_lie_as_the_projections_read_them(
        cross_attention, backend, LatentShape(2, 3, 5, 7, 4, 6)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_the_thousands(backend: str) -> None:
    """Scores reach 12,000, and a weight is off by eps times its score: 40 seeds needed 710 times the table's units."""
    inputs = make_inputs(LatentShape(1, 1, 9, 200, 16, 16), spread=3e3)
    check_against_reference(inputs, backend, torch.float32, amplification=1024.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_score_first_last_and_growing(backend: str) -> None:
    dense_attention.check_growing_and_falling_scores(cross_attention, backend, LatentShape(1, 1, 2, 300, 1, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_is_that_of_its_counters(backend: str) -> None:
    dense_attention.check_dropout_mask(cross_attention, backend, (2, 2, 20, 30))


def test_dropout_draws_from_torch_s_generator() -> None:
    dense_attention.check_dropout_draws_from_torch_s_generator(cross_attention)


# --- determinism, NaN, nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LatentShape(1, 1, 3, 300, 8, 8), LatentShape(1, 1, 300, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same(backend: str, shape: LatentShape) -> None:
    dense_attention.check_two_runs_are_equal(cross_attention, backend, shape, dropout_p=0.1, seed=1)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_what_depends_on_it_and_nothing_else(backend: str, which: int) -> None:
    shape = LatentShape(1, 2, 18, 40, 8, 8)
    dense_attention.check_nan_reaches_what_depends_on_it(cross_attention, backend, which, shape)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_keys_reach_nothing(backend: str, value: float) -> None:
    shape = LatentShape(2, 1, 5, 40, 8, 8)
    inputs, mask = [tensor.float() for tensor in make_inputs(shape)], make_mask(shape)
    expected = run(inputs, backend, mask=mask)
    hidden = ~mask[:, None, :, None]
    inputs[1].masked_fill_(hidden, value)
    inputs[2].masked_fill_(hidden, value)
    actual = run(inputs, backend, mask=mask)
    for name in NAMES:
        assert torch.equal(actual[name], expected[name]), name
    assert all((result[-1] == 0).all() for result in actual.values())  # the last input is masked as a whole
    for name in ("d_k", "d_v"):
        assert (actual[name].masked_select(hidden) == 0).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_inputs_do_no_harm_elsewhere(backend: str, value: float) -> None:
    shape = LatentShape(1, 2, 9, 20, 8, 8)
    for which in range(4):
        dense_attention.check_infinity_does_no_harm_elsewhere(cross_attention, backend, which, value, shape)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_queries_whose_scores_are_all_minus_infinity_get_zeros(backend: str) -> None:
    dense_attention.check_scores_of_minus_infinity_give_zeros(cross_attention, backend, LatentShape(1, 2, 4, 150, 1, 3))


@pytest.mark.parametrize(
    "shape",
    [LatentShape(*sizes, 5, 6) for sizes in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0))],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_in_zeros_out(backend: str, shape: LatentShape) -> None:
    dense_attention.check_zeros(cross_attention, backend, shape, torch.float32)


# --- what the native backend splits, and how it is compiled ----------------------------------------------------------

SPLIT_SHAPES = [
    LatentShape(1, 1, 700, 600, 5, 7),  # several groups of queries, parts of the keys
    LatentShape(2, 1, 900, 300, 4, 3),  # in backward: parts of the queries, several blocks of keys
    LatentShape(2, 3, 2, 1500, 4, 4),
]
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="without the compiled CPU module")


def prefix_mask(shape: LatentShape) -> Tensor:
    """As padding at the end leaves it: keys are then read where they stand."""
    return torch.arange(shape.keys) < torch.arange(shape.keys - 60, shape.keys - 60 + shape.batch)[:, None]


@needs_native
@pytest.mark.parametrize("masked", [None, make_mask, prefix_mask])
@pytest.mark.parametrize("shape", SPLIT_SHAPES, ids=str)
def test_parts_are_merged(shape: LatentShape, masked: Callable[[LatentShape], Tensor] | None) -> None:
    mask = None if masked is None else masked(shape)
    check_against_reference(make_inputs(shape), "native", torch.float32, mask=mask, dropout_p=0.2, seed=5)


@needs_native
@pytest.mark.parametrize("shape", SPLIT_SHAPES, ids=str)
def test_the_number_of_threads_changes_nothing(shape: LatentShape) -> None:
    inputs, threads, results = [tensor.float() for tensor in make_inputs(shape)], torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(inputs, "native", dropout_p=0.1, seed=1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@needs_native
def test_nan_in_one_part_of_the_keys_reaches_all_results() -> None:
    inputs = [tensor.float() for tensor in make_inputs(LatentShape(1, 1, 3, 700, 8, 8))]
    for key in (0, 400, 699):
        changed = [tensor.clone() for tensor in inputs]
        changed[1][0, 0, key, 3] = math.nan
        actual, expected = run(changed, "native"), run(changed, "reference")
        for name, value in actual.items():
            assert torch.equal(value.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_every_instruction_set(level: str) -> None:
    check_at(
        level,
        "test_cross_attention",
        """
        for shape in t.CROSS_SHAPES + t.SPLIT_SHAPES[:1]:
            options = dict(mask=t.make_mask(shape), dropout_p=0.2, seed=1)
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                t.check_against_reference(t.make_inputs(shape), "native", dtype)
            t.check_against_reference(t.make_inputs(shape), "native", torch.float32, **options)
        """,
    )


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend: str) -> None:
    device = device_of(backend)
    q, k, v, _ = (tensor.float().to(device).requires_grad_() for tensor in make_inputs(SMALL))
    mask = make_mask(SMALL).to(device)
    with pk.use_backend(backend):
        for arguments in ((None, None, 0.5, 0.0), (mask, torch.tensor([3]), 0.5, 0.5)):
            torch.library.opcheck(torch.ops.perceiver_kernels.cross_attention_fwd.default, (q, k, v, *arguments))


def test_compiles_whole_with_dynamic_shapes() -> None:
    dense_attention.check_compiles_whole_with_dynamic_shapes(cross_attention, masked=True)


def test_autocast_casts_as_torch_does() -> None:
    dense_attention.check_autocast_casts_as_torch_does(cross_attention)


def test_second_derivatives_are_refused() -> None:
    dense_attention.check_second_derivatives_are_refused(cross_attention)


def test_explain_and_the_limits_of_triton() -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 1, 3, 4, 1025, 2))
    assert "reference: runs this call" in explain(q, k, v)
    with pk.use_backend("triton"), pytest.raises(dispatch.BackendError) as raised:
        cross_attention(q, k, v)
    for reason in ("channels is 1025, must be from 1 to 1024", "compute dtype is float64, must be float32"):
        assert reason in str(raised.value)
    torch.testing.assert_close(cross_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


# --- bad input ------------------------------------------------------------------------------------------------------

BAD_MASK: list[tuple[dict[str, Any], str]] = [
    ({"mask": torch.zeros(2, 7)}, r"mask has dtype torch.float32, must be torch.bool \(True = attend\)"),
    ({"mask": torch.ones(2, 5).bool()}, r"mask has shape \(2, 5\), must be \(2, 7\): batch and keys of k"),
    ({"mask": torch.ones(2, 7, device="meta").bool()}, "mask is on meta, must be on cpu as k is"),
]


@pytest.mark.parametrize(
    ("changes", "message"), BAD_INPUT + BAD_MASK, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    dense_attention.check_bad_input(cross_attention, changes, message)


# --- machine code ---------------------------------------------------------------------------------------------------

INDEX = {"heads": "i32", "queries": "i32", "keys": "i32", "step": "i32", "size": "i32"}
NUMBERS = {"seed": "i64", "threshold": "i64", "keep_scale": "fp32", "scale": "fp32"}


def build(kernel: str, dtype: str, head_dim: int, arch: int = 90) -> Build:
    """A kernel as the launcher compiles it for many queries and keys of contiguous heads."""
    from perceiver_kernels.backends.triton import cross_attention as launcher

    rows = {"fp32": torch.float32, "bf16": torch.bfloat16}
    most = launcher.limits(torch.empty(1, 1, 2, head_dim, dtype=rows[dtype]))
    pointers = dict.fromkeys(("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"), f"*{dtype}")
    pointers |= dict.fromkeys(("lse", "peaks", "totals", "delta", "rests"), "*fp32")
    tensors = ["q", "k", "v", "out", "d"]
    strides = {f"{name}_{axis}": "i32" for name in tensors for axis in ("batch", "head", "row")}
    signature = pointers | strides | INDEX | NUMBERS | {"d_scale": "fp32", "mask_batch": "i32", "mask_row": "i32"}
    share = launcher.share(head_dim, most.channels)
    width = share.width + share.tail
    constants: dict[str, Any] = {f"{name}_channel": 1 for name in tensors} | {"mask": None, "SPLIT": False}
    if kernel == "bwd_tokens":
        share = launcher.share(head_dim, most.two_channels)
        width = 2 * (share.width + share.tail)
        constants |= {"WIDTH_V": share.width, "TAIL_V": share.tail}
    sizes = launcher.choose_tiles(1024, 0, 1, width, most, torch.device("cpu"))
    constants |= {"HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim, "DROPOUT": False, "PRECISION": "ieee"}
    constants |= {"ROWS": sizes.rows, "COLUMNS": sizes.columns, "WIDTH": share.width, "TAIL": share.tail}
    constants["CHUNK"] = min(most.chunk, 64)
    aligned = tuple(strides) if head_dim % 16 == 0 else ()
    name = f"cross_attention:cross_attention_{kernel}_kernel"
    return trimmed(Build(name, signature, constants, arch, sizes.warps, sizes.stages, aligned))


def trimmed(build: Build) -> Build:
    """Without what the kernel does not take."""
    from perceiver_kernels.backends.triton import cross_attention as launcher

    names = set(getattr(launcher, build.kernel.partition(":")[2]).arg_names)
    return dataclasses.replace(
        build,
        signature={name: kind for name, kind in build.signature.items() if name in names},
        constants={name: value for name, value in build.constants.items() if name in names},
        aligned=tuple(name for name in build.aligned if name in names),
    )


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "head_dim", "arch"),
    [("bf16", 64, 80), ("bf16", 261, 90), ("bf16", 1024, 90), ("fp32", 261, 90)],
)
@pytest.mark.parametrize("kernel", ["fwd", "bwd_rows", "bwd_tokens"])
def test_registers_do_not_spill(kernel: str, dtype: str, head_dim: int, arch: int) -> None:
    found = figures(build(kernel, dtype, head_dim, arch))
    assert found.spills == 0
    assert found.shared <= 160 * 1024
    assert (found.tensor_core > 0) == (dtype == "bf16")
