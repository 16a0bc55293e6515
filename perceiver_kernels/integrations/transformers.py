"""transformers' Perceivers by this library's operators: layers, preprocessors with Fourier positions, decoders."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.models.perceiver import modeling_perceiver as theirs
from transformers.pytorch_utils import apply_chunking_to_forward

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.integrations.cross_attention import Maps, attend_to
from perceiver_kernels.integrations.parts import Part, obstacle
from perceiver_kernels.integrations.swap import Accelerated, Left, Swap
from perceiver_kernels.integrations.unbuilt import Unbuilt, built, only_segment, segment_length
from perceiver_kernels.modules.decoder import (
    FeedForwardWeights,
    GridQueries,
    OutputProjection,
    QueryProjection,
    decode_streamed,
)
from perceiver_kernels.modules.projection import is_stock, project
from perceiver_kernels.modules.segments import GridTokens, Segment
from perceiver_kernels.ops.feed_forward import feed_forward
from perceiver_kernels.ops.latent_attention import latent_attention


def plan(model: nn.Module) -> list[Swap | Left] | None:
    """What of transformers' Perceivers within a model is to be swapped, and what is left and why; None: none in it."""
    _check_version()
    steps: list[Swap | Left] = []
    for name, module in model.named_modules():
        if type(module) is theirs.PerceiverLayer:
            steps += _plan_layer(name, module)
        elif isinstance(module, theirs.PerceiverModel) and type(module).forward is theirs.PerceiverModel.forward:
            steps += _plan_preprocessors(name, module) + _plan_decoders(name, module)
    return steps or None


def _check_version() -> None:
    """Raise a ValueError where a method of transformers' takes other arguments than ours in its place."""
    classes: list[Any] = [PerceiverLayer, *_PREPROCESSORS.values(), *_DECODERS.values()]
    for kind in classes:
        for name, method in vars(kind).items():
            original = getattr(kind.original, name, None)
            if inspect.isfunction(method) and inspect.isfunction(original):
                ours, expected = ([*inspect.signature(function).parameters] for function in (method, original))
                if ours != expected:
                    raise ValueError(
                        f"transformers is {transformers.__version__}, must be a version whose {kind.__name__}.{name} "
                        f"takes {', '.join(ours)}, as 5.23's; it takes {', '.join(expected)}"
                    )


# --- layers -----------------------------------------------------------------------------------------------------------


class PerceiverLayer(theirs.PerceiverLayer, Accelerated):
    """transformers' PerceiverLayer: attention and MLP, each by our operators where they cover it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | Unbuilt | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] | None = None
        if not output_attentions:
            outputs = _attend(self.attention, built(hidden_states), attention_mask, inputs, inputs_mask)
        if outputs is None:
            outputs = self.attention(
                built(hidden_states), attention_mask, built(inputs), inputs_mask, output_attentions
            )
        attended, *weights = outputs
        if self.chunk_size_feed_forward or _mlp_obstacle(self):
            chunks = self.chunk_size_feed_forward, self.seq_len_dim
            return apply_chunking_to_forward(self.feed_forward_chunk, *chunks, attended) + attended, *weights
        return self._feed_forward(attended, residual=attended), *weights

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if _mlp_obstacle(self):
            return super().feed_forward_chunk(attention_output)
        return self._feed_forward(attention_output)

    def _feed_forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm, mlp = self.layernorm, self.mlp
        parameters = (mlp.dense1.weight, mlp.dense1.bias, mlp.dense2.weight, mlp.dense2.bias)
        activation = _activation(mlp.intermediate_act_fn)
        assert activation is not None
        return feed_forward(
            x, norm.weight, norm.bias, *parameters, activation=activation, eps=norm.eps, residual=residual
        )


def _plan_layer(name: str, layer: Any) -> list[Swap | Left]:
    obstacles = {f"{name}.attention": _attention_obstacle(layer.attention), f"{name}.mlp": _mlp_obstacle(layer)}
    left: list[Swap | Left] = [
        Left(part, layer.get_submodule(part.removeprefix(f"{name}.")), why) for part, why in obstacles.items() if why
    ]
    return left if len(left) == len(obstacles) else [Swap(name, layer, PerceiverLayer), *left]


def _attention_obstacle(attention: Any) -> str | None:
    """Why our operators cannot stand for an attention: something in it is not as transformers made it."""
    return obstacle(_parts_of_attention(attention))


def _parts_of_attention(attention: Any) -> Iterator[Part]:
    inner = attention.self
    yield Part("self", inner, theirs.PerceiverSelfAttention)
    yield Part("output", attention.output, theirs.PerceiverSelfOutput)
    yield Part("layernorm1", inner.layernorm1, nn.LayerNorm)
    norm = nn.Identity if type(inner.layernorm2) is nn.Identity else nn.LayerNorm
    yield Part("layernorm2", inner.layernorm2, norm)
    for name in ("query", "key", "value"):
        yield Part(name, getattr(inner, name), nn.Linear)
    yield Part("dropout", inner.dropout, nn.Dropout)
    yield Part("output.dense", attention.output.dense, nn.Linear)
    yield Part("attention", attention, theirs.PerceiverAttention)


def _mlp_obstacle(layer: Any) -> str | None:
    """Why our operator cannot stand for a layer's LayerNorm and MLP."""
    mlp = layer.mlp
    parts = (
        Part("layernorm", layer.layernorm, nn.LayerNorm),
        Part("mlp", mlp, theirs.PerceiverMLP),
        Part("dense1", mlp.dense1, nn.Linear),
        Part("dense2", mlp.dense2, nn.Linear),
    )
    why = obstacle(parts)
    if why is None and _activation(mlp.intermediate_act_fn) is None:
        return f"its activation is {mlp.intermediate_act_fn}, not a GELU"
    return why


