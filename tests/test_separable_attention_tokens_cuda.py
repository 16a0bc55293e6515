"""Gradients of separable attention's tokens by csrc/cuda, against the reference in float64; and their machine code."""

from __future__ import annotations

import math
import sys
from typing import Any

import cuda_emulation
import machine_code
import pytest
import torch
from numerics import assert_no_worse
from shapes import SeparableShape, device_of
from torch import Tensor

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.cuda.separable_attention_tokens import tokens_gradients
from perceiver_kernels.backends.reference import separable_attention as reference

needs_kernels = pytest.mark.skipif(runtime.unavailable() is not None, reason="the CUDA module cannot be used here")

SHAPES = [
    SeparableShape(1, 1, 1, 1, (1,)),
    SeparableShape(2, 1, 5, 3, (4, 6)),
    SeparableShape(2, 2, 15, 3, (2, 5, 3)),
    SeparableShape(1, 1, 33, 2, (2, 3, 2, 5)),
    SeparableShape(2, 1, 2, 1, (9, 1)),
    SeparableShape(1, 1, 70, 4, (1, 33)),
    SeparableShape(2, 2, 65, 3, (19,)),
    SeparableShape(1, 1, 130, 3, (3, 9)),  # the rows are split
    SeparableShape(1, 1, 40, 4, (270,)),
    SeparableShape(1, 1, 3, 3, (70, 66)),  # several bands and strips
    SeparableShape(2, 1, 19, 5, (5, 17)),
    SeparableShape(1, 1, 17, 24, (3, 2, 5)),
    SeparableShape(1, 1, 3, 128, (70,)),
]


Inputs = dict[str, Any]


def make_inputs(shape: SeparableShape, with_r: bool = True, masked: bool = False, spread: float = 1.0) -> Inputs:
    g = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    entries = shape.channels + sum(shape.grid)
    inputs: Inputs = {
        "form": spread * rand(shape.query_batch, entries, shape.rows),
        "x": rand(shape.batch, *shape.grid, shape.channels) / shape.channels**0.5,
        "r": rand(shape.batch, *shape.grid).abs() + 0.1 if with_r else None,
        "mask": torch.rand(shape.batch, *shape.grid, generator=g) > 0.3 if masked else None,
        "upstream": (rand(shape.batch, entries, shape.rows), *(rand(shape.batch, shape.rows) for _ in range(2))),
    }
    if masked:
        inputs["mask"][-1] = False
    return inputs


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: cast(v, dtype) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def statistics_of(saved: reference.State, upstream: reference.State, dropout_p: float) -> Tensor:
    """As the kernel that prepares backward leaves them, for rows padded to a multiple of 32."""
    (sums, lse, total), (d_sums, d_lse, d_total) = cast((saved, upstream), torch.float64)
    of_total = d_total if dropout_p > 0 else torch.zeros_like(d_total)
    delta = (d_sums * sums).sum(1) + of_total * total - d_lse
    empty = lse == -torch.inf
    exact = torch.where(empty, 0.0, lse * math.log2(math.e))
    factor = torch.where(empty, 0.0, torch.exp2(exact.float() - exact))
    statistics = torch.stack((exact.float(), factor, factor * delta, factor * of_total), 1).float()
    return torch.nn.functional.pad(statistics, (0, -statistics.shape[2] % 32), value=torch.nan)


Options = dict[str, Any]


def by_reference(inputs: Inputs, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor]:
    form, x, r, mask, upstream = cast(inputs, dtype).values()
    saved = reference.separable_attention_fwd(form, x, r, mask, *options.values())
    needs = (False, True, r is not None)
    return reference.separable_attention_bwd(form, x, r, mask, *options.values(), saved, upstream, needs)[1:]


def by_kernels(
    inputs: Inputs, x_dtype: torch.dtype, options: Options, x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """d_x and d_r; with `x`, where the kernels see other tokens than the row's statistics are of."""
    form, data, r, mask, upstream = inputs.values()
    saved = reference.separable_attention_fwd(form, data, r, mask, *options.values())
    statistics = statistics_of(saved, upstream, options["dropout_p"])
    x = (data if x is None else x).to(x_dtype)
    d_x = x.new_empty(x.shape if x_dtype.is_floating_point else 0)
    d_r = torch.empty(x.shape[:-1] if r is not None else 0)
    tensors = (form.float(), x, r if r is None else r.float(), mask, *options.values(), upstream[0].float(), statistics)
    moved = [t.to(device_of("cuda")) if isinstance(t, Tensor) else t for t in (*tensors, d_x, d_r)]
    tokens_gradients(*moved)
    return moved[-2].cpu(), moved[-1].cpu()


def check(inputs: Inputs, x_dtype: torch.dtype = torch.float32, **options: Any) -> None:
    options = {"dropout_p": 0.0, "seed": 0} | options
    inputs["x"] = inputs["x"].to(x_dtype).double()
    actual = by_kernels(inputs, x_dtype, options)
    truth, plain = (by_reference(inputs, dtype, options) for dtype in (torch.float64, torch.float32))
    for name, *values in zip(("d_x", "d_r"), actual, plain, truth, strict=True):
        if values[0].numel():
            assert_no_worse(values[0], values[1].to(values[0].dtype), values[2], name)


@needs_kernels
@pytest.mark.parametrize("with_r", [True, False], ids=["r", "no_r"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_tokens(shape: SeparableShape, with_r: bool) -> None:
    check(make_inputs(shape, with_r))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[10]], ids=str)
def test_dtypes_of_data(shape: SeparableShape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape)
    inputs["x"] = inputs["x"].abs() if dtype == torch.uint8 else inputs["x"]
    check(inputs, dtype)


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[7], SHAPES[10]], ids=str)
def test_mask(shape: SeparableShape) -> None:
    inputs = make_inputs(shape, masked=True)
    check(inputs)
    options = {"dropout_p": 0.0, "seed": 0}
    mask = inputs["mask"]
    clean = by_kernels(inputs, torch.float32, options)
    garbage = by_kernels(inputs, torch.float32, options, inputs["x"].masked_fill(~mask[..., None], torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(clean, garbage, strict=True))
    assert not clean[0][~mask].any() and not clean[1][~mask].any()


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[10]], ids=str)
def test_dropout(shape: SeparableShape) -> None:
    check(make_inputs(shape, masked=True), dropout_p=0.4, seed=2**40 + 7)


