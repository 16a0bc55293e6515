"""What a position becomes: Fourier features of grids, as small per-axis tables, and of free positions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.backends.reference.fourier_encode import point_features
from perceiver_kernels.ops.fourier_encode import (
    FourierBands,
    check_positions,
    encode_grid,
    encode_points,
    result_dtype,
)

MAX_AXES = 4
CACHED_TABLES = 64  # entries; a grid of 224 x 224 with 64 bands takes 0.2 MB in float32


@dataclass(frozen=True)
class FourierGrid:
    """Fourier features of the positions of a grid; each feature depends on one coordinate only.

    Axis k has the coordinates x = linspace(-1, 1, S_k), and each of them the features sin(pi f x) and cos(pi f x) of
    num_bands frequencies f, and x. Grids compare and hash by value.

    Args:
        shape: (S_1, ..., S_A), 1 to 4 axes.
        num_bands: K, frequencies per axis.
        max_freq: one number or one per axis, for spacing "linear" (without a meaning otherwise). Order "grouped"
            defaults to the shape.
        order: "per_axis": [sin, cos, x] axis after axis (perceiver-pytorch); "grouped": [x of all axes | sin of all |
            cos of all] (DeepMind, Hugging Face).
        spacing: "linear": f = linspace(1, max_freq / 2, K); "log2": f = 1, 2, 4, ..., 2^(K-1) (NeRF); or the K
            frequencies f themselves, a tensor or a sequence (they too are multiplied by pi).
        concat_pos: whether x itself is a feature.
        sine_only: leaves the cosines out.
        endpoint: whether the last coordinate is 1; otherwise coordinates are -1 + 2 i / S_k, as in Hugging Face's
            subsampled decoding.
        precision: "float64": the features are exact; "float32": coordinates, frequencies and angles are rounded to
            float32 one after the other, as Hugging Face does: at thousands of radians the features are off by 1e-4.

    Raises:
        ValueError: an argument is not as described; the message names it.

    Source: Jaegle et al. 2021, arXiv:2103.03206.
    """

    shape: tuple[int, ...]
    num_bands: int
    max_freq: float | Sequence[float] | None = None
    order: str = "per_axis"
    spacing: str | Sequence[float] | Tensor = "linear"
    concat_pos: bool = True
    sine_only: bool = False
    endpoint: bool = True
    precision: str = "float64"

    def __post_init__(self) -> None:
        if self.precision not in ("float64", "float32"):
            raise ValueError(f"precision is {self.precision!r}, must be 'float64' or 'float32'")
        shape = tuple(operator.index(size) for size in self.shape)
        if not 1 <= len(shape) <= MAX_AXES:
            raise ValueError(f"shape is {shape}, must have 1 to {MAX_AXES} axes")
        if min(shape) < 1:
            raise ValueError(f"shape is {shape}, must have at least one position on every axis")
        max_freq = shape if self.max_freq is None and self.order == "grouped" else self.max_freq
        bands = FourierBands(
            len(shape), self.num_bands, max_freq, self.order, self.spacing, self.concat_pos, self.sine_only
        )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "_bands", bands)
        # Equal grids have equal fields, however their arguments were written.
        for name in ("num_bands", "max_freq", "spacing"):
            object.__setattr__(self, name, getattr(bands, name))

    @property
    def bands(self) -> FourierBands:
        """The features of a position, whatever the grid's size."""
        return self._bands  # type: ignore[attr-defined]  # not a field: derived from them, and no part of the hash

    @property
    def num_axes(self) -> int:
        """A."""
        return len(self.shape)

    @property
    def num_positions(self) -> int:
        """M = S_1 * ... * S_A."""
        return math.prod(self.shape)

    @property
    def axis_channels(self) -> tuple[int, ...]:
        """e_k, the number of features of each axis."""
        return (self.bands.channels_per_axis,) * self.num_axes

    @property
    def num_channels(self) -> int:
        """E = e_1 + ... + e_A."""
        return self.bands.num_channels

    def tables(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """The features of each axis's positions, per axis (S_k, e_k), computed in float64 and rounded once.

        Columns are [sin(K), cos(K), x], for order "grouped" [x, sin(K), cos(K)]. The tables are cached and shared: do
        not write to them.
        """
        return self._constants("tables", device, dtype)

    def feature_sums(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Per axis (S_k,) the sums of each position's features, and the sums of their squares; cached and shared."""
        return self._constants("sums", device, dtype), self._constants("squares", device, dtype)

    def summands(
        self,
        data_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """What tokens [data | features] are sums of: (c + S_1 + ... + S_A, c + E), cached and shared.

        The first c = data_channels rows are unit vectors, to be weighted by the data; then each position of each axis
        has its features, zero at the other axes' channels. A token is the sum of the former and one row per axis.
        """
        return self._constants(f"summands {data_channels}", device, dtype)[0]

    def channel_index(self) -> tuple[Tensor, ...]:
        """Per axis (e_k,), int64, CPU: where the columns of its table stand among the num_channels channels."""
        return self._constants("channels", "cpu", torch.int64)

    def encode(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        batch: int | None = None,
        data: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Every position's features, written out: for those who want the array.

        Args:
            device: of the result; defaults to that of out or data, then to torch's default.
            dtype: of the result; defaults to that of out or of floating-point data, then to float32.
            batch: repeats the array for each of so many inputs.
            data: (batch, *shape, c) or (batch, M, c), any dtype and strides: its channels come before the features.
            out: written to and returned: (M, E) or (*shape, E), a batch dimension before; with data, c more channels.
                Any strides with contiguous channels. Gives no gradients.

        Returns:
            (M, E); with batch (batch, M, E); with data its shape with E more channels. Differentiable in data.

        Raises:
            ValueError: shapes, dtypes or devices disagree; the message names the argument.

        Memory: the result alone.
        """
        channels = self.num_channels + (0 if data is None else data.shape[-1])
        on_grid = None if data is None else self._on_grid("data", data, data.shape[-1], batched=True)
        out_on_grid = None if out is None else self._on_grid("out", out, channels, batched=data is not None)
        sizes = {"data": on_grid, "out": out_on_grid}
        batches = {name: len(tensor) for name, tensor in sizes.items() if tensor is not None}
        expected = batches.get("data", batches.get("out", 1)) if batch is None else batch
        for name, size in batches.items():
            if size != expected:
                raise ValueError(f"{name} has batch {size}, must have {expected}")
        dtype = result_dtype(dtype, out, data.dtype if data is not None and data.is_floating_point() else torch.float32)
        for name, tensor in (("out", out), ("data", data)):
            if tensor is not None:
                device = _checked_device(name, tensor, device)
        if on_grid is not None:
            on_grid = on_grid.to(dtype)
        tables = self.tables(device, dtype)
        encoded = encode_grid(tables, self.bands.sections, data=on_grid, batch=expected, out=out_on_grid)
        if out is not None:
            return out
        if data is not None:
            return encoded.view(*data.shape[:-1], channels)
        return encoded.view(*(() if batch is None else (batch,)), self.num_positions, channels)

    def _on_grid(self, name: str, tensor: Tensor, channels: int, *, batched: bool) -> Tensor:
        """A (batch, *shape, channels) view of a tensor that may have its positions in one dimension, or no batch."""
        leading = tuple(tensor.shape[:-1])
        for axes in (self.shape, (self.num_positions,)):
            before = len(leading) - len(axes)
            if leading[before:] != axes or before not in ((1,) if batched else (0, 1)) or tensor.shape[-1] != channels:
                continue
            tensor = tensor if before else tensor[None]
            return tensor if axes == self.shape else tensor.unflatten(1, self.shape)
        grid = ", ".join(map(str, self.shape))
        expected = f"(batch, {grid}, {channels}) or (batch, {self.num_positions}, {channels})"
        without = "" if batched else ", the batch optional,"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {expected}{without} for a grid of {grid}")

    def _constants(self, what: str, device: torch.device | str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return _traced_constants(self._traceable_fields(), what, device, dtype)
        return _looked_up(self, what, device, dtype)

    def _traceable_fields(self) -> tuple[Any, ...]:
        """The fields in a form in which torch.compile takes no number for a dynamic one: the tables are constants."""
        spacing = self.spacing if isinstance(self.spacing, str) else _hexadecimal(self.spacing)
        return (
            tuple(operator.index(size) for size in self.shape),
            operator.index(self.num_bands),
            None if self.max_freq is None else _hexadecimal(self.max_freq),
            self.order,
            spacing,
            self.concat_pos,
            self.sine_only,
            self.endpoint,
            self.precision,
        )


def _hexadecimal(numbers: Any) -> tuple[str, ...]:
    return tuple(number.hex() for number in numbers)


def _from_hexadecimal(field: Any) -> Any:
    return tuple(map(float.fromhex, field)) if isinstance(field, tuple) else field


def _traced_constants(
    fields: tuple[Any, ...], what: str, device: torch.device | str | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Called by torch.compile while it traces: the tables become constants of the graph, shared with the cache."""
    shape, num_bands, max_freq, order, spacing, *options = fields
    grid = FourierGrid(shape, num_bands, _from_hexadecimal(max_freq), order, _from_hexadecimal(spacing), *options)
    return _looked_up(grid, what, device, dtype)


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo, a second or more.
_traced_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _looked_up(
    grid: FourierGrid, what: str, device: torch.device | str | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    if what != "channels" and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, must be floating-point")
    probe = torch.empty(0, device=device)  # resolves the default device and "cuda" without an index
    if type(probe) is not Tensor:  # under a fake-tensor mode or the like: its tensors must not enter the cache
        return _computed(grid, what, probe.device, dtype)
    return _cached(grid, what, probe.device, dtype)


def _computed(grid: FourierGrid, what: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # Tensors of inference mode could never be saved for a backward later.
    with torch.inference_mode(False), torch.no_grad():
        name, *arguments = what.split()
        return tuple(value.to(device, dtype) for value in _COMPUTE[name](grid, *map(int, arguments)))


_cached = lru_cache(maxsize=CACHED_TABLES)(_computed)


def _tables(grid: FourierGrid) -> list[Tensor]:
    bands = grid.bands
    options = (bands.order == "grouped", bands.concat_pos, bands.sine_only)
    if grid.precision == "float32":
        return [_rounded_features(_coordinates(grid, axis), grid, axis).double() for axis in range(grid.num_axes)]
    return [
        point_features(_coordinates(grid, axis)[:, None], bands.frequencies(axis), *options)
        for axis in range(grid.num_axes)
    ]


def _coordinates(grid: FourierGrid, axis: int) -> Tensor:
    """(S_k,), in the grid's precision."""
    dtype, size = getattr(torch, grid.precision), grid.shape[axis]
    if grid.endpoint:
        return torch.linspace(-1.0, 1.0, size, dtype=dtype, device="cpu")
    return -1.0 + 2.0 * torch.arange(size, dtype=dtype, device="cpu") / size


def _rounded_features(x: Tensor, grid: FourierGrid, axis: int) -> Tensor:
    """(S_k, e_k): the features of coordinates x in float32, each operation rounded."""
    bands = grid.bands
    if bands.spacing == "linear":
        assert isinstance(bands.max_freq, tuple)
        frequencies = torch.linspace(1.0, bands.max_freq[axis] / 2, bands.num_bands, dtype=x.dtype, device="cpu")
    else:
        frequencies = torch.tensor(bands.frequencies(axis), dtype=x.dtype, device="cpu")
    angles = math.pi * (x[:, None] * frequencies)
    waves = [angles.sin()] if bands.sine_only else [angles.sin(), angles.cos()]
    position = [x[:, None]] if bands.concat_pos else []
    return torch.cat([*position, *waves] if bands.order == "grouped" else [*waves, *position], 1)


def _sums(grid: FourierGrid) -> list[Tensor]:
    return [table.sum(1) for table in _tables(grid)]


def _squares(grid: FourierGrid) -> list[Tensor]:
    return [table.square().sum(1) for table in _tables(grid)]


def _channels(grid: FourierGrid) -> list[Tensor]:
    sections, start, per_axis = grid.bands.sections, 0, [[] for _ in grid.shape]  # type: ignore[var-annotated]
    for width in sections:
        for channels in per_axis:
            channels.extend(range(start, start + width))
            start += width
    return [torch.tensor(channels, dtype=torch.int64, device="cpu") for channels in per_axis]


def _summands(grid: FourierGrid, data_channels: int) -> list[Tensor]:
    rows = [torch.eye(data_channels, data_channels + grid.num_channels, dtype=torch.float64, device="cpu")]
    for table, channels in zip(_tables(grid), _channels(grid), strict=True):
        rows.append(rows[0].new_zeros(table.shape[0], rows[0].shape[1]))
        rows[-1][:, data_channels + channels] = table
    return [torch.cat(rows)]


_COMPUTE: dict[str, Callable[..., list[Tensor]]] = {
    "tables": _tables,
    "sums": _sums,
    "squares": _squares,
    "channels": _channels,
    "summands": _summands,
}


def _checked_device(name: str, tensor: Tensor, device: torch.device | str | None) -> torch.device:
    if device is not None:
        wanted = torch.device(device)
        if wanted.type != tensor.device.type or wanted.index not in (None, tensor.device.index):
            raise ValueError(f"{name} is on {tensor.device}, must be on {wanted}")
    return tensor.device


class FourierEncoding(nn.Module):
    """Fourier features of free positions, (..., A) -> (..., E): `fourier_encode` as a module without parameters.

    Args:
        num_axes: A, coordinates of a position.
        num_bands, max_freq, order, spacing, concat_pos, sine_only: as in `fourier_encode`.
    """

    def __init__(
        self,
        num_axes: int,
        num_bands: int,
        max_freq: float | Sequence[float] | None = None,
        *,
        order: str = "per_axis",
        spacing: str | Sequence[float] | Tensor = "linear",
        concat_pos: bool = True,
        sine_only: bool = False,
    ) -> None:
        super().__init__()
        if num_axes < 1:
            raise ValueError(f"num_axes is {num_axes}, must be at least 1")
        self.bands = FourierBands(num_axes, num_bands, max_freq, order, spacing, concat_pos, sine_only)

    @property
    def num_channels(self) -> int:
        """E."""
        return self.bands.num_channels

    def forward(self, positions: Tensor) -> Tensor:
        """Map (..., A) to (..., E), in the dtype of positions."""
        check_positions(positions)
        if positions.shape[-1] != self.bands.num_axes:
            raise ValueError(f"positions has {positions.shape[-1]} axes, must have {self.bands.num_axes}")
        return encode_points(positions, self.bands)

    def extra_repr(self) -> str:
        bands = self.bands
        return (
            f"num_axes={bands.num_axes}, num_bands={bands.num_bands}, order={bands.order!r}, spacing={bands.spacing!r}"
        )
