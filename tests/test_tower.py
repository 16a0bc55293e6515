"""The latent tower's modules at sizes large and small against plain PyTorch; what is put into them, and around them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse
from parity import assert_parity, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import perceiver_kernels as pk
from perceiver_kernels.backends import matrix_product
from perceiver_kernels.modules import perceiver
from perceiver_kernels.modules.official import LatentBlocks

# batch, latents, channels: the large one is multiplied by the fused operators, the small one by torch's own.
SIZES = {"large": (2, 150, 136), "small": (2, 5, 24)}
HEADS = 4
MODEL: dict[str, Any] = {
    "num_freq_bands": 3,
    "depth": 3,
    "max_freq": 8.0,
    "num_latents": 40,
    "latent_dim": 32,
    "cross_dim_head": 16,
    "latent_heads": 2,
    "latent_dim_head": 16,
    "num_classes": 7,
}


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    matrix_product.prepared.clear()


@pytest.fixture
def no_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls as small as a test's take the way of large ones."""
    monkeypatch.setattr(matrix_product, "SMALL", 0)
    monkeypatch.setattr(matrix_product, "_timings", {})


def make_attention(dim: int, **options: Any) -> pk.SelfAttention:
    module = pk.SelfAttention(dim, heads=HEADS, head_dim=dim // HEADS, **options)
    randomise(module)
    return module


def make_mlp(dim: int, **options: Any) -> pk.FeedForward:
    module = pk.FeedForward(dim, mult=2, **options)
    randomise(module)
    return module


def make_inputs(size: str, residual: bool) -> tuple[Tensor, ...]:
    batch, latents, dim = SIZES[size]
    return tuple(torch.randn(batch, latents, dim, dtype=torch.float64) for _ in range(1 + residual))


def make_model(**options: Any) -> pk.Perceiver:
    torch.manual_seed(0)
    model = pk.Perceiver(**MODEL | options)
    randomise(model)
    return model


def make_data(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 7, 3, generator=torch.Generator().manual_seed(1))


def plain_attention(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """SelfAttention in torch's functions, with the parameters of `module`."""
    fn: Any = module.fn
    normed = F.layer_norm(x, x.shape[-1:], module.norm.weight, module.norm.bias)
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in (
            F.linear(normed, fn.to_q.weight, fn.to_q.bias),
            *F.linear(normed, fn.to_kv.weight, fn.to_kv.bias).chunk(2, dim=-1),
        )
    )
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = F.linear(attended, fn.to_out.weight, fn.to_out.bias)
    return out if residual is None else out + residual


def plain_mlp(module: nn.Module, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """FeedForward in torch's functions, with the parameters of `module`."""
    first, last = module.fn.net[0], module.fn.net[2]
    normed = F.layer_norm(x, x.shape[-1:], module.norm.weight, module.norm.bias)
    hidden = F.linear(normed, first.weight, first.bias)
    if module.fn.activation == "geglu":
        values, gates = hidden.chunk(2, dim=-1)
        hidden = values * F.gelu(gates)
    else:
        hidden = F.gelu(hidden)
    out = F.dropout(F.linear(hidden, last.weight, last.bias), dropout)
    return out if residual is None else out + residual


KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor], dict[str, Any]]] = {
    "attention": (make_attention, plain_attention, {}),
    "attention_with_biases": (make_attention, plain_attention, {"qkv_bias": True}),
    "geglu": (make_mlp, plain_mlp, {}),
    "geglu_recomputed": (make_mlp, plain_mlp, {"save_hidden": False}),
    "gelu": (make_mlp, plain_mlp, {"activation": "gelu"}),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)
all_sizes = pytest.mark.parametrize("size", SIZES)
with_and_without_residual = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


def test_sizes_reach_both_ways() -> None:
    for size, (batch, latents, dim) in SIZES.items():
        assert matrix_product.too_small(batch * latents, torch.empty(dim, dim)) == (size == "small")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@with_and_without_residual
@all_sizes
@all_kinds
def test_matches_plain_torch(kind: str, size: str, residual: bool, training: bool, dtype: torch.dtype) -> None:
    """Output and every gradient; in eval mode with a dropout that must not be seen."""
    make, plain, options = KINDS[kind]
    ours = make(SIZES[size][2], dropout=0.0 if training else 0.3, **options).train(training)
    theirs = copy.deepcopy(ours)
    assert_parity(
        ours,
        theirs,
        make_inputs(size, residual),
        dtype,
        call_ours=lambda x, residual=None: ours(x, residual=residual),
        call_theirs=lambda x, residual=None: plain(theirs, x, residual),
    )


