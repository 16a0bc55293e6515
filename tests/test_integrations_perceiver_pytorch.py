"""perceiver-pytorch's models accelerated in place: results, gradients and interface stay, and all of it is undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parity import assert_parity, force_path, randomise
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels.integrations import accelerate, restore

pytest.importorskip("perceiver_pytorch", reason="perceiver-pytorch is not installed")
from perceiver_pytorch import experimental, gated, mixed_latents, perceiver_io
from perceiver_pytorch import perceiver_pytorch as base

from perceiver_kernels.integrations import perceiver_pytorch as integration

SMALL: dict[str, Any] = {
    "num_freq_bands": 3,
    "depth": 2,
    "max_freq": 8.0,
    "num_latents": 6,
    "latent_dim": 12,
    "cross_dim_head": 5,
    "latent_heads": 2,
    "latent_dim_head": 4,
    "num_classes": 7,
}
IO: dict[str, Any] = {
    "depth": 2,
    "dim": 9,
    "queries_dim": 10,
    "num_latents": 6,
    "latent_dim": 12,
    "cross_heads": 2,
    "cross_dim_head": 5,
    "latent_heads": 2,
    "latent_dim_head": 4,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceiver": lambda: base.Perceiver(**SMALL, cross_heads=3),
    "tied": lambda: base.Perceiver(**SMALL | {"depth": 3}, weight_tie_layers=True, attn_residual=True),
    "inverted": lambda: base.Perceiver(**SMALL, inverted_cross_attn=(True, False), self_per_cross_attn=2),
    "no_fourier": lambda: base.Perceiver(**SMALL, fourier_encode_data=False, final_classifier_head=False),
    "gated": lambda: gated.Perceiver(**SMALL),
    "mixed_latents": lambda: mixed_latents.Perceiver(**SMALL),
    "io": lambda: perceiver_io.PerceiverIO(**IO, decoder_ff=True, logits_dim=7, attn_residual=True),
}
BATCH = 2


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    randomise(model)
    return model


def make_data(name: str) -> Tensor:
    shape = (BATCH, 11, 9) if name == "io" else (BATCH, 4, 5, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_mask(data: Tensor) -> Tensor:
    """Hide about half the tokens, and all of the first input's."""
    mask = torch.rand(data.shape[:-1], generator=torch.Generator().manual_seed(2)) > 0.5
    mask[:1] = False
    return mask


def call(model: nn.Module, data: Tensor, mask: Tensor | None = None) -> Tensor:
    if isinstance(model, perceiver_io.PerceiverIO):
        queries = torch.randn(5, 10, generator=torch.Generator().manual_seed(3)).to(data.dtype)
        return model(data, mask=mask, queries=queries)
    return model(data, mask=mask)


