"""What is measured on a GPU, the bars' comparisons first: a stage whose time is spent leaves out what comes last."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from perceiver_kernels.benchmarking.cases import CASES, Case
from perceiver_kernels.benchmarking.models import MODELS, Model

BATCHES = (64, 1, 8)


@dataclasses.dataclass(frozen=True)
class EncoderComparison:
    """An encoder cross-attention: its case with the batch, the dtype of weights and data, and whether to compile."""

    case: Case
    dtype: torch.dtype
    mode: str
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """A whole model: with the batch in its input's shape, in a mode that names autocast's dtype."""

    model: Model
    mode: str
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One call of latent attention among so many latents."""

    batch: int
    heads: int
    latents: int
    head_dim: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is measured.

    Args:
        encoder, models: comparisons, the most important ones first.
        kernel: cases of separable attention alone, their data in `dtypes`.
        attention: calls of latent attention.
        encoding: the case and batch whose encoded positions are written out.
        first_call: what a fresh process runs.
        batch: of the comparisons that the bars look at, in 16 bit.
        copied: bytes of the array whose copy shows the bandwidth; product: rows of the square matrices.
        dtypes: full and 16-bit precision.
    """

    encoder: Sequence[EncoderComparison]
    models: Sequence[ModelComparison]
    kernel: Sequence[Case]
    attention: Sequence[AttentionShape]
    encoding: Case
    first_call: Case
    copied: int
    product: int
    batch: int
    dtypes: tuple[torch.dtype, torch.dtype]


# The released model: one head as wide as a token, 6 layers tied over 8 blocks.
OFFICIAL = Model(
    "imagenet-released",
    "ImageNet, the released model: one cross-attention, 48 self layers in 8 tied blocks, a decoder",
    (1, 224, 224, 3),
    {"case": CASES["imagenet-official"], "layers": 6, "blocks": 8, "heads": 8},
    official=True,
)


def full() -> Plan:
    """The published sizes."""
    half = torch.bfloat16
    layer, wide, photo = CASES["imagenet"], CASES["imagenet-official"], CASES["photo-4k"]
    encoder = [
        EncoderComparison(batched(layer, 64), half, "forward", compiled=True),
        EncoderComparison(batched(layer, 64), half, "forward+backward", compiled=True),
        EncoderComparison(batched(wide, 64), half, "forward", compiled=True),
        *(
            EncoderComparison(batched(case, batch), dtype, mode)
            for batch, dtype, case, mode in itertools.product(
                BATCHES, (half, torch.float32), (layer, wide), ("forward", "forward+backward")
            )
        ),
        EncoderComparison(photo, half, "forward"),
        EncoderComparison(photo, torch.float32, "forward"),
    ]
    paper, study = MODELS["imagenet-paper"], MODELS["cifar10-study"]
    models = [
        ModelComparison(sized(OFFICIAL, 64), "forward-bfloat16", compiled=True),
        ModelComparison(sized(OFFICIAL, 64), "train-step-bfloat16", compiled=True),
        ModelComparison(sized(paper, 64), "forward-bfloat16"),
        ModelComparison(sized(study, 64), "train-step-bfloat16"),
        *(
            ModelComparison(sized(model, batch), mode + dtype)
            for batch, dtype, model, mode in itertools.product(
                BATCHES, ("-bfloat16", ""), (OFFICIAL, paper, study), ("forward", "train-step")
            )
        ),
    ]
    return Plan(
        encoder=list(without_repeats(encoder)),
        models=list(without_repeats(models)),
        kernel=[batched(layer, batch) for batch in BATCHES],
        attention=[
            AttentionShape(batch, 8, 512, head_dim, dtype)
            for dtype, head_dim, batch in itertools.product((half, torch.float32), (128, 64), BATCHES)
        ],
        encoding=batched(layer, 8),
        first_call=layer,
        copied=1 << 31,
        product=8192,
        batch=64,
        dtypes=(torch.float32, half),
    )


def tiny() -> Plan:
    """Every stage at sizes that Triton's interpreter runs in seconds; float16, because it knows no bfloat16."""
    half = torch.float16
    layer = dataclasses.replace(
        CASES["imagenet"], shape=(6, 6), num_bands=2, max_freq=6.0, num_latents=5, latent_dim=16, head_dim=8
    )
    wide = dataclasses.replace(layer, name="imagenet-official", head_dim=layer.channels)
    official = dataclasses.replace(
        OFFICIAL,
        input_shape=(1, *layer.shape, 3),
        arguments={"case": wide, "layers": 1, "blocks": 2, "heads": 2, "num_classes": 10},
    )
    sizes = {"num_freq_bands": 2, "max_freq": 6.0, "num_latents": 5, "latent_dim": 16, "num_classes": 10}
    sizes |= {"latent_heads": 2, "latent_dim_head": 8, "depth": 1, "self_per_cross_attn": 1}
    paper = MODELS["imagenet-paper"]
    paper = dataclasses.replace(paper, input_shape=(1, *layer.shape, 3), arguments=paper.arguments | sizes)
    return Plan(
        encoder=[
            EncoderComparison(layer, half, "forward", compiled=True),
            EncoderComparison(layer, half, "forward+backward"),
            EncoderComparison(wide, half, "forward"),
        ],
        models=[
            ModelComparison(official, "forward-float16", compiled=True),
            ModelComparison(official, "train-step-float16"),
            ModelComparison(paper, "forward"),
        ],
        kernel=[layer],
        attention=[AttentionShape(1, 2, 9, 8, torch.float32), AttentionShape(1, 2, 9, 8, half)],
        encoding=layer,
        first_call=layer,
        copied=1 << 16,
        product=64,
        batch=1,
        dtypes=(torch.float32, half),
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def batched(case: Case, batch: int) -> Case:
    return dataclasses.replace(case, batch=batch)


def sized(model: Model, batch: int) -> Model:
    return dataclasses.replace(model, input_shape=(batch, *model.input_shape[1:]))


Comparison = TypeVar("Comparison", EncoderComparison, ModelComparison)


def without_repeats(comparisons: Sequence[Comparison]) -> Iterator[Comparison]:
    """Each comparison once, where it stands first; compiled or not is the same comparison."""
    seen: list[Comparison] = []
    for comparison in comparisons:
        key = dataclasses.replace(comparison, compiled=False)
        if key not in seen:
            seen.append(key)
            yield comparison
