"""The exactness of `pk.accelerate`: transformers' released models, random weights, accelerated against not.

In a command of its own: the gradients of optical flow take most of a machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.bars import Bar, Recorder
from perceiver_kernels.benchmarking.integration_bars import (
    CHUNKS,
    FLOW,
    IMAGENET,
    LANGUAGE,
    MULTIMODAL,
    models,
    points,
    sharing,
)
from perceiver_kernels.benchmarking.measure import available_memory

# Bytes that the gradients of transformers' optical flow need in float64, layer by layer.
FLOW_MEMORY = 16 << 30


def parity(recorder: Recorder) -> Iterator[Bar]:
    """Outputs and all gradients of the released models, accelerated against not, in float32 against float64.

    Errors are the largest of three inputs: some gradients are the little left of large sums, whose error is that of one
    number, and a matter of chance.
    """
    outputs = {"subsampled_output_points": points(CHUNKS)}
    released: tuple[tuple[str, dict[str, Any], Callable[[], Any], dict[str, Any], int], ...] = (
        ("PerceiverForImageClassificationFourier", IMAGENET, image, {}, 3),
        ("PerceiverForImageClassificationLearned", IMAGENET, image, {}, 3),
        ("PerceiverForImageClassificationConvProcessing", IMAGENET, image, {}, 3),
        ("PerceiverForMaskedLM", LANGUAGE, text, {}, 3),
        ("PerceiverForSequenceClassification", LANGUAGE, text, {}, 3),
        ("PerceiverForMultimodalAutoencoding", MULTIMODAL, modalities, outputs, 3),
        ("PerceiverForOpticalFlow", FLOW, lambda: torch.rand(1, 2, 27, *FLOW["train_size"]), {}, 1),
    )
    for name, sizes, draw, options, draws in released:
        recorder.progress(name)
        what = f"{name}: largest error, of what the tolerances allow"
        if sizes is FLOW and available_memory() < FLOW_MEMORY:
            note = f"transformers needs about {tables.size(FLOW_MEMORY)}"
            yield Bar(what, None, 1.0, at_least=False, note=note)
            continue
        plain, fast = models(name, sizes)
        if sizes is FLOW:
            plain = recomputing(plain)
        errors: dict[str, Errors] = {}
        for _ in range(draws):
            inputs = draw()
            ours, theirs = (values(model, inputs, options, torch.float32) for model in (fast, plain))
            truth = values(plain, inputs, options, torch.float64)
            for key, tensor in truth.items():
                our_error, their_error = (largest(value[key].double() - tensor) for value in (ours, theirs))
                found = Errors(our_error, their_error, largest(tensor))
                errors[key] = found.joined(errors.get(key, found))
        # Some gradients are zero by symmetry: what is left of them is rounding.
        least = 1e-13 * max(error.size for error in errors.values())
        kept = {key: error.of_allowed() for key, error in errors.items() if error.size > least}
        worst = max(kept, key=lambda key: kept[key])
        yield Bar(what, kept[worst], 1.0, at_least=False, note=f"worst of {len(kept)}: {worst}")


class Errors(NamedTuple):
    """The largest errors of ours and theirs, and the largest value."""

    ours: float
    theirs: float
    size: float

    def joined(self, other: Errors) -> Errors:
        return Errors(max(self.ours, other.ours), max(self.theirs, other.theirs), max(self.size, other.size))

    def of_allowed(self) -> float:
        """Our error by what may be: twice theirs and 16 units of float32 in the last place of the largest value."""
        return self.ours / (2 * self.theirs + 16 * torch.finfo(torch.float32).eps * self.size)


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def values(model: Any, inputs: Any, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter, of a sum with random weights."""

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cast(part) for key, part in value.items()}
        return value.to(dtype) if value.is_floating_point() else value

    model.to(dtype)
    model.zero_grad()
    logits = model(inputs=cast(inputs), **options).logits
    found = dict(logits) if isinstance(logits, dict) else {"logits": logits}
    generator = torch.Generator().manual_seed(1)
    torch.stack(
        [(part * torch.randn(part.shape, generator=generator).to(dtype)).sum() for part in found.values()]
    ).sum().backward()
    gradients = {f"gradient of {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    result = {key: tensor.detach().clone() for key, tensor in (found | gradients).items()}
    model.zero_grad()
    model.float()
    return result


def image() -> Tensor:
    return torch.rand(1, 3, 224, 224)


def text() -> Tensor:
    return torch.randint(0, 262, (1, 2048))


def modalities() -> dict[str, Tensor]:
    """Video, audio and no label."""
    image, audio = torch.rand(1, 16, 3, 224, 224), torch.rand(1, 16 * 1920, 1)
    return {"image": image, "audio": audio, "label": torch.zeros(1, 700)}


def recomputing(model: nn.Module) -> nn.Module:
    """A copy whose layers keep nothing for backward but what they were given."""
    copied = sharing(model)
    for module in copied.modules():
        if type(module).__name__ == "PerceiverLayer":
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    return copied


GROUPS = (parity,)
