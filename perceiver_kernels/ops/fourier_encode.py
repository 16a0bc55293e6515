"""Fourier features written out: of free positions (the public fourier_encode) and of grids (FourierGrid.encode)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels import dispatch
from perceiver_kernels.backends import native
from perceiver_kernels.backends.reference import fourier_encode as reference
from perceiver_kernels.ops.declarations import GPU_DTYPES, declare_gpu, declare_native, declare_reference
from perceiver_kernels.ops.registration import define, differentiate, implement
from perceiver_kernels.ops.validation import DTYPES, check_floating

OP = "fourier_encode"
ORDERS = ("per_axis", "grouped")
SPACINGS = ("linear", "log2")

declare_gpu(OP, "cuda", "triton", compute_dtypes=GPU_DTYPES, data_dtypes=GPU_DTYPES)
declare_native(OP, native, compute_dtypes=DTYPES, data_dtypes=DTYPES)
declare_reference(OP, reference, compute_dtypes=DTYPES, data_dtypes=DTYPES)


@dataclass(frozen=True)
class FourierBands:
    """Which features a position has: the checked options that grids and free positions share.

    Attributes:
        num_axes: coordinates of a position.
        num_bands: frequencies per axis.
        max_freq: one number per axis, for spacing "linear".
        order: "per_axis" or "grouped".
        spacing: "linear", "log2", or the frequencies themselves.
        concat_pos: whether the coordinates are features too.
        sine_only: leaves the cosines out.
    """

    num_axes: int
    num_bands: int
    max_freq: float | Sequence[float] | None
    order: str
    spacing: str | Sequence[float] | Tensor
    concat_pos: bool
    sine_only: bool

    def __post_init__(self) -> None:
        num_bands = operator.index(self.num_bands)
        if num_bands < 1:
            raise ValueError(f"num_bands is {num_bands}, must be at least 1")
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}, must be {_one_of(ORDERS)}")
        spacing = _checked_spacing(self.spacing, num_bands)
        max_freq = _checked_max_freq(self.max_freq, self.num_axes)
        if max_freq is None and spacing == "linear":
            raise ValueError("max_freq is None, must be a number, or one per axis, for spacing 'linear'")
        object.__setattr__(self, "num_bands", num_bands)
        object.__setattr__(self, "max_freq", max_freq)
        object.__setattr__(self, "spacing", spacing)

    @property
    def sections(self) -> tuple[int, ...]:
        """Widths of the sections of an axis's features: those of a section stand axis after axis in the output."""
        waves = (self.num_bands,) if self.sine_only else (self.num_bands, self.num_bands)
        if self.order == "grouped":
            return (1, *waves) if self.concat_pos else waves
        return (sum(waves) + int(self.concat_pos),)

    @property
    def channels_per_axis(self) -> int:
        return sum(self.sections)

    @property
    def num_channels(self) -> int:
        return self.num_axes * self.channels_per_axis

    def frequencies(self, axis: int) -> tuple[float, ...]:
        """The frequencies f of an axis, in features sin(pi f x)."""
        if self.spacing == "log2":
            return tuple(2.0**band for band in range(self.num_bands))
        if self.spacing != "linear":
            assert isinstance(self.spacing, tuple)
            return self.spacing
        assert isinstance(self.max_freq, tuple)
        steps = max(self.num_bands - 1, 1)
        span = self.max_freq[axis] / 2 - 1.0
        return tuple(1.0 + span * (band / steps) for band in range(self.num_bands))


def _one_of(choices: Sequence[str]) -> str:
    return " or ".join(map(repr, choices))


def _checked_spacing(spacing: str | Sequence[float] | Tensor, num_bands: int) -> str | tuple[float, ...]:
    if isinstance(spacing, str):
        if spacing not in SPACINGS:
            raise ValueError(f"spacing is {spacing!r}, must be {_one_of(SPACINGS)}, or {num_bands} frequencies")
        return spacing
    if isinstance(spacing, Tensor):
        if spacing.dim() != 1:
            raise ValueError(
                f"spacing has shape {tuple(spacing.shape)}, must be ({num_bands},), one frequency per band"
            )
        spacing = spacing.tolist()
    frequencies = tuple(_number("spacing", frequency) for frequency in spacing)
    if len(frequencies) != num_bands:
        raise ValueError(f"spacing has {len(frequencies)} frequencies, must have {num_bands} as num_bands says")
    return frequencies


def _checked_max_freq(max_freq: float | Sequence[float] | None, num_axes: int) -> tuple[float, ...] | None:
    if max_freq is None:
        return None
    if not isinstance(max_freq, (tuple, list)):
        return (_number("max_freq", max_freq),) * num_axes
    if len(max_freq) != num_axes:
        raise ValueError(f"max_freq has {len(max_freq)} entries, must be one number or {num_axes}, one per axis")
    return tuple(_number("max_freq", value) for value in max_freq)


