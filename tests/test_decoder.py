"""Decoders as functions of tensors: queries on a grid against queries written out, a stream of blocks against one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.benchmarking.decoder_bars import FlowDecoder
from perceiver_kernels.modules.decoder import (
    FeedForwardWeights,
    GridQueries,
    OutputProjection,
    QueryProjection,
    decode_streamed,
    grid_parts,
    positions,
    separable_query_cross_attention,
)
from perceiver_kernels.ops.fourier_encode import encode_grid

F64 = torch.float64


def grid_of(*shape: int, **options: Any) -> pk.FourierGrid:
    return pk.FourierGrid(shape=shape, num_bands=2, max_freq=7.0, **options)


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=F64)


def decoder(
    grid: pk.FourierGrid,
    *,
    channels: int = 0,
    constant: int = 0,
    query_batch: int = 1,
    batch: int = 2,
    heads: int = 1,
    out: int = 5,
    norm: bool = True,
    bias: bool = True,
) -> dict[str, Any]:
    """Arguments of a decoder with 6 channels per head of keys and 8 of values."""
    data = rand(query_batch, *grid.shape, channels) if channels else None
    queries = GridQueries(grid, data, rand(constant) if constant else None)
    width = queries.num_channels
    gain = (1 + 0.3 * rand(width, seed=1), rand(width, seed=2), 1e-5) if norm else (None, None, None)
    return {
        "queries": queries,
        "keys": rand(batch, 7, heads * 6),
        "values": rand(batch, 7, heads * 8, seed=1),
        "query": QueryProjection(rand(heads * 6, width) / width**0.5, rand(heads * 6) if bias else None, *gain),
        "output": OutputProjection(rand(out, heads * 8) / 3, rand(out) if bias else None) if out else None,
        "heads": heads,
    }


def dense(
    queries: GridQueries | Tensor,
    keys: Tensor,
    values: Tensor,
    query: QueryProjection,
    output: OutputProjection | None,
    heads: int,
    mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The same with every query written out, in torch's operators."""
    z = written(queries)
    weight, bias, norm_weight, norm_bias, eps = query
    normed = z if eps is None else F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, eps)
    split = lambda x: x.unflatten(2, (heads, -1)).transpose(1, 2)  # noqa: E731
    scores = split(F.linear(normed, weight, bias)) @ split(keys).transpose(2, 3) / (keys.shape[2] // heads) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    out = (scores.softmax(-1).nan_to_num(0.0) @ split(values)).transpose(1, 2).flatten(2)
    return out if output is None else F.linear(out, *output)


def written(queries: GridQueries | Tensor) -> Tensor:
    if isinstance(queries, Tensor):
        return queries
    tables, sections = queries.grid.tables(dtype=F64), queries.grid.bands.sections
    data = None if queries.data is None else queries.data.reshape(queries.batch, *queries.grid.shape, -1)
    z = encode_grid(tables, sections, data=data, batch=queries.batch, out=None).flatten(1, -2)
    return z if queries.constant is None else torch.cat((z, queries.constant.expand(*z.shape[:2], -1)), 2)


def with_leaves(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments, and all tensors in them, that now require gradients."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1]
        if isinstance(value, GridQueries):
            return replace(value, data=leaf(value.data), constant=leaf(value.constant))
        return type(value)(*map(leaf, value)) if isinstance(value, tuple) else value

    return {name: leaf(value) for name, value in arguments.items()}, leaves


def assert_same_with_gradients(function: Any, expected: Any, arguments: dict[str, Any]) -> None:
    results = []
    for f in (function, expected):
        inputs, leaves = with_leaves(arguments)
        out = f(**inputs)
        results.append((out, *torch.autograd.grad(out, leaves, rand(*out.shape))))
    for actual, other in zip(*results, strict=True):
        torch.testing.assert_close(actual, other)


CASES = {
    "data": decoder(grid_of(3, 4), channels=3, query_batch=2),
    "shared data, constant, two heads": decoder(grid_of(3, 4), channels=2, constant=3, heads=2),
    "no data, constant, projected after": decoder(grid_of(2, 3, 2, order="grouped"), constant=2, out=40),
    "one axis, no norm, no bias": decoder(grid_of(5), norm=False, bias=False, batch=1, channels=2, query_batch=3),
    "no output": decoder(grid_of(2, 3), out=0, heads=2),
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_equals_queries_written_out(arguments: dict[str, Any]) -> None:
    assert_same_with_gradients(separable_query_cross_attention, dense, arguments)


def test_a_mask_over_keys() -> None:
    mask = torch.tensor([[True, False, True, True, False, True, False], [False] * 7])
    arguments = {**CASES["data"], "mask": mask}
    assert_same_with_gradients(separable_query_cross_attention, dense, arguments)
    out = separable_query_cross_attention(**arguments)
    torch.testing.assert_close(out[1], arguments["output"].bias.expand_as(out[1]))


def mlp(width: int, hidden: int) -> FeedForwardWeights:
    weights = rand(hidden, width) / width**0.5, rand(hidden), rand(width, hidden) / hidden**0.5, rand(width, seed=4)
    return FeedForwardWeights(1 + 0.2 * rand(width), rand(width, seed=3), *weights)


def whole_decoder(grid: pk.FourierGrid, **options: Any) -> dict[str, Any]:
    width = GridQueries(grid, rand(1, *grid.shape, options.get("channels", 0))).num_channels
    arguments = decoder(grid, out=width, **options)
    return {**arguments, "query_residual": True, "mlp": mlp(width, 9), "final": OutputProjection(rand(2, width))}


def dense_decoder(mlp: FeedForwardWeights, final: OutputProjection, query_residual: bool, **arguments: Any) -> Tensor:
    y = dense(**arguments) + written(arguments["queries"])
    hidden = F.gelu(F.linear(F.layer_norm(y, y.shape[-1:], *mlp[:2]), *mlp[2:4]))
    return F.linear(F.linear(hidden, *mlp[4:6]) + y, *final)


# Blocks of several rows, of one, and of parts of one.
@pytest.mark.parametrize("block_bytes", [1 << 20, 2 * 13 * 8 * 10, 2 * 13 * 8 * 5, 1])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_stream_of_blocks_is_the_decoder(block_bytes: int, recompute: bool) -> None:
    arguments = {**whole_decoder(grid_of(5, 5), channels=3), "block_bytes": block_bytes, "recompute": recompute}
    expected = {name: value for name, value in arguments.items() if name not in ("block_bytes", "recompute")}
    inputs, leaves = with_leaves(arguments)
    with torch.no_grad():
        torch.testing.assert_close(decode_streamed(**inputs), dense_decoder(**expected))
    inputs_expected, leaves_expected = with_leaves(expected)
    out, truth = decode_streamed(**inputs), dense_decoder(**inputs_expected)
    upstream = rand(*out.shape)
    gradients = (torch.autograd.grad(o, ls, upstream) for o, ls in ((out, leaves), (truth, leaves_expected)))
    for actual, other in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, other)


@pytest.mark.parametrize("features", [2, 14])
@pytest.mark.parametrize("bias", [False, True])
def test_fewer_values_than_projected_channels(bias: bool, features: int) -> None:
    """Without gradients, all after the attention is computed from the values' channels."""
    arguments = decoder(grid_of(5, 5), channels=3, bias=bias)
    weights, final = mlp(13, 21), OutputProjection(rand(features, 13), rand(features))
    arguments |= {"output": OutputProjection(rand(13, 8), rand(13) + 5 if bias else None), "mlp": weights}
    y = dense(**arguments)
    hidden = F.gelu(F.linear(F.layer_norm(y, (13,), *weights[:2]), *weights[2:4]))
    expected = F.linear(F.linear(hidden, *weights[4:6]) + y, *final)
    torch.testing.assert_close(decode_streamed(**arguments, final=final), expected)
    torch.testing.assert_close(decode_streamed(**arguments, final=final, block_bytes=1), expected)


@pytest.mark.parametrize("order", ["per_axis", "grouped"])
def test_chosen_queries_decode_as_in_the_whole(order: str) -> None:
    arguments = whole_decoder(grid_of(4, 5, order=order), channels=3, query_batch=2)
    index = torch.tensor([0, 7, 19, 3, 7])
    whole = decode_streamed(**arguments)
    chosen = arguments["queries"].at(index, F64)
    for block_bytes in (1 << 20, 1):
        part = decode_streamed(**{**arguments, "queries": chosen, "block_bytes": block_bytes})
        torch.testing.assert_close(part, whole[:, index])


def test_queries_that_do_not_fold_are_written_out() -> None:
    for grid, channels in ((grid_of(2, 3), 129), (grid_of(4096), 0)):
        arguments = decoder(grid, channels=channels)
        torch.testing.assert_close(separable_query_cross_attention(**arguments), dense(**arguments))


def test_recomputed_blocks_drop_the_same_weights() -> None:
    arguments = {**whole_decoder(grid_of(4, 4)), "dropout_p": 0.4, "block_bytes": 2 * 10 * 8 * 4}
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        inputs, leaves = with_leaves(arguments)
        out = decode_streamed(**inputs, recompute=recompute)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for kept, computed_again in zip(*results, strict=True):
        assert torch.equal(kept, computed_again)


def test_autocast_rounds_values_and_products_only() -> None:
    arguments = whole_decoder(grid_of(4, 5), channels=3)
    expected = decode_streamed(**arguments)
    single, _ = with_leaves(arguments)
    to_float = lambda value: value.float() if isinstance(value, Tensor) else value  # noqa: E731
    queries = single.pop("queries")
    single = {n: type(v)(*map(to_float, v)) if isinstance(v, tuple) else to_float(v) for n, v in single.items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = decode_streamed(GridQueries(queries.grid, queries.data.float()), **single)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().max() < 0.05 * expected.abs().max()


def test_compiles_whole() -> None:
    arguments, leaves = with_leaves(whole_decoder(grid_of(4, 5), channels=2))
    block_bytes = 2 * 12 * 8 * 10

    def f() -> Tensor:
        return decode_streamed(**arguments, block_bytes=block_bytes).square().sum()

    expected = f()
    actual = torch.compile(f, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(actual, expected)
    for gradients in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(*gradients)


def test_the_bars_compare_the_same_decoder() -> None:
    decoder = FlowDecoder(1, F64)
    queries, expected = decoder.written()[::31], decoder.ours()[0, ::31]
    for block in (decoder.expert_block, decoder.folding_expert_block):
        torch.testing.assert_close(block(queries), expected)


@pytest.mark.parametrize("most", [1, 2, 5, 6, 11, 24, 100])
@pytest.mark.parametrize("grid", [(7,), (2, 3, 4), (5, 1), (4, 0), (0,)])
def test_parts_cover_a_grid_in_order(grid: tuple[int, ...], most: int) -> None:
    ranges = [positions(part, grid) for part in grid_parts(grid, most)]
    size = torch.Size(grid).numel()
    assert [i for along in ranges for i in range(along.start, along.stop)] == list(range(size))
    assert all(along.stop - along.start <= most for along in ranges)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": rand(2, 7)}, r"keys has shape \(2, 7\), must be \(batch, latents, a multiple of 1 heads\)"),
        ({"values": rand(2, 6, 8)}, r"values has batch and latents \(2, 6\), must have \(2, 7\) as keys has"),
        ({"values": rand(2, 7, 8).float()}, "values is torch.float32 on cpu, must be torch.float64 on cpu as keys is"),
        ({"mask": torch.ones(2, 9).bool()}, r"mask has shape \(2, 9\), must be \(2, 7\): batch and keys"),
        ({"mask": torch.ones(1, 7).bool()}, r"mask has shape \(1, 7\), must be \(2, 7\): batch and keys"),
        ({"mask": rand(2, 7)}, "mask has dtype torch.float64, must be torch.bool"),
        ({"queries": rand(3, 4, 13)}, "queries has batch 3, must be 1 or 2 as keys has"),
        ({"queries": rand(4, 13)}, "queries has 2 dimensions, must have 3"),
        ({"query": QueryProjection(rand(6, 12))}, r"query.weight has shape \(6, 12\), must be \(6, 13\)"),
        ({"output": OutputProjection(rand(13, 9))}, r"output.weight has shape \(13, 9\), must be \(out_features, 8\)"),
        ({"output": OutputProjection(rand(12, 8))}, "query_residual is True, must be False where .* 12 channels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_streamed(**{**whole_decoder(grid_of(4, 5), channels=3), **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": rand(1, 21, 3)}, r"data has shape \(1, 21, 3\), must be \(batch, 4, 5, channels\) or \(batch, 20, "),
        ({"data": torch.zeros(1, 20, 3, dtype=torch.int64)}, "data has dtype torch.int64, must be floating-point"),
        ({"constant": rand(1, 3)}, r"constant has shape \(1, 3\), must be \(channels,\)"),
    ],
)
def test_bad_queries(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GridQueries(grid_of(4, 5), **arguments)


def test_an_empty_batch() -> None:
    arguments = whole_decoder(grid_of(4, 5), channels=3, query_batch=2)
    queries = arguments["queries"]
    empty = {"queries": GridQueries(queries.grid, queries.data[:0])}
    empty |= {name: arguments[name][:0] for name in ("keys", "values")}
    assert decode_streamed(**{**arguments, **empty}).shape == (0, *decode_streamed(**arguments).shape[1:])


def test_bad_index() -> None:
    for index in (-1, 20):
        with pytest.raises(ValueError, match=f"index has entries from {index} to {index}, must be from 0 to 19"):
            GridQueries(grid_of(4, 5)).at(torch.tensor([index]))
    with pytest.raises(ValueError, match=r"index is \(2,\) of torch.float32, must be \(points,\) of torch.int64"):
        GridQueries(grid_of(4, 5)).at(torch.zeros(2))
