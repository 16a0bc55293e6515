"""fourier_encode on every backend: against the formula in float64, gradients, registration, compilation, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import Build, built, built_loops, figures, needs_triton
from numerics import assert_no_worse, error
from shapes import available_backends, device_of, dtypes_of
from torch import Tensor

from perceiver_kernels.backends.reference import fourier_encode as reference
from perceiver_kernels.backends.triton.runtime import interpreting
from perceiver_kernels.dispatch import BackendError, use_backend
from perceiver_kernels.encodings import FourierEncoding, FourierGrid
from perceiver_kernels.ops.fourier_encode import OP, explain, fourier_encode

BACKENDS = available_backends(OP)
SPACINGS: dict[str, Any] = {"linear": "linear", "log2": "log2", "explicit": [0.5, 3.0, 2.25, -1.0, 7.0]}
FEATURES = [(True, False), (True, True), (False, False), (False, True)]


def widest(backend: str) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes_of(OP, backend) else torch.float32


def slack(backend: str) -> float:
    """How far features may be off before they are rounded: angles of some hundred radians, or sines in float32."""
    return 2e-13 if widest(backend) == torch.float64 else 8e-8


WITH_FLOAT64 = [backend for backend in BACKENDS if widest(backend) == torch.float64]


pytestmark = pytest.mark.usefixtures("fused_multiply_add")


def explicit_formula(
    positions: Tensor, frequencies: Sequence[Sequence[float]], order: str, concat_pos: bool, sine_only: bool
) -> Tensor:
    """Feature by feature in float64, one column of Python at a time."""
    x = positions.cpu().double()
    columns: dict[str, list[list[Tensor]]] = {"sin": [], "cos": [], "pos": []}
    for axis, axis_frequencies in enumerate(frequencies):
        columns["sin"].append([(math.pi * f * x[..., axis]).sin() for f in axis_frequencies])
        columns["cos"].append([(math.pi * f * x[..., axis]).cos() for f in axis_frequencies])
        columns["pos"].append([x[..., axis]])
    kinds = ["sin"] + ["cos"] * (not sine_only)
    kinds = ["pos"] * concat_pos + kinds if order == "grouped" else kinds + ["pos"] * concat_pos
    axes = range(len(frequencies))
    places = (
        [(kind, k) for kind in kinds for k in axes] if order == "grouped" else [(q, k) for k in axes for q in kinds]
    )
    return torch.stack([column for kind, axis in places for column in columns[kind][axis]], dim=-1)


def frequencies_of(spacing: Any, num_bands: int, max_freqs: Sequence[float]) -> list[list[float]]:
    if spacing == "linear":
        return [torch.linspace(1.0, m / 2, num_bands, dtype=torch.float64).tolist() for m in max_freqs]
    if spacing == "log2":
        return [[2.0**k for k in range(num_bands)] for _ in max_freqs]
    return [list(spacing) for _ in max_freqs]


def random_positions(*shape: int, dtype: torch.dtype = torch.float64, backend: str = "native") -> Tensor:
    return (2 * torch.rand(shape, dtype=torch.float64) - 1).to(device_of(backend), dtype)


def assert_rounded_once(actual: Tensor, truth: Tensor, backend: str) -> None:
    """All features are at most 1 or so: one rounding to the dtype, and what the backend's angles are off."""
    eps = torch.finfo(actual.dtype).eps
    bound = eps * max(1.0, truth.abs().max().item()) / 2 + slack(backend) if truth.numel() else 0.0
    assert actual.shape == truth.shape
    assert error(actual.cpu(), truth) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("concat_pos, sine_only", FEATURES)
