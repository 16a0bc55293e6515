"""Cross-attention: reference against loops, every backend against the float64 reference, registration, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from machine_code import Build, figures
from numerics import assert_no_worse
from shapes import CROSS_SHAPES, LatentShape, available_backends, declared, device_of
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.backends.reference.philox import dropout_scales
from perceiver_kernels.ops.cross_attention import OP, cross_attention, explain
from perceiver_kernels.ops.latent_attention import latent_attention

BACKENDS = [backend for backend in available_backends(OP) if backend != "reference"]
NAMES = ("out", "d_q", "d_k", "d_v")
SMALL = LatentShape(2, 2, 5, 7, 4, 6)


def dtypes_of(backend: str) -> list[torch.dtype]:
    """What a backend takes here; Triton's interpreter cannot do bfloat16."""
    without = {torch.bfloat16} if device_of(backend) == "cpu" and backend == "triton" else set()
    return [dtype for dtype in declared(OP, backend).data_dtypes if dtype not in without]


TYPED_BACKENDS = [(backend, dtype) for backend in BACKENDS for dtype in dtypes_of(backend)]


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


def make_mask(shape: LatentShape) -> Tensor:
    """About two thirds of the keys, and of the last input none."""
    mask = torch.rand(shape.batch, shape.keys, generator=torch.Generator().manual_seed(1)) < 0.67
    if shape.batch > 1:
        mask[-1] = False
    return mask


def run(inputs: list[Tensor], backend: str, mask: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """out and the gradients of q, k and v, on the CPU; the inputs' strides are kept."""
    device = device_of(backend)
    q, k, v = (tensor.detach().to(device).requires_grad_() for tensor in inputs[:3])
    with pk.use_backend(backend):
        out = cross_attention(q, k, v, mask=None if mask is None else mask.to(device), **options)
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(device))
    return {name: value.cpu() for name, value in zip(NAMES, (out.detach(), *gradients), strict=True)}


def check_against_reference(
    inputs: list[Tensor], backend: str, dtype: torch.dtype, amplification: float = 1.0, **options: Any
) -> None:
    typed = [tensor.to(dtype) for tensor in inputs]
    truth = run([tensor.double() for tensor in typed], "reference", **options)
    plain, actual = run(typed, "reference", **options), run(typed, backend, **options)
    for name, value in actual.items():
        assert value.dtype == dtype
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
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    with pk.use_backend("reference"):
        out = cross_attention(q, k, v, mask=mask, scale=0.3)
    for b, h, n in itertools.product(range(2), range(2), range(3)):
        scores = {m: 0.3 * (q[b, h, n] @ k[b, h, m]) for m in range(5) if mask[b, m]}
        total = sum(math.exp(score) for score in scores.values())
        expected = sum(math.exp(score) / total * v[b, h, m] for m, score in scores.items())
        torch.testing.assert_close(out[b, h, n], expected)


