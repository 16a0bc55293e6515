"""Published Perceivers, each in one line: `pk.presets.imagenet_fourier()` builds the model, with random weights.

    pk.presets.PRESETS                                  all of them, by name
    pk.presets.optical_flow.num_parameters              without building it
    pk.presets.cifar10_study(latent_dim=128)            arguments in place of the published ones

Official models are Perceiver IOs as DeepMind released them, inputs channels last; the others are `Perceiver`s. Not
here: the Perceiver paper's AudioSet models of mel spectrograms (how its 4,800 inputs stand is not published) and of
audio with video (`Perceiver` reads one modality), and Perceiver AR (its causal attention has no kernels yet).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from perceiver_kernels.encodings import FourierEncoding, FourierGrid
from perceiver_kernels.modules.inputs import (
    ConvInputs,
    GridInputs,
    Inputs,
    LearnedPositionInputs,
    PaddedModalities,
    TextInputs,
)
from perceiver_kernels.modules.official import (
    Encoder,
    LatentBlocks,
    OfficialAutoencoder,
    OfficialLanguageModel,
    OfficialPerceiver,
    QueryDecoder,
)
from perceiver_kernels.modules.perceiver import Perceiver
from perceiver_kernels.modules.queries import (
    ConcatenatedQueries,
    FourierQueries,
    InputQueries,
    LearnedQueries,
)


@dataclass(frozen=True)
class Preset:
    """A published model, built by a call.

    Args:
        name: under which it stands in PRESETS.
        what: the model, in words.
        input_shape: of its input, batch 1; of several modalities by name.
        build: makes it of its arguments.
        arguments: the published ones.
        source: the paper.
    """

    name: str
    what: str
    input_shape: tuple[int, ...] | dict[str, tuple[int, ...]]
    build: Callable[..., nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    source: str = "Jaegle et al. 2021, arXiv:2103.03206"

    def __call__(self, **arguments: Any) -> nn.Module:
        """The model, with random weights; arguments take the place of the published ones."""
        return self.build(**self.arguments | arguments)

    @property
    def num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self().parameters())


_IO = "Jaegle et al. 2022, arXiv:2107.14795"


# --- official models ------------------------------------------------------------------------------------------------


def _classifier(
    inputs: Inputs,
    num_latents: int = 512,
    latent_dim: int = 1024,
    layers: int = 6,
    blocks: int = 8,
    classes: int = 1000,
) -> OfficialPerceiver:
    return OfficialPerceiver(
        inputs,
        Encoder(num_latents, latent_dim, inputs.num_channels),
        LatentBlocks(latent_dim, layers, blocks=blocks, heads=8),
        LearnedQueries(1, latent_dim),
        QueryDecoder(latent_dim, latent_dim, classes),
        single=True,
    )


def _grid(*shape: int, num_bands: int = 64, max_freq: tuple[float, ...] | None = None) -> FourierGrid:
    return FourierGrid(shape, num_bands, max_freq, order="grouped")


def _imagenet_fourier(size: int = 224, **arguments: Any) -> nn.Module:
    return _classifier(GridInputs(_grid(size, size), 3), **arguments)


def _imagenet_learned(size: int = 224, **arguments: Any) -> nn.Module:
    return _classifier(LearnedPositionInputs((size, size)), **arguments)


def _imagenet_conv(size: int = 224, **arguments: Any) -> nn.Module:
    return _classifier(ConvInputs(_grid(size // 4, size // 4)), **arguments)


def _optical_flow(
    shape: tuple[int, int] = (368, 496), num_latents: int = 2048, latent_dim: int = 512, layers: int = 24
) -> nn.Module:
    inputs = GridInputs(_grid(*shape), 64, projected_from=54)
    return OfficialPerceiver(
        inputs,
        Encoder(num_latents, latent_dim, inputs.num_channels),
        LatentBlocks(latent_dim, layers, heads=16),
        ConcatenatedQueries(InputQueries(64), FourierQueries(inputs.grid)),
        QueryDecoder(inputs.num_channels, latent_dim, 2, query_residual=False),
        raw_queries=True,
        out_scale=0.01,
    )


def _language_model(
    length: int = 2048,
    channels: int = 768,
    num_latents: int = 256,
    latent_dim: int = 1280,
    layers: int = 26,
    qk: int = 256,
) -> nn.Module:
    heads = 8
    return OfficialLanguageModel(
        TextInputs(262, length, channels),
        Encoder(num_latents, latent_dim, channels, heads=heads, head_dim=qk // heads, head_dim_v=latent_dim // heads),
        LatentBlocks(latent_dim, layers, heads=heads, head_dim=qk // heads),
        LearnedQueries(length, channels),
        QueryDecoder(
            channels,
            latent_dim,
            None,
            heads=heads,
            head_dim=qk // heads,
            head_dim_v=channels // heads,
            query_residual=False,
        ),
    )


def _autoencoder(
    frames: int = 16,
    size: int = 224,
    samples: int = 30720,
    classes: int = 700,
    num_latents: int = 784,
    latent_dim: int = 512,
    layers: int = 8,
) -> nn.Module:
    patches = samples // 16
    audio = _grid(patches, num_bands=192, max_freq=(samples,))
    resolution = (frames, size, size)
    video = _grid(frames, size // 4, size // 4, num_bands=32, max_freq=resolution)
    inputs = PaddedModalities({"audio": (audio, 16), "image": (video, 48)}, {"label": classes}, min_padding=4)
    pixels = _grid(*resolution, num_bands=32, max_freq=resolution)
    queries = 1024 + 2
    return OfficialAutoencoder(
        inputs,
        Encoder(num_latents, latent_dim, inputs.num_channels),
        LatentBlocks(latent_dim, layers, heads=8),
        {
            "audio": ConcatenatedQueries(FourierQueries(audio), LearnedQueries(1, queries - audio.num_channels)),
            "image": ConcatenatedQueries(FourierQueries(pixels), LearnedQueries(1, queries - pixels.num_channels)),
            "label": ConcatenatedQueries(LearnedQueries(1, 1024), LearnedQueries(1, queries - 1024)),
        },
        QueryDecoder(queries, latent_dim, 512, query_residual=False),
        {"audio": nn.Linear(512, 16), "image": nn.Linear(512, 3), "label": nn.Linear(512, classes)},
    )


imagenet_fourier = Preset(
    "imagenet_fourier", "ImageNet, pixels with Fourier features", (1, 224, 224, 3), _imagenet_fourier, source=_IO
)
imagenet_learned = Preset(
    "imagenet_learned", "ImageNet, pixels with learned positions", (1, 224, 224, 3), _imagenet_learned, source=_IO
)
imagenet_conv = Preset("imagenet_conv", "ImageNet, after a convolution", (1, 224, 224, 3), _imagenet_conv, source=_IO)
optical_flow = Preset(
    "optical_flow",
    "optical flow; 3 x 3 patches of two frames, 27 channels each; a query for every pixel",
    (1, 368, 496, 54),
    _optical_flow,
    source=_IO,
)
multimodal_autoencoding = Preset(
    "multimodal_autoencoding",
    "Kinetics: 16 frames in 4 x 4 patches and their sound, autoencoded, and the label guessed; 804,737 queries",
    {"audio": (1, 1920, 16), "image": (1, 16, 56, 56, 48)},
    _autoencoder,
    source=_IO,
)
language_model = Preset("language_model", "bytes of text, some of them masked", (1, 2048), _language_model, source=_IO)


# --- Perceivers of the first paper, and studies -----------------------------------------------------------------------


# As perceiver-pytorch builds them: MLPs are gated and four times as wide as the latents, and the first layers keep
# weights of their own, so that there are more parameters than in the paper: 228.6 M for ImageNet, not about 45 M.
_PAPER: dict[str, Any] = {
    "num_latents": 512,
    "latent_dim": 1024,
    "latent_heads": 8,
    "latent_dim_head": 128,
    "num_freq_bands": 64,
}


def _points(num_freq_bands: int = 64, max_freq: float = 1120.0, **arguments: Any) -> nn.Module:
    encoding = FourierEncoding(3, num_freq_bands, max_freq)
    model = Perceiver(
        num_freq_bands=num_freq_bands,
        max_freq=max_freq,
        input_axis=1,
        input_channels=encoding.num_channels,
        fourier_encode_data=False,
        **arguments,
    )
    return nn.Sequential(encoding, model)


imagenet_paper = Preset(
    "imagenet_paper",
    "ImageNet, 8 cross-attends and 48 self layers, tied",
    (1, 224, 224, 3),
    Perceiver,
    _PAPER | {"max_freq": 224.0, "depth": 8, "self_per_cross_attn": 6, "weight_tie_layers": True},
)
audioset_paper = Preset(
    "audioset_paper",
    "AudioSet, waveform in segments of 128, two cross-attends",
    (1, 480, 128),
    Perceiver,
    _PAPER
    | {
        "input_axis": 1,
        "input_channels": 128,
        "max_freq": 480.0,
        "depth": 2,
        "self_per_cross_attn": 8,
        "num_classes": 527,
    },
)
audioset_video_paper = Preset(
    "audioset_video_paper",
    "AudioSet, 32 frames in patches of 2 x 8 x 8, two cross-attends",
    (1, 16, 28, 28, 384),
    Perceiver,
    _PAPER
    | {
        "input_axis": 3,
        "input_channels": 384,
        "max_freq": 224.0,
        "depth": 2,
        "self_per_cross_attn": 8,
        "num_classes": 527,
    },
)
modelnet40_paper = Preset(
    "modelnet40_paper",
    "ModelNet40, points in space, two cross-attends",
    (1, 2000, 3),
    _points,
    _PAPER | {"depth": 2, "self_per_cross_attn": 6, "num_classes": 40},
)
cifar10_study = Preset(
    "cifar10_study",
    "CIFAR-10, small",
    (1, 32, 32, 3),
    Perceiver,
    {
        "num_freq_bands": 64,
        "max_freq": 32.0,
        "depth": 1,
        "self_per_cross_attn": 4,
        "num_latents": 128,
        "latent_dim": 256,
        "latent_heads": 4,
        "num_classes": 10,
    },
)
mnist_study = Preset(
    "mnist_study",
    "MNIST, smaller",
    (1, 28, 28, 1),
    Perceiver,
    {
        "input_channels": 1,
        "num_freq_bands": 4,
        "max_freq": 28.0,
        "depth": 6,
        "self_per_cross_attn": 4,
        "num_latents": 16,
        "latent_dim": 64,
        "num_classes": 10,
    },
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in list(globals().values()) if isinstance(preset, Preset)}