@needs_kernels
def test_strided_and_expanded_inputs() -> None:
    inputs = make_inputs(SeparableShape(2, 1, 9, 3, (6, 10)), masked=True)
    inputs["x"] = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    inputs["r"] = inputs["r"][:, :1].expand(-1, 6, -1)
    inputs["mask"] = inputs["mask"].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs)


@needs_kernels
def test_steep_scores() -> None:
    inputs = make_inputs(SeparableShape(1, 1, 40, 3, (5, 12)), spread=20.0)
    options = {"dropout_p": 0.0, "seed": 0}
    inputs = cast(cast(inputs, torch.float32), torch.float64)
    actual = by_kernels(inputs, torch.float32, options)
    truth, plain = (by_reference(inputs, dtype, options) for dtype in (torch.float64, torch.float32))
    for name, *values in zip(("d_x", "d_r"), actual, plain, truth, strict=True):
        assert_no_worse(*values, name, amplification=100.0)


@needs_kernels
@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
def test_table_entries_that_exclude(channels: int, value: float) -> None:
    """Positions that some rows, and rows that no position can attend to."""
    inputs = make_inputs(SeparableShape(1, 1, 6, channels, (4, 6)))
    inputs["form"][:, channels + 1, :3] = value
    inputs["form"][:, channels + 6, 2:] = value
    if value == -torch.inf:
        inputs["form"][:, channels : channels + 4, 5] = value
    options = {"dropout_p": 0.0, "seed": 0}
    actual = by_kernels(inputs, torch.float32, options)
    kept = make_inputs(SeparableShape(1, 1, 6, channels, (4, 6)))
    kept["form"] = inputs["form"].clamp(min=-1e6)
    kept["upstream"] = tuple(t.index_fill(-1, torch.tensor([5]), 0.0) for t in kept["upstream"])
    if value != -torch.inf:
        kept["upstream"] = inputs["upstream"]
    for result, expected in zip(actual, by_reference(kept, torch.float64, options), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("channels", [3, 5])
def test_nan_reaches_its_token_alone(channels: int) -> None:
    inputs = make_inputs(SeparableShape(1, 1, 40, channels, (4, 6)))
    x = inputs["x"].clone()
    x[0, 2, 3, 1] = torch.nan
    d_x, d_r = by_kernels(inputs, torch.float32, {"dropout_p": 0.0, "seed": 0}, x)
    assert torch.equal(d_r.isnan(), x.isnan().any(-1))
    assert torch.equal(d_x.isnan().any(-1), x.isnan().any(-1))


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPES[7], SHAPES[10]], ids=str)
def test_order_of_threads_changes_nothing(shape: SeparableShape) -> None:
    options = {"dropout_p": 0.0, "seed": 0}
    first = by_kernels(make_inputs(shape), torch.float32, options)
    emulated = runtime.emulated() and "perceiver_kernels._cuda" in sys.modules
    if emulated:
        cuda_emulation.shuffle(7)
    try:
        second = by_kernels(make_inputs(shape), torch.float32, options)
    finally:
        if emulated:
            cuda_emulation.shuffle(0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- machine code ----------------------------------------------------------------------------------------------------

needs_module = pytest.mark.skipif(machine_code.cuda_module() is None, reason="the CUDA module is not built")


def few_channels(channels: int, axes: str, with_r: bool, arch: str) -> machine_code.Figures:
    tile = "ILi%dELi1ELi4E" if axes == "one axis" else "ILi%dELi2ELi2E" if channels == 4 else "ILi%dELi4ELi2E"
    name = f"separable_attention_bwd_tokens_kernel{tile % channels}Lb{int(with_r)}E"
    return machine_code.built(name, arch)


@needs_module
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(("with_r", "most"), [(True, 22.0), (False, 19.0)])
def test_instructions_per_pair(with_r: bool, most: float, arch: str) -> None:
    """By hand it is 20: four for the form, score, EX2, four for u, slope, six of d_x, three of d_r; loads for all."""
    found = few_channels(3, "two axes", with_r, arch)
    assert found.exponentials % 8 == 0
    assert found.per_pair <= most
    assert found.spills == found.shuffles == 0
    assert found.registers <= 128  # 16 warps on a multiprocessor


@needs_module
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("axes", ["one axis", "two axes"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_few_channels_fit_the_registers(channels: int, axes: str, arch: str) -> None:
    assert few_channels(channels, axes, True, arch).spills == 0


@needs_module
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("own_channels", [1, 4, 16])
def test_many_channels_fit_the_registers(own_channels: int, arch: str) -> None:
    found = machine_code.built(f"separable_attention_bwd_many_tokens_kernelILi{own_channels}E", arch)
    assert found.spills == 0
    assert found.registers <= 128