def _activation(function: nn.Module) -> str | None:
    """The name that our operators have for an activation, if they have it."""
    if not is_stock(function, type(function)):
        return None
    if type(function) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
    if type(function) is GELUActivation and function.act is F.gelu:
        return "gelu"
    return "gelu_tanh" if type(function) in (GELUTanh, NewGELUActivation) else None


def _attend(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    inputs: Tensor | Unbuilt | None,
    inputs_mask: Tensor | None,
) -> tuple[Tensor] | None:
    """What PerceiverAttention gives, or None where that itself has to compute it."""
    if _attention_obstacle(attention):
        return None
    inner = attention.self
    if inputs is None:
        if attention_mask is not None:
            return None
        attended = _attend_among(inner, hidden_states)
    else:
        if hidden_states.shape[0] not in (1, inputs.shape[0]):
            return None
        mask = None if inputs_mask is None else _key_mask(inputs_mask)
        if mask is None and inputs_mask is not None:
            return None
        attended = _attend_to(inner, hidden_states, inputs, mask)
    residual = hidden_states if attention.use_query_residual else None
    batch = hidden_states.shape[0]
    return (project(attention.output.dense, attended.expand(batch, -1, -1), residual),)


def _attend_among(inner: Any, x: Tensor) -> Tensor:
    """Self-attention."""
    x, maps = inner.layernorm1(x), _maps(inner)
    q, k, v = (maps.split_heads(project(layer, x)) for layer in (inner.query, inner.key, inner.value))
    return latent_attention(q, k, v, dropout_p=maps.dropout_p).transpose(1, 2).flatten(2)


def _attend_to(inner: Any, x: Tensor, inputs: Tensor | Unbuilt, mask: Tensor | None) -> Tensor:
    """Cross-attention."""
    if x.shape[0] > 1 and x.stride(0) == 0:  # latents that all inputs share
        x = x[:1]
    return attend_to(project(inner.query, inner.layernorm1(x)), inputs, mask, _maps(inner))


def _maps(inner: Any) -> Maps:
    norm = inner.layernorm2 if isinstance(inner.layernorm2, nn.LayerNorm) else None
    scale = inner.qk_channels_per_head**-0.5
    return Maps(inner.key, inner.value, norm, inner.num_heads, scale, inner.dropout)


