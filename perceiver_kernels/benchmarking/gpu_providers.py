"""Who is measured on a GPU besides this library: fused attention of every kind, perceiver-pytorch and transformers.

Each is the module of a case (`Provider`) or of a model (`ModelProvider`); what is not installed, or does not apply,
says so in its result.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import perceiver_kernels as pk
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.models import MODEL_PROVIDERS, Model, ModelProvider
from perceiver_kernels.benchmarking.plain import ExpertCrossAttention, Layer, axis_tables, encode
from perceiver_kernels.benchmarking.providers import PROVIDERS, Provider, needs_compiler

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA with heads filled up to a multiple of 8 channels, which its fused backends need."""
    channels = q.shape[-1]
    missing = -channels % 8
    if missing:
        q, k, v = (F.pad(part, (0, missing)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q.contiguous(), k, v, scale=channels**-0.5)[..., :channels]


def forced(backend: SDPBackend) -> Attend:
    """SDPA by one backend or not at all."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return padded(q, k, v)

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out = flex_attention(q.contiguous(), k, v)
    assert isinstance(out, Tensor)
    return out


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the scores of every pair in memory, as perceiver-pytorch and transformers have them."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class KeptTables(ExpertCrossAttention):
    """The expert with the features of every axis kept on the device, as this library keeps them."""

    def __init__(self, case: Case, attend: Attend = padded) -> None:
        super().__init__(case)
        self.layer.fn.attend = attend
        for axis, table in enumerate(axis_tables(case)):
            self.register_buffer(f"table_{axis}", table, persistent=False)

    def tokens(self, image: Tensor) -> Tensor:
        return encode(image, list(self.buffers(recurse=False)))


class TransformersCrossAttention(Layer):
    """transformers' attention to tokens that are built as the expert builds them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.encoder = KeptTables(case)
        self.layer = TranslatedAttention(case)
        del self.encoder.layer

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        return self.layer(latents.expand(image.shape[0], -1, -1), self.encoder.tokens(image))


class TranslatedAttention(nn.Module):
    """transformers' PerceiverAttention that loads the state dict of a CrossAttention; biases that has not are zero."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from transformers.models.perceiver.modeling_perceiver import PerceiverAttention, PerceiverConfig

        width = case.heads * case.head_dim
        self.attention = PerceiverAttention(
            PerceiverConfig(attention_probs_dropout_prob=0.0),
            is_cross_attention=True,
            qk_channels=width,
            v_channels=width,
            num_heads=case.heads,
            q_dim=case.latent_dim,
            kv_dim=case.channels,
            use_query_residual=False,
        )

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        return self.attention(latents, inputs=tokens)[0]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.attention.load_state_dict(translated_attention(state_dict), strict, assign)


ATTENTION_NAMES = {
    "norm": "self.layernorm1",
    "norm_context": "self.layernorm2",
    "fn.to_q": "self.query",
    "fn.to_out": "output.dense",
}
MLP_NAMES = {"norm": "layernorm", "fn.net.0": "mlp.dense1", "fn.net.2": "mlp.dense2"}


def translated_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pre-norm attention's state dict by transformers' names."""
    keys = weights["fn.to_kv.weight"].shape[0] // 2
    result = {
        f"{theirs}.{kind}": weights[f"{ours}.{kind}"]
        for ours, theirs in ATTENTION_NAMES.items()
        for kind in ("weight", "bias")
        if f"{ours}.{kind}" in weights
    }
    result["self.key.weight"], result["self.value.weight"] = weights["fn.to_kv.weight"].split(keys)
    biases = weights.get("fn.to_kv.bias", weights["fn.to_kv.weight"].new_zeros(2 * keys))
    result["self.key.bias"], result["self.value.bias"] = biases.split(keys)
    result.setdefault("self.query.bias", torch.zeros_like(result["self.query.weight"][:, 0]))
    return result


def needs_transformers() -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "not installed: pip install transformers"
    return None


def needs_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a GPU"


def compiled_layer(build: Callable[[Case], Layer]) -> Callable[[Case], Layer]:
    def built(case: Case) -> Layer:
        module = build(case)
        module.compile(dynamic=False)
        return module

    return built


def _expert(name: str, what: str, attend: Attend, compiled: bool = False) -> Provider:
    def build(case: Case) -> Layer:
        return KeptTables(case, attend)

    floats = PROVIDERS["expert"].floats
    if not compiled:
        return Provider(name, what, build, floats)
    return Provider(name, what, compiled_layer(build), floats, needs_compiler, compiled=True)


def _compiled(provider: Provider) -> Provider:
    return dataclasses.replace(
        provider,
        name=f"{provider.name}-compiled",
        what="the same under torch.compile",
        layer=compiled_layer(provider.layer),
        missing=lambda: provider.missing() or needs_compiler(),
        compiled=True,
    )


_TRANSFORMERS = Provider(
    "transformers",
    "its attention; positions encoded as the expert does it, not anew on the CPU",
    TransformersCrossAttention,
    PROVIDERS["perceiver-pytorch"].floats,
    needs_transformers,
)
_UNFUSED = Provider(
    "unfused",
    "plain PyTorch with the scores of every pair in memory",
    lambda case: KeptTables(case, unfused),
    PROVIDERS["perceiver-pytorch"].floats,
)

EXPERTS = tuple(_expert(f"expert-{name}", f"SDPA by {name}", forced(kind)) for name, kind in SDPA_BACKENDS.items())
COMPILED_EXPERTS = (
    _expert("expert-compiled", "SDPA under torch.compile", padded, compiled=True),
    _expert("expert-flex", "FlexAttention under torch.compile", flex, compiled=True),
)
PEERS = (PROVIDERS["perceiver-pytorch"], _UNFUSED, _TRANSFORMERS)
COMPILED_PEERS = (_compiled(PROVIDERS["perceiver-pytorch"]), _compiled(_TRANSFORMERS))
GRAPHED = tuple(
    dataclasses.replace(
        provider, name=f"{provider.name}-graph", what="as one CUDA graph", missing=needs_gpu, graph=True
    )
    for provider in (_expert("expert", "SDPA by torch's choice", padded), PROVIDERS["ours"])
)


def encoder_providers(mode: str, *, compiled: bool) -> list[Provider]:
    """Who runs an encoder cross-attention; CUDA graphs only forward, torch.compile where asked for."""
    providers = [PROVIDERS["ours"], *EXPERTS, *PEERS]
    if mode == "forward":
        providers += GRAPHED
    return providers + ([*COMPILED_EXPERTS, *COMPILED_PEERS] if compiled else [])


# --- whole models -----------------------------------------------------------------------------------------------------

# Modules that a model repeats: each is compiled by itself, so that one compilation serves all its layers.
REPEATED = ("Residuals", "CrossAttention", "PerceiverLayer", "PerceiverBlock")


def compiled_layers(build: Callable[[Model], nn.Module]) -> Callable[[Model], nn.Module]:
    """Compiles layer by layer: a whole model of 48 layers would take minutes."""

    def built(model: Model) -> nn.Module:
        module = build(model)
        for part in module.modules():
            if type(part).__name__ in REPEATED:
                part.compile(dynamic=False)
        return module

    return built


class TransformersOfficial(nn.Module):
    """transformers' model for PlainOfficial's case, weights and input; the encoded positions may be kept."""

    def __init__(
        self, case: Case, layers: int, blocks: int, heads: int, num_classes: int = 1000, *, kept: bool = True
    ) -> None:
        super().__init__()
        from transformers.models.perceiver import modeling_perceiver as theirs

        self.case = case
        config = theirs.PerceiverConfig(
            num_latents=case.num_latents,
            d_latents=case.latent_dim,
            num_blocks=blocks,
            num_self_attends_per_block=layers,
            num_self_attention_heads=heads,
            num_cross_attention_heads=1,
            attention_probs_dropout_prob=0.0,
            num_labels=num_classes,
        )
        positions = {"concat_pos": True, "max_resolution": case.shape, "num_bands": case.num_bands, "sine_only": False}
        preprocessor = theirs.PerceiverImagePreprocessor(
            config, prep_type="pixels", spatial_downsample=1, fourier_position_encoding_kwargs=positions
        )
        decoder = theirs.PerceiverClassificationDecoder(
            config,
            num_channels=case.latent_dim,
            trainable_position_encoding_kwargs={"num_channels": case.latent_dim, "index_dims": 1},
            use_query_residual=True,
        )
        self.perceiver = theirs.PerceiverModel(config, decoder=decoder, input_preprocessor=preprocessor)
        if kept:
            preprocessor.position_embeddings = KeptPositions(preprocessor.position_embeddings, case.shape)

    def forward(self, image: Tensor) -> Tensor:
        return self.perceiver(image.permute(0, 3, 1, 2)).logits

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.perceiver.load_state_dict(translated_official(state_dict, self.case), strict, assign)


class KeptPositions(nn.Module):
    """transformers' encoded positions, computed once; it encodes them on the CPU at every call, for every image."""

    def __init__(self, encoding: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        encoded = encoding(shape, batch_size=1, device="cpu", dtype=torch.float32)
        self.register_buffer("encoded", encoded, persistent=False)

    def forward(self, index_dims: Any, batch_size: int, device: Any, dtype: torch.dtype, pos: Any = None) -> Tensor:
        return self.get_buffer("encoded").to(dtype).expand(batch_size, -1, -1)


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state dict of one part, its prefix taken off."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def translated_official(weights: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The state dict of PlainOfficial by transformers' names, channels of the tokens in transformers' order."""
    encoder, decoder = "encoder", "decoder.decoder"
    result = {
        "embeddings.latents": weights["latents"],
        f"{decoder}.output_position_encodings.position_embeddings": weights["query"],
    }
    cross = part_of(weights, "cross.")
    order = transformers_order(case)
    for name in ("norm_context.weight", "norm_context.bias", "fn.to_kv.weight"):
        cross[name] = cross[name][..., order]
    places = {
        f"{encoder}.cross_attention": (translated_attention(cross), part_of(weights, "cross_ff.")),
        f"{decoder}.decoding_cross_attention": (
            translated_attention(part_of(weights, "decoder.")),
            part_of(weights, "decoder_ff."),
        ),
    }
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    for i in range(layers):
        attention, mlp = (part_of(weights, f"layers.{i}.{step}.") for step in (0, 1))
        places[f"{encoder}.self_attends.{i}"] = translated_attention(attention), mlp
    for place, (attention, mlp) in places.items():
        result |= {f"{place}.attention.{name}": value for name, value in attention.items()}
        for ours, theirs in MLP_NAMES.items():
            result |= {f"{place}.{theirs}.{kind}": mlp[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    return result | {f"{decoder}.final_layer.{kind}": weights[f"to_logits.{kind}"] for kind in ("weight", "bias")}


def transformers_order(case: Case) -> Tensor:
    """For each channel of transformers' tokens, its place in ours: [data, x of all axes, sin of all, cos of all]."""
    grid = pk.FourierGrid(shape=case.shape, num_bands=case.num_bands, max_freq=case.max_freq, order="grouped")
    bands, width = case.num_bands, 2 * case.num_bands + 1
    in_axis = torch.tensor([2 * bands, *range(2 * bands)])  # a grouped table's columns are [x, sin, cos]
    order = torch.arange(case.channels)
    for axis, places in enumerate(grid.channel_index()):
        order[case.data_channels + places] = case.data_channels + axis * width + in_axis
    return order


def graphed_model(module: nn.Module, data: Tensor) -> nn.Module:
    return cast(nn.Module, pk.graphed(module, data))  # callable like one


_PERCEIVER_PYTORCH = MODEL_PROVIDERS["perceiver-pytorch"]
PLAIN = dataclasses.replace(MODEL_PROVIDERS["plain"], tower=None)
_OFFICIAL = ModelProvider(
    "transformers",
    "as it is, but that positions are encoded once, not at every call on the CPU",
    lambda model: TransformersOfficial(**model.arguments),
    False,
    needs_transformers,
)
_OURS_GRAPHED = dataclasses.replace(
    MODEL_PROVIDERS["ours"],
    name="ours-graphed",
    what="the same by pk.graphed",
    missing=needs_gpu,
    ready=graphed_model,
)


def _compiled_model(provider: ModelProvider) -> ModelProvider:
    return dataclasses.replace(
        provider,
        name=f"{provider.name}-compiled",
        what="the same under torch.compile, layer by layer",
        build=compiled_layers(provider.build),
        missing=lambda: provider.missing() or needs_compiler(),
    )


def model_providers(model: Model, mode: str, *, compiled: bool) -> list[ModelProvider]:
    """Who runs a model: the library it stands for, where that is installed, and plain PyTorch with SDPA."""
    peer = _OFFICIAL if model.official else _PERCEIVER_PYTORCH
    providers = [MODEL_PROVIDERS["ours"], PLAIN, peer]
    if compiled:
        providers += [_compiled_model(PLAIN), _compiled_model(peer)]
    if mode.startswith("forward"):
        providers.append(_OURS_GRAPHED)
    return providers
