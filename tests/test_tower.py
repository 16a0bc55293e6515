"""The latent tower's modules at sizes large and small against plain PyTorch; what is put into them, and around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse
from parity import assert_parity, randomise
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels.backends import matrix_product

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


def test_explain_says_why_keys_and_values_are_built() -> None:
    module, _ = make_any("cross_attention", "small")
    module.fn.to_kv.register_forward_hook(lambda *_: None)
    text = module.explain(torch.randn(2, 5, 24), make_data(), grid=GRID)
    assert text.startswith("path: projected\n") and "separable: no, fn.to_kv is replaced or has hooks" in text


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
    usual, checkpointing = make_model(**options), make_model(**options, activation_checkpointing=True)
    expected, actual = step(usual, make_data()), step(checkpointing, make_data())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert saved_bytes(checkpointing, make_data()) < 0.5 * saved_bytes(usual, make_data())


def test_checkpointing_only_in_training() -> None:
    model = make_model(activation_checkpointing=True).eval()
    assert saved_bytes(model, make_data()) == saved_bytes(make_model().eval(), make_data())