def _key_mask(mask: Tensor) -> Tensor | None:
    """transformers' additive mask (batch, 1, N, M) as bool (batch, M), True = attend; None if it says more than that.

    Inputs without a token to attend to are left to transformers: adding the lowest number to all scores gives them
    equal weights, and gradients as if it had not been added.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or not mask.is_floating_point():
        return None
    keys = mask[:, 0, 0]
    allowed = keys == 0
    only_masks = (allowed | (keys == torch.finfo(mask.dtype).min)).all() & (mask == keys[:, None, None]).all()
    return allowed if only_masks & allowed.any(1).all() else None


# --- preprocessors ----------------------------------------------------------------------------------------------------


class PerceiverImagePreprocessor(theirs.PerceiverImagePreprocessor, Accelerated):
    """transformers' PerceiverImagePreprocessor, which leaves the Fourier features of the positions to the encoder."""

    def _build_network_inputs(
        self, inputs: Tensor, network_input_is_1d: bool = True, interpolate_pos_encoding: bool = False
    ) -> tuple[Any, Tensor]:
        if not network_input_is_1d or _positions_obstacle(self, inputs.ndim - 2):
            return super()._build_network_inputs(inputs, network_input_is_1d, interpolate_pos_encoding)
        return _on_grid(inputs, self.position_embeddings)


class PerceiverAudioPreprocessor(theirs.PerceiverAudioPreprocessor, Accelerated):
    """transformers' PerceiverAudioPreprocessor, which leaves the Fourier features of the positions to the encoder."""

    def _build_network_inputs(self, inputs: Tensor) -> tuple[Any, Tensor]:
        if _positions_obstacle(self, inputs.ndim - 2):
            return super()._build_network_inputs(inputs)
        return _on_grid(inputs, self.position_embeddings)


class PerceiverMultimodalPreprocessor(theirs.PerceiverMultimodalPreprocessor, Accelerated):
    """transformers' PerceiverMultimodalPreprocessor: modalities stay segments, their padding a constant of each."""

    def forward(
        self,
        inputs: dict[str, Tensor],
        pos: Tensor | None = None,
        network_input_is_1d: bool = True,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Unbuilt, dict[str, int], dict[str, Tensor]]:
        segments, without_pos = {}, {}
        for modality, preprocessor in self.modalities.items():
            tokens, _, without_pos[modality] = preprocessor(
                inputs[modality], pos=pos, network_input_is_1d=network_input_is_1d
            )
            segments[modality] = self._padded(modality, tokens)
        sizes = {modality: segment.shape[1] for modality, segment in segments.items()}
        return _unbuilt([segments[modality] for modality in sorted(segments)]), sizes, without_pos

    def _padded(self, modality: str, tokens: Tensor | Unbuilt) -> Segment:
        """A modality's tokens with their padding, and masked as mask_probs has it."""
        padding, mask_prob = self.padding[modality][0], self.mask_probs.get(modality, 0.0)
        if modality in self.mask_probs and mask_prob == 0:  # as there, the mask's token gets gradients, all zero
            padding = padding + 0 * self.mask[modality][0, : padding.shape[0]]
        segment = only_segment(tokens)
        if isinstance(segment, GridTokens) and mask_prob == 0:
            return segment.padded(padding)
        array = built(tokens)
        padded = torch.cat((array, padding.expand(*array.shape[:2], -1)), 2)
        if mask_prob == 0:
            return padded
        mask = torch.bernoulli(torch.full(array.shape[:2], mask_prob, device=array.device))[..., None]
        return (1 - mask) * padded + mask * self.mask[modality]


def _plan_preprocessors(name: str, model: Any) -> list[Swap | Left]:
    """Swaps for the preprocessors of a PerceiverModel whose encoder reads what they give then."""
    steps: list[Swap | Left] = []
    array_needed = (
        _attention_obstacle(model.encoder.cross_attention.attention) and "the encoder needs an array of tokens"
    )
    for part, module in _submodules(name, "input_preprocessor", model.input_preprocessor):
        to = _PREPROCESSORS.get(type(module))
        if to is None:
            continue
        why = array_needed or (None if to is PerceiverMultimodalPreprocessor else _positions_obstacle(module))
        steps.append(Left(part, module, why) if why else Swap(part, module, to))
    return steps