def _number(name: str, value: Any) -> float:
    """The value as a finite float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is or holds {value!r}, must be a number") from None
    if not abs(number) < math.inf:  # math.isfinite stops torch.compile's tracing of a dynamic number
        raise ValueError(f"{name} is or holds {number}, must be finite")
    return number


def fourier_encode(
    positions: Tensor,
    num_bands: int,
    max_freq: float | Sequence[float] | None = None,
    *,
    spacing: str | Sequence[float] | Tensor = "linear",
    order: str = "per_axis",
    concat_pos: bool = True,
    sine_only: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Fourier features of free positions.

    Each coordinate x becomes sin(pi f_1 x), ..., sin(pi f_K x), cos(pi f_1 x), ..., cos(pi f_K x) and x, computed in
    float64 and rounded once.

    Args:
        positions: (..., A), floating-point, any strides; usually in [-1, 1].
        num_bands: K, frequencies per axis.
        max_freq: one number or one per axis; needed for spacing "linear", without a meaning otherwise.
        spacing: "linear": f = linspace(1, max_freq / 2, K); "log2": f = 1, 2, 4, ..., 2^(K-1) (NeRF);
            or the K frequencies f themselves (they too are multiplied by pi).
        order: "per_axis": [sin, cos, x] axis after axis (perceiver-pytorch); "grouped": [x of all axes | sin of all |
            cos of all] (DeepMind, Hugging Face).
        concat_pos: whether x itself is a feature.
        sine_only: leaves the cosines out.
        out: (..., E), written to and returned; its channels must be contiguous. Gives no gradients.
        dtype: of the result; defaults to out's, then to that of positions.

    Returns:
        (..., E) with E = A * (2 K + 1), less without concat_pos or with sine_only. Differentiable in positions.

    Raises:
        ValueError: an argument is not as described; the message names it.
        BackendError: a forced backend cannot run this call; the message lists every reason.

    Memory: the result. Backward: O(positions * A * K) in float64.
    Cost: two sines and cosines per coordinate and 64 evenly spaced frequencies, one per 8 octaves; recurrences between.
    Source: Jaegle et al. 2021, arXiv:2103.03206; Mildenhall et al. 2020, arXiv:2003.08934.
    """
    check_positions(positions)
    bands = FourierBands(positions.shape[-1], num_bands, max_freq, order, spacing, concat_pos, sine_only)
    return encode_points(positions, bands, out=out, dtype=dtype)


def explain(positions: Tensor, *_: Any, out: Tensor | None = None, dtype: torch.dtype | None = None, **__: Any) -> str:
    """Which backend would run this call of fourier_encode, and the others' reasons why not."""
    result = dtype or (positions.dtype if out is None else out.dtype)
    return dispatch.describe(dispatch.Call(OP, positions.device.type, result, positions.dtype, positions.shape[-1]))


def check_positions(positions: Tensor) -> None:
    if positions.dim() < 1 or positions.shape[-1] < 1:
        raise ValueError(f"positions has shape {tuple(positions.shape)}, must be (..., axes) with at least one axis")
    check_floating("positions", positions)


