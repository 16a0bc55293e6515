"""FourierGrid: tables, sums, channel order and the written-out array, against the formulas of the libraries in use."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import available_backends, declared, device_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from perceiver_kernels import encodings
from perceiver_kernels.dispatch import use_backend
from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.ops.fourier_encode import DTYPES, OP, fourier_encode

BACKENDS = available_backends(OP)
DTYPES_OF = {backend: declared(OP, backend).compute_dtypes for backend in BACKENDS}
BACKENDS_AND_DTYPES = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES_OF[backend]]
SHAPES = [(1,), (9,), (300,), (4, 6), (1, 5), (2, 3, 4), (2, 3, 1, 4)]
ORDERS = ["per_axis", "grouped"]
SPACINGS: dict[str, Any] = {"linear": "linear", "log2": "log2", "explicit": (0.5, 3.0, 2.25)}
FEATURES = [(True, False), (True, True), (False, False), (False, True)]


def positions_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """(*shape, A)"""
    axes = [torch.linspace(-1.0, 1.0, steps=size, dtype=dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def deepmind_features(shape: tuple[int, ...], num_bands: int, concat_pos: bool, sine_only: bool) -> Tensor:
    """generate_fourier_features of DeepMind's Perceiver and Hugging Face's port, max_resolution being the shape."""
    pos = positions_of(shape).flatten(0, -2)
    freq_bands = torch.stack([torch.linspace(1.0, res / 2, num_bands, dtype=torch.float64) for res in shape])
    per_pos_features = (pos[:, :, None] * freq_bands[None]).reshape(pos.shape[0], -1)
    if sine_only:
        per_pos_features = torch.sin(math.pi * per_pos_features)
    else:
        per_pos_features = torch.cat(
            [torch.sin(math.pi * per_pos_features), torch.cos(math.pi * per_pos_features)], dim=-1
        )
    return torch.cat([pos, per_pos_features], dim=-1) if concat_pos else per_pos_features


def assert_encodes(grid: FourierGrid, expected: Tensor) -> None:
    for backend in BACKENDS:
        dtype = torch.float64 if torch.float64 in DTYPES_OF[backend] else torch.float32
        rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
        with use_backend(backend):
            encoded = grid.encode(device_of(backend), dtype)
        torch.testing.assert_close(encoded.cpu().double(), expected, rtol=0, atol=2e-13 + rounding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_per_axis_matches_perceiver_pytorch(shape: tuple[int, ...]) -> None:
    peer = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    expected = peer.fourier_encode(positions_of(shape), 24.0, 6).flatten(-2).flatten(0, -2)
    assert_encodes(FourierGrid(shape, num_bands=6, max_freq=24.0), expected)


@pytest.mark.parametrize("concat_pos, sine_only", FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grouped_matches_deepmind(shape: tuple[int, ...], concat_pos: bool, sine_only: bool) -> None:
    grid = FourierGrid(shape, 6, order="grouped", concat_pos=concat_pos, sine_only=sine_only)
    assert_encodes(grid, deepmind_features(shape, 6, concat_pos, sine_only))


@pytest.mark.parametrize("concat_pos, sine_only", FEATURES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tables_are_the_columns_of_the_array(
    shape: tuple[int, ...], order: str, spacing: str, concat_pos: bool, sine_only: bool
) -> None:
    max_freq = tuple(3.0 + axis for axis in range(len(shape)))
    grid = FourierGrid(shape, 3, max_freq, order, SPACINGS[spacing], concat_pos, sine_only)
    options: dict[str, Any] = {"spacing": SPACINGS[spacing], "order": order}
    options |= {"concat_pos": concat_pos, "sine_only": sine_only}
    assert_encodes(grid, fourier_encode(positions_of(shape), 3, max_freq, **options).flatten(0, -2))
    encoded = grid.encode(dtype=torch.float64).unflatten(0, shape)
    tables, index = grid.tables(dtype=torch.float64), grid.channel_index()
    assert sorted(torch.cat(index).tolist()) == list(range(grid.num_channels))
    assert [tuple(table.shape) for table in tables] == list(zip(shape, grid.axis_channels, strict=True))
    for axis, (table, channels) in enumerate(zip(tables, index, strict=True)):
        along = encoded[..., channels].movedim(axis, 0).reshape(shape[axis], -1, len(channels))
        assert torch.equal(along, table[:, None].expand_as(along))


def test_column_order() -> None:
    per_axis, grouped = (FourierGrid((4, 6), 2, 8.0, order) for order in ORDERS)
    assert [index.tolist() for index in per_axis.channel_index()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [index.tolist() for index in grouped.channel_index()] == [[0, 2, 3, 6, 7], [1, 4, 5, 8, 9]]
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).float()
    assert torch.equal(per_axis.tables()[0][:, -1], x) and torch.equal(grouped.tables()[0][:, 0], x)


def test_a_single_position_stands_at_minus_one() -> None:
    assert FourierGrid((1,), 1, 2.0).tables()[0][0, -1] == -1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_are_rounded_once(dtype: torch.dtype) -> None:
    grid = FourierGrid((224, 5), 64, 224.0)
    for table, truth in zip(grid.tables(dtype=dtype), grid.tables(dtype=torch.float64), strict=True):
        assert table.dtype == dtype and torch.equal(table, truth.to(dtype))


@pytest.mark.parametrize("order", ORDERS)
def test_feature_sums(order: str) -> None:
    grid = FourierGrid((7, 3), 5, 8.0, order)
    sums, squares = grid.feature_sums(dtype=torch.float64)
    for table, total, square in zip(grid.tables(dtype=torch.float64), sums, squares, strict=True):
        torch.testing.assert_close(total, table.sum(1))
        torch.testing.assert_close(square, table.square().sum(1))
    assert torch.equal(grid.feature_sums()[1][0], squares[0].float())


def test_constants_are_cached() -> None:
    first, second = FourierGrid((4, 6), 3, 8), FourierGrid([4, 6], 3, (8.0, 8.0))  # type: ignore[arg-type]
    assert first == second and hash(first) == hash(second)
    assert all(a is b for a, b in zip(first.tables(), second.tables("cpu"), strict=True))
    assert first.feature_sums()[0][0] is second.feature_sums()[0][0]
    assert first.tables()[0] is not first.tables(dtype=torch.float64)[0]
    for size in range(1, 2 * encodings.CACHED_TABLES):
        FourierGrid((size,), 1, 2.0).tables()
    assert encodings._cached.cache_info().currsize == encodings.CACHED_TABLES


def test_grids_are_values() -> None:
    frequencies = torch.tensor([1.0, 2.5])
    grid = FourierGrid((4,), 2, spacing=frequencies)
    assert grid.spacing == (1.0, 2.5) and grid == FourierGrid((4,), 2, spacing=[1.0, 2.5])
    for twin in (pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid)):
        assert twin == grid and twin.num_channels == grid.num_channels == 5
    assert FourierGrid((4, 6), 2, order="grouped") == FourierGrid((4, 6), 2, (4.0, 6.0), "grouped")
    with pytest.raises(AttributeError):
        grid.num_bands = 3  # type: ignore[misc]


def test_cache_keeps_no_tensor_of_a_mode() -> None:
    grid = FourierGrid((5, 7), 3, 8.125)
    with torch.inference_mode():
        assert not grid.tables()[0].is_inference()
    other = FourierGrid((5, 7), 3, 8.25)
    with FakeTensorMode():
        assert type(other.tables()[0]) is not Tensor
    assert type(other.tables()[0]) is Tensor
    assert grid.tables("meta")[0].is_meta


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_encode_with_data(backend: str, order: str, dtype: torch.dtype) -> None:
    grid, device = FourierGrid((4, 6), 3, 8.0, order), device_of(backend)
    data = torch.randn(2, 3, 4, 6).to(device, dtype).movedim(1, -1)
    with use_backend("reference"):
        features = grid.encode(device, dtype)
    expected = torch.cat((data.flatten(1, 2), features.expand(2, -1, -1)), dim=-1)
    with use_backend(backend):
        assert torch.equal(grid.encode(data=data), expected.unflatten(1, (4, 6)))
        assert torch.equal(grid.encode(data=data.flatten(1, 2)), expected)
        assert torch.equal(grid.encode(device, batch=3, dtype=dtype), features.expand(3, -1, -1))
        assert grid.encode(data=data[:0]).shape == (0, 4, 6, 3 + grid.num_channels)
        pixels = torch.randint(256, (2, 24, 3), dtype=torch.uint8, device=device)
        assert torch.equal(grid.encode(data=pixels)[..., :3], pixels.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_into_given_memory(backend: str) -> None:
    grid, device = FourierGrid((4, 6), 3, 8.0), device_of(backend)
    channels = grid.num_channels
    data = torch.randn(2, 24, 3, device=device)
    with use_backend(backend):
        expected = grid.encode(device)
        for shape in ((24, channels), (4, 6, channels), (2, 24, channels), (2, 4, 6, channels)):
            out = torch.empty(shape, device=device)
            assert grid.encode(out=out) is out
            assert torch.equal(out.reshape(-1, 24, channels), expected.expand(out.numel() // expected.numel(), -1, -1))
        buffer = torch.full((6, 2, 4, channels + 5), -7.0, device=device)
        out = buffer.permute(1, 2, 0, 3)[..., 1:-1]
        grid.encode(data=data, out=out)
        assert torch.equal(out, grid.encode(data=data.unflatten(1, (4, 6))))
    assert (buffer[..., 0] == -7.0).all() and (buffer[..., -1] == -7.0).all()


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape, channels", [((2, 8), 3), ((3, 7), 3), ((40,), 2), ((2, 3, 16), 1), ((2, 1, 2, 4), 5)])
def test_every_alignment(backend: str, shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
    """Memory of whole tokens or with gaps, aligned to 16 bytes or not; data of any strides, expanded too."""
    grid, device = FourierGrid(shape, 5, 9.0, "grouped"), device_of(backend)
    width = channels + grid.num_channels
    data = torch.randn(2, channels, *shape, device=device).to(dtype).movedim(1, -1)
    memory = torch.empty(math.prod((2, *shape)) * width + 1, dtype=dtype, device=device)
    outs = [memory[first : first + memory.numel() - 1].view(2, *shape, width) for first in (0, 1)]
    outs.append(torch.empty(2, *shape, 64, dtype=dtype, device=device)[..., :width])
    for values in (data, data[..., :1, :].expand(data.shape)):
        with use_backend("reference"):
            expected = grid.encode(data=values)
        for out in outs:
            with use_backend(backend):
                assert torch.equal(grid.encode(data=values, out=out), expected)
            out.fill_(math.nan)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, shape", [(8, (3, 4)), (19, (2, 5)), (33, (1,)), (2, (3, 700)), (1, (2, 2, 1, 90))])
def test_many_inputs_and_long_axes(backend: str, batch: int, shape: tuple[int, ...]) -> None:
    """Shapes that are split over inputs or along the last axis."""
    grid, device = FourierGrid(shape, 2, 9.0), device_of(backend)
    data = torch.randn(2, *shape, batch, device=device).movedim((0, -1), (-1, 0))
    for dtype in (torch.float32, torch.bfloat16):
        with use_backend("reference"):
            expected = grid.encode(data=data.to(dtype))
        with use_backend(backend):
            assert torch.equal(grid.encode(data=data.to(dtype)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_gradients(backend: str) -> None:
    grid = FourierGrid((2, 3), 2, 8.0)
    data = torch.randn(2, 2, 3, 2, device=device_of(backend), requires_grad=True)
    with use_backend(backend):
        if torch.float64 in DTYPES_OF[backend]:
            assert torch.autograd.gradcheck(lambda x: grid.encode(data=x), (data.double().detach().requires_grad_(),))
        encoded = grid.encode(data=data)
        upstream = torch.randn_like(encoded)
        encoded.backward(upstream)
    assert data.grad is not None and torch.equal(data.grad, upstream[..., :2])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_backends_write_the_same(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    grid = FourierGrid(
        shape,
        data.draw(st.integers(1, 9)),
        data.draw(st.floats(-100, 100)),
        data.draw(st.sampled_from(ORDERS)),
        data.draw(st.sampled_from(["linear", "log2"])),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    values = torch.randn(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4)), *shape).to(dtype).movedim(1, -1)
    results = []
    for backend in BACKENDS:
        if dtype in DTYPES_OF[backend]:
            with use_backend(backend):
                results.append(grid.encode(data=values.to(device_of(backend))).cpu())
    assert all(torch.equal(result, results[0]) for result in results)


def compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True])
def test_grids_made_inside_a_compiled_function(dynamic: bool | None) -> None:
    encodings._cached.cache_clear()

    def encode(x: Tensor, max_freq: float) -> Tensor:
        grid = FourierGrid(x.shape[1:-1], 4, max_freq, "grouped")
        sums, squares = grid.feature_sums(x.device, x.dtype)
        rows, columns = grid.tables(x.device, x.dtype)
        encoded = grid.encode(data=x)[..., 3 + grid.channel_index()[1]]
        return encoded + rows.sum() + columns.sum() + sums[0].sum() + squares[1].sum()

    function = compiled(encode, dynamic)
    for batch, height, max_freq in ((2, 4, 8.0), (3, 4, 8.0), (3, 5, 8.0), (3, 5, 9.5)):
        x = torch.randn(batch, height, 6, 3)
        torch.testing.assert_close(function(x, max_freq), encode(x, max_freq))
        grid = FourierGrid((height, 6), 4, max_freq, "grouped")
        assert all(type(table) is Tensor for table in (*grid.tables(), *grid.feature_sums()[0], *grid.channel_index()))


@pytest.mark.parametrize("dynamic", [None, True])
def test_grids_given_to_a_compiled_function(dynamic: bool | None) -> None:
    function = compiled(lambda x, grid: x * grid.tables()[0].sum() + grid.num_channels, dynamic)
    x = torch.randn(3)
    for shape, max_freq, spacing in (((4, 5), 3.0, "linear"), ((4, 6), 3.0, "linear"), ((4, 6), 4.5, "linear"),
                                     ((4, 6), 4.5, (1.0, 2.0, 3.5))):  # fmt: skip
        grid = FourierGrid(shape, 3, max_freq, spacing=spacing)
        torch.testing.assert_close(function(x, grid), x * grid.tables()[0].sum() + grid.num_channels)


def test_exports() -> None:
    class Encode(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return FourierGrid(x.shape[1:-1], 4, 8.0).encode(data=x)

    x = torch.randn(2, 4, 6, 3)
    for strict in (False, True):
        program = torch.export.export(Encode(), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), Encode()(x))


GRID = FourierGrid((4, 6), 3, 8.0)
BAD_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "no_axes": (lambda: FourierGrid((), 3, 8.0), r"shape is \(\), must have 1 to 4 axes"),
    "five_axes": (lambda: FourierGrid((2,) * 5, 3, 8.0), "must have 1 to 4 axes"),
    "empty_axis": (lambda: FourierGrid((4, 0), 3, 8.0), r"shape is \(4, 0\), must have at least one position"),
    "no_bands": (lambda: FourierGrid((4,), 0, 8.0), "num_bands is 0, must be at least 1"),
    "max_freq": (lambda: FourierGrid((4,), 3), "max_freq is None, must be a number"),
    "max_freq_count": (
        lambda: FourierGrid((4, 6), 3, (1.0, 2.0, 3.0)),
        "max_freq has 3 entries, must be one number or 2",
    ),
    "max_freq_inf": (lambda: FourierGrid((4,), 3, math.inf), "max_freq is or holds inf, must be finite"),
    "order": (lambda: FourierGrid((4,), 3, 8.0, "axes"), "order is 'axes', must be 'per_axis' or 'grouped'"),
    "spacing": (lambda: FourierGrid((4,), 3, 8.0, spacing="exp"), "spacing is 'exp', must be 'linear' or 'log2'"),
    "spacing_count": (lambda: FourierGrid((4,), 3, spacing=(1.0,)), "spacing has 1 frequencies, must have 3"),
    "tables_dtype": (lambda: GRID.tables(dtype=torch.int64), "dtype is torch.int64, must be floating-point"),
    "encode_dtype": (lambda: GRID.encode(dtype=torch.int64), "dtype is torch.int64, must be float32"),
    "data_shape": (
        lambda: GRID.encode(data=torch.zeros(2, 6, 4, 3)),
        r"data has shape \(2, 6, 4, 3\), must be \(batch, 4",
    ),
    "data_no_batch": (lambda: GRID.encode(data=torch.zeros(4, 6, 3)), r"data has shape \(4, 6, 3\)"),
    "data_batch": (lambda: GRID.encode(data=torch.zeros(2, 24, 3), batch=3), "data has batch 2, must have 3"),
    "data_device": (
        lambda: GRID.encode("meta", data=torch.zeros(2, 24, 3)),
        "data is on cpu, must be on meta",
    ),
    "mixed_devices": (
        lambda: GRID.encode(data=torch.zeros(2, 24, 3), out=torch.zeros(2, 24, 17, device="meta")),
        "data is on cpu, must be on meta",
    ),
    "out_shape": (
        lambda: GRID.encode(out=torch.zeros(2, 24, 15)),
        r"out has shape \(2, 24, 15\), must be \(batch, 4, 6, 14",
    ),
    "out_batch": (
        lambda: GRID.encode(data=torch.zeros(2, 24, 3), out=torch.zeros(1, 24, 17)),
        "out has batch 1, must have 2",
    ),
    "out_dtype": (lambda: GRID.encode(dtype=torch.float64, out=torch.zeros(24, 14)), "out has dtype torch.float32"),
    "out_channels": (
        lambda: GRID.encode(out=torch.zeros(14, 24).t()),
        "out has stride 24 between channels, must have 1",
    ),
    "out_gradient": (
        lambda: GRID.encode(data=torch.zeros(2, 24, 3, requires_grad=True), out=torch.zeros(2, 24, 17)),
        "out is given, must be None for data that requires a gradient",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_coordinates_without_an_endpoint_and_rounded_features() -> None:
    """As Hugging Face has them: -1 + 2 i / S, and every step in float32."""
    half_open = FourierGrid((4,), num_bands=2, max_freq=4.0, endpoint=False)
    assert half_open.tables()[0][:, -1].tolist() == [-1.0, -0.5, 0.0, 0.5]
    options = {"shape": (999,), "num_bands": 64, "max_freq": 30720.0, "order": "grouped"}
    rounded, exact = (FourierGrid(**options, precision=precision) for precision in ("float32", "float64"))
    assert rounded != exact
    x = torch.linspace(-1, 1, 999)[:, None]
    angles = math.pi * (x * torch.linspace(1, 15360, 64))
    table = rounded.tables(dtype=torch.float64)[0].float()
    torch.testing.assert_close(table, torch.cat((x, angles.sin(), angles.cos()), 1), rtol=0, atol=1e-6)
    assert 1e-4 < (table - exact.tables()[0]).abs().max() < 1e-2
    with pytest.raises(ValueError, match="precision is 'float16', must be 'float64' or 'float32'"):
        FourierGrid((4,), num_bands=2, max_freq=4.0, precision="float16")
