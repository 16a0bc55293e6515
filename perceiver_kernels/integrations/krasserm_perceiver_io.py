"""krasserm's perceiver-io by this library's operators: attention, MLPs, and Fourier positions that are not written out.

Rotary embeddings, key-value caches and causal masks (Perceiver AR) run as before. Release 0.11.
"""

# The attributes of another library's modules have no types.
# mypy: disable-error-code="arg-type,attr-defined,index,misc,no-any-return,operator,override,union-attr"

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, cast

import torch
from perceiver.model.core import modules as theirs
from perceiver.model.core.position import FourierPositionEncoding
from perceiver.model.core.utils import ModuleOutput
from torch import Tensor, nn

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.integrations.cross_attention import Maps, attend_to
from perceiver_kernels.integrations.parts import Part, all_stock, obstacle, pre_norm_mlp
from perceiver_kernels.integrations.swap import Accelerated, Left, Swap
from perceiver_kernels.integrations.unbuilt import Unbuilt, built
from perceiver_kernels.modules.decoder import (
    GridQueries,
    OutputProjection,
    QueryProjection,
    separable_query_cross_attention,
)
from perceiver_kernels.modules.projection import project
from perceiver_kernels.modules.segments import GridTokens

# --- attention --------------------------------------------------------------------------------------------------------


