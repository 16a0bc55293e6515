"""Absorbed attention: reference against loops, every backend against the float64 reference, features, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from another_process import INSTRUCTION_SETS, check_at
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import Build, figures, needs_triton
from numerics import assert_no_worse
from shapes import available_backends, device_of, dtypes_of
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.backends.reference.philox import dropout_scales
from perceiver_kernels.ops.absorbed_attention import OP, absorbed_attention, explain
from perceiver_kernels.ops.fourier_encode import FourierBands, fourier_encode

BACKENDS = [backend for backend in available_backends(OP) if backend != "reference"]
DOUBLE = [backend for backend in available_backends(OP) if torch.float64 in dtypes_of(OP, backend)]
NAMES = ("acc", "lse", "total", "d_a", "d_x")

pytestmark = pytest.mark.usefixtures("fused_multiply_add")


@dataclass(frozen=True)
class AbsorbedShape:
    """One call of absorbed attention; a token has `channels` data channels and the features of `axes` coordinates."""

    batch: int
    query_batch: int
    rows: int
    tokens: int
    channels: int
    axes: int = 0
    num_bands: int = 0
    order: str = "per_axis"
    concat_pos: bool = True
    sine_only: bool = False
    max_freq: float = 20.0

    def __str__(self) -> str:
        features = f"-A{self.axes}x{self.num_bands}-{self.order}" if self.axes else ""
        return f"B{self.batch}-Q{self.query_batch}-R{self.rows}-M{self.tokens}-c{self.channels}{features}"

    @property
    def bands(self) -> FourierBands | None:
        if not self.axes:
            return None
        options = (self.order, "linear", self.concat_pos, self.sine_only)
        return FourierBands(self.axes, self.num_bands, self.max_freq, *options)

    @property
    def width(self) -> int:
        return self.channels + (self.bands.num_channels if self.bands else 0)


SMALL = AbsorbedShape(2, 1, 5, 7, 3, 2, 3)
SHAPES = [
    AbsorbedShape(1, 1, 1, 1, 2),
    AbsorbedShape(2, 1, 15, 17, 5),
    AbsorbedShape(2, 2, 17, 33, 3, 2, 4),
    AbsorbedShape(1, 1, 16, 129, 1, 3, 6, "grouped"),
    AbsorbedShape(2, 1, 3, 127, 0, 1, 7, concat_pos=False),
    AbsorbedShape(1, 1, 2, 200, 17, 1, 5, sine_only=True),  # few rows and many tokens: split over tokens
    AbsorbedShape(1, 1, 127, 2, 4, 2, 3, "grouped", False, True),
    AbsorbedShape(1, 1, 5, 40, 3, 2, 64, max_freq=224.0),  # angles of hundreds of radians
    AbsorbedShape(1, 1, 9, 31, 261),
    AbsorbedShape(1, 1, 3, 16, 512),
]


@dataclass
class Inputs:
    """a, x and positions, and the gradients of acc, lse and total."""

    a: Tensor
    x: Tensor | None
    positions: Tensor | None
    upstream: list[Tensor]

    def map(self, change: Any) -> Inputs:
        """With another x."""
        return Inputs(self.a, None if self.x is None else change(self.x), self.positions, self.upstream)

    def double(self) -> Inputs:
        x = None if self.x is None else self.x.double()
        return Inputs(self.a.double(), x, self.positions, [tensor.double() for tensor in self.upstream])


def make_inputs(shape: AbsorbedShape, *, spread: float = 1.0, shared_positions: bool = False) -> Inputs:
    """In float32; a has the mean 0 over its channels, as LayerNorm asks for."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(shape.query_batch, shape.rows, shape.width, generator=g) * spread / shape.width**0.5
    x = torch.randn(shape.batch, shape.tokens, shape.channels, generator=g) if shape.channels else None
    positions = None
    if shape.axes:
        batch = 1 if shared_positions else shape.batch
        positions = 2 * torch.rand(batch, shape.tokens, shape.axes, generator=g) - 1
    sizes = ((shape.batch, shape.rows, shape.width), (shape.batch, shape.rows), (shape.batch, shape.rows))
    upstream = [torch.randn(size, generator=g) for size in sizes]
    return Inputs(a - a.mean(2, keepdim=True), x, positions, upstream)


