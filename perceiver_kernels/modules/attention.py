"""Pre-norm attention modules: from latents to data (CrossAttention) and among latents (SelfAttention)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.modules import dense
from perceiver_kernels.modules.folding import (
    PathChoice,
    choose_path,
    separable_cross_attention,
    separable_obstacle,
)
from perceiver_kernels.modules.projection import is_plain, is_stock, project
from perceiver_kernels.modules.segments import (
    GridTokens,
    KeysAndValues,
    Segment,
    absorbed_sizes,
    check_segments,
    materialized,
    segmented_cross_attention,
)
from perceiver_kernels.ops.latent_attention import latent_attention

# perceiver-pytorch's: a latent without any weight gets zeros from inverted attention, not NaN.
_INVERTED_EPS = 1e-8


class AttentionProjections(nn.Module):
    """The linear maps around an attention: to_q, to_kv (keys, then values) and to_out; head by head within each."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        inner_dim: int,
        inner_dim_v: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.to_q = nn.Linear(query_dim, inner_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.to_kv = nn.Linear(context_dim, inner_dim + inner_dim_v, bias=qkv_bias, device=device, dtype=dtype)
        self.to_out = nn.Linear(inner_dim_v, query_dim, bias=out_bias, device=device, dtype=dtype)


class CrossAttention(nn.Module):
    """Pre-norm attention of latents to data on a grid or to dense tokens.

    out = to_out( softmax(head_dim^-1/2 * q @ k^T) @ v ),
    q = to_q( norm(latents) ),  [k, v] = to_kv( norm_context(context) )

    With a grid, context holds only the raw data channels; each token's Fourier features count as further channels after
    them, and the separable path never builds them, nor keys, nor values. Which path runs is chosen by shape;
    `explain` names it. Where to_kv or norm_context has been replaced or hooked into, it is called as it is.

    Args:
        query_dim: channels of the latents and of the output.
        context_dim: channels of a token, Fourier features included; defaults to query_dim.
        heads: attention heads.
        head_dim: channels per head.
        head_dim_v: channels per head of the values; defaults to head_dim.
        dropout: probability in [0, 1) of dropping an attention weight in training.
        qkv_bias: whether to_q and to_kv have biases.
        out_bias: whether to_out has a bias.
        query_norm: whether the latents pass a LayerNorm.
        context_norm: whether the tokens pass a LayerNorm.
        eps: of both LayerNorms.
        masked_rows: what the attention gives for an input whose mask is False everywhere: "zeros", or, as
            perceiver-pytorch does, the "mean" of the values of all its tokens.

    Parameters are named norm, norm_context, fn.to_q, fn.to_kv and fn.to_out, as in perceiver-pytorch.
    Source: Jaegle et al. 2021, arXiv:2103.03206.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        *,
        heads: int = 1,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = True,
        query_norm: bool = True,
        context_norm: bool = True,
        eps: float = 1e-5,
        masked_rows: Literal["zeros", "mean"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_dropout(dropout)
        if masked_rows not in ("zeros", "mean"):
            raise ValueError(f'masked_rows is {masked_rows!r}, but must be "zeros" or "mean"')
        self.query_dim = query_dim
        self.context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.head_dim = head_dim
        self.head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.dropout = dropout
        self.masked_rows = masked_rows
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fn = AttentionProjections(
            query_dim,
            self.context_dim,
            heads * head_dim,
            heads * self.head_dim_v,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            **factory,
        )
        self.norm = nn.LayerNorm(query_dim, eps=eps, **factory) if query_norm else nn.Identity()
        self.norm_context = nn.LayerNorm(self.context_dim, eps=eps, **factory) if context_norm else None

    def forward(
        self,
        latents: Tensor,
        context: Tensor | GridTokens | Sequence[Segment],
        *,
        grid: FourierGrid | None = None,
        mask: Tensor | None = None,
        inverted: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attend from the latents to the context.

        Args:
            latents: (batch, N, query_dim), or (1, N, query_dim) for latents that all inputs share.
            context: with a grid, data (batch, *grid.shape, c) or (batch, M, c), c = context_dim - grid.num_channels, of
                any floating dtype and any strides; without a grid, tokens (batch, M, context_dim), `GridTokens`, or a
                sequence of segments, each of them one of the two, which are attended to together.
            grid: where the tokens stand and which features a position has.
            mask: bool (batch, M) or (batch, *grid.shape), True = attend; of segments (batch, tokens of all of them).
            inverted: normalise each token's scores over the latents, then each latent's weights over the tokens.
            residual: (batch, N, query_dim) or (1, N, query_dim), added to the result.

        Returns:
            (batch, N, query_dim).

        Raises:
            ValueError: shapes, dtypes or devices disagree; the message names the argument.
        """
        if not isinstance(context, Tensor):
            segments = self._segments(context, grid)
            if self._folds() and not inverted:
                return self._attend_to_segments(latents, segments, mask, residual)
            context = materialized(segments)
        context, mask = self._flatten(latents, context, grid, mask)
        path = "inverted" if inverted else self._choose_path(latents, context, grid).path
        query = project(self.fn.to_q, self.norm(latents))
        if mask is not None and not inverted and self.masked_rows == "mean":
            query, mask = _make_all_masked_uniform(query, mask)
        if path == "separable" and grid is not None:
            attended = self._attend_to_grid(query, context, grid, mask)
        elif path == "absorbed":
            attended = self._attend_folded(query, [self._tokens(context, grid)], mask)
        else:
            attended = self._attend_projected(query, self._tokens(context, grid), mask, inverted)
        return project(self.fn.to_out, attended, residual)

    def explain(
        self,
        latents: Tensor,
        context: Tensor | GridTokens | Sequence[Segment],
        *,
        grid: FourierGrid | None = None,
        mask: Tensor | None = None,
        inverted: bool = False,
    ) -> str:
        """Say which path `forward` takes for these arguments, and what each would cost or why it cannot run."""
        if not isinstance(context, Tensor):
            segments = self._segments(context, grid)
            if self._folds() and not inverted:
                return "\n".join(
                    ["path: segments, merged", *map(self._explain_segment, range(len(segments)), segments)]
                )
            context, grid = materialized(segments), None
        context, _ = self._flatten(latents, context, grid, mask)
        if inverted:
            return "path: inverted\n  plain PyTorch: attention normalised over the latents has no fused path yet"
        choice = self._choose_path(latents, context, grid)
        lines = [choice.describe(), *self._explain_attention(choice.path, latents, context, mask)]
        return "\n".join(lines)

    def _attend_to_segments(
        self, latents: Tensor, segments: Sequence[Segment], mask: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        _check_latents(latents, segments[0], self.query_dim)
        if mask is not None:
            tokens = sum(segment.shape[1] for segment in segments)
            mask = flatten_key_mask(mask, segments[0].shape[0], (tokens,), segments[0].device)
        query = project(self.fn.to_q, self.norm(latents))
        if mask is not None and self.masked_rows == "mean":
            query, mask = _make_all_masked_uniform(query, mask)
        return project(self.fn.to_out, self._attend_folded(query, segments, mask), residual)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, dropout={self.dropout}, masked_rows={self.masked_rows!r}"

    def _flatten(
        self, latents: Tensor, context: Tensor, grid: FourierGrid | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Check the arguments of `forward`; give the context as (batch, M, channels) and the mask as (batch, M)."""
        if grid is None:
            channels, shape = self.context_dim, tuple(context.shape[1:2])
        else:
            channels, shape = self.context_dim - grid.num_channels, grid.shape
            if channels < 1:
                raise ValueError(f"grid has {grid.num_channels} channels, but must have fewer than {self.context_dim}")
        context = _flatten_context(context, shape, channels)
        _check_latents(latents, context, self.query_dim)
        if mask is not None:
            mask = flatten_key_mask(mask, context.shape[0], shape, context.device)
        return context, mask

    def _segments(self, context: GridTokens | Sequence[Segment], grid: FourierGrid | None) -> Sequence[Segment]:
        if grid is not None:
            raise ValueError("grid is given, must be None for segments, which have their own")
        segments = (context,) if isinstance(context, GridTokens) else context
        check_segments(segments, self.context_dim)
        return segments

    def _folds(self) -> bool:
        """Whether to_kv and norm_context are as they came, so that their parameters do for them."""
        norm = self.norm_context
        return is_plain(self.fn.to_kv) and (norm is None or is_stock(norm, nn.LayerNorm))

    def _attend_to_grid(self, query: Tensor, data: Tensor, grid: FourierGrid, mask: Tensor | None) -> Tensor:
        if self.head_dim_v != self.head_dim:
            return self._attend_folded(query, [GridTokens(grid, data)], mask)
        norm, to_kv = self.norm_context, self.fn.to_kv
        return separable_cross_attention(
            query,
            data,
            grid,
            mask,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=None if norm is None else norm.eps,
            kv_weight=to_kv.weight,
            kv_bias=to_kv.bias,
            heads=self.heads,
            **self._scale_and_dropout(),
        )

    def _attend_folded(self, query: Tensor, segments: Sequence[Segment], mask: Tensor | None) -> Tensor:
        norm, to_kv = self.norm_context, self.fn.to_kv
        key_weight, value_weight = to_kv.weight.split(self._widths())
        key_bias, value_bias = (None, None) if to_kv.bias is None else to_kv.bias.split(self._widths())
        normed = (None, None, None) if norm is None else (norm.weight, norm.bias, norm.eps)
        projections = KeysAndValues(key_weight, key_bias, value_weight, value_bias, *normed)
        options = self._scale_and_dropout()
        return segmented_cross_attention(query, segments, mask, projections, heads=self.heads, **options)

    def _attend_projected(self, query: Tensor, tokens: Tensor, mask: Tensor | None, inverted: bool) -> Tensor:
        """With keys and values in memory, by the modules themselves."""
        tokens = tokens if self.norm_context is None else self.norm_context(tokens)
        keys_and_values = project(self.fn.to_kv, tokens).split(self._widths(), -1)
        q, keys, values = (_split_heads(part, self.heads) for part in (query, *keys_and_values))
        attend = _attend_inverted if inverted else dense.attend
        return _merge_heads(attend(q, keys, values, mask, **self._scale_and_dropout()))

    def _widths(self) -> list[int]:
        """Of all heads' keys and values."""
        return [self.heads * self.head_dim, self.heads * self.head_dim_v]

    def _choose_path(self, latents: Tensor, context: Tensor, grid: FourierGrid | None) -> PathChoice:
        if not self._folds():
            reason: int | str = "no, to_kv or norm_context has been replaced or hooked into"
            return PathChoice("modules", dict.fromkeys(("separable", "absorbed", "projected"), reason))
        batch, num_tokens, channels = context.shape
        return choose_path(
            queries=latents.shape[1],
            batch=batch,
            heads=self.heads,
            head_dim=(self.head_dim + self.head_dim_v) // 2,
            data_channels=channels,
            grid=grid,
            context_channels=self.context_dim,
            num_tokens=num_tokens,
        )

    def _explain_attention(self, path: str, latents: Tensor, context: Tensor, mask: Tensor | None) -> list[str]:
        """What attends to dense tokens, on a path that has them."""
        if path == "separable":
            return []
        (batch, tokens, _), queries, heads = context.shape, latents.shape[1], self.heads
        plain = mask is None and (self.dropout == 0 or not self.training) and not torch.is_grad_enabled()
        if path == "absorbed":
            sizes = absorbed_sizes((batch, tokens, self.context_dim), heads * queries, plain)
        else:
            sizes = dense.Sizes(batch, heads, queries, tokens, self.head_dim, self.head_dim_v, plain)
        ours = "pk.absorbed_attention" if path == "absorbed" else "pk.cross_attention"
        return [dense.describe(dense.torch_reason(latents.device, sizes), ours)]

    def _explain_segment(self, index: int, segment: Segment) -> str:
        path = "absorbed into its channels"
        if isinstance(segment, GridTokens):
            obstacle = separable_obstacle(segment.grid, segment.data.shape[-1])
            path = (
                "separable"
                if obstacle is None
                else f"absorbed into its channels, features written out; separable: {obstacle}"
            )
        return f"  context[{index}], {tuple(segment.shape)}: {path}"

    def _tokens(self, context: Tensor, grid: FourierGrid | None) -> Tensor:
        """The dense tokens (batch, M, context_dim), with a grid's features written out."""
        dtype = next(self.parameters()).dtype
        context = context.to(dtype)
        if grid is None:
            return context
        features = grid.encode(device=context.device, dtype=dtype)
        return torch.cat((context, features.expand(context.shape[0], -1, -1)), dim=-1)

    def _scale_and_dropout(self) -> dict[str, float]:
        return {"scale": self.head_dim**-0.5, "dropout_p": self.dropout if self.training else 0.0}


class SelfAttention(nn.Module):
    """Pre-norm attention among the latents of an input, without the (N, N) scores in memory.

    out = to_out( softmax(head_dim^-1/2 * q @ k^T) @ v ) + residual,
    q = to_q( norm(x) ),  [k, v] = to_kv( norm(x) )

    Args:
        dim: channels in and out.
        heads: attention heads.
        head_dim: channels per head.
        head_dim_v: channels per head of the values; defaults to head_dim.
        dropout: probability in [0, 1) of dropping an attention weight in training.
        qkv_bias: whether to_q and to_kv have biases.
        out_bias: whether to_out has a bias.
        eps: of the LayerNorm.

    Parameters are named norm, fn.to_q, fn.to_kv and fn.to_out, as in perceiver-pytorch.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_dropout(dropout)
        self.heads = heads
        self.dropout = dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner_dims = (heads * head_dim, heads * (head_dim if head_dim_v is None else head_dim_v))
        self.fn = AttentionProjections(dim, dim, *inner_dims, qkv_bias=qkv_bias, out_bias=out_bias, **factory)
        self.norm = nn.LayerNorm(dim, eps=eps, **factory)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map (batch, N, dim) to (batch, N, dim) and add the residual, of the same shape."""
        x = self.norm(x)
        query = project(self.fn.to_q, x)
        keys_and_values = project(self.fn.to_kv, x)
        widths = (query.shape[-1], keys_and_values.shape[-1] - query.shape[-1])
        query, keys, values = (_split_heads(part, self.heads) for part in (query, *keys_and_values.split(widths, -1)))
        attended = latent_attention(query, keys, values, dropout_p=self.dropout if self.training else 0.0)
        return project(self.fn.to_out, _merge_heads(attended), residual)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}"


def _attend_inverted(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float, dropout_p: float
) -> Tensor:
    """Slot attention in plain PyTorch: softmax over the latents of each token, then L1 norm over the tokens.

    Arguments and result as in `dense.attend`. A latent without any weight gets zeros.
    Source: Locatello et al. 2020, arXiv:2006.15055.
    """
    weights = (query * scale @ keys.transpose(-2, -1)).softmax(dim=-2)
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None, :], 0.0)
    weights = F.dropout(F.normalize(weights, p=1.0, dim=-1, eps=_INVERTED_EPS), dropout_p)
    return weights @ values


