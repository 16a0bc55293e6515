"""perceiver-pytorch's models by this library's operators: its pre-norm attention and MLPs, and encoders of raw data.

Its PreNorm around an Attention has the parameters of this library's attention modules, by the same names, so the
swapped class is one of them too; so is its Perceiver one of `Perceiver`, of which only the places of the layers differ.
Releases 0.8 to 0.11.
"""

# The attributes of another library's modules have no types.
# mypy: disable-error-code="arg-type,attr-defined,has-type,index,misc,no-any-return,operator,override,union-attr"

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from perceiver_pytorch import experimental, gated, mixed_latents, perceiver_io
from perceiver_pytorch import perceiver_pytorch as base
from torch import Tensor, nn

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.integrations.parts import Part, all_stock, obstacle, pre_norm_mlp
from perceiver_kernels.integrations.swap import Accelerated, Left, Swap
from perceiver_kernels.modules import attention
from perceiver_kernels.modules.perceiver import Perceiver
from perceiver_kernels.modules.projection import is_stock

ATTENTIONS = (base.Attention, perceiver_io.Attention)
FEED_FORWARDS = (base.FeedForward, perceiver_io.FeedForward)


# --- attention and MLPs ---------------------------------------------------------------------------------------------


class FusedAttention(nn.Module):
    """What swapped PreNorms around an attention share: settings that this library's modules keep themselves."""

    masked_rows = "mean"

    @property
    def heads(self) -> Any:
        return self.fn.heads

    @property
    def head_dim(self) -> Any:
        return self.fn.to_q.out_features // self.fn.heads

    head_dim_v = head_dim

    @property
    def dropout(self) -> Any:
        return self.fn.dropout.p if hasattr(self.fn, "dropout") else 0.0

    @property
    def query_dim(self) -> Any:
        return self.fn.to_q.in_features

    @property
    def context_dim(self) -> Any:
        return self.norm_context.normalized_shape[-1]

    def _is_covered(self) -> bool:
        # A Dropout may be switched apart from what holds it.
        dropout = getattr(self.fn, "dropout", None)
        in_step = dropout is None or dropout.p == 0 or dropout.training == self.training
        return in_step and all_stock(_attention_parts(self))


def _attention_parts(pre_norm: Any) -> Iterator[Part]:
    fn = pre_norm.fn
    yield Part("fn", fn, type(fn) if type(fn) in ATTENTIONS else base.Attention)
    yield Part("norm", pre_norm.norm, nn.LayerNorm)
    if pre_norm.norm_context is not None:
        yield Part("norm_context", pre_norm.norm_context, nn.LayerNorm)
    for name in ("to_q", "to_kv", "to_out"):
        yield Part(f"fn.{name}", getattr(fn, name, None), nn.Linear)
    if hasattr(fn, "dropout"):
        yield Part("fn.dropout", fn.dropout, nn.Dropout)