def make_mask(shape: AbsorbedShape) -> Tensor:
    """About two thirds of the tokens, and of the last input none."""
    mask = torch.rand(shape.batch, shape.tokens, generator=torch.Generator().manual_seed(1)) < 0.67
    if shape.batch > 1:
        mask[-1] = False
    return mask


def run(
    inputs: Inputs, bands: FourierBands | None, backend: str, mask: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The state and the gradients of a and x, on the CPU; x's strides are kept."""
    device = device_of(backend)
    to = lambda tensor: None if tensor is None else tensor.detach().to(device)  # noqa: E731
    a, x, positions = to(inputs.a), to(inputs.x), to(inputs.positions)
    leaves = [leaf.requires_grad_() for leaf in (a, x) if leaf is not None]
    with pk.use_backend(backend):
        state = absorbed_attention(a, x, positions, bands, mask=to(mask), **options)
        gradients = torch.autograd.grad(state, leaves, [to(tensor) for tensor in inputs.upstream])
    return {name: value.detach().cpu() for name, value in zip(NAMES, (*state, *gradients), strict=False)}


def check_against_reference(
    inputs: Inputs, bands: FourierBands | None, backend: str, amplification: float = 1.0, **options: Any
) -> None:
    truth = run(inputs.double(), bands, "reference", **options)
    plain, actual = run(inputs, bands, "reference", **options), run(inputs, bands, backend, **options)
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype
        assert_no_worse(value, plain[name], truth[name], name, amplification)


# --- the reference against explicit loops ---------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_reference_is_the_formula(eps: float | None) -> None:
    shape = AbsorbedShape(2, 1, 3, 5, 2, 2, 2)
    inputs, mask = make_inputs(shape).double(), torch.tensor([[True, True, False, True, False]] * 2)
    assert inputs.x is not None and inputs.positions is not None
    acc, lse, total = absorbed_attention(inputs.a, inputs.x, inputs.positions, shape.bands, eps=eps, mask=mask)
    for b, i in itertools.product(range(2), range(3)):
        tokens, scores, factors = {}, {}, {}
        for m in (m for m in range(5) if mask[b, m]):
            z = torch.cat([inputs.x[b, m], fourier_encode(inputs.positions[b, m].double(), 2, 20.0)])
            tokens[m], factors[m] = z, 1.0 if eps is None else 1 / math.sqrt(z.var(correction=0).item() + eps)
            scores[m] = factors[m] * (inputs.a[0, i] @ z).item()
        weights = {m: math.exp(score) for m, score in scores.items()}
        everything = sum(weights.values())
        expected = sum(weights[m] / everything * factors[m] * tokens[m] for m in tokens)
        torch.testing.assert_close(acc[b, i], expected)
        assert lse[b, i].item() == pytest.approx(math.log(everything))
        assert total[b, i].item() == pytest.approx(1.0)


def test_it_is_attention_to_the_layer_normed_tokens() -> None:
    """With LayerNorm, a centred and acc centred: what attention to LayerNorm(z) gives."""
    shape = AbsorbedShape(2, 2, 4, 9, 3, 2, 3)
    inputs = make_inputs(shape).double()
    assert inputs.positions is not None and inputs.x is not None
    z = torch.cat([inputs.x, fourier_encode(inputs.positions.double(), 3, 20.0)], 2)
    normed = torch.nn.functional.layer_norm(z, (shape.width,))
    expected = (inputs.a @ normed.transpose(1, 2)).softmax(-1) @ normed
    acc, _, _ = absorbed_attention(inputs.a, inputs.x, inputs.positions, shape.bands, eps=1e-5)
    torch.testing.assert_close(acc - acc.mean(2, keepdim=True), expected)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("backend", DOUBLE)
def test_gradcheck(backend: str, dropout_p: float, eps: float | None) -> None:
    inputs, mask = make_inputs(SMALL).double(), make_mask(SMALL)
    options: dict[str, Any] = {"eps": eps, "mask": mask, "dropout_p": dropout_p, "seed": 3}

    def f(a: Tensor, x: Tensor) -> list[Tensor]:
        acc, lse, total = absorbed_attention(a, x, inputs.positions, SMALL.bands, **options)
        return [acc, lse.nan_to_num(neginf=0.0), total]  # -inf for the input that is masked as a whole

    assert inputs.x is not None
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(f, (inputs.a.requires_grad_(), inputs.x.requires_grad_()))


# --- every backend against the float64 reference ---------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shape_grid(backend: str, shape: AbsorbedShape, eps: float | None) -> None:
    check_against_reference(make_inputs(shape), shape.bands, backend, eps=eps)


@pytest.mark.parametrize("shape", SHAPES[1:7], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_dropout(backend: str, shape: AbsorbedShape) -> None:
    options = {"mask": make_mask(shape), "dropout_p": 0.3, "seed": 2**40 + 7, "eps": 1e-5}
    check_against_reference(make_inputs(shape, shared_positions=True), shape.bands, backend, **options)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, most) for most in (2, 20, 40, 9)]),
    shared=st.booleans(),
    axes=st.integers(0, 2),
    num_bands=st.integers(1, 5),
    order=st.sampled_from(["per_axis", "grouped"]),
    concat_pos=st.booleans(),
    sine_only=st.booleans(),
    eps=st.sampled_from([None, 1e-5]),
    masked=st.booleans(),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_small_shape(
    backend: str, sizes: tuple[int, ...], shared: bool, eps: float | None, masked: bool, **features: Any
) -> None:
    batch, *others = sizes
    shape = AbsorbedShape(batch, 1 if shared else batch, *others, **features)
    mask = make_mask(shape) if masked else None
    check_against_reference(make_inputs(shape), shape.bands, backend, eps=eps, mask=mask)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_data_dtypes(backend: str, shape: AbsorbedShape) -> None:
    for dtype in dtypes_of(OP, backend):
        check_against_reference(make_inputs(shape).map(lambda x: x.to(dtype)), shape.bands, backend, eps=1e-5)  # noqa: B023


