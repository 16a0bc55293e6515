"""A Perceiver IO's decoder in functions of tensors: queries on a grid folded into the keys, blocks of queries streamed.

A query is z = [data ; features of its position on each axis ; constant], and only LayerNorm(z) times keys is wanted. As
on the encoder's side (folding.py), the summands of z are projected instead of z, here onto the keys
(docs/separable_attention.md, "Queries on a grid"). No query is built but where it is added to the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.modules import dense
from perceiver_kernels.modules.folding import LONGEST_SINGLE_AXIS
from perceiver_kernels.ops.feed_forward import feed_forward
from perceiver_kernels.ops.fourier_encode import encode_grid
from perceiver_kernels.ops.linear import linear
from perceiver_kernels.ops.separable_layer_norm import separable_layer_norm
from perceiver_kernels.ops.separable_query_attention import MAX_CHANNELS, attend_from_grid
from perceiver_kernels.ops.validation import check_key_mask

BLOCK_BYTES = 16 << 20

Queries = TypeVar("Queries", bound="GridQueries")

# Parts of a grid: along each axis a range of its positions.
Part: TypeAlias = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class GridQueries:
    """The queries [data ; Fourier features ; constant] of all positions of a grid, not built.

    Args:
        grid: the positions and their features.
        data: (batch or 1, *grid.shape, c) or (batch or 1, M, c), floating-point, any strides; None: c = 0.
        constant: (n,), channels that are the same for every query, such as a modality's embedding; None: n = 0.

    Raises:
        ValueError: data or constant is not as described; the message names it.
    """

    grid: FourierGrid
    data: Tensor | None = None
    constant: Tensor | None = None

    def __post_init__(self) -> None:
        grid, data, constant = self.grid, self.data, self.constant
        if data is not None:
            if tuple(data.shape[1:-1]) not in (grid.shape, (grid.num_positions,)):
                sizes = ", ".join(map(str, grid.shape))
                expected = f"(batch, {sizes}, channels) or (batch, {grid.num_positions}, channels) for the grid"
                raise ValueError(f"data has shape {tuple(data.shape)}, must be {expected}")
            if not data.is_floating_point():
                raise ValueError(f"data has dtype {data.dtype}, must be floating-point")
        if constant is not None and constant.dim() != 1:
            raise ValueError(f"constant has shape {tuple(constant.shape)}, must be (channels,)")

    @property
    def batch(self) -> int:
        """The data's, or 1."""
        return 1 if self.data is None else self.data.shape[0]

    @property
    def data_channels(self) -> int:
        """c."""
        return 0 if self.data is None else self.data.shape[-1]

    @property
    def num_channels(self) -> int:
        """Channels of a query, c + E + n."""
        return self.data_channels + self.grid.num_channels + (0 if self.constant is None else self.constant.shape[0])

    def padded(self: Queries, channels: Tensor) -> Queries:
        """The same with further channels, (n,), that are the same for every query."""
        constant = channels if self.constant is None else torch.cat((self.constant, channels))
        return replace(self, constant=constant)

    def encode(self, device: torch.device, dtype: torch.dtype, part: Part | None = None) -> Tensor:
        """The queries of part of the grid written out, (batch or 1, positions, channels)."""
        part = part or tuple(slice(0, size) for size in self.grid.shape)
        tables = [table[along] for table, along in zip(self.grid.tables(device, dtype), part, strict=True)]
        data = None
        if self.data is not None:
            index = (slice(None), *part)
            data = self.data.reshape(self.batch, *self.grid.shape, self.data_channels)[index].to(dtype)
        encoded = encode_grid(tables, self.grid.bands.sections, data=data, batch=self.batch, out=None).flatten(1, -2)
        return self._with_constant(encoded)

    def at(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The queries of chosen positions written out, to decode these alone.

        Args:
            index: (P,), int64: positions in row-major order, 0 to M - 1.
            dtype: of the result.

        Returns:
            (batch or 1, P, channels).
        """
        check_indices("index", index, self.grid.num_positions)
        coordinates = torch.unravel_index(index, self.grid.shape)
        tables = self.grid.tables(index.device, dtype)
        features = torch.cat([table[along] for table, along in zip(tables, coordinates, strict=True)], -1)
        order = torch.cat(self.grid.channel_index()).argsort().to(index.device)
        points = features[:, order].expand(self.batch, -1, -1)
        if self.data is not None:
            data = self.data.reshape(self.batch, self.grid.num_positions, self.data_channels)
            points = torch.cat((data[:, index].to(dtype), points), -1)
        return self._with_constant(points)

    def _with_constant(self, queries: Tensor) -> Tensor:
        if self.constant is None:
            return queries
        return torch.cat((queries, self.constant.to(queries).expand(*queries.shape[:-1], -1)), -1)


def check_indices(name: str, indices: Tensor, count: int) -> None:
    """Raise a ValueError unless these are (points,), int64, from 0 to count - 1."""
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(f"{name} is {tuple(indices.shape)} of {indices.dtype}, must be (points,) of torch.int64")
    # On a GPU, looking would wait for it.
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        first, last = indices.aminmax()
        if first < 0 or last >= count:
            raise ValueError(f"{name} has entries from {first} to {last}, must be from 0 to {count - 1}")


class QueryProjection(NamedTuple):
    """LayerNorm of the queries and the linear map after it.

    weight: (heads * head_dim, channels) and bias: (heads * head_dim,) or None. norm_weight and norm_bias: (channels,)
    or None, as in F.layer_norm; eps None: there is no LayerNorm.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float | None = None


class OutputProjection(NamedTuple):
    """The linear map after attention: weight (out_features, heads * head_dim_v), bias (out_features,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class FeedForwardWeights(NamedTuple):
    """A pre-norm MLP, as `feed_forward` takes it; its residual is its input."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    activation: str = "gelu"
    eps: float = 1e-5


@dataclass(frozen=True)
class FoldedQueries:
    """Queries on a grid and keys as the scores of `separable_query_attention`.

    form: (batch or 1, heads, c + S_1 + ... + S_A, N), the keys' part of the data channels and a table per axis;
    h: (batch or 1, heads, N) or None; x: (batch or 1, M, c) or None; r: (batch or 1, M) or None.
    """

    grid: tuple[int, ...]
    form: Tensor
    h: Tensor | None
    x: Tensor | None
    r: Tensor | None

    def attend(
        self, values: Tensor, *, part: Part | None = None, mask: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        """The attention of part of the grid: (batch, heads, positions, head_dim_v) for values (batch, heads, N, ..)."""
        if part is None:
            return attend_from_grid(
                self.form, values, self.h, self.x, self.r, grid=self.grid, mask=mask, dropout_p=dropout_p
            )
        rows = positions(part, self.grid)
        channels, *tables = self.form.split((self.form.shape[2] - sum(self.grid), *self.grid), 2)
        form = torch.cat((channels, *(table[:, :, along] for table, along in zip(tables, part, strict=True))), 2)
        x, r = (None if tensor is None else tensor[:, rows] for tensor in (self.x, self.r))
        sizes = [along.stop - along.start for along in part]
        return attend_from_grid(form, values, self.h, x, r, grid=sizes, mask=mask, dropout_p=dropout_p)


def fold_queries(queries: GridQueries, keys: Tensor, query: QueryProjection, scale: float) -> FoldedQueries:
    """LayerNorm and projection of the queries, folded into the keys.

    Args:
        queries: on a grid.
        keys: (batch or 1, heads, N, head_dim), projected.
        query: how keys see the queries.
        scale: of the scores.

    Returns:
        In float32, or float64 for float64 keys; differentiable in the data, the constant, the keys and the projection.
    """
    dtype = _computed(keys)
    weight, bias, norm_weight, norm_bias = (None if p is None else p.to(dtype) for p in query[:4])
    assert weight is not None
    k = scale * keys.to(dtype)
    h = None
    constant = bias if norm_bias is None else F.linear(norm_bias, weight, bias)
    if constant is not None:
        h = (k @ constant.unflatten(0, (keys.shape[1], -1, 1)))[..., 0]

    # LayerNorm's gain and centring go into the weights.
    weight = weight if norm_weight is None else weight * norm_weight
    if query.eps is not None:
        weight = weight - weight.mean(1, keepdim=True)
    on_grid = queries.data_channels + queries.grid.num_channels
    summands = queries.grid.summands(queries.data_channels, keys.device, dtype)
    projected = F.linear(summands, weight[:, :on_grid])
    if queries.constant is not None:  # every query has one position on the first axis, and the constant once
        data, first, rest = projected.split((queries.data_channels, queries.grid.shape[0], sum(queries.grid.shape[1:])))
        projected = torch.cat((data, first + weight[:, on_grid:] @ queries.constant.to(dtype), rest))
    form = projected.unflatten(1, (keys.shape[1], -1)).transpose(0, 1) @ k.transpose(2, 3)

    x = None
    if queries.data is not None:
        x = queries.data.reshape(queries.batch, queries.grid.num_positions, queries.data_channels).to(dtype)
    r = None if query.eps is None else reciprocal_deviation(queries, query.eps, keys.device, dtype)
    return FoldedQueries(queries.grid.shape, form, h, x, r)


def reciprocal_deviation(queries: GridQueries, eps: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """LayerNorm's r of every query, (batch or 1, M)."""
    grid, constant = queries.grid, queries.constant
    sums, squares = grid.feature_sums(device, dtype)
    channels = grid.num_channels
    if constant is not None:
        constant, channels = constant.to(dtype), channels + constant.shape[0]
        sums, squares = (sums[0] + constant.sum(), *sums[1:]), (squares[0] + constant.square().sum(), *squares[1:])
    if queries.data is None:
        x = sums[0].new_empty(1, *grid.shape, 0)
    else:
        x = queries.data.reshape(queries.batch, *grid.shape, queries.data_channels)
    return separable_layer_norm(x, sums, squares, feature_channels=channels, eps=eps).flatten(1)


def separable_query_cross_attention(
    queries: GridQueries,
    keys: Tensor,
    values: Tensor,
    query: QueryProjection,
    output: OutputProjection | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * Q K^T) V W_O^T + b_O with Q = W_Q LayerNorm([data ; features ; constant]) + b_Q, not built.

    Args:
        queries: on a grid of 1 to 4 axes, up to 128 data channels.
        keys: (batch or 1, N, heads * head_dim), projected from the latents.
        values: (batch or 1, N, heads * head_dim_v), projected from the latents.
        query: LayerNorm and projection of the queries.
        output: the projection after attention, or None; of one head it is folded into the values where that is less
            work.
        heads: attention heads.
        scale: defaults to head_dim ** -0.5.
        mask: bool (batch, N), True = attend. A query with nothing to attend to gets b_O.
        dropout_p: probability in [0, 1) of dropping an attention weight.

    Returns:
        (batch, M, out_features), without output (batch, M, heads * head_dim_v), in values' dtype.

    Raises:
        ValueError: shapes or dtypes disagree; the message names the argument.

    Memory: the result, and where output is not folded what it projects. On backends without a kernel for it, the
        weights (see `separable_query_attention`).
    Source: docs/separable_attention.md; Jaegle et al. 2022, arXiv:2107.14795.
    """
    _check(queries, keys, values, query, output, heads, mask)
    return _Attention(queries, keys, values, query, output, heads, scale, mask, dropout_p).whole()


def decode_streamed(
    queries: GridQueries | Tensor | Sequence[GridQueries | Tensor],
    keys: Tensor,
    values: Tensor,
    query: QueryProjection,
    output: OutputProjection | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    query_residual: bool = False,
    mlp: FeedForwardWeights | None = None,
    final: OutputProjection | None = None,
    recompute: bool = True,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """A decoder, block after block of its queries: cross-attention, query residual, MLP and a last linear map.

    y = output(attention(query(queries), keys, values)) [+ queries];  y = y + MLP(LayerNorm(y));  out = final(y)

    Args:
        queries: on a grid; or written out, (batch or 1, O, channels), which take the dense path. What the latter give
            for `GridQueries.at` of some positions is what the former give there. Or a sequence of such segments.
        keys, values, query, output, heads, scale, mask, dropout_p: as in `separable_query_cross_attention`.
        query_residual: whether the queries are added to the projected attention, which has as many channels.
        mlp: the MLP, or None.
        final: the last linear map, or None.
        recompute: in training, whether a block's intermediate results are computed again in backward instead of kept.
        block_bytes: about how large the widest array of a block may be.

    Returns:
        (batch, O, channels of the last map).

    Raises:
        ValueError: shapes or dtypes disagree; the message names the argument.

    Memory: the result and some times block_bytes, however many queries there are; with recompute so in training, too.
    Source: Jaegle et al. 2022, arXiv:2107.14795.
    """
    segments = [queries] if isinstance(queries, (GridQueries, Tensor)) else queries
    if not segments:
        raise ValueError("queries is an empty sequence, must have at least one segment")
    for segment in segments:
        _check(segment, keys, values, query, output, heads, mask)
    channels = values.shape[2] if output is None else output.weight.shape[0]
    if query_residual and channels != query.weight.shape[1]:
        raise ValueError(
            f"query_residual is True, must be False where the attention gives {channels} channels and "
            f"queries have {query.weight.shape[1]}"
        )

    trains = torch.is_grad_enabled() and _requires_grad(segments, keys, values, query, output, mlp, final)
    after: _MLP | _ReducedMLP | None = None if mlp is None else _MLP(mlp, final)
    plain = heads == 1 and mask is None and dropout_p == 0 and not query_residual and not trains
    if plain and output and mlp and final and _ReducedMLP.pays(values.shape[2], output, final):
        after = _ReducedMLP(output, mlp, final)
        values, output = after.into(values), None
    attentions = [
        _Attention(segment, keys, values, query, output, heads, scale, mask, dropout_p) for segment in segments
    ]
    batch = _joint_batch([attention.batch for attention in attentions])

    def decode(attention: _Attention, part: Part) -> Tensor:
        y = attention(part, residual=query_residual)
        if after is not None:
            y = after(y)
        elif final is not None:
            y = linear(y, *final)
        return y.expand(batch, -1, -1)

    widest = max(attentions[0].widest, 0 if mlp is None else mlp.weight_in.shape[0])
    most = max(block_bytes // (max(batch, 1) * widest * values.element_size()), 1)
    blocks = [partial(decode, attention, part) for attention in attentions for part in attention.parts(most)]
    if len(blocks) == 1:
        return blocks[0]()
    if trains:
        if not recompute:
            return torch.cat([block() for block in blocks], 1)
        return torch.cat([checkpoint(block, use_reentrant=False) for block in blocks], 1)
    return _filled(blocks, sum(attention.num_queries for attention in attentions))


def _requires_grad(segments: Sequence[GridQueries | Tensor], *others: Tensor | tuple[object, ...] | None) -> bool:
    """Whether backward will come through any of the arguments."""
    found: list[object] = []
    for segment in segments:
        found += (segment.data, segment.constant) if isinstance(segment, GridQueries) else (segment,)
    for other in others:
        found += other if isinstance(other, tuple) else (other,)
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in found)


def _filled(blocks: Sequence[Callable[[], Tensor]], num_queries: int) -> Tensor:
    """All blocks in one array, of which there is never a second."""
    out, start = None, 0
    for decode in blocks:
        block = decode()
        if out is None:
            out = block.new_empty(block.shape[0], num_queries, block.shape[2])
        out[:, start : start + block.shape[1]] = block
        start += block.shape[1]
    assert out is not None
    return out


def grid_parts(grid: tuple[int, ...], most: int) -> list[Part]:
    """A grid in parts of about equal size and at most so many positions (but at least one), in order.

    A part is a range of one axis at one position of the axes before it, and all of those after it: its positions follow
    each other.
    """
    first, rest = grid[0], grid[1:]
    inner = math.prod(rest)
    if rest and inner > most:
        return [(slice(i, i + 1), *part) for i in range(first) for part in grid_parts(rest, most)]
    whole = tuple(slice(0, size) for size in rest)
    count = max(math.ceil(first / max(most // max(inner, 1), 1)), 1)
    return [(slice(i * first // count, (i + 1) * first // count), *whole) for i in range(count)]


def positions(part: Part, grid: tuple[int, ...]) -> slice:
    """The range of a part's positions among all of the grid, in row-major order."""
    start, size = 0, 1
    for along, length in zip(part, grid, strict=True):
        start = start * length + along.start
        size *= along.stop - along.start
    return slice(start, start + size)


class _Attention:
    """Cross-attention and output projection of blocks of queries."""

    def __init__(
        self,
        queries: GridQueries | Tensor,
        keys: Tensor,
        values: Tensor,
        query: QueryProjection,
        output: OutputProjection | None,
        heads: int,
        scale: float | None,
        mask: Tensor | None,
        dropout_p: float,
    ) -> None:
        query_batch = queries.batch if isinstance(queries, GridQueries) else queries.shape[0]
        self.batch = _joint_batch([keys.shape[0], query_batch])
        self.queries, self.query = queries, query
        self.mask, self.dropout_p = mask, dropout_p
        self.dtype, self.device = values.dtype, values.device
        self.scale = (keys.shape[2] // heads) ** -0.5 if scale is None else scale
        self.keys = keys.unflatten(2, (heads, -1)).transpose(1, 2)
        weight, bias = (None, None) if output is None else output
        channels = values.shape[2] if weight is None else weight.shape[0]
        if weight is not None and heads == 1 and _folds(values.shape[1], *weight.shape):
            # Without mask and dropout a query's weights sum to 1: the bias goes into the values, too.
            into_values = bias if mask is None and dropout_p == 0 else None
            values = _linear(values, weight, into_values)
            weight, bias = None, bias if into_values is None else None
        self.weight, self.bias = weight, bias
        self.values = values.unflatten(2, (heads, -1)).transpose(1, 2).expand(self.batch, -1, -1, -1)
        self.widest = max(values.shape[2], channels)
        self.folded = None
        if isinstance(queries, GridQueries) and _separable(queries):
            with torch.autocast(values.device.type, enabled=False):
                self.folded = fold_queries(queries, self.keys, query, self.scale)

    @property
    def num_queries(self) -> int:
        """O."""
        return self.queries.grid.num_positions if isinstance(self.queries, GridQueries) else self.queries.shape[1]

    def parts(self, most: int) -> list[Part]:
        """The queries in blocks: parts of their grid, or of the one axis that they have."""
        shape = self.queries.grid.shape if isinstance(self.queries, GridQueries) else (self.queries.shape[1],)
        return grid_parts(shape, most)

    def whole(self) -> Tensor:
        (part,) = self.parts(self.num_queries)
        return self(part)

    def __call__(self, part: Part, residual: bool = False) -> Tensor:
        """(batch, block's queries, channels): attention, projected, and the queries added where wanted."""
        written = self._written(part) if residual or self.folded is None else None
        if self.folded is not None:
            with torch.autocast(self.device.type, enabled=False):
                attended = self.folded.attend(self.values, part=part, mask=self.mask, dropout_p=self.dropout_p)
        else:
            assert written is not None
            attended = self._attend_dense(written)
        attended = attended.transpose(1, 2).flatten(2)
        added = written.to(self.dtype).expand(self.batch, -1, -1) if residual and written is not None else None
        if self.weight is not None:
            return linear(attended, self.weight, self.bias, residual=added)
        for term in (self.bias, added):
            attended = attended if term is None else attended + term
        return attended

    def _written(self, part: Part) -> Tensor:
        if isinstance(self.queries, GridQueries):
            return self.queries.encode(self.device, self.dtype, part)
        return self.queries[:, part[0]]

    def _attend_dense(self, queries: Tensor) -> Tensor:
        weight, bias, norm_weight, norm_bias, eps = self.query
        if eps is not None:
            queries = F.layer_norm(queries, queries.shape[-1:], norm_weight, norm_bias, eps)
        q = linear(queries, weight, bias).unflatten(2, (self.keys.shape[1], -1)).transpose(1, 2)
        keys = self.keys.expand(self.batch, -1, -1, -1)
        return dense.attend(q, keys, self.values, self.mask, scale=self.scale, dropout_p=self.dropout_p)


class _MLP:
    """An MLP with its residual and the last linear map, which is folded into the second layer where that is less work.

    final(y + second(hidden)) = (final second)(hidden) + final(y).
    """

    def __init__(self, weights: FeedForwardWeights, final: OutputProjection | None) -> None:
        self.folds = final is not None and final.weight.shape[0] < weights.weight_out.shape[0]
        if self.folds and final is not None:
            constant = final.bias
            if weights.bias_out is not None:
                constant = _linear(weights.bias_out, final.weight, final.bias)
            weights = weights._replace(
                weight_out=_linear(weights.weight_out.t(), final.weight, None).t(), bias_out=constant
            )
        self.weights, self.final = _with_even_hidden(weights), final

    def __call__(self, y: Tensor) -> Tensor:
        residual = linear(y, self.final.weight) if self.folds and self.final is not None else y
        weights = self.weights
        out = feed_forward(y, *weights[:6], activation=weights.activation, eps=weights.eps, residual=residual)
        return out if self.folds or self.final is None else linear(out, *self.final)


class _ReducedMLP:
    """Output projection, MLP with its residual and last linear map, of attention to values of fewer channels than y's.

    y = W a + b has no more degrees of freedom than the attended values a. Let [W b], less its mean over y's channels,
    be Q R with orthonormal columns of Q. Then y = Q z + mean(y) with z = R [a ; 1]: LayerNorm's variance is |z|^2 over
    y's channels, and what follows is linear in z. R goes into the values, as a query's weights sum to 1.
    """

    @staticmethod
    def pays(channels: int, output: OutputProjection, final: OutputProjection) -> bool:
        """Whether attended values, one constant and a mean are fewer than y's channels, and the last map's are."""
        return max(channels + 2, final.weight.shape[0]) < output.weight.shape[0]

    def __init__(self, output: OutputProjection, mlp: FeedForwardWeights, final: OutputProjection) -> None:
        dtype = output.weight.dtype
        with torch.autocast(output.weight.device.type, enabled=False):
            weight, bias = _in_double(*output)
            gain, shift, weight_in, bias_in, weight_out, bias_out = _in_double(*mlp[:6])
            last, last_bias = _in_double(*final)
            assert weight is not None and weight_in is not None and weight_out is not None and last is not None
            bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
            joined = torch.cat((weight, bias[:, None]), 1)
            mean = joined.mean(0, keepdim=True)
            basis, triangle = torch.linalg.qr(joined - mean)
            self.into_values = torch.cat((triangle, mean))
            self.residual = torch.cat((last @ basis, last.sum(1, keepdim=True)), 1).to(dtype)
            weight_in_gain = weight_in if gain is None else weight_in * gain
            folded = FeedForwardWeights(
                norm_weight=None,
                norm_bias=None,
                weight_in=F.pad(weight_in_gain @ basis, (0, 1)),
                bias_in=bias_in if shift is None else F.linear(shift, weight_in, bias_in),
                weight_out=last @ weight_out,
                bias_out=last_bias if bias_out is None else F.linear(bias_out, last, last_bias),
                activation=mlp.activation,
                eps=mlp.eps,
            )
        folded = _with_even_hidden(folded)
        self.first, self.second = (
            OutputProjection(weight.to(dtype), None if bias is None else bias.to(dtype))
            for weight, bias in ((folded.weight_in, folded.bias_in), (folded.weight_out, folded.bias_out))
        )
        self.activation, self.eps, self.channels = mlp.activation, mlp.eps, output.weight.shape[0]

    def into(self, values: Tensor) -> Tensor:
        """The values (batch, N, channels) that attention gives [z ; mean(y)] for."""
        return F.linear(F.pad(values.double(), (0, 1), value=1.0), self.into_values).to(values.dtype)

    def __call__(self, z: Tensor) -> Tensor:
        computed = z.to(_computed(z))
        squares = torch.linalg.vector_norm(computed[..., :-1], dim=-1, keepdim=True).square()
        normed = (computed * (squares / self.channels + self.eps).rsqrt()).to(z.dtype)
        hidden = linear(normed, *self.first, activation=self.activation)
        return linear(hidden, *self.second, residual=linear(z, self.residual))


def _in_double(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if parameter is None else parameter.detach().double() for parameter in parameters]


def _with_even_hidden(weights: FeedForwardWeights) -> FeedForwardWeights:
    """Hidden channels of zeros up to a multiple of 16: for 322 outputs, MKL takes half as long again as for 336."""
    more = -weights.weight_in.shape[0] % 16
    if not more or weights.activation not in ("gelu", "gelu_tanh"):  # which keep zeros
        return weights
    return weights._replace(
        weight_in=F.pad(weights.weight_in, (0, 0, 0, more)),
        bias_in=None if weights.bias_in is None else F.pad(weights.bias_in, (0, more)),
        weight_out=F.pad(weights.weight_out, (0, more)),
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product of weights, at least in float32, in x's dtype."""
    dtype = _computed(x)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def _computed(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _folds(keys: int, out_features: int, head_dim: int) -> bool:
    """Whether values of out_features for each of the keys are less work per query than projecting what it attended."""
    return keys * out_features <= (keys + out_features) * head_dim


def _separable(queries: GridQueries) -> bool:
    """Whether the queries' scores are a few tables: not where one axis has a table as large as the scores."""
    long = queries.grid.num_axes == 1 and queries.grid.num_positions >= LONGEST_SINGLE_AXIS
    return queries.data_channels <= MAX_CHANNELS and not long


def _joint_batch(batches: Sequence[int]) -> int:
    """The one that is not 1, if there is one; 0 too."""
    found = {batch for batch in batches if batch != 1}
    if len(found) > 1:
        raise ValueError(f"queries has segments of batch {sorted(found)}, must have one batch, or 1")
    return found.pop() if found else 1


def _check(
    queries: GridQueries | Tensor,
    keys: Tensor,
    values: Tensor,
    query: QueryProjection,
    output: OutputProjection | None,
    heads: int,
    mask: Tensor | None,
) -> None:
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dim() != 3 or tensor.shape[2] % heads or not tensor.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, must be (batch, latents, a multiple of {heads} heads)"
            )
    if keys.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"values has batch and latents {tuple(values.shape[:2])}, must have {tuple(keys.shape[:2])} as keys has"
        )
    if values.dtype != keys.dtype or values.device != keys.device:
        raise ValueError(
            f"values is {values.dtype} on {values.device}, must be {keys.dtype} on {keys.device} as keys is"
        )
    if isinstance(queries, GridQueries):
        batch, channels = queries.batch, queries.num_channels
    elif queries.dim() == 3:
        batch, _, channels = queries.shape
    else:
        raise ValueError(f"queries has {queries.dim()} dimensions, must have 3: (batch or 1, queries, channels)")
    if batch != keys.shape[0] and 1 not in (batch, keys.shape[0]):
        raise ValueError(f"queries has batch {batch}, must be 1 or {keys.shape[0]} as keys has")
    check_key_mask(mask, keys.shape[0] if batch == 1 else batch, keys.shape[1], "keys")
    if tuple(query.weight.shape) != (keys.shape[2], channels):
        raise ValueError(
            f"query.weight has shape {tuple(query.weight.shape)}, must be {(keys.shape[2], channels)}: keys' channels "
            "and the queries'"
        )
    if output is not None and (output.weight.dim() != 2 or output.weight.shape[1] != values.shape[2]):
        raise ValueError(
            f"output.weight has shape {tuple(output.weight.shape)}, must be (out_features, {values.shape[2]}) as "
            "values has channels"
        )