_PREPROCESSORS: dict[type, type[nn.Module]] = {
    kind.original: kind
    for kind in (PerceiverImagePreprocessor, PerceiverAudioPreprocessor, PerceiverMultimodalPreprocessor)
}


def _submodules(prefix: str, name: str, module: Any) -> list[tuple[str, nn.Module]]:
    """The modules below an attribute of a module of this name; none if it is a function or None."""
    if not isinstance(module, nn.Module):
        return []
    return list(module.named_modules(prefix=f"{prefix}.{name}" if prefix else name))


def _positions_obstacle(preprocessor: Any, axes: int | None = None) -> str | None:
    """Why an encoder cannot read a preprocessor's data as they are: their positions are not Fourier features."""
    if preprocessor.concat_or_add_pos != "concat":
        return "it adds positions to the data: the encoder takes the tokens as an array"
    return _fourier_obstacle(preprocessor.position_embeddings, preprocessor.positions_projection, axes)


def _fourier_obstacle(positions: Any, projection: nn.Module, axes: int | None = None) -> str | None:
    """Why positions are not plain Fourier features, of so many axes."""
    if type(positions) is not theirs.PerceiverFourierPositionEncoding:
        return "its positions are not Fourier features: they are taken as an array"
    if type(projection) is not nn.Identity:
        return "it projects its positions: they are taken as an array"
    if axes not in (None, len(positions.max_resolution)):
        return f"its data have {axes} axes, its positions {len(positions.max_resolution)}"
    return obstacle([Part("position_embeddings", positions, theirs.PerceiverFourierPositionEncoding)])


def _on_grid(data: Tensor, positions: Any) -> tuple[Unbuilt, Tensor]:
    """Data (batch, *axes, channels) as tokens with their positions' features; and as (batch, M, channels) without."""
    return _unbuilt([GridTokens(fourier_grid(positions, tuple(data.shape[1:-1])), data)]), data.flatten(1, -2)


def _unbuilt(segments: list[Segment]) -> Unbuilt:
    return Unbuilt(segments, segments[0].shape[0], segments[0].device, segments[0].dtype)


def fourier_grid(positions: Any, shape: Sequence[int], *, endpoint: bool = True) -> FourierGrid:
    """The grid whose features a PerceiverFourierPositionEncoding gives for data of this shape."""
    return FourierGrid(
        tuple(shape),
        num_bands=positions.num_bands,
        max_freq=tuple(map(float, positions.max_resolution)),
        order="grouped",
        concat_pos=positions.concat_pos,
        sine_only=positions.sine_only,
        endpoint=endpoint,
        precision="float32",
    )


# --- decoders ---------------------------------------------------------------------------------------------------------