class FusedCrossAttention(FusedAttention, attention.CrossAttention):
    """A PreNorm with norm_context, around an attention: latents to data, which may be raw on a grid."""

    def forward(
        self,
        x: Tensor,
        *,
        grid: FourierGrid | None = None,
        residual: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The original's arguments; also raw data and its grid, x of batch 1 for all, and what to add."""
        context = arguments.get("context")
        fits = context is not None and len(x) in (1, len(context)) and _can_attend(context, arguments.get("mask"))
        if fits and self._is_covered():
            inverted = arguments.get("inverted_attention", False)
            mask = None if arguments.get("mask") is None else arguments["mask"].flatten(1)
            return attention.CrossAttention.forward(
                self, x, context, grid=grid, mask=mask, inverted=inverted, residual=residual
            )
        if grid is not None:
            arguments["context"] = self._tokens(arguments["context"].flatten(1, -2), grid)
        if context is not None and len(x) == 1:
            x = x.expand(len(context), -1, -1)
        out = self.original.forward(self, x, **arguments)
        return out if residual is None else out + residual


class FusedSelfAttention(FusedAttention, attention.SelfAttention):
    """A PreNorm without norm_context, around an attention: among latents, unless it is given a context."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, **arguments: Any) -> Tensor:
        """The original's arguments, and what to add."""
        if not _is_given(arguments) and self._is_covered():
            return attention.SelfAttention.forward(self, x, residual=residual)
        out = self.original.forward(self, x, **arguments)
        return out if residual is None else out + residual


class FusedFeedForward(nn.Module):
    """A PreNorm around an MLP."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, **arguments: Any) -> Tensor:
        """The original's arguments, and what to add."""
        if arguments or not self._is_covered():
            out = self.original.forward(self, x, **arguments)
            return out if residual is None else out + residual
        first, _, last, *_ = self.fn.net
        return pre_norm_mlp(x, self.norm, first, last, activation="geglu", residual=residual)

    def _is_covered(self) -> bool:
        drops = any(isinstance(layer, nn.Dropout) and layer.training and layer.p > 0 for layer in self.fn.net)
        return not drops and all_stock(_feed_forward_parts(self))


def _feed_forward_parts(pre_norm: Any) -> Iterator[Part]:
    fn = pre_norm.fn
    yield Part("fn", fn, type(fn) if type(fn) in FEED_FORWARDS else base.FeedForward)
    yield Part("norm", pre_norm.norm, nn.LayerNorm)
    if pre_norm.norm_context is not None:
        yield Part("norm_context", None, nn.LayerNorm)
    geglu = perceiver_io.GEGLU if type(fn) is perceiver_io.FeedForward else base.GEGLU
    yield Part("fn.net", fn.net if len(fn.net) in (3, 4) else None, nn.Sequential)
    kinds = (nn.Linear, geglu, nn.Linear, nn.Dropout)[: len(fn.net)]
    for i, kind in enumerate(kinds):
        yield Part(f"fn.net.{i}", fn.net[i], kind)


def _is_given(arguments: dict[str, Any]) -> bool:
    return any(value is not None and value is not False for value in arguments.values())


def _can_attend(context: Tensor, mask: Any) -> bool:
    """Whether a context (batch, *axes, channels) has tokens, and the mask, if there is one, an entry for each."""
    batch, *axes, _ = context.shape
    if mask is None or 0 in axes:
        return 0 not in axes
    return mask.dtype == torch.bool and mask.ndim > 1 and tuple(mask.flatten(1).shape) == (batch, math.prod(axes))


class PreNormCrossAttention(base.PreNorm, Accelerated, FusedCrossAttention):
    forward = FusedCrossAttention.forward


class PreNormSelfAttention(base.PreNorm, Accelerated, FusedSelfAttention):
    forward = FusedSelfAttention.forward


class PreNormFeedForward(base.PreNorm, Accelerated, FusedFeedForward):
    forward = FusedFeedForward.forward


class IOPreNormCrossAttention(perceiver_io.PreNorm, Accelerated, FusedCrossAttention):
    forward = FusedCrossAttention.forward


class IOPreNormSelfAttention(perceiver_io.PreNorm, Accelerated, FusedSelfAttention):
    forward = FusedSelfAttention.forward


class IOPreNormFeedForward(perceiver_io.PreNorm, Accelerated, FusedFeedForward):
    forward = FusedFeedForward.forward


# --- blocks and whole models ----------------------------------------------------------------------------------------

# Releases up to 0.10 had no PerceiverBlock: a layer was a list of its parts.
_Block: Any = getattr(base, "PerceiverBlock", nn.Module)


def _add(part: nn.Module, x: Tensor, **arguments: Any) -> Tensor:
    """part(x) + x, the addition inside the operator where it can be: hooks are given what the original gives them."""
    fuses = isinstance(part, Accelerated) and is_stock(part, type(part))
    return part(x, residual=x, **arguments) if fuses else part(x, **arguments) + x


def _run_pairs(pairs: Any, x: Tensor) -> Tensor:
    for self_attn, self_ff in pairs:
        x = _add(self_ff, _add(self_attn, x))
    return x


class Block(_Block, Accelerated):
    """PerceiverBlock with additions inside the operators."""

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        inverted_attention: bool = False,
        **grid: FourierGrid | None,
    ) -> Tensor:
        """The original's arguments; with `grid`, context is raw data."""
        if self.has_cross_attn:
            to_data = {"context": context, "mask": mask, "inverted_attention": inverted_attention}
            x = _add(self.cross_ff, _add(self.cross_attn, x, **to_data, **grid))
        return _run_pairs(self.self_attns, x)