@pytest.fixture
def exact_positions() -> Iterator[None]:
    """gated.py and mixed_latents.py compute positions in the default dtype, whatever that of the data."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("exact_positions")
def test_same_results_and_gradients(name: str, masked: bool) -> None:
    """In training mode; one masked input has nothing to attend to."""
    assert_same_results(name, masked, torch.float64)


@pytest.mark.parametrize("name", ["perceiver", "io"])
def test_no_worse_in_single_precision(name: str) -> None:
    assert_same_results(name, True, torch.float32)


def assert_same_results(name: str, masked: bool, dtype: torch.dtype) -> None:
    theirs = make(name)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert report.swapped
    data = make_data(name)
    mask = make_mask(data) if masked else None
    assert_parity(
        ours,
        theirs,
        (data,),
        dtype,
        call_ours=lambda data: call(ours, data, mask),
        call_theirs=lambda data: call(theirs, data, mask),
    )


@pytest.mark.parametrize("path", ["separable", "absorbed", "projected"])
def test_same_results_on_every_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_path(monkeypatch, path)
    theirs = make("perceiver")
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    data = make_data("perceiver")
    mask = make_mask(data)
    assert_parity(
        ours,
        theirs,
        (data,),
        torch.float64,
        call_ours=lambda data: ours(data, mask),
        call_theirs=lambda data: theirs(data, mask),
    )


@pytest.mark.parametrize("name", ["perceiver", "gated", "mixed_latents"])
def test_encoded_data_is_not_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    accelerate(model)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("positions are encoded")

    for module in (base, gated, mixed_latents):
        monkeypatch.setattr(module, "fourier_encode", refuse)
    force_path(monkeypatch, "separable")
    model(make_data(name).float())
    restore(model)
    with pytest.raises(AssertionError, match="positions are encoded"):
        model(make_data(name).float())


def test_language_model() -> None:
    theirs = perceiver_io.PerceiverLM(dim=8, num_tokens=20, max_seq_len=12, depth=1, num_latents=4, latent_dim=8)
    randomise(theirs)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    tokens = torch.randint(20, (BATCH, 9))
    mask = torch.rand(BATCH, 9) > 0.3
    assert_parity(
        ours, theirs, (), torch.float64, call_ours=lambda: ours(tokens, mask), call_theirs=lambda: theirs(tokens, mask)
    )


def test_experimental_perceiver_keeps_its_linear_attention() -> None:
    """It maps the encoded data by a linear layer, so that only its layers are swapped."""
    model = experimental.Perceiver(**SMALL, fourier_encode_data=False).double()
    data = make_data("perceiver")
    expected = model(data)
    report = accelerate(model)
    assert report.left["layers.0.4"] == "fn is LinearAttention, neither Attention nor FeedForward"
    assert "written out" in report.left[""]
    torch.testing.assert_close(model(data), expected)


@pytest.mark.parametrize("name", MODELS)
def test_restored_as_it_was(name: str) -> None:
    """Classes, state_dict and results, bit for bit; in between, parameters are the same objects."""
    model = make(name).double()
    kinds = {name: type(module) for name, module in model.named_modules()}
    data = make_data(name)
    expected = call(model, data)
    parameters = dict(model.named_parameters())
    keys = [*model.state_dict()]
    first, second = accelerate(model), accelerate(model)
    assert first == second
    assert isinstance(model, kinds[""])
    assert [*model.state_dict()] == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert restore(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(call(model, data), expected)


@pytest.mark.parametrize("name", MODELS)
def test_copies_stay_accelerated(name: str) -> None:
    model = make(name).double()
    accelerate(model)
    data = make_data(name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.get_submodule("to_logits")) is type(model.get_submodule("to_logits"))
        assert {type(module) for module in twin.modules()} == {type(module) for module in model.modules()}
        assert torch.equal(call(twin, data), call(model, data))


@pytest.mark.parametrize("return_embeddings", [False, True])
@pytest.mark.parametrize("given", ["nothing", "tensor", "list"])
@pytest.mark.parametrize("name", ["perceiver", "tied"])
def test_hidden_states(name: str, given: str, return_embeddings: bool) -> None:
    model = make(name).double()
    earlier = torch.randn(3, BATCH, SMALL["num_latents"], SMALL["latent_dim"], dtype=torch.float64)
    block_outputs = {"nothing": None, "tensor": earlier[0], "list": list(earlier)}[given]
    arguments = {"block_outputs": block_outputs, "return_hiddens": True, "return_embeddings": return_embeddings}
    expected = model(make_data(name), **arguments)
    accelerate(model)
    torch.testing.assert_close(model(make_data(name), **arguments), expected)


@pytest.mark.parametrize("name", ["perceiver", "gated"])
def test_dropout_in_training_only(name: str) -> None:
    make_model = {"perceiver": base.Perceiver, "gated": gated.Perceiver}[name]
    model = make_model(**SMALL, attn_dropout=0.5, ff_dropout=0.5)
    data = make_data(name).float()
    expected = model.eval()(data)
    accelerate(model)
    torch.testing.assert_close(model(data), expected)
    model.train()
    assert not torch.equal(model(data), model(data))
    model.eval()
    torch.testing.assert_close(model(data), expected)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(data), model(data))


def test_attention_dropout_keeps_the_mean() -> None:
    """An average over many draws is what there is without dropout, for one layer whose rest is linear."""
    torch.manual_seed(0)
    block = base.PreNorm(6, base.Attention(6, 4, dropout=0.4, heads=2, dim_head=3), context_dim=4).double()
    x, context = torch.randn(1, 3, 6).double(), torch.randn(1, 50, 4).double()
    expected = block.eval()(x, context=context)
    accelerate(block.train())
    drawn = block(x.expand(2000, -1, -1), context=context.expand(2000, -1, -1))
    assert (drawn.mean(0, keepdim=True) - expected).abs().max() < 5 * drawn.std(0).max() / 2000**0.5


class Doubled(nn.Module):
    """A wrapper as an adapter is: the layer within, and something more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


