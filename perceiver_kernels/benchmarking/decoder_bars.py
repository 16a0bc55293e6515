"""The bars of the decoder: optical flow's, from every pixel to 2,048 latents, and the parts that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.bars import Bar, Recorder, percent
from perceiver_kernels.benchmarking.measure import Call, error, peak_extra_memory
from perceiver_kernels.modules.decoder import (
    FeedForwardWeights,
    GridQueries,
    OutputProjection,
    QueryProjection,
    decode_streamed,
    fold_queries,
)

GRID = (368, 496)
LATENTS, LATENT_CHANNELS = 2048, 512
DATA_CHANNELS = 64
# The experts choose the fastest way among these many queries at a time, on so many rows of the grid.
EXPERT_CHUNKS = (4096, 16384)
TRIAL_ROWS = 33


class FlowDecoder:
    """The released optical flow model's decoder with random weights, over some rows of its grid.

    Queries [data ; Fourier features] of 64 + 258 channels, one head of 512, MLP of 322, two channels out.
    """

    def __init__(self, rows: int = GRID[0], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(dtype)

        def layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
            return normal(outputs, inputs, scale=inputs**-0.5), normal(outputs, scale=0.1)

        grid = pk.FourierGrid((rows, GRID[1]), num_bands=64, max_freq=(368, 496), order="grouped")
        data = normal(1, rows * GRID[1], DATA_CHANNELS)
        self.queries = GridQueries(grid, data)
        width = self.queries.num_channels
        self.keys, self.values = (normal(1, LATENTS, LATENT_CHANNELS) for _ in range(2))
        norm = 1 + normal(width, scale=0.1), normal(width, scale=0.1)
        self.query = QueryProjection(*layer(width, LATENT_CHANNELS), *norm, 1e-5)
        self.output = OutputProjection(*layer(LATENT_CHANNELS, width))
        self.mlp = FeedForwardWeights(*norm, *layer(width, width), *layer(width, width))
        self.final = OutputProjection(*layer(width, 2))

    def ours(self) -> Tensor:
        """By this library."""
        with torch.no_grad():
            return decode_streamed(
                self.queries, self.keys, self.values, self.query, self.output, mlp=self.mlp, final=self.final
            )

    def written(self) -> Tensor:
        """The queries that the experts are given."""
        return self.queries.encode(self.keys.device, self.keys.dtype)[0]

    def expert_block(self, queries: Tensor) -> Tensor:
        """The same of some queries in plain PyTorch."""
        q = F.linear(self._normed(queries), self.query.weight, self.query.bias)
        attended = F.scaled_dot_product_attention(q[None, None], self.keys[None], self.values[None])[0, 0]
        return self._after(F.linear(attended, *self.output))

    def folding_expert_block(self, queries: Tensor) -> Tensor:
        """The same with the weights folded into keys and values, of 323 channels each."""
        weight, bias = self.query[:2]
        assert bias is not None
        normed = F.pad(self._normed(queries), (0, 1), value=1.0)
        keys = torch.cat((self.keys[0] @ weight, (self.keys[0] @ bias)[:, None]), 1)
        values = F.pad(F.linear(self.values[0], *self.output), (0, 1))
        attended = F.scaled_dot_product_attention(
            normed[None, None], keys[None, None], values[None, None], scale=LATENT_CHANNELS**-0.5
        )
        return self._after(attended[0, 0, :, :-1])

    def _normed(self, queries: Tensor) -> Tensor:
        query = self.query
        return F.layer_norm(queries, queries.shape[-1:], query.norm_weight, query.norm_bias, query.eps or 0.0)

    def _after(self, y: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(F.layer_norm(y, y.shape[-1:], *self.mlp[:2]), *self.mlp[2:4]))
        return F.linear(y + F.linear(hidden, *self.mlp[4:6]), *self.final)


def expert_call(block: Callable[[Tensor], Tensor], queries: Tensor, chunk: int) -> Call:
    """An expert over all queries, so many at a time."""

    def call() -> Tensor:
        with torch.no_grad():
            out = queries.new_empty(queries.shape[0], 2)
            for start in range(0, queries.shape[0], chunk):
                out[start : start + chunk] = block(queries[start : start + chunk])
            return out

    return call


def flow_decoder(recorder: Recorder) -> Iterator[Bar]:
    """Optical flow's decoder, 182,528 queries, against plain PyTorch."""
    trial = FlowDecoder(TRIAL_ROWS)
    blocks = {
        "expert": trial.expert_block,
        "expert-compiled": torch.compile(trial.expert_block),
        "folding expert": trial.folding_expert_block,
    }
    queries = trial.written()
    calls: dict[str, Call] = {"ours": trial.ours}
    for name, block in blocks.items():
        for chunk in (*EXPERT_CHUNKS, queries.shape[0]):
            calls[f"{name}, {chunk} at a time"] = expert_call(block, queries, chunk)
    times = recorder.interleave(calls)
    for names, limit in ((("expert", "expert-compiled"), 5.0), (("folding expert",), 1.5)):
        ratios = [(times[call].ratio(times["ours"]), call) for call in calls if call.split(",")[0] in names]
        value, name = min(ratios)
        note = f"the fastest is {name}, {tables.seconds(times[name].median)} for {queries.shape[0]} queries"
        yield Bar(f"flow decoder, forward: {names[0]} / ours", value, limit, at_least=True, note=note)

    few, exact = FlowDecoder(2), FlowDecoder(2, torch.float64)
    with torch.no_grad():
        truth = exact.expert_block(exact.written())
        theirs = error(few.expert_block(few.written()), truth)
    what = "flow decoder, forward: our error / expert's"
    yield Bar(what, error(few.ours()[0], truth).rms / theirs.rms, 1.5, at_least=False)

    whole = FlowDecoder()
    memory = peak_extra_memory(whole.ours)
    times = recorder.interleave({"trial": trial.ours, "whole": whole.ours})
    per_query = times["whole"].ratio(times["trial"]) * queries.shape[0] / whole.queries.grid.num_positions
    note = f"{tables.seconds(times['whole'].median)} for {whole.queries.grid.num_positions} queries"
    yield Bar("flow decoder, all queries: peak extra memory", memory, 200e6, at_least=False, show=tables.size)
    what = f"flow decoder, all queries: time per query / of {queries.shape[0]}"
    yield Bar(what, per_query, 1.1, at_least=False, note=note)