class OnRawData(Perceiver):
    """A Perceiver whose cross-attentions, all swapped, take raw data and a grid."""

    activation_checkpointing = False
    fourier_encode_data = True
    has_attn_residual = False

    @property
    def input_channels(self) -> int:
        return self._cross_attentions()[0].context_dim - self._num_position_channels

    def forward(self, data: Tensor, mask: Tensor | None = None, *arguments: Any, **named: Any) -> Any:
        """As the original; what it refuses, and what has been altered since, goes to the original."""
        if not self._covers(data, mask):
            return self.original.forward(self, data, mask, *arguments, **named)
        return self._classify(data, mask, *arguments, **named)

    def _classify(self, *arguments: Any, **named: Any) -> Any:
        return Perceiver.forward(self, *arguments, **named)

    def _covers(self, data: Tensor, mask: Tensor | None) -> bool:
        return (
            self._is_fused()
            and data.is_floating_point()
            and data.ndim == self.input_axis + 2
            and data.shape[-1] == self.input_channels
            and data.device == self.latents.device
            and _can_attend(data, mask)
        )

    def _is_fused(self) -> bool:
        try:
            return all(isinstance(cross_attn, FusedCrossAttention) for cross_attn in self._cross_attentions())
        except (AttributeError, IndexError, TypeError):  # a layer has been replaced by another kind of module
            return False

    def _inverts(self) -> Sequence[bool]:
        return getattr(self, "inverted_cross_attn", (False,) * len(self.layers))


class PerceiverOfBlocks(base.Perceiver, Accelerated, OnRawData):
    """That of 0.11: layers are PerceiverBlocks."""

    forward = OnRawData.forward

    def _run_layer(
        self, layer: int, x: Tensor, context: Tensor, grid: FourierGrid | None, mask: Tensor | None
    ) -> Tensor:
        inverted = self._inverts()[layer]
        return self.layers[layer](x, context=context, mask=mask, inverted_attention=inverted, grid=grid)


class PerceiverOfLists(base.Perceiver, Accelerated, OnRawData):
    """Those up to 0.10: a layer is a list of cross-attention, MLP, list of pairs, and attention residual since 0.10."""

    forward = OnRawData.forward

    @property
    def attn_residuals(self) -> list[nn.Module]:
        return [layer[3] for layer in self.layers]

    def _run_layer(
        self, layer: int, x: Tensor, context: Tensor, grid: FourierGrid | None, mask: Tensor | None
    ) -> Tensor:
        cross_attn, cross_ff, self_attns, *_ = self.layers[layer]
        inverted = {"inverted_attention": True} if self._inverts()[layer] else {}
        x = _add(cross_ff, _add(cross_attn, x, context=context, mask=mask, grid=grid, **inverted))
        return _run_pairs(self_attns, x)

    def _cross_attentions(self) -> list[attention.CrossAttention]:
        return [layer[0] for layer in self.layers]


class GatedPerceiver(gated.Perceiver, Accelerated, OnRawData):
    """That of gated.py, whose attentions pass a GRU cell in place of the residual."""

    forward = OnRawData.forward

    def _classify(self, data: Tensor, mask: Tensor | None = None) -> Tensor:
        context, grid, mask = self._prepare(data, mask)
        x = self.latents.expand(len(data), -1, -1)
        for cross_attn, cross_ff, latent_attn, latent_ff in self.layers:
            x = cross_ff(cross_attn(x, context=context, mask=mask, grid=grid))
            x = latent_ff(latent_attn(x))
        return self.to_logits(x.mean(dim=-2))

    def _cross_attentions(self) -> list[attention.CrossAttention]:
        return [layer[0].fn for layer in self.layers]


class MixedLatentsPerceiver(mixed_latents.Perceiver, Accelerated, OnRawData):
    """That of mixed_latents.py, whose latents are mixed by convolutions instead of self-attention."""

    forward = OnRawData.forward

    def _classify(self, data: Tensor, mask: Tensor | None = None) -> Tensor:
        context, grid, mask = self._prepare(data, mask)
        x = self.latents.unsqueeze(0)
        for cross_attn, cross_ff, latent_attn, latent_ff in self.layers:
            x = _add(cross_ff, _add(cross_attn, x, context=context, mask=mask, grid=grid))
            x = _add(latent_ff, _add(latent_attn, x))
        return self.to_logits(x.mean(dim=-2))

    def _cross_attentions(self) -> list[attention.CrossAttention]:
        return [layer[0] for layer in self.layers]


