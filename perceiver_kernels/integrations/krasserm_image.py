"""What krasserm's image classifier reads: pixels, whose positions are left to the encoder."""

# The attributes of another library's modules have no types.
# mypy: disable-error-code="misc,no-any-return"

from __future__ import annotations

from typing import Any

from perceiver.model.vision.image_classifier.backend import ImageInputAdapter
from torch import Tensor

from perceiver_kernels.integrations.krasserm_perceiver_io import tokens_on_grid
from perceiver_kernels.integrations.swap import Accelerated


class ImageAdapter(ImageInputAdapter, Accelerated):
    """ImageInputAdapter, which leaves the Fourier features of the positions to the encoder."""

    def forward(self, x: Tensor) -> Any:
        if tuple(x.shape[1:]) != tuple(self.image_shape) or not x.is_floating_point():
            return super().forward(x)
        return tokens_on_grid(self.position_encoding, x)