class PerceiverBasicDecoder(theirs.PerceiverBasicDecoder, Accelerated):
    """transformers' PerceiverBasicDecoder: queries on a grid stay unbuilt, and are decoded block after block."""

    def decoder_query(
        self,
        inputs: Any,
        modality_sizes: Any = None,
        inputs_without_pos: Any = None,
        subsampled_points: Tensor | None = None,
    ) -> Any:
        if subsampled_points is None or self.concat_preprocessed_input or self._obstacle():
            return super().decoder_query(inputs, modality_sizes, inputs_without_pos, subsampled_points)
        grid = fourier_grid(self.output_position_encodings, self.output_index_dims, endpoint=False)
        points = subsampled_points.to(inputs.device, torch.int64)
        queries: GridQueries | Tensor = GridQueries(grid)
        if not torch.equal(points, torch.arange(grid.num_positions, device=points.device)):
            queries = GridQueries(grid).at(points, inputs.dtype)
        return Unbuilt([queries], inputs.shape[0], inputs.device, inputs.dtype)

    def _obstacle(self) -> str | None:
        if self.position_encoding_type != "fourier" or isinstance(self.output_index_dims, int):
            return "its positions are not Fourier features"
        return _fourier_obstacle(self.output_position_encodings, self.positions_projection, len(self.output_index_dims))

    def forward(
        self, query: Any, z: Tensor, query_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> Any:
        layer = self.decoding_cross_attention
        if (
            output_attentions
            or not isinstance(query, Unbuilt)
            or not is_stock(layer, PerceiverLayer)
            or _attention_obstacle(layer.attention)
            or _mlp_obstacle(layer)
        ):
            return super().forward(built(query), z, query_mask, output_attentions)
        return theirs.PerceiverDecoderOutput(logits=_decode(layer, self.final_layer, query, z))


def _decode(layer: Any, final_layer: Any, queries: Unbuilt, z: Tensor) -> Tensor:
    """A decoder's cross-attention layer and final projection, for queries that are nowhere in memory as a whole."""
    inner, norm, mlp = layer.attention.self, layer.layernorm, layer.mlp
    query_norm, output = inner.layernorm1, layer.attention.output.dense
    tokens = inner.layernorm2(z)
    fused = Part("final_layer", final_layer, nn.Linear).is_stock
    activation = _activation(mlp.intermediate_act_fn)
    assert activation is not None
    linears = (mlp.dense1.weight, mlp.dense1.bias, mlp.dense2.weight, mlp.dense2.bias)
    out = decode_streamed(
        queries.segments,
        project(inner.key, tokens),
        project(inner.value, tokens),
        QueryProjection(inner.query.weight, inner.query.bias, query_norm.weight, query_norm.bias, query_norm.eps),
        OutputProjection(output.weight, output.bias),
        heads=inner.num_heads,
        dropout_p=_maps(inner).dropout_p,
        query_residual=layer.attention.use_query_residual,
        mlp=FeedForwardWeights(norm.weight, norm.bias, *linears, activation, norm.eps),
        final=OutputProjection(final_layer.weight, final_layer.bias) if fused else None,
    )
    return out if fused else final_layer(out)


class PerceiverMultimodalDecoder(theirs.PerceiverMultimodalDecoder, Accelerated):
    """transformers' PerceiverMultimodalDecoder: modalities' queries stay segments, their padding a constant of each."""

    def decoder_query(
        self, inputs: Any, modality_sizes: Any, inputs_without_pos: Any = None, subsampled_points: Any = None
    ) -> Unbuilt:
        by_modality = _by_modality(inputs, modality_sizes)
        without_pos, points = inputs_without_pos or {}, subsampled_points or {}
        segments = []
        for modality in sorted(self.modalities):
            queries = self.modalities[modality].decoder_query(
                inputs=by_modality[modality],
                modality_sizes=None,
                inputs_without_pos=without_pos.get(modality),
                subsampled_points=points.get(modality),
            )
            segments.append(self._padded(queries, self.padding[modality][0]))
        return Unbuilt(segments, inputs.shape[0], inputs.device, inputs.dtype)

    def _padded(self, queries: Tensor | Unbuilt, padding: Tensor) -> GridQueries | Tensor:
        part = only_segment(queries)
        if isinstance(part, GridQueries):
            return part.padded(padding)
        array = (built(queries) if part is None else part).flatten(1, -2)
        return torch.cat((array, padding.expand(*array.shape[:2], -1)), 2)


def _by_modality(inputs: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """transformers' `restructure`, building nothing where each modality is a segment."""
    order = sorted(sizes)
    if isinstance(inputs, Unbuilt) and [*map(segment_length, inputs.segments)] == [sizes[m] for m in order]:
        segments = zip(order, inputs.segments, strict=True)
        return {m: Unbuilt([part], inputs.shape[0], inputs.device, inputs.dtype) for m, part in segments}
    return theirs.restructure(sizes, inputs)


def _plan_decoders(name: str, model: Any) -> list[Swap | Left]:
    """Swaps for what makes queries in a PerceiverModel, and for what decodes them."""
    return [
        Swap(part, module, _DECODERS[type(module)])
        for part, module in _submodules(name, "decoder", model.decoder)
        if type(module) in _DECODERS
    ]


_DECODERS: dict[type, type[nn.Module]] = {
    kind.original: kind for kind in (PerceiverBasicDecoder, PerceiverMultimodalDecoder)
}
