"""The modules of a Perceiver IO's decoder, run block after block of queries on a grid (decoder.py), or as they are."""

from __future__ import annotations

from torch import Tensor, nn

from perceiver_kernels.modules.attention import CrossAttention
from perceiver_kernels.modules.decoder import (
    FeedForwardWeights,
    GridQueries,
    OutputProjection,
    QueryProjection,
    decode_streamed,
)
from perceiver_kernels.modules.feed_forward import FeedForward
from perceiver_kernels.modules.projection import is_plain, is_stock, project
from perceiver_kernels.ops.linear import linear


def decode(
    attention: CrossAttention,
    queries: Tensor | GridQueries,
    latents: Tensor,
    *,
    mlp: FeedForward | None = None,
    final: nn.Module | OutputProjection | None = None,
    query_residual: bool = False,
) -> Tensor:
    """Cross-attention of queries to the latents, query residual, MLP with residual, and a last linear map.

    Args:
        attention: from queries to latents.
        queries: written out, (batch or 1, O, channels); or on a grid: then no array of them is built, and memory does
            not grow with their number beyond the result.
        latents: (batch, N, channels).
        mlp: the MLP, or None.
        final: the last map, nn.Linear or its weights; None or nn.Identity leaves it out.
        query_residual: whether the queries are added to the attention.

    Returns:
        (batch, O, channels of the last map).
    """
    if isinstance(final, nn.Identity):
        final = None
    elif isinstance(final, nn.Module) and is_plain(final):
        final = OutputProjection(final.weight, final.bias)
    if isinstance(queries, GridQueries):
        if not isinstance(final, nn.Module) and _streams(attention, mlp):
            return _stream(attention, queries, latents, mlp, final, query_residual)
        queries = queries.encode(latents.device, latents.dtype)
    x = attention(queries, latents, residual=queries if query_residual else None)
    if mlp is not None:
        x = mlp(x, residual=x)
    if isinstance(final, nn.Module):
        return final(x)
    return x if final is None else linear(x, *final)


def _streams(attention: CrossAttention, mlp: FeedForward | None) -> bool:
    """Whether the modules are as they came, so that their parameters stand for them."""
    fn, norm = attention.fn, attention.norm
    if not all(is_stock(module, type(module)) for module in (attention, mlp) if module is not None):
        return False
    plain = is_plain(fn.to_q) and is_plain(fn.to_out) and (mlp is None or mlp.weights() is not None)
    return plain and type(norm) in (nn.LayerNorm, nn.Identity) and is_stock(norm, type(norm))


def _stream(
    attention: CrossAttention,
    queries: GridQueries,
    latents: Tensor,
    mlp: FeedForward | None,
    final: OutputProjection | None,
    query_residual: bool,
) -> Tensor:
    fn, norm, heads = attention.fn, attention.norm, attention.heads
    context = latents if attention.norm_context is None else attention.norm_context(latents)
    widths = (heads * attention.head_dim, heads * attention.head_dim_v)
    keys, values = project(fn.to_kv, context).split(widths, dim=-1)
    layer_norm = (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else (None, None, None)
    parameters = None if mlp is None else mlp.weights()
    weights = None
    if mlp is not None and parameters is not None:
        weights = FeedForwardWeights._make((*parameters, mlp.fn.activation, mlp.norm.eps))
    return decode_streamed(
        queries,
        keys,
        values,
        QueryProjection(fn.to_q.weight, fn.to_q.bias, *layer_norm),
        OutputProjection(fn.to_out.weight, fn.to_out.bias),
        heads=heads,
        dropout_p=attention.dropout if attention.training else 0.0,
        query_residual=query_residual,
        mlp=weights,
        final=final,
    )