def flatten_key_mask(mask: Tensor, batch: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Check a key mask for `batch` inputs with tokens on a grid of this shape; give it as (batch, M)."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, but must be torch.bool, True = attend")
    num_tokens = math.prod(shape)
    if tuple(mask.shape) not in ((batch, num_tokens), (batch, *shape)):
        expected = _either((batch, num_tokens), (batch, *shape))
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but must be {expected}")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}, but what it masks is on {device}")
    return mask.flatten(1)


def _flatten_context(context: Tensor, shape: tuple[int, ...], channels: int) -> Tensor:
    if not context.is_floating_point():
        raise ValueError(f"context has dtype {context.dtype}, but must be floating-point")
    num_tokens = math.prod(shape)
    if tuple(context.shape[1:]) not in ((num_tokens, channels), (*shape, channels)):
        expected = _either(("batch", num_tokens, channels), ("batch", *shape, channels))
        raise ValueError(f"context has shape {tuple(context.shape)}, but must be {expected}")
    if num_tokens == 0:
        raise ValueError(f"context has shape {tuple(context.shape)}: there is no token to attend to")
    return context.flatten(1, -2)


def _either(*shapes: tuple[int | str, ...]) -> str:
    """The distinct shapes in words: "(batch, 12, 3) or (batch, 3, 4, 3)"."""
    return " or ".join(dict.fromkeys(f"({', '.join(map(str, shape))})" for shape in shapes))


def _check_latents(latents: Tensor, context: Segment, query_dim: int) -> None:
    if latents.ndim != 3 or latents.shape[2] != query_dim:
        raise ValueError(f"latents has shape {tuple(latents.shape)}, but must be (batch, N, {query_dim})")
    if latents.shape[0] not in (1, context.shape[0]):
        raise ValueError(f"latents has batch {latents.shape[0]}, but context has {context.shape[0]}")
    if latents.device != context.device:
        raise ValueError(f"context is on {context.device}, but latents is on {latents.device}")


def _check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, but must be in [0, 1)")


def _make_all_masked_uniform(query: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where an input's mask is False everywhere, let a zero query attend to all its tokens, so with equal weights.

    With no branch on the data, every path then gives the mean of the values there, and the query gets no gradient.
    """
    all_masked = ~mask.any(dim=-1, keepdim=True)
    return query.masked_fill(all_masked[:, :, None], 0.0), mask | all_masked


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, n, heads * head_dim) -> (batch, heads, n, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, n, head_dim) -> (batch, n, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)