@pytest.mark.parametrize("activation", ["geglu", "gelu"])
@with_and_without_residual
@all_sizes
def test_dropout_of_the_mlp_is_torchs(size: str, residual: bool, activation: str) -> None:
    """The same elements as F.dropout drops from the same seed."""
    ours = make_mlp(SIZES[size][2], activation=activation, dropout=0.3)
    inputs = tuple(tensor.float() for tensor in make_inputs(size, residual))
    torch.manual_seed(4)
    actual = ours(inputs[0], residual=inputs[1] if residual else None)
    torch.manual_seed(4)
    expected = plain_mlp(ours, inputs[0], inputs[1] if residual else None, dropout=0.3)
    torch.testing.assert_close(actual, expected)


@with_and_without_residual
@all_sizes
def test_dropout_of_the_attention_is_the_operators(size: str, residual: bool) -> None:
    """A composition of F.layer_norm, F.linear and latent_attention draws the same weights from the same seed."""
    ours = make_attention(SIZES[size][2], dropout=0.3)
    x, *rest = (tensor.float() for tensor in make_inputs(size, residual))
    torch.manual_seed(4)
    actual = ours(x, residual=rest[0] if residual else None)
    torch.manual_seed(4)
    normed = F.layer_norm(x, x.shape[-1:], ours.norm.weight, ours.norm.bias)
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in (ours.fn.to_q(normed), *ours.fn.to_kv(normed).chunk(2, dim=-1))
    )
    attended = pk.latent_attention(q, k, v, dropout_p=0.3).transpose(1, 2).flatten(2)
    expected = ours.fn.to_out(attended)
    torch.testing.assert_close(actual, expected + rest[0] if residual else expected)


@with_and_without_residual
@all_sizes
@all_kinds
def test_autocast(kind: str, size: str, residual: bool) -> None:
    make, plain, options = KINDS[kind]
    module = make(SIZES[size][2], **options)
    inputs = make_inputs(size, residual)
    single = tuple(tensor.float() for tensor in inputs)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            actual = module(single[0], residual=single[1] if residual else None)
            expected = plain(module, *single)
        truth = plain(copy.deepcopy(module).double(), *inputs)
    assert actual.dtype == expected.dtype
    assert_no_worse(actual, expected, truth)


# Layers that are more than an nn.Linear


class Doubled(nn.Linear):
    """What an adapter does: a result that the weight alone does not give."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def double_by_subclass(parent: nn.Module, name: str) -> None:
    layer = parent.get_submodule(name)
    twin = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.load_state_dict(layer.state_dict())
    parent.set_submodule(name, twin)


def double_by_hook(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_hook(lambda module, arguments, output: 2.0 * output)


def double_by_forward(parent: nn.Module, name: str) -> None:
    layer = parent.get_submodule(name)
    original = layer.forward
    layer.forward = lambda x: 2.0 * original(x)


def double_by_wrapper(parent: nn.Module, name: str) -> None:
    """A module with a weight of its own that is not all of it."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * self.base(x)

    parent.set_submodule(name, Wrapped(parent.get_submodule(name)))


def double_by_weight(parent: nn.Module, name: str) -> None:
    """The truth: an nn.Linear as any other."""
    layer = parent.get_submodule(name)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2.0)


LAYERS = {
    "attention": ("fn.to_q", "fn.to_kv", "fn.to_out"),
    "geglu": ("fn.net.0", "fn.net.2"),
    "cross_attention": ("fn.to_q", "fn.to_kv", "fn.to_out"),
}
GRID = pk.FourierGrid((6, 7), num_bands=3, max_freq=8.0)


