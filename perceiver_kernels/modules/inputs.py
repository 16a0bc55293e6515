"""What the released Perceivers read: images, frames, text or several modalities become the encoder's tokens.

Where positions have Fourier features the tokens are described, not built (`GridTokens`). Channels come last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.modules.segments import GridTokens, Segment


class Inputs(nn.Module):
    """Makes tokens of `num_channels` channels, position features included."""

    num_channels: int


class GridInputs(Inputs):
    """Raw data (batch, *grid.shape, channels) and its grid, after a linear map if `projected_from` names its channels.

    Args:
        grid: positions of the data.
        channels: of a token before its position features.
        projected_from: channels of the data, where a linear map to `channels` comes first.
    """

    def __init__(self, grid: FourierGrid, channels: int, projected_from: int | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.num_channels = channels + grid.num_channels
        self.data_channels = channels if projected_from is None else projected_from
        self.projection = nn.Identity() if projected_from is None else nn.Linear(projected_from, channels)

    def forward(self, data: Tensor) -> GridTokens:
        _check_data(data, (*self.grid.shape, self.data_channels))
        return GridTokens(self.grid, self.projection(data))


class ConvInputs(Inputs):
    """An image (batch, H, W, 3), a fourth as long by a convolution and a maximum, with Fourier features.

    Args:
        grid: positions of what the convolution leaves, H / 4 x W / 4. (transformers pads otherwise, and has 55 x 55.)
        channels: of the convolution.
    """

    def __init__(self, grid: FourierGrid, channels: int = 64) -> None:
        super().__init__()
        self.grid = grid
        self.num_channels = channels + grid.num_channels
        self.conv = nn.Conv2d(3, channels, kernel_size=7, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, image: Tensor) -> GridTokens:
        _check_data(image, (*(4 * size for size in self.grid.shape), 3), "image")
        # JAX's "same": where an odd number of rows or columns is added, the last side gets more.
        maps = F.relu(self.norm(self.conv(F.pad(image.movedim(-1, 1), (2, 3, 2, 3)))))
        return GridTokens(self.grid, F.max_pool2d(maps, kernel_size=3, stride=2, ceil_mode=True).movedim(1, -1))


class LearnedPositionInputs(Inputs):
    """An image (batch, H, W, 3): a linear map of each pixel, beside a learned and projected embedding of its place."""

    def __init__(self, shape: tuple[int, int], channels: int = 256, position_channels: int = 256) -> None:
        super().__init__()
        self.shape = shape
        self.num_channels = channels + position_channels
        self.pixels = nn.Linear(3, channels)
        self.positions = nn.Parameter(0.02 * torch.randn(shape[0] * shape[1], position_channels))
        self.projection = nn.Linear(position_channels, position_channels)

    def forward(self, image: Tensor) -> Tensor:
        _check_data(image, (*self.shape, 3), "image")
        positions = self.projection(self.positions).expand(len(image), -1, -1)
        return torch.cat((self.pixels(image.flatten(1, 2)), positions), dim=-1)


class TextInputs(Inputs):
    """Tokens (batch, n), int64, n up to the length: an embedding of each plus one of its place."""

    def __init__(self, vocabulary: int, length: int, channels: int) -> None:
        super().__init__()
        self.num_channels = channels
        self.embeddings = nn.Embedding(vocabulary, channels)
        self.positions = nn.Embedding(length, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        length = self.positions.num_embeddings
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= length:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, must be (batch, n), n from 1 to {length}")
        return self.embeddings(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))


class PaddedModalities(Inputs):
    """Modalities on grids, each padded to the same channels by a learned constant, and one that the model must guess.

    Args:
        grids: of each modality that is read, and the channels of its data.
        hidden: the modalities that are not read: a single learned token stands for each.
        min_padding: least channels of a constant.

    The data of a modality is (batch, *grid.shape, channels).
    """

    def __init__(
        self, grids: Mapping[str, tuple[FourierGrid, int]], hidden: Mapping[str, int], min_padding: int
    ) -> None:
        super().__init__()
        self.grids = dict(grids)
        own = {name: grid.num_channels + channels for name, (grid, channels) in grids.items()} | dict(hidden)
        self.num_channels = max(own.values()) + min_padding
        self.padding = nn.ParameterDict({k: 0.02 * torch.randn(self.num_channels - n) for k, n in own.items()})
        # Of those that are read, only masking in training would need one; the released checkpoints have them.
        self.mask = nn.ParameterDict({k: 0.02 * torch.randn(self.num_channels) for k in own})
        self.hidden = tuple(hidden)

    def forward(self, modalities: Mapping[str, Tensor]) -> list[Segment]:
        if set(modalities) != set(self.grids):
            raise ValueError(f"modalities are {sorted(modalities)}, must be {sorted(self.grids)}")
        segments: list[Segment] = []
        for name, (grid, channels) in self.grids.items():
            _check_data(modalities[name], (*grid.shape, channels), name)
            segments.append(GridTokens(grid, modalities[name], self.padding[name]))
        batch = segments[0].shape[0]
        return segments + [self.mask[name].expand(batch, 1, -1) for name in self.hidden]


def _check_data(data: Tensor, shape: tuple[int, ...], name: str = "data") -> None:
    if tuple(data.shape[1:]) != shape:
        raise ValueError(f"{name} has shape {tuple(data.shape)}, must be (batch, {', '.join(map(str, shape))})")
    if not data.is_floating_point():
        raise ValueError(f"{name} has dtype {data.dtype}, must be floating-point")
