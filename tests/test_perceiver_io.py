"""PerceiverIO and PerceiverLM against those they replace: parameters, results, gradients, checkpoints; and errors."""

import copy
import importlib
import inspect
import pickle
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import assert_parity, force_path, randomise
from torch import Tensor, nn

import perceiver_kernels as pk

SMALL: dict[str, Any] = {
    "depth": 2,
    "dim": 9,
    "queries_dim": 10,
    "num_latents": 6,
    "latent_dim": 12,
    "cross_dim_head": 5,
    "latent_heads": 2,
    "latent_dim_head": 4,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "logits": {"logits_dim": 7, "decoder_ff": True},
    "heads": {"cross_heads": 3, "logits_dim": 7},
    "tied": {"depth": 3, "weight_tie_layers": True, "attn_residual": True, "attn_residual_rank": 4},
    "attn_residual": {"attn_residual": True, "attn_residual_rank": 4, "decoder_ff": True},
    "inverted": {"inverted_cross_attn": True},
    "seq_dropout": {"seq_dropout_prob": 0.4, "logits_dim": 7},
    "no_layers": {"depth": 0},
}
LM: dict[str, Any] = {"dim": 8, "num_tokens": 20, "max_seq_len": 12, "depth": 1, "num_latents": 4, "latent_dim": 8}
BATCH, TOKENS, QUERIES = 2, 11, 5

all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def library() -> ModuleType:
    pytest.importorskip("perceiver_pytorch")
    return importlib.import_module("perceiver_pytorch.perceiver_io")


def make(**options: Any) -> pk.PerceiverIO:
    torch.manual_seed(0)
    return pk.PerceiverIO(**SMALL | options)