class MultiHeadAttention(theirs.MultiHeadAttention, Accelerated):
    """Attention to tokens that are normalised already."""

    def forward(self, x_q: Tensor, x_kv: Tensor, pad_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        x_q, x_kv = built(x_q), built(x_kv)
        if _is_given(args, kwargs) or not _is_covered(self, pad_mask, x_kv):
            return super().forward(x_q, x_kv, pad_mask, *args, **kwargs)
        return _output(self, _attend(self, project(self.q_proj, x_q), x_kv, None, pad_mask))


class CrossAttention(theirs.CrossAttention, Accelerated):
    """Pre-norm attention to an array, or to tokens and from queries on a grid that are not built."""

    def forward(
        self,
        x_q: Tensor | Unbuilt,
        x_kv: Tensor | Unbuilt | None = None,
        x_kv_prefix: Tensor | None = None,
        pad_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        attention = self.attention
        covered = x_kv is not None and x_kv_prefix is None and not _is_given(args, kwargs)
        if not covered or not _is_covered(attention, pad_mask, x_kv) or not all_stock(_parts_of_cross(self)):
            return super().forward(built(x_q), built(x_kv), x_kv_prefix, pad_mask, *args, **kwargs)
        on_grid = _queries_on_grid(x_q)
        if on_grid is not None and pad_mask is None:
            return ModuleOutput(last_hidden_state=self._decode(on_grid, built(x_kv)), kv_cache=None)
        query = project(attention.q_proj, self.q_norm(built(x_q)))
        return _output(attention, _attend(attention, query, x_kv, self.kv_norm, pad_mask))

    def _decode(self, queries: GridQueries, x_kv: Tensor) -> Tensor:
        attention, norm = self.attention, self.q_norm
        x_kv = self.kv_norm(x_kv)
        return separable_query_cross_attention(
            queries,
            project(attention.k_proj, x_kv),
            project(attention.v_proj, x_kv),
            QueryProjection(attention.q_proj.weight, attention.q_proj.bias, norm.weight, norm.bias, norm.eps),
            OutputProjection(attention.o_proj.weight, attention.o_proj.bias),
            heads=attention.num_heads,
            dropout_p=_maps(attention, None).dropout_p,
        )


class SelfAttention(theirs.SelfAttention, Accelerated):
    """Pre-norm attention of an array to itself."""

    def forward(self, x: Tensor, pad_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        attention = self.attention
        covered = not _is_given(args, kwargs) and pad_mask is None and _is_covered(attention, None, x)
        if not covered or not all_stock(_parts_of_self(self)):
            return super().forward(x, pad_mask, *args, **kwargs)
        x = self.norm(x)
        return _output(attention, _attend(attention, project(attention.q_proj, x), x, None, None))


def _is_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there are rotary embeddings or a cache of keys and values."""
    return any(value is not None for value in (*args, *kwargs.values()))


def _is_covered(attention: Any, pad_mask: Tensor | None, x_kv: Any) -> bool:
    maskable = pad_mask is None or (pad_mask.dtype == torch.bool and tuple(pad_mask.shape) == tuple(x_kv.shape[:2]))
    return maskable and not attention.causal_attention and all_stock(_parts_of_attention(attention))


def _parts_of_attention(attention: Any) -> Iterator[Part]:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield Part(name, getattr(attention, name), nn.Linear)
    yield Part("dropout", attention.dropout, nn.Dropout)


def _parts_within(module: Any, *norms: str) -> Iterator[Part]:
    kind = type(module.attention)
    yield Part("attention", module.attention, kind if kind is MultiHeadAttention else theirs.MultiHeadAttention)
    for name in norms:
        yield Part(name, getattr(module, name), nn.LayerNorm)


def _parts_of_cross(module: Any) -> Iterator[Part]:
    return _parts_within(module, "q_norm", "kv_norm")


def _parts_of_self(module: Any) -> Iterator[Part]:
    return _parts_within(module, "norm")


def _attend(
    attention: Any, query: Tensor, tokens: Tensor | Unbuilt, norm: nn.LayerNorm | None, pad_mask: Tensor | None
) -> Tensor:
    """Attention of a projected query (batch or 1, N, channels), with an input's pads all of them: to all its tokens."""
    mask = None
    if pad_mask is not None:
        all_pads = pad_mask.all(dim=1, keepdim=True)
        query, mask = query.masked_fill(all_pads[..., None], 0.0), ~pad_mask | all_pads
    return attend_to(query, tokens, mask, _maps(attention, norm))


def _maps(attention: Any, norm: nn.LayerNorm | None) -> Maps:
    scale, dropout = attention.dp_scale, attention.dropout
    return Maps(attention.k_proj, attention.v_proj, norm, attention.num_heads, scale, dropout)


def _queries_on_grid(x_q: Tensor | Unbuilt) -> GridQueries | None:
    first, *others = x_q.segments if isinstance(x_q, Unbuilt) else (None,)
    return first if isinstance(first, GridQueries) and not others else None


def _output(attention: Any, attended: Tensor) -> Any:
    return ModuleOutput(last_hidden_state=project(attention.o_proj, attended), kv_cache=None)


# --- MLPs -------------------------------------------------------------------------------------------------------------


class MLP(theirs.MLP, Accelerated):
    """LayerNorm and MLP."""

    def forward(self, x: Tensor) -> Any:
        if not all_stock(_parts_of_mlp(self)):
            return super().forward(x)
        norm, first, _, last = self
        return ModuleOutput(last_hidden_state=pre_norm_mlp(x, norm, first, last, activation="gelu"))


def _parts_of_mlp(mlp: Any) -> Iterator[Part]:
    kinds = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear)
    for i, kind in enumerate(kinds):
        yield Part(str(i), mlp[i] if len(mlp) == len(kinds) else None, kind)
    # Its tanh form is another activation.
    yield Part("2", mlp[2] if mlp[2].approximate == "none" else None, nn.GELU)


# --- inputs -----------------------------------------------------------------------------------------------------------

# Vision needs more packages than the core does, so what is for it is imported where there is such an adapter.
_ADAPTERS = {
    "perceiver.model.vision.image_classifier.backend.ImageInputAdapter": "krasserm_image.ImageAdapter",
    "perceiver.model.vision.optical_flow.backend.OpticalFlowInputAdapter": "krasserm_flow.FlowAdapter",
}


def _adapter_class(adapter: nn.Module) -> type[nn.Module] | None:
    kind = type(adapter)
    module, _, name = _ADAPTERS.get(f"{kind.__module__}.{kind.__name__}", "").partition(".")
    return getattr(import_module(f"perceiver_kernels.integrations.{module}"), name) if module else None


def tokens_on_grid(encoding: Any, data: Tensor) -> Unbuilt:
    """Data and the Fourier features of its positions, in place of the array of both."""
    dtype = torch.promote_types(data.dtype, encoding.position_encoding.dtype)
    return Unbuilt([GridTokens(grid_of(encoding), data)], data.shape[0], data.device, dtype)


def grid_of(encoding: Any) -> FourierGrid:
    shape, bands = tuple(encoding.input_shape), encoding.num_frequency_bands
    return FourierGrid(shape, bands, order="grouped", precision="float32")


def _encoding_obstacle(encoding: nn.Module) -> str | None:
    """Why features on a grid cannot stand for a position encoding, whose array is in checkpoints."""
    if not Part("", encoding, FourierPositionEncoding).is_stock:
        return f"position_encoding is {type(encoding).__name__}, must be FourierPositionEncoding without hooks"
    stored = cast(Tensor, encoding.position_encoding)
    if stored.device.type == "meta":
        return "position_encoding is on meta, and cannot be looked at"
    expected = grid_of(encoding).encode(stored.device)
    if expected.shape != stored.shape or not torch.allclose(stored.float(), expected, rtol=0.0, atol=1e-5):
        return "position_encoding has been changed"
    return None


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(model: nn.Module) -> list[Swap | Left] | None:
    """What of perceiver-io there is in a model, and what becomes of it; None: nothing."""
    steps: list[Swap | Left] = []
    swapped: set[int] = set()
    for name, module in model.named_modules():
        step = _plan_layer(name, module)
        if step is not None:
            steps.append(step)
            swapped.update([id(module)] if isinstance(step, Swap) else [])
    for name, module in model.named_modules():
        if isinstance(module, theirs.PerceiverEncoder) and _adapter_class(module.input_adapter):
            steps.append(_plan_adapter(f"{name}.input_adapter".removeprefix("."), module, swapped))
    return steps or None


def _plan_layer(name: str, module: Any) -> Swap | Left | None:
    kind = type(module)
    if kind is theirs.MLP:
        why = obstacle(_parts_of_mlp(module))
        return Swap(name, module, MLP) if why is None else Left(name, module, why)
    if kind is theirs.MultiHeadAttention:
        why = "causal attention has no kernel" if module.causal_attention else obstacle(_parts_of_attention(module))
        return Swap(name, module, MultiHeadAttention) if why is None else Left(name, module, why)
    if kind not in (theirs.CrossAttention, theirs.SelfAttention):
        return None
    cross = kind is theirs.CrossAttention
    why = obstacle(_parts_of_cross(module) if cross else _parts_of_self(module))
    if why is None and module.attention.causal_attention:
        why = "causal attention has no kernel"
    if why is None:
        why = obstacle(
            Part(f"attention.{part.name}", part.module, part.kind) for part in _parts_of_attention(module.attention)
        )
    return Swap(name, module, CrossAttention if cross else SelfAttention) if why is None else Left(name, module, why)


def _plan_adapter(name: str, encoder: Any, swapped: set[int]) -> Swap | Left:
    """An adapter need not write positions out where all that reads it is swapped."""
    adapter = encoder.input_adapter
    to = _adapter_class(adapter)
    assert to is not None
    layers = [encoder.cross_attn_1, *([encoder.cross_attn_n] if encoder.extra_cross_attention_layer else [])]
    readers = [module for layer in layers for module in layer.modules() if isinstance(module, theirs.CrossAttention)]
    if not all(id(reader) in swapped for reader in readers):
        return Left(name, adapter, "a cross-attention that reads it is left")
    if any("forward" in vars(layer) for layer in layers):
        return Left(name, adapter, "activation checkpointing of the cross-attention takes arrays")
    why = _encoding_obstacle(adapter.position_encoding)
    return Swap(name, adapter, to) if why is None else Left(name, adapter, why)