def encode_points(
    positions: Tensor, bands: FourierBands, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`fourier_encode` of checked positions and options."""
    shape = (*positions.shape[:-1], bands.num_channels)
    dtype = result_dtype(dtype, out, positions.dtype)
    frequencies = [f for axis in range(bands.num_axes) for f in bands.frequencies(axis)]
    options = (frequencies, bands.order == "grouped", bands.concat_pos, bands.sine_only)
    rows = positions.reshape(math.prod(shape[:-1]), bands.num_axes)
    if out is None:
        return torch.ops.perceiver_kernels.fourier_encode_points(rows, *options, dtype).view(shape)
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, must be {shape}")
    check_out(out, positions, "positions")
    try:
        out_rows = out.view(rows.shape[0], bands.num_channels)
    except RuntimeError:
        raise ValueError(f"out has strides {out.stride()}, must be viewable as ({rows.shape[0]}, channels)") from None
    torch.ops.perceiver_kernels.fourier_encode_points_out(rows, *options, out_rows)
    return out


def encode_grid(
    tables: Sequence[Tensor], sections: Sequence[int], *, data: Tensor | None, batch: int, out: Tensor | None
) -> Tensor:
    """[data | features] of every position of a grid, (batch, S_1, ..., S_A, c + E), from per-axis tables.

    Args:
        tables: per axis (S_k, sum of sections), in the dtype of the result.
        sections: widths of the column sections of a table; the output holds them section after section, and within a
            section axis after axis.
        data: (batch, S_1, ..., S_A, c) in the dtype of the result, any strides; differentiable.
        batch: of the result.
        out: the result's memory, any strides with contiguous channels.
    """
    tables, sections = list(tables), list(sections)
    if out is None:
        return torch.ops.perceiver_kernels.fourier_encode_grid(tables, sections, data, batch)
    check_out(out, data, "data")
    torch.ops.perceiver_kernels.fourier_encode_grid_out(tables, sections, data, out)
    return out


def result_dtype(dtype: torch.dtype | None, out: Tensor | None, default: torch.dtype) -> torch.dtype:
    """The dtype asked for, else out's, else the default; must be one that the kernels write."""
    if out is not None and dtype not in (None, out.dtype):
        raise ValueError(f"out has dtype {out.dtype}, must be {dtype} as dtype says")
    name, chosen = ("dtype is", dtype or default) if out is None else ("out has dtype", out.dtype)
    if chosen not in DTYPES:
        raise ValueError(f"{name} {chosen}, must be float32, float64, bfloat16 or float16")
    return chosen


def check_out(out: Tensor, source: Tensor | None, source_name: str) -> None:
    if out.numel() and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out has stride {out.stride(-1)} between channels, must have 1")
    if source is None:
        return
    if out.device != source.device:
        raise ValueError(f"out is on {out.device}, must be on {source.device} as {source_name} is")
    if torch.is_grad_enabled() and source.requires_grad:
        raise ValueError(f"out is given, must be None for {source_name} that requires a gradient")


define("fourier_encode_grid(Tensor[] tables, int[] sections, Tensor? data, SymInt batch) -> Tensor")
define("fourier_encode_grid_out(Tensor[] tables, int[] sections, Tensor? data, Tensor(a!) out) -> ()")
define(
    "fourier_encode_points(Tensor positions, float[] frequencies, bool grouped, bool concat_pos, bool sine_only, "
    "ScalarType dtype) -> Tensor"
)
define(
    "fourier_encode_points_out(Tensor positions, float[] frequencies, bool grouped, bool concat_pos, bool sine_only, "
    "Tensor(a!) out) -> ()"
)


def _grid_out(tables: list[Tensor], sections: list[int], data: Tensor | None, out: Tensor) -> None:
    call = dispatch.Call(OP, out.device.type, out.dtype, out.dtype, len(tables))
    dispatch.select(call).load().fourier_encode_grid(tables, sections, data, out)


def _grid_fake(tables: list[Tensor], sections: list[int], data: Tensor | None, batch: int) -> Tensor:
    channels = len(tables) * sum(sections) + (0 if data is None else data.shape[-1])
    return tables[0].new_empty(batch, *(table.shape[0] for table in tables), channels)


def _grid(tables: list[Tensor], sections: list[int], data: Tensor | None, batch: int) -> Tensor:
    out = _grid_fake(tables, sections, data, batch)
    _grid_out(tables, sections, data, out)
    return out


def _grid_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tables, _, data, _ = inputs
    ctx.axes, ctx.channels = len(tables), 0 if data is None else data.shape[-1]


def _grid_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The tables are constants; the data's channels come first."""
    return [None] * ctx.axes, None, grad[..., : ctx.channels], None


def _points_out(
    positions: Tensor, frequencies: list[float], grouped: bool, concat_pos: bool, sine_only: bool, out: Tensor
) -> None:
    call = dispatch.Call(OP, positions.device.type, out.dtype, positions.dtype, positions.shape[1])
    backend = dispatch.select(call).load()
    backend.fourier_encode_points(positions, frequencies, grouped, concat_pos, sine_only, out)


def _points_fake(
    positions: Tensor, frequencies: list[float], grouped: bool, concat_pos: bool, sine_only: bool, dtype: torch.dtype
) -> Tensor:
    channels = (1 if sine_only else 2) * len(frequencies) + (positions.shape[1] if concat_pos else 0)
    return positions.new_empty(positions.shape[0], channels, dtype=dtype)


def _points(
    positions: Tensor, frequencies: list[float], grouped: bool, concat_pos: bool, sine_only: bool, dtype: torch.dtype
) -> Tensor:
    out = _points_fake(positions, frequencies, grouped, concat_pos, sine_only, dtype)
    _points_out(positions, frequencies, grouped, concat_pos, sine_only, out)
    return out


def _nothing(*_: Any) -> None:
    """Fake of an op that only writes to its argument."""


def _points_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    positions, *ctx.options, _ = inputs
    ctx.save_for_backward(positions)


def _points_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    # In float64: angles reach hundreds of radians, whose rounding to float32 would be the gradient's largest error.
    gradient = reference.point_features_gradient(grad.double(), positions.double(), *ctx.options)
    return gradient.to(positions.dtype), None, None, None, None, None


implement("fourier_encode_grid", _grid, _grid_fake)
implement("fourier_encode_grid_out", _grid_out, _nothing)
implement("fourier_encode_points", _points, _points_fake)
implement("fourier_encode_points_out", _points_out, _nothing)
differentiate("fourier_encode_grid", _grid_setup_context, _grid_backward)
differentiate("fourier_encode_points", _points_setup_context, _points_backward)
