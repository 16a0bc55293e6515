"""What krasserm's image classifier reads: pixels, whose positions are left to the encoder."""

# The attributes of another library's modules have no types.
# mypy: disable-error-code="misc,no-any-return"

from __future__ import annotations

from typing import Any

from perceiver.model.vision.image_classifier.backend import ImageInputAdapter
from torch import Tensor

from perceiver_kernels.integrations.krasserm_perceiver_io import grid_of
from perceiver_kernels.integrations.swap import Accelerated
from perceiver_kernels.integrations.unbuilt import UnbuiltTokens
from perceiver_kernels.modules.segments import GridTokens


class ImageAdapter(ImageInputAdapter, Accelerated):
    """ImageInputAdapter, which leaves the Fourier features of the positions to the encoder."""

    def forward(self, x: Tensor) -> Any:
        if tuple(x.shape[1:]) != tuple(self.image_shape) or not x.is_floating_point():
            return super().forward(x)
        return UnbuiltTokens([GridTokens(x, grid_of(self.position_encoding))])
