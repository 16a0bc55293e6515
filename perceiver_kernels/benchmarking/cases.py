"""What is measured: the encoder cross-attention of every published Perceiver whose input is a grid."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

# The layer without and with gradients of all parameters, and a whole Perceiver of depth 1 around it, without.
MODES = ("forward", "forward+backward", "perceiver")


@dataclasses.dataclass(frozen=True)
class Case:
    """One encoder cross-attention, from the raw grid of data to the output projection.

    Every axis has the same `max_freq`, because perceiver-pytorch knows no other; the time does not depend on it.
    """

    name: str
    what: str
    shape: tuple[int, ...]
    num_bands: int
    max_freq: float
    data_channels: int
    num_latents: int
    latent_dim: int
    heads: int = 1
    head_dim: int = 64
    batch: int = 1

    @property
    def tokens(self) -> int:
        """M, the positions of the grid."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """C, the channels of one encoded token: data and Fourier features."""
        return self.data_channels + len(self.shape) * (2 * self.num_bands + 1)

    @property
    def pairs(self) -> int:
        """(latent, token) pairs, each of which costs one exponential per head."""
        return self.batch * self.heads * self.num_latents * self.tokens

    def image(self) -> Tensor:
        """The raw data, (batch, *shape, data_channels), the same at every call."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.batch, *self.shape, self.data_channels, generator=generator) * 2 - 1

    def small(self, size: int = 8) -> Case:
        """The same case on a grid of a few positions, for warming up and for testing."""
        return dataclasses.replace(self, shape=tuple(min(size, steps) for steps in self.shape))


# Shapes: Jaegle et al. 2021, arXiv:2103.03206 (Perceiver) and arXiv:2107.14795 (Perceiver IO), and the released models.
# Official models use one head as wide as a token, perceiver-pytorch one head of 64. Left out of a token: the constant
# learned padding that brings every modality of the multimodal model to 704 channels.
CASES = {
    case.name: case
    for case in (
        Case("imagenet", "ImageNet, one head of 64", (224, 224), 64, 224.0, 3, 512, 1024),
        Case("imagenet-official", "ImageNet, one head of 261", (224, 224), 64, 224.0, 3, 512, 1024, 1, 261),
        Case("imagenet-conv", "ImageNet after a convolution", (56, 56), 64, 56.0, 64, 512, 1024, 1, 322),
        Case("optical-flow", "Sintel, a pair of frames", (368, 496), 64, 496.0, 64, 2048, 512, 1, 322),
        Case("multimodal-video", "Kinetics, video in 4 x 4 patches", (16, 56, 56), 32, 56.0, 48, 784, 512, 1, 704),
        Case("multimodal-audio", "Kinetics, audio in patches of 16", (1920,), 192, 1920.0, 16, 784, 512, 1, 704),
        Case("audioset-raw", "AudioSet, waveform in segments of 128", (480,), 64, 480.0, 128, 512, 1024),
        Case("audioset-mel", "AudioSet, mel spectrogram of 4,800 bins", (75, 64), 64, 75.0, 1, 512, 1024),
        Case("audioset-video", "AudioSet, video in 2 x 8 x 8 patches", (16, 28, 28), 64, 28.0, 384, 512, 1024),
        Case("cifar10", "CIFAR-10, a batch of 32", (32, 32), 64, 32.0, 3, 128, 256, batch=32),
        Case("mnist", "MNIST, a batch of 32", (28, 28), 4, 28.0, 1, 16, 64, batch=32),
        Case("photo-4k", "a 4K photograph, every pixel", (2160, 3840), 64, 224.0, 3, 512, 1024),
    )
}
