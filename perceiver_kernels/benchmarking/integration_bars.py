"""The speed and memory of `pk.accelerate`: transformers' released models, random weights, accelerated against not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.bars import Bar, Recorder
from perceiver_kernels.benchmarking.measure import Call, Timing, available_memory, peak_extra_memory

# Bytes that transformers' optical flow needs: twice the scores of 2,048 latents and 182,528 pixels, and the tokens.
FLOW_MEMORY = 5 << 30
CHUNKS = 128

SHARED: dict[str, Any] = {
    "num_cross_attention_heads": 1,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "attention_probs_dropout_prob": 0.0,
}
IMAGENET = SHARED | {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6}
IMAGENET |= {"num_self_attention_heads": 8, "num_labels": 1000, "image_size": 224}
FLOW = SHARED | {"num_latents": 2048, "d_latents": 512, "num_blocks": 1, "num_self_attends_per_block": 24}
FLOW |= {"num_self_attention_heads": 16, "train_size": [368, 496]}
MULTIMODAL = SHARED | {"num_latents": 784, "d_latents": 512, "num_blocks": 1, "num_self_attends_per_block": 8}
MULTIMODAL |= {"num_self_attention_heads": 8, "num_labels": 700, "image_size": 224, "num_frames": 16}
MULTIMODAL |= {"audio_samples_per_frame": 1920, "samples_per_patch": 16, "output_shape": [1, 16, 224, 224]}
MULTIMODAL |= {"output_num_channels": 512, "_label_trainable_num_channels": 1024}
LANGUAGE = SHARED | {"num_cross_attention_heads": 8, "num_latents": 256, "d_latents": 1280, "d_model": 768}
LANGUAGE |= {"num_blocks": 1, "num_self_attends_per_block": 26, "num_self_attention_heads": 8, "qk_channels": 256}
LANGUAGE |= {"v_channels": 1280, "vocab_size": 262, "max_position_embeddings": 2048}


def imagenet(recorder: Recorder) -> Iterator[Bar]:
    """The released ImageNet model with Fourier positions, forward."""
    plain, fast = models("PerceiverForImageClassificationFourier", IMAGENET)
    compiled = compiled_layers(plain)
    image = torch.rand(1, 3, 224, 224)
    calls = {
        "transformers": forward(plain, image),
        "transformers-compiled": forward(compiled, image),
        "ours": forward(fast, image),
    }
    times = recorder.interleave(calls)
    yield speedup("ImageNet, forward", times, "transformers", 3.3)
    yield speedup("ImageNet, forward", times, "transformers-compiled", 2.3)
    calls = {name: autocast(forward(model, image)) for name, model in (("transformers", plain), ("ours", fast))}
    yield speedup("ImageNet, forward, bfloat16 autocast", recorder.interleave(calls), "transformers", 2.2)


def optical_flow(recorder: Recorder) -> Iterator[Bar]:
    """The released optical flow model, 368 x 496 pixels in and out, forward."""
    plain, fast = models("PerceiverForOpticalFlow", FLOW)
    frames = torch.rand(1, 2, 27, *FLOW["train_size"])
    ours = forward(fast, frames)
    ours()
    yield memory("optical flow, forward", peak_extra_memory(ours), 2e9)
    what, limit = "optical flow, forward", 4.0
    if available_memory() < FLOW_MEMORY:
        note = f"transformers needs about {tables.size(FLOW_MEMORY)}"
        yield Bar(f"{what}: transformers / ours", None, limit, at_least=True, note=note)
        return
    yield speedup(
        what, recorder.interleave({"transformers": forward(plain, frames), "ours": ours}), "transformers", limit
    )


def multimodal(recorder: Recorder) -> Iterator[Bar]:
    """The released multimodal autoencoder: all 804,737 outputs in one call, where others take 128."""
    plain, fast = models("PerceiverForMultimodalAutoencoding", MULTIMODAL)
    frames, height, width = MULTIMODAL["output_shape"][1:]
    inputs = {
        "image": torch.rand(1, frames, 3, height, width),
        "audio": torch.rand(1, frames * MULTIMODAL["audio_samples_per_frame"], 1),
        "label": torch.zeros(1, MULTIMODAL["num_labels"]),
    }
    ours = forward(fast, inputs, subsampled_output_points=points(1))
    chunk = forward(plain, inputs, subsampled_output_points=points(CHUNKS))
    ours()
    yield memory("multimodal, all outputs", peak_extra_memory(ours), 3e9)
    times = recorder.interleave({"a chunk": chunk, "ours": ours, **decoder_calls(plain, inputs)})
    times["transformers"] = all_chunks(times["a chunk"])
    products = times["products"].median * frames * height * width / ROWS
    bar = speedup(f"multimodal, all outputs, {CHUNKS} chunks", times, "transformers", 2.3)
    decoder = f"their decoder alone would take {tables.seconds(CHUNKS * times['a chunk of the decoder'].median)}"
    share = f"products of the decoder's MLP and last projection are {products / times['ours'].median:.0%} of ours"
    yield dataclasses.replace(bar, note=f"{bar.note}; {decoder}; {share}")


def all_chunks(one: Timing) -> Timing:
    return Timing(tuple(tuple(CHUNKS * call for call in calls) for calls in one.rounds))


ROWS = 16384


def decoder_calls(model: Any, inputs: dict[str, Tensor]) -> dict[str, Call]:
    """A chunk's decoder without the encoder before it; and the products of some rows that nothing can spare.

    Attended values have fewer channels than the queries that they become, and the last map is folded into the MLP's.
    """
    perceiver = model.perceiver
    with torch.no_grad():
        tokens, sizes, without_pos = perceiver.input_preprocessor(inputs)
        query = perceiver.decoder.decoder_query(tokens, sizes, without_pos, points(CHUNKS))
    z = torch.randn(1, MULTIMODAL["num_latents"], MULTIMODAL["d_latents"])
    values, hidden, channels = MULTIMODAL["d_latents"] + 2, query.shape[2], MULTIMODAL["output_num_channels"]
    operands = [
        (torch.randn(ROWS, width), torch.randn(wanted, width))
        for width, wanted in ((values, hidden), (hidden, channels), (values, channels))
    ]

    def products() -> None:
        for x, weight in operands:
            torch.mm(x, weight.t())

    return {"a chunk of the decoder": torch.no_grad()(lambda: perceiver.decoder(query, z)), "products": products}


def points(chunks: int) -> dict[str, Tensor | None]:
    """The outputs to decode: the first of so many chunks."""
    frames, height, width = MULTIMODAL["output_shape"][1:]
    audio = frames * MULTIMODAL["audio_samples_per_frame"] // MULTIMODAL["samples_per_patch"]
    image = frames * height * width
    return {"image": torch.arange(image // chunks), "audio": torch.arange(audio // chunks), "label": None}


def language(recorder: Recorder) -> Iterator[Bar]:
    """The released masked language model, 2,048 bytes, a batch of 8."""
    plain, fast = models("PerceiverForMaskedLM", LANGUAGE)
    text = torch.randint(0, 262, (8, 2048))
    times = recorder.interleave({"transformers": forward(plain, text), "ours": forward(fast, text)})
    yield speedup("language model, 8 x 2,048 bytes, forward", times, "transformers", 1.8)


def models(name: str, sizes: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A model of transformers, and one that shares its parameters and is accelerated."""
    import transformers

    torch.manual_seed(0)
    plain = getattr(transformers, name)(transformers.PerceiverConfig(**sizes)).eval()
    fast = sharing(plain)
    pk.accelerate(fast)
    return plain, fast


def sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def compiled_layers(model: nn.Module) -> nn.Module:
    """A copy compiled layer by layer: a whole model of 48 layers would take minutes."""
    compiled = sharing(model)
    for module in compiled.modules():
        if type(module).__name__ == "PerceiverLayer":
            module.compile(dynamic=False)
    return compiled


def forward(model: nn.Module, inputs: Any, **options: Any) -> Call:
    @torch.no_grad()
    def call() -> Any:
        return model(inputs=inputs, **options).logits

    return call


def autocast(call: Callable[[], object]) -> Call:
    def under_autocast() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return under_autocast


def speedup(what: str, times: dict[str, Timing], peer: str, limit: float) -> Bar:
    theirs, ours = times[peer], times["ours"]
    note = ", ".join(tables.seconds(timing.median) for timing in (theirs, ours))
    return Bar(f"{what}: {peer} / ours", theirs.ratio(ours), limit, at_least=True, note=note)


def memory(what: str, value: int | None, limit: float) -> Bar:
    return Bar(f"{what}: our peak memory", value, limit, at_least=False, show=tables.size)


GROUPS = (imagenet, language, optical_flow, multimodal)
