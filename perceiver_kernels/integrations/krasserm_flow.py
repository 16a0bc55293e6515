"""What krasserm's optical flow reads: frames, whose positions are left to encoder and decoder."""

# The attributes of another library's modules have no types.
# mypy: disable-error-code="misc,no-any-return"

from __future__ import annotations

from typing import Any

from perceiver.model.vision.optical_flow.backend import OpticalFlowInputAdapter
from torch import Tensor

from perceiver_kernels.integrations.krasserm_perceiver_io import tokens_on_grid
from perceiver_kernels.integrations.swap import Accelerated


class FlowAdapter(OpticalFlowInputAdapter, Accelerated):
    """OpticalFlowInputAdapter, which leaves the Fourier features of the positions to encoder and decoder."""

    def forward(self, x: Tensor) -> Any:
        if x.ndim != 5 or tuple(x.shape[3:]) != tuple(self.position_encoding.input_shape):
            return super().forward(x)
        frames = x.permute(0, 3, 4, 1, 2).flatten(3)
        return tokens_on_grid(self.position_encoding, self.linear(frames))