def make_any(kind: str, size: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A module with an input of its own: called with nothing."""
    batch, latents, dim = SIZES[size]
    x = torch.randn(batch, latents, dim)
    if kind != "cross_attention":
        module = KINDS[kind][0](dim)
        return module, lambda module: module(x, residual=x)
    module = pk.CrossAttention(dim, 3 + GRID.num_channels, heads=2, head_dim=16)
    randomise(module)
    return module, lambda module: module(x, make_data(), grid=GRID, residual=x)


@pytest.mark.parametrize("change", [double_by_subclass, double_by_hook, double_by_forward, double_by_wrapper])
@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind, layers in LAYERS.items() for layer in layers])
@all_sizes
def test_a_changed_layer_runs_as_it_is(kind: str, layer: str, size: str, change: Callable[..., None]) -> None:
    module, call = make_any(kind, size)
    expected = copy.deepcopy(module)
    double_by_weight(expected, layer)
    change(module, layer)
    torch.testing.assert_close(call(module), call(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind, layers in LAYERS.items() for layer in layers])
def test_hooks_fire(kind: str, layer: str) -> None:
    """Before and after, forward and backward, each once."""
    module, call = make_any(kind, "large")
    fired: list[str] = []
    target = module.get_submodule(layer)
    target.register_forward_pre_hook(lambda *_: fired.append("before"))
    target.register_forward_hook(lambda *_: fired.append("after"))
    target.register_full_backward_hook(lambda *_: fired.append("backward"))
    call(module).sum().backward()
    assert fired == ["before", "after", "backward"]


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize(("kind", "layer"), [(kind, layer) for kind, layers in LAYERS.items() for layer in layers])
def test_a_parametrised_layer(kind: str, layer: str, parametrize: Callable[..., nn.Module]) -> None:
    """Its weight is what the parametrisation says, and gradients reach what that is made of."""
    module, call = make_any(kind, "large")
    expected = copy.deepcopy(module).eval()
    target = parametrize(module.get_submodule(layer))
    module.eval()  # spectral_norm changes its estimate in training
    originals = [parameter for name, parameter in target.named_parameters() if name.startswith("parametrizations")]
    with torch.no_grad():
        expected.get_submodule(layer).weight.copy_(target.weight)
    out = call(module)
    torch.testing.assert_close(out, call(expected), rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(out.square().sum(), originals)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_explain_says_why_keys_and_values_are_built() -> None:
    module, _ = make_any("cross_attention", "small")
    module.fn.to_kv.register_forward_hook(lambda *_: None)
    text = module.explain(torch.randn(2, 5, 24), make_data(), grid=GRID)
    assert text.startswith("path: modules\n") and "separable: no, to_kv or norm_context has been replaced" in text


# Activation checkpointing


def step(model: nn.Module, data: Tensor) -> list[Tensor]:
    """The output, and the gradients of every parameter."""
    torch.manual_seed(3)
    out = model(data)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def saved_bytes(model: nn.Module, data: Tensor) -> int:
    """Bytes of what a forward pass keeps for backward, memory that tensors share counted once, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(data)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", ["as_torch", "fused"])
def test_checkpointing_changes_nothing(size: str, tied: bool, dropout: float, request: pytest.FixtureRequest) -> None:
    if size == "fused":
        request.getfixturevalue("no_small_calls")
    options = {"weight_tie_layers": tied, "attn_dropout": dropout, "ff_dropout": dropout}
    usual, checkpointing = (make_model(**options, mlp_recompute=0, activation_checkpointing=on) for on in (False, True))
    expected, actual = step(usual, make_data()), step(checkpointing, make_data())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert saved_bytes(checkpointing, make_data()) < 0.5 * saved_bytes(usual, make_data())


@pytest.mark.parametrize(("share", "computed_again"), [(0, 0), (0.5, 1), (2 / 3, 2), (1, 3)])
def test_mlps_computed_again_by_share(share: float, computed_again: int, request: pytest.FixtureRequest) -> None:
    """Results stay the same to the last bit, and each such MLP saves its first product less."""
    request.getfixturevalue("no_small_calls")
    options = {"depth": 1, "self_per_cross_attn": 2}
    usual, sparing = (make_model(**options, mlp_recompute=each) for each in (0, share))
    expected, actual = step(usual, make_data()), step(sparing, make_data())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    rows = len(make_data()) * usual.latents.shape[0]
    product = 4 * rows * usual.layers[0].cross_ff.fn.net[0].out_features
    assert saved_bytes(usual, make_data()) - saved_bytes(sparing, make_data()) == computed_again * product


def test_mlps_compute_again_where_keeping_is_too_much(request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    request.getfixturevalue("no_small_calls")
    rows, options = 16 * len(make_data()), {"num_latents": 16, "depth": 2, "self_per_cross_attn": 2}
    width = make_model(**options).layers[0].cross_ff.fn.net[0].out_features
    for budget, like in ((6 * 4 * rows * width, 0), (6 * 4 * rows * width - 1, 2 / 3)):
        monkeypatch.setattr(perceiver, "KEPT_PRODUCTS", budget)
        expected = saved_bytes(make_model(**options, mlp_recompute=like), make_data())
        assert saved_bytes(make_model(**options), make_data()) == expected


def test_a_share_is_from_0_to_1() -> None:
    with pytest.raises(ValueError, match=r"mlp_recompute is 1.5, but must be from 0 to 1"):
        make_model(mlp_recompute=1.5)


def test_checkpointing_only_in_training() -> None:
    model = make_model(activation_checkpointing=True).eval()
    assert saved_bytes(model, make_data()) == saved_bytes(make_model().eval(), make_data())


# torch.compile


@pytest.mark.parametrize("name", ["perceiver", "perceiver_tied", "tower"])
def test_compiles_whole(name: str) -> None:
    """One graph, forward and backward, by the default compiler, with the results of eager mode."""
    from perceiver_kernels.benchmarking.providers import needs_compiler

    if needs_compiler():
        pytest.skip(needs_compiler())
    model, data = (
        (LatentBlocks(dim=24, layers=2, heads=2, mult=2), torch.randn(2, 6, 24))
        if name == "tower"
        else (make_model(depth=2 + (name != "perceiver"), weight_tie_layers=name != "perceiver"), make_data())
    )
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for actual, expected in zip(step(compiled, data), step(model, data), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + 1e-6)


# Threads


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Equal numbers of threads: MKL's, and with it the last bits of torch's products, are those of the whole process.
@pytest.mark.parametrize("counts", [(1, 1), (2, 2)], ids=str)
def test_two_models_on_two_python_threads(counts: tuple[int, int], threads: None, no_small_calls: None) -> None:
    """A forward pass under autocast and a training step at once are, bit for bit, the ones done in turn."""
    training, inference = make_model(), make_model(depth=2, latent_dim=48).eval()

    def infer() -> list[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return [inference(make_data())]

    def train() -> list[Tensor]:
        out = training(make_data())
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(training.parameters()))]

    work = (infer, train)
    expected: list[list[Tensor]] = []
    for count, call in zip(counts, work, strict=True):
        torch.set_num_threads(count)
        call(), call()  # forms of weights are made when they are met again
        expected.append(call())
    found: list[list[list[Tensor]]] = [[], []]
    failures: list[Exception] = []
    start = threading.Barrier(2)

    def repeat(which: int) -> None:
        torch.set_num_threads(counts[which])
        start.wait()
        try:
            for _ in range(5):
                found[which].append(work[which]())
        except Exception as failure:
            failures.append(failure)

    workers = [threading.Thread(target=repeat, args=(which,)) for which in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for every, once in zip(found, expected, strict=True):
        assert len(every) == 5
        assert all(torch.equal(a, b) for result in every for a, b in zip(result, once, strict=True))


# Weights that are shared, and change


def prepared_weights() -> dict[int, int]:
    """Number of forms by address, of every weight that has any."""
    known = matrix_product.prepared._known
    return {weight.data_ptr(): len(entry.forms) for weight, entry in known.items() if entry.forms}


@pytest.mark.parametrize("provider", ["onednn", "mkl"])
def test_tied_weights_are_prepared_once(provider: str, monkeypatch: pytest.MonkeyPatch, no_small_calls: None) -> None:
    """One form of each distinct weight, and after a step of the optimizer the results are those of the new weights."""
    if reason := matrix_product.PROVIDERS[provider].reason(torch.float32):
        pytest.skip(reason)
    monkeypatch.setenv(matrix_product.ENVIRONMENT, provider)
    tied = make_model(depth=5, weight_tie_layers=True)

    def infer(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(make_data())

    for _ in range(3):
        infer(tied)
    forms = prepared_weights()
    assert set(forms) <= {parameter.data_ptr() for parameter in tied.parameters()}
    assert forms and set(forms.values()) == {1}
    shared = tied.layers[1].self_attns[0]
    assert shared[0].fn.to_out.weight.data_ptr() in forms and shared[1].fn.net[0].weight.data_ptr() in forms

    optimizer = torch.optim.SGD(tied.parameters(), lr=0.1)
    F.cross_entropy(tied(make_data()), torch.tensor([1, 2])).backward()
    before = infer(tied)
    optimizer.step()
    fresh = make_model(depth=5, weight_tie_layers=True)
    fresh.load_state_dict(tied.state_dict())
    for _ in range(3):
        after = infer(tied)
        torch.testing.assert_close(after, infer(fresh), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(after, before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", ["as_torch", "fused"])
def test_trains_like_perceiver_pytorch(size: str, request: pytest.FixtureRequest) -> None:
    """The same losses over 20 steps of AdamW."""
    peer = pytest.importorskip("perceiver_pytorch")
    if size == "fused":
        request.getfixturevalue("no_small_calls")
    options = {**MODEL, "weight_tie_layers": True}
    torch.manual_seed(0)
    ours, theirs = pk.Perceiver(**options), peer.Perceiver(**options)
    theirs.load_state_dict(ours.state_dict())
    data, labels = make_data(8), torch.arange(8) % 7
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.8 * losses[0][0]