def make_both(**options: Any) -> tuple[pk.PerceiverIO, nn.Module]:
    """Our PerceiverIO and perceiver-pytorch's, with the same, randomised parameters."""
    ours, theirs = make(**options), library().PerceiverIO(**SMALL | options)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def make_inputs(*queries_shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (BATCH, TOKENS, SMALL["dim"]), (*(queries_shape or (QUERIES,)), SMALL["queries_dim"])
    data, queries = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return data, queries


def make_mask() -> Tensor:
    """Hide about half the tokens, and all of the first input's."""
    mask = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[:1] = False
    return mask


def signature(function: Any) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_same_interface() -> None:
    """Names, order, kinds and defaults; what is ours alone comes last and by keyword."""
    theirs = library()
    constructor = signature(pk.PerceiverIO.__init__)
    assert [name for name, *_ in constructor[-2:]] == ["mlp_recompute", "activation_checkpointing"]
    assert constructor[:-2] == signature(theirs.PerceiverIO.__init__)
    forward = signature(pk.PerceiverIO.forward)
    assert forward[-1] == ("grid", inspect.Parameter.KEYWORD_ONLY, None)
    assert forward[:-1] == signature(theirs.PerceiverIO.forward)
    assert signature(pk.PerceiverLM.forward) == signature(theirs.PerceiverLM.forward)
    assert signature(pk.PerceiverLM.__init__)[:-1] == signature(theirs.PerceiverLM.__init__)[:-1]


@all_options
def test_same_parameters_from_the_same_seed(options: dict[str, Any]) -> None:
    """Keys, their order, the order an optimizer sees, and values."""
    ours = make(**options)
    torch.manual_seed(0)
    assert_same_parameters(ours, library().PerceiverIO(**SMALL | options))


def test_language_model_has_the_same_parameters_from_the_same_seed() -> None:
    torch.manual_seed(0)
    ours = pk.PerceiverLM(**LM)
    torch.manual_seed(0)
    assert_same_parameters(ours, library().PerceiverLM(**LM))


def assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_load_both_ways(name: str) -> None:
    ours, theirs = make_both(**OPTIONS[name])
    fresh = make(**OPTIONS[name])
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@all_options
def test_matches_peer(options: dict[str, Any], masked: bool, dtype: torch.dtype) -> None:
    """Output and gradients of data, queries and parameters in training mode; equal seeds drop equal tokens."""
    ours, theirs = make_both(**options)
    mask = make_mask() if masked else None

    def call(model: nn.Module, data: Tensor, queries: Tensor) -> Tensor:
        # Tokens are chosen by float32 ranks whatever the dtype of the data.
        torch.manual_seed(3)
        return model(data, mask=mask, queries=queries)

    assert_parity(
        ours,
        theirs,
        make_inputs(),
        dtype,
        call_ours=lambda *inputs: call(ours, *inputs),
        call_theirs=lambda *inputs: call(theirs, *inputs),
    )


@pytest.mark.parametrize("path", ["absorbed", "projected"])
def test_matches_peer_on_every_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_path(monkeypatch, path)
    ours, theirs = make_both(**OPTIONS["logits"])
    mask = make_mask()
    calls = (lambda data, queries, model=model: model(data, mask, queries) for model in (ours, theirs))
    call_ours, call_theirs = calls
    assert_parity(
        ours, theirs, make_inputs(BATCH, QUERIES), torch.float32, call_ours=call_ours, call_theirs=call_theirs
    )


@pytest.mark.parametrize("given", ["nothing", "tensor", "list"])
@pytest.mark.parametrize("name", ["default", "attn_residual"])
@pytest.mark.parametrize("queried", [False, True])
def test_hidden_states(name: str, given: str, queried: bool) -> None:
    """return_hiddens and block_outputs give the same lists, and leave the caller's alone."""
    ours, theirs = (model.double() for model in make_both(**OPTIONS[name]))
    data, queries = make_inputs()
    earlier = torch.randn(3, BATCH, SMALL["num_latents"], SMALL["latent_dim"], dtype=torch.float64)
    arguments = {
        "queries": queries if queried else None,
        "block_outputs": {"nothing": None, "tensor": earlier[0], "list": list(earlier)}[given],
        "return_hiddens": True,
    }
    torch.testing.assert_close(ours(data, **arguments), theirs(data, **arguments))


@pytest.mark.parametrize("shape", [(QUERIES,), (1, QUERIES), (BATCH, QUERIES), (0,)])
def test_queries_with_and_without_batch(shape: tuple[int, ...]) -> None:
    ours, theirs = (model.double() for model in make_both(**OPTIONS["logits"]))
    data, queries = make_inputs(*shape)
    expected = theirs(data, queries=queries.expand(BATCH, -1, -1))
    torch.testing.assert_close(ours(data, queries=queries), expected)


def test_latents_without_queries() -> None:
    ours, theirs = (model.double() for model in make_both())
    data, _ = make_inputs()
    torch.testing.assert_close(ours(data), theirs(data))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("path", ["separable", "absorbed", "projected"])
def test_data_on_a_grid(path: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw data and a grid give what the data with the features written out gives."""
    force_path(monkeypatch, path)
    grid = pk.FourierGrid((3, 4), num_bands=2, max_freq=4.0)
    model = make(dim=3 + grid.num_channels, decoder_ff=True).double()
    data = torch.randn(BATCH, 3, 4, 3, dtype=torch.float64)
    mask = torch.rand(BATCH, 3, 4) > 0.5 if masked else None
    tokens = torch.cat((data.flatten(1, 2), grid.encode(dtype=torch.float64).expand(BATCH, -1, -1)), dim=-1)
    _, queries = make_inputs()
    expected = model(tokens, None if mask is None else mask.flatten(1), queries)
    torch.testing.assert_close(model(data, mask, queries, grid=grid), expected)
    torch.testing.assert_close(model(data.flatten(1, 2), mask, queries, grid=grid), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_dropped_on_a_grid(masked: bool) -> None:
    """The same seed drops the same tokens of raw data and of tokens with the features written out."""
    grid = pk.FourierGrid((3, 4), num_bands=2, max_freq=4.0)
    model = make(dim=3 + grid.num_channels, seq_dropout_prob=0.5).double().train()
    data = torch.randn(BATCH, 3, 4, 3, dtype=torch.float64)
    mask = torch.rand(BATCH, 12) > 0.3 if masked else None
    tokens = torch.cat((data.flatten(1, 2), grid.encode(dtype=torch.float64).expand(BATCH, -1, -1)), dim=-1)
    torch.manual_seed(5)
    expected = model(tokens, mask)
    torch.manual_seed(5)
    torch.testing.assert_close(model(data, mask, grid=grid), expected)
    assert not torch.equal(model(data, mask, grid=grid), model(data, mask, grid=grid))
    model.eval()
    torch.testing.assert_close(model(data, mask, grid=grid), model(tokens, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_language_model_matches_peer(masked: bool, dtype: torch.dtype) -> None:
    ours, theirs = pk.PerceiverLM(**LM), library().PerceiverLM(**LM)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = torch.randint(LM["num_tokens"], (BATCH, 9))
    mask = torch.rand(BATCH, 9) > 0.5 if masked else None
    assert_parity(
        ours, theirs, (), dtype, call_ours=lambda: ours(tokens, mask), call_theirs=lambda: theirs(tokens, mask)
    )


# Releases 0.8 to 0.10 held the encoder and each layer in lists.
OLD_NAMES = (
    (r"cross_attend_block\.cross_attn\.", "cross_attend_blocks.0."),
    (r"cross_attend_block\.cross_ff\.", "cross_attend_blocks.1."),
    (r"layers\.(\d+)\.self_attns\.0\.", r"layers.\1."),
    (r"attn_residuals\.(\d+)\.", r"layers.\1.2."),
)


def as_old_release(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state_dict.items():
        for new, old in OLD_NAMES:
            key = re.sub(new, old, key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", ["logits", "tied", "attn_residual"])
def test_old_checkpoints_load(name: str) -> None:
    """Alone, and inside a language model, whose decoder takes no MLP."""
    model, fresh = (nn.ModuleDict({"perceiver_io": make(**OPTIONS[name])}) for _ in range(2))
    randomise(model)
    old = as_old_release(model.state_dict())
    assert "perceiver_io.layers.1.0.fn.to_q.weight" in old
    fresh.load_state_dict(old, strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_explain() -> None:
    grid = pk.FourierGrid((3, 4), num_bands=2, max_freq=4.0)
    model = make(dim=3 + grid.num_channels)
    assert pk.explain(model, torch.zeros(BATCH, 3, 4, 3), grid=grid).startswith("path: ")
    tokens = torch.zeros(BATCH, 12, 3 + grid.num_channels)
    assert "separable: no, the context is not data on a grid" in pk.explain(model, tokens)


def test_tied_layers_share_parameters() -> None:
    model = make(**OPTIONS["tied"])
    for layers in (model.layers, model.attn_residuals):
        assert layers[0] is layers[1] is layers[2]


def test_pickle_and_deepcopy() -> None:
    model = make(**OPTIONS["logits"]).double()
    data, queries = make_inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(data, queries=queries), model(data, queries=queries))


def test_checkpointing_keeps_results_and_gradients() -> None:
    results = []
    for options in ({}, {"activation_checkpointing": True}, {"mlp_recompute": 1.0}):
        model = make(**OPTIONS["logits"], **options).double()
        data, queries = make_inputs()
        out = model(data, queries=queries)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_empty_batch() -> None:
    model = make(**OPTIONS["logits"]).double()
    data, queries = make_inputs()
    out = model(data[:0], queries=queries)
    assert out.shape == (0, QUERIES, 7)
    out.sum().backward()


def test_compiles_whole() -> None:
    model = make(**OPTIONS["logits"], depth=1)
    data, queries = (tensor.float() for tensor in make_inputs())
    mask = make_mask()
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = function(data, mask, queries)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
    torch.testing.assert_close(*results)


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"data": torch.zeros(2, 11, 4)}, r"context has shape \(2, 11, 4\), but must be \(batch, 11, 9\)"),
    "empty": ({"data": torch.zeros(2, 0, 9)}, r"context has shape \(2, 0, 9\): there is no token"),
    "integers": ({"data": torch.zeros(2, 11, 9, dtype=torch.int64)}, r"context has dtype torch\.int64"),
    "device": ({"data": torch.zeros(2, 11, 9, device="meta")}, "data is on meta, but the parameters are on cpu"),
    "mask_dtype": ({"mask": torch.ones(2, 11)}, r"mask has dtype torch\.float32, but must be"),
    "mask_shape": ({"mask": torch.ones(2, 12, dtype=torch.bool)}, r"mask has shape \(2, 12\), but must be \(2, 11\)"),
    "queries_channels": ({"queries": torch.zeros(5, 4)}, r"queries has shape \(5, 4\), but must be \(O, 10\), "),
    "queries_batch": ({"queries": torch.zeros(3, 5, 10)}, r"queries has shape \(3, 5, 10\), .* or \(2, O, 10\)"),
    "queries_axes": ({"queries": torch.zeros(1, 1, 5, 10)}, r"queries has shape \(1, 1, 5, 10\), but must be"),
    "queries_dtype": ({"queries": torch.zeros(5, 10, dtype=torch.int64)}, r"queries has dtype torch\.int64"),
    "queries_device": ({"queries": torch.zeros(5, 10, device="meta")}, "queries is on meta"),
    "grid": ({"grid": pk.FourierGrid((3, 4), num_bands=2, max_freq=4.0)}, "grid has 10 channels, but must have fewer"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    data, queries = (tensor.float() for tensor in make_inputs())
    with pytest.raises(ValueError, match=message):
        make()(**{"data": data, "queries": queries, **arguments})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 13, dtype=torch.int64), r"x has shape \(2, 13\), but must be \(batch, n\), n at most 12"),
        (torch.zeros(13, dtype=torch.int64), r"x has shape \(13,\), but must be \(batch, n\)"),
        (torch.zeros(2, 9), r"x has dtype torch\.float32, but must be an integer dtype"),
    ],
)
def test_bad_tokens(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.PerceiverLM(**LM)(tokens)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"depth": -1}, "depth is -1, but must be at least 0"),
    "seq_dropout_prob": ({"seq_dropout_prob": 1.0}, r"seq_dropout_prob is 1\.0, but must be in \[0, 1\)"),
    "mlp_recompute": ({"mlp_recompute": 2.0}, r"mlp_recompute is 2\.0, but must be from 0 to 1"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