WRAPPED = {
    "layers.0.cross_attn": "fn.to_kv",
    "layers.1.cross_attn": "fn.to_q",
    "layers.0.self_attns.0.0": "fn.to_out",
    "layers.0.self_attns.0.1": "fn.net.2",
}


@pytest.mark.parametrize("before", [True, False], ids=["wrapped before", "wrapped after"])
@pytest.mark.parametrize("holder", WRAPPED)
def test_wrapped_layers_are_called(holder: str, before: bool) -> None:
    """Left alone and reported if found wrapped; noticed at the next call if wrapped later."""
    layer = WRAPPED[holder]
    theirs, ours = make("perceiver").double(), make("perceiver").double()
    data = make_data("perceiver")
    mask = make_mask(data)
    if not before:
        accelerate(ours)
    for model in (theirs, ours):
        parent, _, name = f"{holder}.{layer}".rpartition(".")
        setattr(model.get_submodule(parent), name, Doubled(model.get_submodule(f"{parent}.{name}")))
    report = accelerate(ours) if before else None
    torch.testing.assert_close(ours(data, mask), theirs(data, mask))
    if report is not None:
        assert report.left[holder] == f"{layer} is Doubled, must be Linear, not wrapped, and without hooks"
        cross = holder.endswith("cross_attn")
        assert ("" in report.left) == cross
        assert isinstance(ours, pk.Perceiver) != cross


@pytest.mark.parametrize("where", ["layers.0.cross_attn.fn", "layers.0.self_attns.0.0.fn.to_q", "layers.1.cross_ff.fn"])
def test_hooks_are_called(where: str) -> None:
    model = make("perceiver").double()
    data = make_data("perceiver")
    expected = model(data)
    accelerate(model)
    called = []
    model.get_submodule(where).register_forward_hook(lambda *_: called.append(where))
    torch.testing.assert_close(model(data), expected)
    assert called == [where]


@pytest.mark.parametrize("where", ["layers.0.cross_attn", "layers.0.cross_ff", "layers.0.self_attns.0.0"])
def test_hooks_of_swapped_modules_get_what_the_original_gives(where: str) -> None:
    model = make("perceiver").double()
    data = make_data("perceiver")
    model.get_submodule(where).register_forward_hook(lambda _, __, out: 0.5 * out)
    expected = model(data)
    accelerate(model)
    torch.testing.assert_close(model(data), expected)


def test_queries_of_more_inputs_than_the_data() -> None:
    model = perceiver_io.PerceiverIO(depth=1, dim=5, queries_dim=6, num_latents=4, latent_dim=8, logits_dim=3).double()
    data, queries = torch.randn(1, 9, 5, dtype=torch.float64), torch.randn(4, 7, 6, dtype=torch.float64)
    expected = model(data, queries=queries)
    accelerate(model)
    torch.testing.assert_close(model(data, queries=queries), expected)