def flow_decoder_parts(recorder: Recorder) -> Iterator[Bar]:
    """Attention of optical flow's decoder and the whole of it, against the best product of the run."""
    decoder = FlowDecoder(TRIAL_ROWS)
    width, count = decoder.queries.num_channels, decoder.queries.grid.num_positions
    values = F.linear(decoder.values, *decoder.output)[:, None]
    folded = fold_queries(decoder.queries, decoder.keys[:, None], decoder.query, LATENT_CHANNELS**-0.5)
    square = torch.randn(1536, 1536)
    calls: dict[str, Call] = {
        "attention": lambda: folded.attend(values),
        "whole": decoder.ours,
        "square": lambda: torch.mm(square, square),
    }
    # The MLP's second layer and the last one are folded into one of two channels.
    attention, mlp = 2 * count * LATENTS * (DATA_CHANNELS + width), 2 * count * width**2
    work = {"attention": attention, "whole": attention + mlp, "square": 2 * 1536**3}
    with torch.no_grad():
        times = recorder.interleave(calls)
    rates = {name: work[name] / time.median for name, time in times.items()}
    best = max(rates.values())
    for name, limit in (("attention", 0.9), ("whole", 0.8)):
        note = f"{tables.rate(rates[name])}FLOP/s of {tables.rate(best)}FLOP/s, {tables.seconds(times[name].median)}"
        what = f"flow decoder, {name}: of the best product"
        yield Bar(what, rates[name] / best, limit, at_least=True, show=percent, note=note)


GROUPS = (flow_decoder_parts, flow_decoder)