def test_reference_is_latent_attention_s_and_torch_s() -> None:
    q, k, v, _ = make_inputs(LatentShape(2, 3, 17, 29, 16, 16))
    mask = torch.rand(2, 29) < 0.5
    with pk.use_backend("reference"):
        assert torch.equal(cross_attention(q, k, v), latent_attention(q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        torch.testing.assert_close(cross_attention(q, k, v, mask=mask), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p: float) -> None:
    leaves = [tensor.requires_grad_() for tensor in make_inputs(SMALL)[:3]]
    f = lambda *leaves: cross_attention(*leaves, mask=make_mask(SMALL), dropout_p=dropout_p, seed=3)  # noqa: E731
    with pk.use_backend("reference"):
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


def channels_strided(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs]


def misaligned(inputs: list[Tensor]) -> list[Tensor]:
    return [F.pad(tensor, (1, 2, 1, 0))[..., 1:, 1:-2] for tensor in inputs]


def expanded(inputs: list[Tensor]) -> list[Tensor]:
    """One head for all, one row for all, one channel for all, and the gradient of a sum."""
    q, k, v, gradient = inputs
    one = gradient.new_ones(()).expand(gradient.shape)
    return [q[:, :1].expand_as(q), k[:, :, :1].expand_as(k), v[..., :1].expand_as(v), one]


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
    for value in run([tensor.float() for tensor in make_inputs(SMALL)], backend).values():
        assert value.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_the_thousands(backend: str) -> None:
    inputs = make_inputs(LatentShape(1, 1, 9, 200, 16, 16), spread=3e3)
    check_against_reference(inputs, backend, torch.float32, amplification=3e3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_score_first_last_and_growing(backend: str) -> None:
    q, k, v, gradient = make_inputs(LatentShape(1, 1, 2, 300, 1, 8))
    for keys in (torch.arange(300.0), -torch.arange(300.0), (torch.arange(300.0) == 299) * 900.0):
        inputs = [torch.full_like(q, 0.7), keys.double().view(k.shape), v, gradient]
        check_against_reference(inputs, backend, torch.float32, amplification=100.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_is_that_of_its_counters(backend: str) -> None:
    """With equal scores and the identity as values, the output is the mask."""
    batch, heads, queries, keys = 2, 2, 20, 30
    device = device_of(backend)
    q, k = torch.zeros(batch, heads, queries, 1, device=device), torch.zeros(batch, heads, keys, 1, device=device)
    v = torch.eye(keys, device=device).expand(batch, heads, keys, keys)
    with pk.use_backend(backend):
        out = cross_attention(q, k, v, dropout_p=0.3, seed=1).cpu()
    scales = dropout_scales(torch.Size((batch, heads * queries, keys)), 0.3, 1, torch.float32, torch.device("cpu"))
    assert torch.equal(out != 0, scales.view(out.shape) != 0)


def test_dropout_draws_from_torch_s_generator() -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 2, 8, 64, 4, 4))
    torch.manual_seed(5)
    first, second = (cross_attention(q, k, v, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(cross_attention(q, k, v, dropout_p=0.3), first)
    assert not torch.equal(first, second)


# --- determinism, NaN, nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LatentShape(1, 1, 3, 300, 8, 8), LatentShape(1, 1, 300, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same(backend: str, shape: LatentShape) -> None:
    inputs = [tensor.float() for tensor in make_inputs(shape)]
    first, second = (run(inputs, backend, dropout_p=0.1, seed=1) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_what_depends_on_it_and_nothing_else(backend: str, which: int) -> None:
    inputs = [tensor.float() for tensor in make_inputs(LatentShape(1, 2, 18, 40, 8, 8))]
    inputs[which][0, 0, 17, 3] = math.nan
    actual, expected = run(inputs, backend), run(inputs, "reference")
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert value[:, 1].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_keys_reach_nothing(backend: str, value: float) -> None:
    shape = LatentShape(2, 1, 5, 40, 8, 8)
    inputs, mask = [tensor.float() for tensor in make_inputs(shape)], make_mask(shape)
    expected = run(inputs, backend, mask)
    hidden = ~mask[:, None, :, None]
    inputs[1].masked_fill_(hidden, value)
    inputs[2].masked_fill_(hidden, value)
    actual = run(inputs, backend, mask)
    for name in NAMES:
        assert torch.equal(actual[name], expected[name]), name
    assert all((result[-1] == 0).all() for result in actual.values())  # the last input is masked as a whole
    for name in ("d_k", "d_v"):
        assert (actual[name].masked_select(hidden) == 0).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_inputs_do_no_harm_elsewhere(backend: str, value: float) -> None:
    for which in range(4):
        inputs = [tensor.float() for tensor in make_inputs(LatentShape(1, 2, 9, 20, 8, 8))]
        inputs[which][0, 0, 7, 3] = value
        actual, expected = run(inputs, backend), run(inputs, "reference")
        assert torch.equal(actual["out"].isfinite(), expected["out"].isfinite())
        for result in actual.values():
            assert result[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_queries_whose_scores_are_all_minus_infinity_get_zeros(backend: str) -> None:
    inputs = [tensor.float() for tensor in make_inputs(LatentShape(1, 2, 4, 150, 1, 3))]
    inputs[0].abs_()
    inputs[1][0, 0] = -math.inf
    out = run(inputs, backend)["out"]
    assert (out[0, 0] == 0).all()
    assert (out[0, 1] != 0).all()


@pytest.mark.parametrize(
    "shape",
    [LatentShape(*sizes, 5, 6) for sizes in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0))],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_in_zeros_out(backend: str, shape: LatentShape) -> None:
    inputs = [tensor.float() for tensor in make_inputs(shape)]
    for value, like in zip(run(inputs, backend).values(), (inputs[3], *inputs[:3]), strict=True):
        assert value.shape == like.shape
        assert (value == 0).all()


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
    def f(qkv: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return cross_attention(q, k, v, mask=mask).transpose(1, 2).flatten(2).square().sum() * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows in (12, 33):
        leaves = [torch.randn(2, rows, 3, 4, 8, generator=torch.Generator().manual_seed(rows)) for _ in range(2)]
        mask = torch.arange(rows).expand(2, rows) % 3 > 0
        results = [g(leaf.requires_grad_(), mask) for g, leaf in zip((f, compiled), leaves, strict=True)]
        torch.testing.assert_close(results[0], results[1])
        gradients = [torch.autograd.grad(result, leaf) for result, leaf in zip(results, leaves, strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_autocast_casts_as_torch_does() -> None:
    q, k, v, _ = (tensor.float() for tensor in make_inputs(LatentShape(1, 2, 9, 9, 8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inputs in ((q, k, v), (q.bfloat16(), k, v), (q.double(), k.double(), v.double())):
            ours, theirs = cross_attention(*inputs), F.scaled_dot_product_attention(*inputs)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_second_derivatives_are_refused() -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 1, 3, 4, 2, 2))
    out = cross_attention(q.requires_grad_(), k, v)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_attention has no second derivatives"):
        gradient.sum().backward()


def test_explain_and_the_limits_of_triton() -> None:
    q, k, v, _ = make_inputs(LatentShape(1, 1, 3, 4, 1025, 2))
    assert "reference: runs this call" in explain(q, k, v)
    with pk.use_backend("triton"), pytest.raises(dispatch.BackendError) as raised:
        cross_attention(q, k, v)
    for reason in ("channels is 1025, must be from 1 to 1024", "compute dtype is float64, must be float32"):
        assert reason in str(raised.value)
    torch.testing.assert_close(cross_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 4)}, "q has 3 dimensions, must have 4"),
        ({"v": torch.zeros(2, 3, 7, 0)}, "v has head_dim 0, must have at least 1"),
        ({"q": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, "q has dtype torch.int64, must be float32, float64"),
        ({"k": torch.zeros(2, 3, 7, 4).double()}, "k has dtype torch.float64, must be torch.float32 as q has"),
        ({"v": torch.zeros(2, 3, 7, 6, device="meta")}, "v is on meta, must be on cpu as q is"),
        ({"k": torch.zeros(1, 3, 7, 4)}, "k has batch 1, must be 2 as q has"),
        ({"v": torch.zeros(2, 1, 7, 6)}, "v has 1 heads, must have 3 as q has"),
        ({"k": torch.zeros(2, 3, 7, 5)}, "k has head_dim 5, must have 4 as q has"),
        ({"v": torch.zeros(2, 3, 8, 6)}, "v has 8 tokens, must have 7 as k has"),
        ({"mask": torch.zeros(2, 7)}, r"mask has dtype torch.float32, must be torch.bool \(True = attend\)"),
        ({"mask": torch.ones(2, 5).bool()}, r"mask has shape \(2, 5\), must be \(2, 7\): batch and keys of k"),
        ({"mask": torch.ones(2, 7, device="meta").bool()}, "mask is on meta, must be on cpu as k is"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0, must be at least 0 and less than 1"),
        ({"seed": -1}, r"seed is -1, must be from 0 to 2\^63 - 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    inputs = {"q": torch.zeros(2, 3, 5, 4), "k": torch.zeros(2, 3, 7, 4), "v": torch.zeros(2, 3, 7, 6)}
    with pytest.raises(ValueError, match=message):
        cross_attention(**{**inputs, **changes})


# --- machine code ---------------------------------------------------------------------------------------------------

INDEX = {"heads": "i32", "queries": "i32", "keys": "i32", "step": "i32", "size": "i32"}
NUMBERS = {"seed": "i64", "threshold": "i64", "keep_scale": "fp32", "scale": "fp32"}


def build(kernel: str, dtype: str, head_dim: int, arch: int = 90) -> Build:
    """A kernel as the launcher compiles it for many queries and keys of contiguous heads."""
    from perceiver_kernels.backends.triton import cross_attention as launcher

    rows = {"fp32": torch.float32, "bf16": torch.bfloat16}
    most = launcher.limits(torch.empty(1, 1, 2, head_dim, dtype=rows[dtype]))
    pointers = dict.fromkeys(("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"), f"*{dtype}")
    pointers |= dict.fromkeys(("lse", "peaks", "totals", "delta"), "*fp32")
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