def test_hooks_of_swapped_modules_are_called() -> None:
    model = make("perceiver").double()
    called = []
    for name in ("layers.0", "layers.0.cross_attn", "layers.1.self_attns.0.1", ""):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    accelerate(model)
    assert isinstance(model, pk.Perceiver)
    model(make_data("perceiver"))
    assert called == ["layers.0.cross_attn", "layers.0", "layers.1.self_attns.0.1", ""]


def test_subclasses_are_left() -> None:
    class Mine(base.Perceiver):
        pass

    model = Mine(**SMALL).double()
    data = make_data("perceiver")
    expected = model(data)
    report = accelerate(model)
    assert report.left == {"": "a subclass of Perceiver may compute otherwise"}
    assert type(model) is Mine
    torch.testing.assert_close(model(data), expected)


def test_queries_among_the_keys_are_left() -> None:
    model = base.PerceiverBlock(dim=12, queries_contribute_kv=True)
    report = accelerate(model)
    assert report.left == {"cross_attn": "queries_contribute_kv adds the queries to the keys"}


def test_bad_input() -> None:
    """The number of axes is the original's own complaint; of channels, the attention's."""
    model = make("perceiver")
    accelerate(model)
    with pytest.raises(AssertionError, match="input data must have the right number of axis"):
        model(torch.zeros(BATCH, 20, 3))
    with pytest.raises(ValueError, match=r"context has shape \(2, 20, 18\), but must be \(batch, 20, 17\)"):
        model(torch.zeros(BATCH, 4, 5, 4))


def test_a_layer_replaced_after_accelerating_is_the_originals_matter() -> None:
    model = make("perceiver")
    accelerate(model)
    model.layers[0] = nn.Identity()
    original = pk.restore(copy.deepcopy(model))
    errors = []
    for each in (model, original):
        with pytest.raises(Exception) as error:  # whichever it is
            each(torch.zeros(BATCH, 4, 5, 3))
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]


def test_no_tokens() -> None:
    model = make("perceiver").double()
    data = torch.zeros(BATCH, 0, 5, 3, dtype=torch.float64)
    expected = model(data)
    accelerate(model)
    torch.testing.assert_close(model(data), expected)


def test_mask_of_any_shape() -> None:
    model = make("perceiver").double()
    data = make_data("perceiver")
    mask = make_mask(data)
    expected = model(data, mask)
    accelerate(model)
    torch.testing.assert_close(model(data, mask), expected)
    torch.testing.assert_close(model(data, mask.flatten(1)), expected)


def as_release_0_9(model: nn.Module) -> nn.Module:
    """The same model with its layers in lists, as releases up to 0.10 kept them."""
    twin = copy.deepcopy(model)
    blocks = zip(twin.layers, twin.attn_residuals, strict=True)
    twin.layers = nn.ModuleList(
        nn.ModuleList([block.cross_attn, block.cross_ff, block.self_attns, mix]) for block, mix in blocks
    )
    del twin.attn_residuals
    return twin


@pytest.mark.parametrize("name", ["perceiver", "tied", "inverted"])
def test_layers_in_lists(name: str) -> None:
    model = make(name).double()
    old = as_release_0_9(model)
    accelerate(old)
    assert type(old) is integration.PerceiverOfLists
    data = make_data(name)
    mask = make_mask(data)
    torch.testing.assert_close(old(data, mask), model(data, mask))


def test_compiles_whole() -> None:
    model = base.Perceiver(**SMALL | {"depth": 1})
    accelerate(model)
    data = make_data("perceiver").float()
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = function(data)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
    torch.testing.assert_close(*results)


def test_explain() -> None:
    model = make("perceiver")
    accelerate(model)
    assert pk.explain(model, make_data("perceiver").float()).startswith("layers.0.cross_attn: path: ")


def test_casts_after_accelerating() -> None:
    model = make("perceiver")
    accelerate(model)
    data = make_data("perceiver")
    single = model(data.float())
    torch.testing.assert_close(model.double()(data).float(), single, rtol=1e-4, atol=1e-5)
