"""Builders of queries: written out, a few of them, on a grid; and decoders that do not build those on a grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_parity, randomise
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.modules import queries as q

GRID = pk.FourierGrid((3, 4), num_bands=2, max_freq=4.0)
BATCH, DIM = 2, 3
BUILDERS: dict[str, q.Queries] = {
    "learned": q.LearnedQueries(12, 5),
    "fourier": q.FourierQueries(GRID),
    "inputs": q.InputQueries(DIM),
    "positions": q.PositionQueries(pk.FourierEncoding(2, 3, 4.0)),
    "inputs_fourier": q.ConcatenatedQueries(q.InputQueries(DIM), q.FourierQueries(GRID)),
    "fourier_task": q.ConcatenatedQueries(q.FourierQueries(GRID), q.TaskQueries(4, 6)),
    "everything": q.ConcatenatedQueries(
        q.InputQueries(DIM), q.FourierQueries(GRID), q.TaskQueries(4, 6), q.LearnedQueries(1, 2)
    ),
    "learned_task": q.ConcatenatedQueries(q.LearnedQueries(12, 5), q.TaskQueries(4, 6)),
}
ON_GRID = ["fourier", "inputs_fourier", "fourier_task", "everything"]


def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randn(BATCH, *GRID.shape, DIM, generator=generator, dtype=torch.float64),
        "positions": torch.rand(12, 2, generator=generator, dtype=torch.float64),
        "tasks": torch.tensor(2),
    }


@pytest.mark.parametrize("name", BUILDERS)
def test_a_few_are_those_of_all(name: str) -> None:
    builder = BUILDERS[name].double()
    whole = builder(BATCH, **given())
    assert whole.shape == (BATCH, 12, builder.num_channels)
    assert whole.dtype == torch.float64
    chosen = torch.tensor([11, 0, 5, 5])
    torch.testing.assert_close(builder(BATCH, chosen, **given()), whole[:, chosen])
    assert builder(BATCH, chosen[:0], **given()).shape == (BATCH, 0, builder.num_channels)


@pytest.mark.parametrize("name", BUILDERS)
def test_on_a_grid(name: str) -> None:
    """What the decoder does not build is what is written out."""
    builder = BUILDERS[name].double()
    on_grid = builder.on_grid(**given())
    assert (on_grid is not None) == (name in ON_GRID)
    if on_grid is not None:
        assert on_grid.num_channels == builder.num_channels
        written_out = on_grid.encode(torch.device("cpu"), torch.float64).expand(BATCH, -1, -1)
        torch.testing.assert_close(written_out, builder(BATCH, **given()))


def test_not_on_a_grid() -> None:
    """Another order, a task per input, and learned queries that differ have to be written out."""
    grid, inputs, tasks = q.FourierQueries(GRID), q.InputQueries(DIM), q.TaskQueries(4, 6)
    assert q.ConcatenatedQueries(grid, inputs).on_grid(**given()) is None
    assert q.ConcatenatedQueries(grid, q.LearnedQueries(12, 2)).on_grid() is None
    assert q.ConcatenatedQueries(grid, grid).on_grid() is None
    each = {"tasks": torch.tensor([1, 3])}
    model = q.ConcatenatedQueries(grid, tasks)
    assert model.on_grid(**each) is None
    assert model(BATCH, **each).shape == (BATCH, 12, GRID.num_channels + 6)
    assert not torch.equal(model(BATCH, **each)[0], model(BATCH, **each)[1])


def test_learned_queries_train() -> None:
    builder = q.ConcatenatedQueries(q.LearnedQueries(3, 2), q.TaskQueries(4, 6))
    builder(BATCH, tasks=torch.tensor([1, 1])).square().sum().backward()
    learned, tasks = builder.parts
    assert learned.embeddings.grad.abs().min() > 0
    assert (tasks.embeddings.grad.abs().sum(1) > 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("options", [{"decoder_ff": True, "logits_dim": 7}, {"cross_heads": 2}], ids=["mlp", "heads"])
@pytest.mark.parametrize("name", ON_GRID)
def test_decoder_streams_queries_on_a_grid(name: str, options: dict[str, Any]) -> None:
    """PerceiverIO gives for queries that are not built what it gives for them written out; gradients too."""
    builder = BUILDERS[name].double()
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"dim": 5, "queries_dim": builder.num_channels, "num_latents": 4, "latent_dim": 8}
    model = pk.PerceiverIO(depth=1, cross_dim_head=6, **arguments, **options)
    randomise(model)
    data = torch.randn(BATCH, 9, 5, dtype=torch.float64)
    assert_parity(
        model,
        model,
        (data,),
        torch.float64,
        call_ours=lambda data: model(data, queries=builder.on_grid(**given())),
        call_theirs=lambda data: model(data, queries=builder(BATCH, **given())),
    )


def test_decoder_gradients_of_inputs_and_tasks() -> None:
    builder = BUILDERS["everything"].double()
    model = pk.PerceiverIO(depth=0, dim=5, queries_dim=builder.num_channels, num_latents=4, latent_dim=8).double()
    data = torch.randn(BATCH, 9, 5, dtype=torch.float64)
    results = []
    for build in (builder.on_grid, lambda **inputs: builder(BATCH, **inputs)):
        inputs = given()
        inputs["inputs"].requires_grad_()
        out = model(data, queries=build(**inputs))
        results.append((out, *torch.autograd.grad(out.square().sum(), (inputs["inputs"], *builder.parameters()))))
    torch.testing.assert_close(*results)


def test_altered_decoders_run_their_modules() -> None:
    builder = BUILDERS["inputs_fourier"].double()
    model = pk.PerceiverIO(
        depth=0, dim=5, queries_dim=builder.num_channels, num_latents=4, latent_dim=8, decoder_ff=True
    )
    model.double()
    data = torch.randn(BATCH, 9, 5, dtype=torch.float64)
    expected = model(data, queries=builder.on_grid(**given()))
    called: list[str] = []
    for name in ("decoder_cross_attn.fn.to_q", "decoder_ff.fn.net.0"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(model(data, queries=builder.on_grid(**given())), expected)
    assert called == ["decoder_cross_attn.fn.to_q", "decoder_ff.fn.net.0"]


@pytest.mark.parametrize("name", ["decoder_cross_attn", "decoder_ff"])
def test_hooks_on_decoders_change_what_they_give(name: str) -> None:
    builder = BUILDERS["fourier"].double()
    model = pk.PerceiverIO(
        depth=0, dim=5, queries_dim=builder.num_channels, num_latents=4, latent_dim=8, decoder_ff=True
    ).double()
    model.get_submodule(name).register_forward_hook(lambda _, __, out: 0.5 * out)
    data = torch.randn(BATCH, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(model(data, queries=builder.on_grid()), model(data, queries=builder(BATCH)))


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing": ("inputs", {}, r"inputs is NoneType, must be given as a tensor \(batch, \.\.\., channels\)"),
    "inputs_shape": ("inputs", {"inputs": torch.zeros(2, 12, 4)}, r"inputs has shape \(2, 12, 4\), must be"),
    "inputs_dtype": ("inputs", {"inputs": torch.zeros(2, 12, 3).int()}, r"inputs has dtype torch\.int32, must be"),
    "inputs_batch": ("inputs", {"inputs": torch.zeros(3, 12, 3)}, "inputs has batch 3, must have 1 or 2"),
    "positions": ("positions", {"positions": torch.zeros(3, 12, 2)}, r"positions has shape \(3, 12, 2\), must be "),
    "tasks_dtype": ("learned_task", {"tasks": torch.tensor(1.0)}, r"tasks has dtype torch\.float32, must be"),
    "tasks_shape": ("learned_task", {"tasks": torch.tensor([1, 2, 3])}, r"tasks has shape \(3,\), must be \(\)"),
    "tasks_range": ("learned_task", {"tasks": torch.tensor([1, 99])}, "tasks has entries from 1 to 99, must be from 0"),
    "indices_dtype": ("learned", {"indices": torch.tensor([1.0])}, r"indices is \(1,\) of torch\.float32, must be"),
    "indices_axes": ("fourier", {"indices": torch.tensor([[1]])}, r"indices is \(1, 1\) of torch\.int64, must be"),
    "indices_high": ("fourier", {"indices": torch.tensor([12])}, "indices has entries from 12 to 12,"),
    "indices_low": ("learned", {"indices": torch.tensor([-1, 3])}, "indices has entries from -1 to 3, must be from 0"),
    "lengths": ("inputs_fourier", {"inputs": torch.zeros(2, 5, 3)}, r"parts\[1\] has 12 queries, must have 1 or 5"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](BATCH, **arguments)


def test_bad_input_on_a_grid() -> None:
    with pytest.raises(ValueError, match=r"inputs has shape \(2, 5, 3\), must have a query per position of"):
        BUILDERS["inputs_fourier"].on_grid(inputs=torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="parts has 1 entries, must have at least 2"):
        q.ConcatenatedQueries(q.LearnedQueries(1, 2))
    model = pk.PerceiverIO(depth=0, dim=5, queries_dim=9)
    with pytest.raises(ValueError, match="queries has 10 channels and batch 1, but must have 9, and 1 or 2"):
        model(torch.zeros(2, 3, 5), queries=q.FourierQueries(GRID).on_grid())
