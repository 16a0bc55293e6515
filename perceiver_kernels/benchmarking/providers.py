"""Who is measured: this library on each backend, perceiver-pytorch, and the best plain PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.plain import ExpertCrossAttention, Layer, PlainPerceiver

FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Provider:
    """A way to run a case.

    Args:
        name: as in tables and on the command line.
        what: one line for a reader of the table.
        layer: builds the module of a case, called with (latents, image); its `layer` holds the parameters.
        floats: estimates how many floats it holds at its worst moment, given the case and whether it runs backward.
        missing: why it cannot run here, or None.
        perceiver: builds the whole Perceiver around the layer, called with (image).
        compiled: whether its first call compiles, so that only the second shows its memory.
        graph: whether it runs as one CUDA graph.
    """

    name: str
    what: str
    layer: Callable[[Case], Layer]
    floats: Callable[[Case, bool], int]
    missing: Callable[[], str | None] = lambda: None
    perceiver: Callable[[Case], nn.Module] | None = None
    compiled: bool = False
    graph: bool = False

    def bytes_needed(self, case: Case, mode: str) -> int:
        """Peak memory beyond image and parameters, estimated, so that nothing is run into the ground."""
        return FLOAT * self.floats(case, mode == "forward+backward")


class LibraryCrossAttention(Layer):
    """This library's layer, on the backend that dispatch picks or on a given one."""

    def __init__(self, case: Case, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.grid = pk.FourierGrid(shape=case.shape, num_bands=case.num_bands, max_freq=case.max_freq)
        self.layer = pk.CrossAttention(case.latent_dim, case.channels, heads=case.heads, head_dim=case.head_dim)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        with pk.use_backend(self.backend) if self.backend else contextlib.nullcontext():
            return self.layer(latents, image, grid=self.grid)


class PerceiverPytorchCrossAttention(Layer):
    """perceiver-pytorch's layer, its input encoded at every call just as its Perceiver.forward does it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from perceiver_pytorch.perceiver_pytorch import Attention, PreNorm

        self.case = case
        attention = Attention(case.latent_dim, case.channels, heads=case.heads, dim_head=case.head_dim)
        self.layer = PreNorm(case.latent_dim, attention, context_dim=case.channels)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        positions = perceiver_pytorch_encoding(self.case, image.shape[0], image.dtype, image.device)
        context = torch.cat((image, positions), dim=-1).flatten(1, -2)
        return self.layer(latents.repeat(image.shape[0], 1, 1), context=context)


def perceiver_pytorch_encoding(
    case: Case, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The encoded positions (batch, *shape, E), repeated over the batch as perceiver-pytorch's Perceiver does."""
    from einops import repeat
    from perceiver_pytorch.perceiver_pytorch import fourier_encode

    axes = [torch.linspace(-1.0, 1.0, steps=size, dtype=dtype, device=device) for size in case.shape]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    encoded = fourier_encode(positions, case.max_freq, case.num_bands).flatten(-2)
    return repeat(encoded, "... -> b ...", b=batch)


def perceiver_arguments(case: Case) -> dict[str, Any]:
    """Constructor arguments of perceiver-pytorch's Perceiver, and ours, for the model that PlainPerceiver is."""
    return {
        "num_freq_bands": case.num_bands,
        "depth": 1,
        "max_freq": case.max_freq,
        "input_channels": case.data_channels,
        "input_axis": len(case.shape),
        "num_latents": case.num_latents,
        "latent_dim": case.latent_dim,
        "cross_heads": case.heads,
        "cross_dim_head": case.head_dim,
    }


def _perceiver_pytorch(case: Case) -> nn.Module:
    from perceiver_pytorch import Perceiver

    return Perceiver(**perceiver_arguments(case))


def needs_perceiver_pytorch() -> str | None:
    if importlib.util.find_spec("perceiver_pytorch") is None:
        return "not installed: pip install perceiver-pytorch"
    return None


def needs_compiler() -> str | None:
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return "torch.compile needs a C++ compiler"
    return None


def _compiled(case: Case) -> Layer:
    module = ExpertCrossAttention(case)
    module.compile(dynamic=False)
    return module


def _floats_plain(case: Case, backward: bool) -> int:
    """Tokens, normalised tokens, K and V; backward keeps them and adds their gradients."""
    kv = 2 * case.heads * case.head_dim
    return case.batch * case.tokens * (3 * case.channels + 2 * kv if backward else 2 * case.channels + kv)


def _floats_perceiver_pytorch(case: Case, backward: bool) -> int:
    """As plain, the encoded positions besides, and the scores of every pair two or three times over."""
    positions = case.batch * case.tokens * case.channels
    return _floats_plain(case, backward) + positions + (3 if backward else 2) * case.pairs


def _floats_native(case: Case, backward: bool) -> int:
    """One table and one marginal per row and axis, one number per token; backward their gradients."""
    tables = case.heads * case.num_latents * sum(case.shape)
    return (4 if backward else 2) * tables * case.batch + case.batch * case.tokens * (2 + case.data_channels)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "perceiver-pytorch",
            "the most used implementation, as it is",
            PerceiverPytorchCrossAttention,
            _floats_perceiver_pytorch,
            needs_perceiver_pytorch,
            _perceiver_pytorch,
        ),
        Provider(
            "expert",
            "the best plain PyTorch: features per axis, fused attention",
            ExpertCrossAttention,
            _floats_plain,
            perceiver=lambda case: PlainPerceiver(case, ExpertCrossAttention(case)),
        ),
        Provider(
            "expert-compiled", "the same under torch.compile", _compiled, _floats_plain, needs_compiler, compiled=True
        ),
        Provider(
            "expert-cached",
            "the same with all positions encoded beforehand, outside the clock",
            lambda case: ExpertCrossAttention(case, cached=True),
            _floats_plain,
        ),
        Provider(
            "ours-reference",
            "this library's executable specification",
            lambda case: LibraryCrossAttention(case, "reference"),
            _floats_perceiver_pytorch,
        ),
        Provider(
            "ours",
            "this library",
            LibraryCrossAttention,
            _floats_native,
            perceiver=lambda case: pk.Perceiver(**perceiver_arguments(case)),
        ),
    )
}