@pytest.mark.parametrize("order", ["per_axis", "grouped"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_matches_formula(backend: str, axes: int, spacing: str, order: str, concat_pos: bool, sine_only: bool) -> None:
    max_freqs = [10.0, 3.0, 224.0, 1.0][:axes]
    options: dict[str, Any] = {"order": order, "concat_pos": concat_pos, "sine_only": sine_only}
    positions = random_positions(3, 7, axes, dtype=widest(backend), backend=backend)
    truth = explicit_formula(positions, frequencies_of(SPACINGS[spacing], 5, max_freqs), **options)
    with use_backend(backend):
        actual = fourier_encode(positions, 5, max_freqs, spacing=SPACINGS[spacing], **options)
    assert_rounded_once(actual, truth, backend)


# A position costs the interpreter milliseconds.
COUNTS = {backend: [0, 1, 8, 15, 33 if backend == "triton" and interpreting() else 300] for backend in BACKENDS}


@pytest.mark.parametrize(
    "backend, dtype, count", [(b, d, n) for b in BACKENDS for d in dtypes_of(OP, b) for n in COUNTS[b]], ids=str
)
def test_dtypes_and_counts(backend: str, dtype: torch.dtype, count: int) -> None:
    positions = random_positions(2, count, dtype=dtype, backend=backend).t()  # strided
    truth = explicit_formula(positions, frequencies_of("linear", 6, [12.0, 12.0]), "per_axis", True, False)
    with use_backend(backend):
        for result in dtypes_of(OP, backend):
            actual = fourier_encode(positions, 6, 12.0, dtype=result)
            assert actual.dtype == result
            assert_rounded_once(actual, truth, backend)
        assert fourier_encode(positions, 6, 12.0).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_bands", [1, 2, 64, 65, 300])
def test_long_recurrences_stay_accurate(backend: str, num_bands: int) -> None:
    positions = random_positions(40, 2, dtype=widest(backend), backend=backend)
    truth = explicit_formula(positions, frequencies_of("linear", num_bands, [224.0] * 2), "per_axis", True, False)
    with use_backend(backend):
        assert_rounded_once(fourier_encode(positions, num_bands, 224.0), truth, backend)


@pytest.mark.parametrize(
    "backend, dtype", [(b, d) for b in BACKENDS for d in dtypes_of(OP, b) if d.itemsize < 8], ids=str
)
def test_no_worse_than_plain(backend: str, dtype: torch.dtype) -> None:
    positions = random_positions(30, 3, dtype=dtype, backend=backend)
    positions[0], positions[1] = 7.0, -123.0
    frequencies = [f for axis in frequencies_of("linear", 9, [200.0, 60.0, 3.0]) for f in axis]
    options = (frequencies, True, True, False)
    truth = reference.point_features(positions.double(), *options)
    with use_backend(backend):
        actual = fourier_encode(positions, 9, [200.0, 60.0, 3.0], order="grouped")
    assert_no_worse(actual, reference.point_features(positions, *options), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_octaves_are_as_accurate_as_their_angles(backend: str) -> None:
    positions = random_positions(40, 3, dtype=widest(backend), backend=backend)
    truth = explicit_formula(positions, frequencies_of("log2", 20, [0.0] * 3), "grouped", True, False)
    with use_backend(backend):
        actual = fourier_encode(positions, 20, spacing="log2", order="grouped")
    largest_angle = math.pi * 2.0**19
    rounded = 0.0 if widest(backend) == torch.float64 else torch.finfo(torch.float32).eps / 2 + slack(backend)
    assert error(actual.cpu(), truth) <= 4 * torch.finfo(torch.float64).eps * largest_angle + rounded


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_perceiver_pytorch(backend: str) -> None:
    peer = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    positions = random_positions(5, 6, 2, dtype=widest(backend), backend=backend)
    with use_backend(backend):
        actual = fourier_encode(positions, 8, 24.0)
    assert_rounded_once(actual, peer.fourier_encode(positions.cpu().double(), 24.0, 8).flatten(-2), backend)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_backends_agree(data: st.DataObject) -> None:
    axes, count = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 20))
    num_bands = data.draw(st.integers(1, 20))
    number = st.floats(-40, 40)
    spacing = data.draw(st.sampled_from(["linear", "log2"]) | st.lists(number, min_size=num_bands, max_size=num_bands))
    positions = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=count * axes, max_size=count * axes)))
    options: dict[str, Any] = {
        "spacing": spacing,
        "order": data.draw(st.sampled_from(["per_axis", "grouped"])),
        "concat_pos": data.draw(st.booleans()),
        "sine_only": data.draw(st.booleans()),
        "dtype": data.draw(st.sampled_from([torch.float32, torch.float64])),
    }
    max_freq, results = data.draw(number), []
    for backend in BACKENDS:
        if options["dtype"] in dtypes_of(OP, backend):
            on_device = positions.view(count, axes).to(device_of(backend))
            with use_backend(backend):
                results.append(fourier_encode(on_device, num_bands, max_freq, **options).cpu())
    tolerance = 1e-6 if options["dtype"] == torch.float32 else 1e-8 if spacing == "log2" else 2e-12
    for result in results:
        torch.testing.assert_close(result, results[-1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out(backend: str) -> None:
    positions = random_positions(3, 4, 2, dtype=torch.float32, backend=backend)
    buffer = torch.full((3, 4, 20), -7.0, dtype=widest(backend), device=positions.device)
    with use_backend(backend):
        expected = fourier_encode(positions, 4, 8.0, dtype=buffer.dtype)
        out = buffer[..., 1:19]
        assert fourier_encode(positions, 4, 8.0, out=out) is out
    assert torch.equal(out, expected)
    assert (buffer[..., 0] == -7.0).all() and (buffer[..., 19] == -7.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_coordinates_stay_in_their_features(backend: str, bad: float) -> None:
    positions = random_positions(9, 2, dtype=torch.float32, backend=backend)
    with use_backend(backend):
        clean = fourier_encode(positions, 12, 8.0)
        positions[4, 1] = bad
        encoded = fourier_encode(positions, 12, 8.0)
    assert encoded[4, 25:49].isnan().all()
    assert torch.equal(encoded[4, :25], clean[4, :25]) and torch.equal(encoded[[3, 5]], clean[[3, 5]])


@pytest.mark.parametrize("backend", WITH_FLOAT64)
@pytest.mark.parametrize("concat_pos, sine_only", FEATURES)
@pytest.mark.parametrize("order", ["per_axis", "grouped"])
def test_gradients(backend: str, order: str, concat_pos: bool, sine_only: bool) -> None:
    positions = random_positions(3, 2, 2).requires_grad_()

    def encode(x: Tensor) -> Tensor:
        return fourier_encode(x, 3, [6.0, 4.0], order=order, concat_pos=concat_pos, sine_only=sine_only)

    with use_backend(backend):
        assert torch.autograd.gradcheck(encode, (positions,))
        assert torch.autograd.gradgradcheck(encode, (positions,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_narrow_positions(backend: str, dtype: torch.dtype) -> None:
    positions = random_positions(3, 2, dtype=dtype, backend=backend).requires_grad_()
    exact = positions.detach().double().requires_grad_()
    upstream = torch.randn(3, 14, device=positions.device)
    with use_backend(backend):
        fourier_encode(positions, 3, 6.0, dtype=torch.float32).backward(upstream)
    with use_backend("reference"):
        fourier_encode(exact, 3, 6.0).backward(upstream.double())
    assert positions.grad is not None and exact.grad is not None
    assert torch.equal(positions.grad, exact.grad.to(dtype))


def points_sample(**changes: Any) -> tuple[Any, ...]:
    fields: dict[str, Any] = {"positions": random_positions(5, 2), "frequencies": [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]}
    fields |= {"grouped": True, "concat_pos": True, "sine_only": False, **changes}
    return tuple(fields.values())


def grid_sample(order: str, data: Tensor | None, like: Tensor) -> tuple[Any, ...]:
    grid = FourierGrid((2, 3), 2, 4.0, order)
    return [table.clone() for table in grid.tables(like.device, like.dtype)], list(grid.bands.sections), data


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    ops = torch.ops.perceiver_kernels
    data = random_positions(4, 2, 3, 3, dtype=widest(backend), backend=backend)
    x = random_positions(5, 2, dtype=widest(backend), backend=backend)
    with use_backend(backend):
        for requires_grad in (False, True):
            positions = x.clone().requires_grad_(requires_grad)
            torch.library.opcheck(ops.fourier_encode_points, (*points_sample(positions=positions), torch.float32))
            sample = (*grid_sample("grouped", data.clone().requires_grad_(requires_grad), data), 4)
            torch.library.opcheck(ops.fourier_encode_grid, sample)
        torch.library.opcheck(ops.fourier_encode_grid, (*grid_sample("per_axis", None, data), 2))
        out = torch.zeros(5, 14, device=x.device)
        torch.library.opcheck(ops.fourier_encode_points_out, (*points_sample(positions=x), out))
        out = torch.zeros(4, 2, 3, 13, dtype=data.dtype, device=data.device)
        torch.library.opcheck(ops.fourier_encode_grid_out, (*grid_sample("per_axis", data, data), out))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_breaks(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    module = FourierEncoding(2, 4, 9.0)

    def encode(x: Tensor) -> Tensor:
        return 2 * module(x) + fourier_encode(x, 4, x.shape[1] * 2.5)

    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (3, 5):
        positions = random_positions(count, 2).requires_grad_()
        expected = encode(positions)
        actual = compiled(positions)
        torch.testing.assert_close(actual, expected)
        for result in (actual, expected):
            result.square().sum().backward()
    out = torch.zeros(5, 18, dtype=torch.float64)
    torch.compile(lambda x, y: fourier_encode(x, 4, 9.0, out=y), fullgraph=True, backend="aot_eager")(
        positions.detach(), out
    )
    assert torch.equal(out, fourier_encode(positions.detach(), 4, 9.0))


def test_module() -> None:
    module = FourierEncoding(3, 4, spacing="log2", order="grouped")
    positions = random_positions(2, 5, 3)
    assert module.num_channels == 27
    assert torch.equal(module(positions), fourier_encode(positions, 4, spacing="log2", order="grouped"))
    assert "num_axes=3" in repr(module)
    with pytest.raises(ValueError, match="positions has 2 axes, must have 3"):
        module(positions[..., :2])
    with pytest.raises(ValueError, match="num_axes is 0"):
        FourierEncoding(0, 4, 9.0)


def test_explain_names_the_backend() -> None:
    on_cpu = next(backend for backend in BACKENDS if backend not in ("cuda", "triton"))
    assert f"{on_cpu}: runs this call" in explain(torch.zeros(3, 2), 4, 9.0)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in WITH_FLOAT64])
def test_kernels_for_gpus_do_not_take_float64(backend: str) -> None:
    positions = random_positions(3, 2, backend=backend)
    message = "compute dtype is float64, must be float32 or bfloat16 or float16; data dtype is float64"
    with use_backend(backend), pytest.raises(BackendError, match=message):
        fourier_encode(positions, 4, 9.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [1e2, 1e4, 1e6, 1e9])
def test_far_positions(backend: str, far: float) -> None:
    """Angles are reduced before they are rounded; a position's features do not depend on its neighbours."""
    positions = random_positions(20, 1, dtype=widest(backend), backend=backend)
    with use_backend(backend):
        near = fourier_encode(positions, 3, 8.0)
        positions[::2] *= far
        encoded = fourier_encode(positions, 3, 8.0)
    truth = explicit_formula(positions, frequencies_of("linear", 3, [8.0]), "per_axis", True, False)
    waves = slice(0, 6)
    assert error(encoded[:, waves].cpu(), truth[:, waves]) <= slack(backend) + 2**-24 + 4 * far * 2**-46
    assert torch.equal(encoded[1::2], near[1::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_bands, axes, order", [(300, 1, "per_axis"), (1, 6, "grouped"), (2500, 2, "grouped")])
def test_many_features_of_strided_positions(backend: str, num_bands: int, axes: int, order: str) -> None:
    """Rows that fit into a block's memory or do not, aligned to 16 bytes or not, with gaps or without."""
    positions = random_positions(axes, 9, dtype=torch.float32, backend=backend).t()
    truth = explicit_formula(positions, frequencies_of("linear", num_bands, [20.0] * axes), order, True, False)
    width = truth.shape[-1]
    memory = torch.empty(9, width + 3, device=positions.device)
    outs = [memory.view(-1)[: 9 * width].view(9, width), memory.view(-1)[1 : 9 * width + 1].view(9, width)]
    for out in (*outs, memory[:, 2:-1]):
        with use_backend(backend):
            fourier_encode(positions, num_bands, 20.0, order=order, out=out)
        assert_rounded_once(out, truth, backend)


@needs_triton
@pytest.mark.parametrize("bits, packed, arch", [(16, True, 90), (32, True, 80), (32, False, 90)])
def test_machine_code_of_grids(bits: int, packed: bool, arch: int) -> None:
    """A photograph's tokens, 3 + 2 * 129 channels: copied in stores of 16 bytes, without any wave or spill."""
    vector = 128 // bits
    build = Build(
        "fourier_encode:fourier_encode_grid_kernel",
        dict.fromkeys(("out", "data", "table_0", "table_1", "table_2", "table_3"), f"*i{bits}")
        | dict.fromkeys(("size_0", "size_1", "size_2", "size_3", "span"), "i32")
        | {f"{of}_stride_{axis}": "i64" for of in ("out", "data") for axis in ("b", 0, 1, 2, 3)}
        | {"data_stride_c": "i64"},
        {"AXES": 2, "DATA_CHANNELS": 3, "SECTIONS": [129], "CHANNELS": 261, "COLUMNS": 129, "GROUP": 4 * vector,
         "VECTOR": vector, "PACKED": packed, "BLOCK": 128 * vector},
        arch=arch,
    )  # fmt: skip
    found = figures(build)
    stores = {name: count for name, count in found.operations.items() if name.startswith("STG")}
    assert found.spills == 0 and found.registers <= 128
    assert not [name for name in found.operations if name in ("MUFU.SIN", "MUFU.COS", "MUFU.EX2")]
    assert set(stores) == ({"STG.E.128"} if packed else {"STG.E"})
    elements = vector * (1 if packed else stores["STG.E"] / vector)
    assert found.loop / elements <= 12, "instructions per element"


@needs_triton
@pytest.mark.parametrize("kind, arch", [("fp32", 80), ("bf16", 90)])
def test_machine_code_of_points(kind: str, arch: int) -> None:
    build = Build(
        "fourier_encode:fourier_encode_points_kernel",
        {"out": f"*{kind}", "positions": f"*{kind}", "frequencies": "*fp32", "points": "i32", "span": "i32",
         "out_stride": "i64", "stride_p": "i64", "stride_a": "i64"},
        {"AXES": 2, "BANDS": 64, "GROUPED": False, "CONCAT_POS": True, "SINE_ONLY": False, "BLOCK": 128},
        arch=arch, warps=2,
    )  # fmt: skip
    found = figures(build)
    assert found.spills == 0 and found.registers <= 40
    assert not [name for name in found.operations if name in ("MUFU.SIN", "MUFU.COS")]
    pairs_of_a_thread = 2
    assert found.loop / pairs_of_a_thread <= 56, "instructions per pair of sine and cosine"


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("form, store, most", [("IjLi4E", "STG.E.128", 8), ("ItLi8E", "STG.E.128", 7),
                                               ("IjLi1E", "STG.E", 16), ("ItLi1E", "STG.E.U16", 16)])  # fmt: skip
def test_cuda_machine_code_of_grids(form: str, store: str, most: float, arch: str) -> None:
    """Nothing but loads, stores and steps in the loop; no division anywhere."""
    kernel = f"fourier_encode_grid_kernel{form}"
    found = built(kernel, arch)
    assert found.spills == 0 and found.registers <= 64
    assert not [name for name in found.operations if name.startswith(("MUFU", "I2F", "CALL"))]
    assert {name for name in found.operations if name.startswith("STG")} == {store}
    words = int(form[4])
    loop = max(built_loops(kernel, arch), key=lambda loop: sum(name.startswith("LDG") for name in loop))
    assert sum(name.startswith("LDG") for name in loop) == words
    assert len(loop) / words <= most, "instructions per element"


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("kind", ["f", "NS_8BFloat16E", "NS_7Float16E"])
def test_cuda_machine_code_of_points(kind: str, arch: str) -> None:
    """Both waves of a pair in some forty instructions, so that memory is the limit; float64 for far positions alone."""
    kernel = f"fourier_encode_points_kernelI{kind}Lb1E"
    found = built(kernel, arch)
    assert found.spills == 0 and found.registers <= 32
    assert found.operations["STG.E.128"] >= 4
    (loop,) = (a for a in built_loops(kernel, arch) if "LDS" in a and not any(name.startswith("D") for name in a))
    assert len(loop) / loop.count("LDS") <= 38, "instructions per pair of sine and cosine"


POSITIONS = torch.zeros(5, 2)
BAD_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "integer": (
        lambda: fourier_encode(torch.zeros(5, 2, dtype=torch.int64), 4, 9.0),
        "positions has dtype torch.int64",
    ),
    "scalar": (lambda: fourier_encode(torch.tensor(1.0), 4, 9.0), r"positions has shape \(\)"),
    "no_axes": (lambda: fourier_encode(torch.zeros(5, 0), 4, 9.0), r"positions has shape \(5, 0\)"),
    "no_bands": (lambda: fourier_encode(POSITIONS, 0, 9.0), "num_bands is 0, must be at least 1"),
    "max_freq": (lambda: fourier_encode(POSITIONS, 4), "max_freq is None"),
    "max_freq_count": (lambda: fourier_encode(POSITIONS, 4, [1.0, 2.0, 3.0]), "max_freq has 3 entries"),
    "max_freq_nan": (lambda: fourier_encode(POSITIONS, 4, math.nan), "max_freq is or holds nan"),
    "max_freq_text": (lambda: fourier_encode(POSITIONS, 4, "high"), "max_freq is or holds 'high'"),  # type: ignore[arg-type]
    "spacing": (
        lambda: fourier_encode(POSITIONS, 4, 9.0, spacing="log"),
        "spacing is 'log', must be 'linear' or 'log2'",
    ),
    "spacing_count": (lambda: fourier_encode(POSITIONS, 4, spacing=[1.0]), "spacing has 1 frequencies, must have 4"),
    "spacing_shape": (lambda: fourier_encode(POSITIONS, 4, spacing=torch.ones(2, 4)), r"spacing has shape \(2, 4\)"),
    "spacing_inf": (lambda: fourier_encode(POSITIONS, 1, spacing=[math.inf]), "spacing is or holds inf"),
    "order": (
        lambda: fourier_encode(POSITIONS, 4, 9.0, order="axis"),
        "order is 'axis', must be 'per_axis' or 'grouped'",
    ),
    "dtype": (lambda: fourier_encode(POSITIONS, 4, 9.0, dtype=torch.int32), "dtype is torch.int32"),
    "out_shape": (lambda: fourier_encode(POSITIONS, 4, 9.0, out=torch.zeros(5, 17)), r"out has shape \(5, 17\)"),
    "out_dtype": (
        lambda: fourier_encode(POSITIONS, 4, 9.0, out=torch.zeros(5, 18), dtype=torch.float64),
        "out has dtype torch.float32, must be torch.float64",
    ),
    "out_integer": (
        lambda: fourier_encode(POSITIONS, 4, 9.0, out=torch.zeros(5, 18, dtype=torch.uint8)),
        "out has dtype torch.uint8",
    ),
    "out_channels": (lambda: fourier_encode(POSITIONS, 4, 9.0, out=torch.zeros(18, 5).t()), "out has stride 5"),
    "out_rows": (
        lambda: fourier_encode(torch.zeros(3, 5, 2), 4, 9.0, out=torch.zeros(5, 3, 18).transpose(0, 1)),
        "out has strides",
    ),
    "out_device": (
        lambda: fourier_encode(POSITIONS, 4, 9.0, out=torch.zeros(5, 18, device="meta")),
        "out is on meta, must be on cpu",
    ),
    "out_gradient": (
        lambda: fourier_encode(torch.zeros(5, 2, requires_grad=True), 4, 9.0, out=torch.zeros(5, 18)),
        "out is given, must be None for positions that requires a gradient",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()