def channels_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def misaligned(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 2, 1, 0))[:, 1:, 1:-2]


def expanded(x: Tensor) -> Tensor:
    return x[:, :1, :1].expand_as(x)


@pytest.mark.parametrize("layout", [channels_first, misaligned, expanded])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, layout: Any) -> None:
    shape = AbsorbedShape(2, 1, 3, 9, 16, 2, 3)
    inputs = make_inputs(shape).map(layout)
    assert inputs.positions is not None and inputs.x is not None and not inputs.x.is_contiguous()
    inputs.positions = inputs.positions.transpose(1, 2).contiguous().transpose(1, 2)
    check_against_reference(inputs, shape.bands, backend, mask=make_mask(shape).t().contiguous().t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_are_as_if_rounded_once(backend: str) -> None:
    """A single token per input: acc is its z. Octaves up to 2^9 and positions outside of [-1, 1]."""
    bands = FourierBands(1, 10, None, "per_axis", "log2", True, False)
    positions = torch.cat([torch.linspace(-3, 3, 59), torch.tensor([0.0, 0.5, -0.25, 1e-20])]).view(-1, 1, 1)
    device = device_of(backend)
    with pk.use_backend(backend):
        acc, _, _ = absorbed_attention(torch.zeros(1, 1, 21, device=device), None, positions.to(device), bands)
    truth = fourier_encode(positions.double(), 10, spacing="log2")
    assert (acc.cpu() - truth).abs().max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_alone_shared_by_all_inputs(backend: str, dtype: torch.dtype) -> None:
    shape = AbsorbedShape(3, 3, 4, 20, 0, 2, 3)
    inputs = make_inputs(shape, shared_positions=True)
    assert inputs.positions is not None
    inputs.positions = inputs.positions.to(dtype)
    check_against_reference(inputs, shape.bands, backend, eps=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_the_thousands(backend: str) -> None:
    shape = AbsorbedShape(1, 1, 5, 100, 3, 1, 4)
    check_against_reference(make_inputs(shape, spread=3e3), shape.bands, backend, amplification=3e3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_is_that_of_its_counters(backend: str) -> None:
    """With equal scores and the identity as tokens, acc is the mask."""
    device = device_of(backend)
    a, x = torch.zeros(1, 20, 30, device=device), torch.eye(30, device=device).expand(2, 30, 30)
    with pk.use_backend(backend):
        acc, _, total = absorbed_attention(a, x, dropout_p=0.3, seed=1)
    scales = dropout_scales(torch.Size((2, 20, 30)), 0.3, 1, torch.float32, torch.device("cpu"))
    assert torch.equal(acc.cpu() != 0, scales != 0)
    torch.testing.assert_close(total.cpu(), scales.mean(2))


# --- determinism, NaN, nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same(backend: str) -> None:
    shape = AbsorbedShape(2, 1, 3, 200, 3, 2, 3)
    first, second = (run(make_inputs(shape), shape.bands, backend, dropout_p=0.1, seed=1) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("which", ["a", "x", "positions", "upstream"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_what_depends_on_it_and_nothing_else(backend: str, which: str, eps: float | None) -> None:
    shape = AbsorbedShape(2, 2, 5, 40, 3, 2, 3)
    inputs = make_inputs(shape)
    tensor = inputs.upstream[0] if which == "upstream" else getattr(inputs, which)
    tensor[0, 3, 1] = math.nan
    actual, expected = run(inputs, shape.bands, backend, eps=eps), run(inputs, shape.bands, "reference", eps=eps)
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert value[1].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_tokens_reach_nothing(backend: str, value: float) -> None:
    shape = AbsorbedShape(2, 2, 5, 40, 3, 2, 3)
    inputs, mask = make_inputs(shape), make_mask(shape)
    expected = run(inputs, shape.bands, backend, mask, eps=1e-5)
    assert inputs.x is not None and inputs.positions is not None
    inputs.x.masked_fill_(~mask[..., None], value)
    inputs.positions.masked_fill_(~mask[..., None], value)
    actual = run(inputs, shape.bands, backend, mask, eps=1e-5)
    for name in NAMES:
        assert torch.equal(actual[name], expected[name]), name
    assert (actual["lse"][-1] == -math.inf).all()  # the last input is masked as a whole
    assert all((actual[name][-1] == 0).all() for name in NAMES if name != "lse")
    assert (actual["d_x"].masked_select(~mask[..., None]) == 0).all()


@pytest.mark.parametrize(
    "shape",
    [AbsorbedShape(0, 1, 3, 4, 5), AbsorbedShape(2, 1, 0, 4, 5), AbsorbedShape(2, 1, 3, 0, 5, 1, 2)],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_in_zeros_out(backend: str, shape: AbsorbedShape) -> None:
    inputs = make_inputs(shape)
    for name, value in run(inputs, shape.bands, backend).items():
        assert (value == (-math.inf if name == "lse" else 0)).all()


# --- what the native backend splits, and how it is compiled ----------------------------------------------------------

SPLIT_SHAPES = [
    AbsorbedShape(2, 1, 20, 700, 3, 2, 3),  # parts of the tokens
    AbsorbedShape(1, 1, 700, 600, 3, 1, 2),  # several groups of rows; in backward, parts of the rows
    AbsorbedShape(2, 2, 2, 300, 1024),
]
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="without the compiled CPU module")


@needs_native
@pytest.mark.parametrize("shape", SPLIT_SHAPES, ids=str)
def test_parts_are_merged_on_any_number_of_threads(shape: AbsorbedShape) -> None:
    options: dict[str, Any] = {"mask": make_mask(shape), "eps": 1e-5, "dropout_p": 0.2, "seed": 5}
    inputs, threads = make_inputs(shape), torch.get_num_threads()
    check_against_reference(inputs, shape.bands, "native", **options)
    expected = run(inputs, shape.bands, "native", **options)
    try:
        torch.set_num_threads(5)
        actual = run(inputs, shape.bands, "native", **options)
    finally:
        torch.set_num_threads(threads)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@needs_native
def test_float64_tokens_of_float32_rows() -> None:
    shape = SHAPES[2]
    check_against_reference(make_inputs(shape).map(lambda x: x.double()), shape.bands, "native", eps=1e-5)


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_every_instruction_set(level: str) -> None:
    check_at(
        level,
        "test_absorbed_attention",
        """
        for shape in t.SHAPES + t.SPLIT_SHAPES[:1]:
            t.check_against_reference(t.make_inputs(shape), shape.bands, "native", eps=1e-5, mask=t.make_mask(shape))
        """,
    )


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend: str) -> None:
    inputs, device = make_inputs(SMALL), device_of(backend)
    assert inputs.x is not None and inputs.positions is not None
    a, x = (tensor.to(device).requires_grad_() for tensor in (inputs.a, inputs.x))
    positions, mask = inputs.positions.to(device), make_mask(SMALL).to(device)
    mask[-1, 0] = True
    features = ([1.0, 2.0, 3.0] * 2, False, True, False)
    op = torch.ops.perceiver_kernels.absorbed_attention_fwd.default
    with pk.use_backend(backend):
        torch.library.opcheck(op, (a, x, positions, mask, torch.tensor([3]), *features, 1e-5, 0.5))
        torch.library.opcheck(op, (a[..., :3], x, None, None, None, [], False, False, False, None, 0.0))


def test_compiles_whole_with_dynamic_shapes() -> None:
    bands = SMALL.bands

    def f(a: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        acc, lse, total = absorbed_attention(a * 2, x, positions, bands, eps=1e-5)
        return acc.square().sum() + lse.sum() + total.sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for tokens in (12, 33):
        inputs = make_inputs(dataclasses.replace(SMALL, tokens=tokens))
        leaves = [inputs.a.requires_grad_(), inputs.x.requires_grad_()]  # type: ignore[union-attr]
        results = [g(*leaves, inputs.positions) for g in (f, compiled)]  # type: ignore[arg-type]
        torch.testing.assert_close(results[0], results[1])
        first, second = (torch.autograd.grad(result, leaves) for result in results)
        torch.testing.assert_close(first, second)


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(SMALL)
    acc, _, _ = absorbed_attention(inputs.a.requires_grad_(), inputs.x, inputs.positions, SMALL.bands)
    (gradient,) = torch.autograd.grad(acc.square().sum(), inputs.a, create_graph=True)
    with pytest.raises(RuntimeError, match="absorbed_attention has no second derivatives"):
        gradient.sum().backward()


def test_explain_and_the_limits_of_triton() -> None:
    a, x = torch.zeros(1, 2, 513).double(), torch.zeros(1, 3, 513).double()
    assert f"{BACKENDS[-1] if 'native' in BACKENDS else 'reference'}: runs this call" in explain(a, x)
    with pk.use_backend("triton"), pytest.raises(dispatch.BackendError) as raised:
        absorbed_attention(a, x)
    for reason in ("channels is 513, must be from 1 to 512", "compute dtype is float64, must be float32"):
        assert reason in str(raised.value)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(5, 17)}, "a has 2 dimensions, must have 3"),
        ({"a": torch.zeros(1, 5, 17).half()}, "a has dtype torch.float16, must be torch.float32 or torch.float64"),
        ({"x": None, "positions": None, "bands": None}, "x and positions are None, must have one of them at least"),
        ({"bands": None}, "bands is None, must be given as positions is"),
        ({"positions": None}, "positions is None, must be given as bands is"),
        ({"x": torch.zeros(2, 3)}, "x has 2 dimensions, must have 3"),
        ({"x": torch.zeros(2, 7, 3).long()}, "x has dtype torch.int64, must be float32, float64, bfloat16 or float16"),
        ({"positions": torch.zeros(2, 7, 3)}, r"positions has shape \(2, 7, 3\), must be \(batch or 1, tokens, 2\)"),
        ({"positions": torch.zeros(2, 7, 2).double()}, "positions has dtype torch.float64, must be float32, bfloat16"),
        ({"positions": torch.zeros(2, 7, 2, requires_grad=True)}, "positions require a gradient, must not"),
        ({"positions": torch.zeros(3, 7, 2)}, "positions has batch 3, must be 1 or 2 as x has"),
        ({"positions": torch.zeros(2, 8, 2)}, "positions has 8 tokens, must have 7 as x has"),
        ({"a": torch.zeros(1, 5, 16)}, "a has 16 channels, must have 17: those of x and of the features"),
        ({"a": torch.zeros(3, 5, 17)}, "a has batch 3, must be 1 or 2 as the tokens have"),
        ({"eps": -1.0}, "eps is -1.0, must be at least 0"),
        ({"mask": torch.zeros(2, 7)}, r"mask has dtype torch.float32, must be torch.bool \(True = attend\)"),
        ({"mask": torch.ones(2, 5).bool()}, r"mask has shape \(2, 5\), must be \(2, 7\): batch and tokens"),
        ({"x": torch.zeros(2, 7, 3, device="meta")}, "x is on meta, must be on cpu as a is"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0, must be at least 0 and less than 1"),
        ({"seed": -1}, r"seed is -1, must be from 0 to 2\^63 - 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    inputs = {
        "a": torch.zeros(1, 5, 17),
        "x": torch.zeros(2, 7, 3),
        "positions": torch.zeros(2, 7, 2),
        "bands": SMALL.bands,
    }
    with pytest.raises(ValueError, match=message):
        absorbed_attention(**{**inputs, **changes})  # type: ignore[arg-type]


# --- machine code ---------------------------------------------------------------------------------------------------

TABLES = ["a", "x", "positions", "frequencies", "sums", "peaks", "totals"]
TABLES += ["d_acc", "reference", "correction", "delta", "d_total", "d_a", "rests", "d_x"]
INDICES = ["a_batch", "x_batch", "x_row", "p_batch", "p_row", "p_axis", "mask_batch", "mask_row"]
INDICES += ["rows", "tokens", "step", "size"]


def build(kernel: str, channels: int, axes: int, num_bands: int) -> Build:
    """A kernel as the launcher compiles it for many rows and float32 tokens with LayerNorm."""
    from perceiver_kernels.backends.triton import absorbed_attention as launcher

    waves = axes * num_bands
    data = launcher.share(channels + axes, 1 << 30)
    wave_width = launcher.tiles.next_power_of_2(waves, 16)
    width = data.width + data.tail + 2 * wave_width
    most = launcher.limits(kernel, width)
    sizes = launcher.choose_tiles(1024, 0, 1, width, most, torch.device("cpu"))
    signature = {**dict.fromkeys(TABLES, "*fp32"), **dict.fromkeys(INDICES, "i32")}
    signature |= {"lse": "*fp64", "eps": "fp32", "seed": "i64", "threshold": "i64", "keep_scale": "fp32"}
    constants = {
        "mask": None, "x_channel": 1, "CHANNELS": channels, "AXES": axes, "WAVES": waves, "COSINES": waves,
        "BANDS": num_bands, "SPLIT": True, "DROPOUT": False, "PRECISION": "ieee", "ROWS": sizes.rows,
        "COLUMNS": sizes.columns, "WIDTH": data.width, "TAIL": data.tail, "WAVE_WIDTH": wave_width,
    }  # fmt: skip
    name = f"absorbed_attention_{kernel}_kernel"
    taken = set(getattr(launcher, name).arg_names)
    return Build(
        f"absorbed_attention:{name}",
        {argument: kind for argument, kind in signature.items() if argument in taken},
        {argument: value for argument, value in constants.items() if argument in taken},
        warps=sizes.warps,
        stages=sizes.stages,
    )


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "num_bands"), [("fwd", 6), ("fwd", 64), ("bwd_rows", 6), ("bwd_tokens", 6), ("bwd_tokens", 64)]
)
def test_registers_do_not_spill(kernel: str, num_bands: int) -> None:
    found = figures(build(kernel, 3, 2, num_bands))
    assert found.spills == 0
    assert found.shared <= 160 * 1024