# --- the plan -------------------------------------------------------------------------------------------------------

_PRE_NORMS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    base.PreNorm: (PreNormCrossAttention, PreNormSelfAttention, PreNormFeedForward),
    perceiver_io.PreNorm: (IOPreNormCrossAttention, IOPreNormSelfAttention, IOPreNormFeedForward),
}
_MODELS = (base.Perceiver, gated.Perceiver, mixed_latents.Perceiver, experimental.Perceiver, perceiver_io.PerceiverIO)
# Releases before 0.7.4, and models of theirs that name a base, space their frequencies otherwise.
_ENCODES_AS_WE_DO = [*inspect.signature(base.fourier_encode).parameters] == ["x", "max_freq", "num_bands"]


def plan(model: nn.Module) -> list[Swap | Left] | None:
    """What of perceiver-pytorch there is in a model, and what becomes of it; None: nothing."""
    steps: list[Swap | Left] = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in _PRE_NORMS:
            steps.append(_plan_pre_norm(name, module, *_PRE_NORMS[kind]))
        elif kind is getattr(base, "PerceiverBlock", None):
            steps.append(Swap(name, module, Block))
    if not steps:
        return None
    swapped = {id(step.module) for step in steps if isinstance(step, Swap)}
    for name, module in model.named_modules():
        if type(module) in _MODELS[:-1]:
            steps.append(_plan_model(name, module, swapped))
        elif isinstance(module, _MODELS) and type(module) not in _MODELS:
            steps.append(Left(name, module, f"a subclass of {_base_of(module).__name__} may compute otherwise"))
    order = [name for name, _ in model.named_modules()]
    return sorted(steps, key=lambda step: order.index(step.name))


def _base_of(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in type(module).__mro__ if kind in _MODELS)


def _plan_pre_norm(
    name: str,
    module: nn.Module,
    cross_attention: type[nn.Module],
    self_attention: type[nn.Module],
    mlp: type[nn.Module],
) -> Swap | Left:
    pre_norm = cast(Any, module)
    fn = pre_norm.fn
    if type(fn) in FEED_FORWARDS:
        why, to = obstacle(_feed_forward_parts(pre_norm)), mlp
    elif type(fn) in ATTENTIONS:
        to = self_attention if pre_norm.norm_context is None else cross_attention
        why = obstacle(_attention_parts(pre_norm)) or _attention_obstacle(fn)
    else:
        return Left(name, module, f"fn is {type(fn).__name__}, neither Attention nor FeedForward")
    return Swap(name, module, to) if why is None else Left(name, module, why)


def _attention_obstacle(fn: Any) -> str | None:
    if getattr(fn, "queries_contribute_kv", False):
        return "queries_contribute_kv adds the queries to the keys"
    if fn.scale != (fn.to_q.out_features // fn.heads) ** -0.5:
        return f"scale is {fn.scale}, must be dim_head ** -0.5"
    return None


def _plan_model(name: str, module: nn.Module, swapped: set[int]) -> Swap | Left:
    """An encoder of raw data, where all its cross-attentions are swapped."""
    to = _model_class(module)
    if to is None:
        return Left(name, module, "a linear map of the encoded data needs it written out; its layers are swapped")
    if not _ENCODES_AS_WE_DO:
        return Left(name, module, "this release spaces its frequencies otherwise")
    if not all(id(cross_attn) in swapped for cross_attn in cast(Any, to)._cross_attentions(module)):
        return Left(name, module, "a cross-attention is left, and needs the encoded data written out")
    return Swap(name, module, to)


def _model_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is base.Perceiver:
        listed = any(isinstance(layer, nn.ModuleList) for layer in cast(Any, module).layers)
        return PerceiverOfLists if listed else PerceiverOfBlocks
    return {gated.Perceiver: GatedPerceiver, mixed_latents.Perceiver: MixedLatentsPerceiver}.get(type(module))
