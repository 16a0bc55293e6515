"""flash-perceiver without flash-attn, and on top of it: results and gradients of plain PyTorch's layers."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import plain_flash_attn
import pytest
import torch
from parity import assert_parity, randomise
from torch import Tensor, nn

from perceiver_kernels import integrations
from perceiver_kernels.integrations import accelerate, restore
from perceiver_kernels.integrations.flash_perceiver import without_flash_attn

if importlib.util.find_spec("flash_perceiver") is None:
    pytest.skip("flash-perceiver is not installed", allow_module_level=True)
if importlib.util.find_spec("flash_attn") is not None:
    pytest.skip("flash-attn is installed, which runs on GPUs alone", allow_module_level=True)

FLASH_ATTN = ["flash_attn", *(f"flash_attn.{name}" for name in ("bert_padding", "modules", "modules.mha"))]
FLASH_ATTN += ["flash_attn.modules.block", "flash_attn.modules.mlp"]
IMPORTED_ANEW = ("flash_perceiver", "perceiver_kernels.integrations.flash_perceiver_blocks")


def flash_perceiver(*, plain: bool) -> ModuleType:
    """flash_perceiver on top of plain_flash_attn, as if it were flash-attn, or of the stand-ins."""
    for name in [*sys.modules]:
        if name.partition(".")[0] == "flash_perceiver" or name in IMPORTED_ANEW:
            del sys.modules[name]
    vars(integrations).pop("flash_perceiver_blocks", None)
    if plain:
        sys.modules.update(dict.fromkeys(FLASH_ATTN, plain_flash_attn))
    try:
        with nullcontext() if plain else without_flash_attn():
            return importlib.import_module("flash_perceiver")
    finally:
        for name in FLASH_ATTN:
            sys.modules.pop(name, None)


SIZES: dict[str, Any] = {"input_dim": 9, "num_latents": 6, "latent_dim": 16}
HEADS: dict[str, Any] = {"cross_heads": 2, "cross_head_dim": 5, "latent_heads": 4, "latent_head_dim": 6}
MODELS: dict[str, Callable[[ModuleType], nn.Module]] = {
    "gated": lambda library: library.Perceiver(**SIZES, **HEADS, depth=2, output_dim=5, output_mode="average"),
    "gelu": lambda library: library.Perceiver(
        **SIZES, **HEADS, depth=2, output_dim=5, output_mode="concat", gated_mlp=False, weight_tie_layers=True
    ),
    "zero_tokens": lambda library: library.Perceiver(
        **SIZES, **HEADS, depth=1, output_dim=5, output_mode="first", num_zero_tokens=2, self_per_cross_attn=2
    ),
    "rotary": lambda library: library.Perceiver(**SIZES, **HEADS, depth=1, latent_rotary_emb_dim=4),
    "io": lambda library: library.PerceiverIO(**SIZES, **HEADS, depth=2, query_dim=8, query_heads=2, proj_dim=3),
}


def make(name: str, *, plain: bool) -> nn.Module:
    library = flash_perceiver(plain=plain)
    torch.manual_seed(0)
    return MODELS[name](library)


def call(model: nn.Module, data: Tensor, mask: Tensor | None, packed: bool = True) -> Tensor:
    model.set_flash_attn(packed)
    queries = {}
    if type(model).__name__ == "PerceiverIO":
        queries["queries"] = torch.randn(7, 8, generator=torch.Generator().manual_seed(3)).to(data.dtype)
    return model(data, mask=mask, **queries)


def make_data() -> Tensor:
    return torch.randn(3, 11, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_mask() -> Tensor:
    """Lengths of many sizes; the first input has no token."""
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[0] = False
    return mask


def assert_same(ours: nn.Module, theirs: nn.Module, masked: bool, packed: bool) -> None:
    mask = make_mask() if masked else None
    if mask is not None and not packed:
        mask[0, :2] = True  # lowered by 10,000 all of them, scores lose their last digits
    for model in (ours, theirs):
        model.double()
    assert_parity(
        ours,
        theirs,
        (make_data(),),
        torch.float64,
        call_ours=lambda data: call(ours, data, mask, packed),
        call_theirs=lambda data: call(theirs, data, mask, packed),
    )


masks = pytest.mark.parametrize(
    ("masked", "packed"), [(False, True), (True, True), (True, False)], ids=["all", "packed", "padded"]
)


@masks
@pytest.mark.parametrize("name", MODELS)
def test_stand_ins_match_plain_layers(name: str, masked: bool, packed: bool) -> None:
    """The same initial values from the same seed, parameter for parameter; the same results and gradients."""
    theirs, ours = make(name, plain=True), make(name, plain=False)
    for (key, value), (ours_key, ours_value) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert (ours_key, ours_value.shape) == (key, value.shape)
        assert torch.equal(ours_value, value), key
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, masked, packed)


@masks
@pytest.mark.parametrize("name", MODELS)
def test_accelerated_on_top_of_flash_attn(name: str, masked: bool, packed: bool) -> None:
    theirs = make(name, plain=True)
    randomise(theirs)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    rotary = "layers.0.1.0.mixer"
    assert report.left == ({rotary: "rotary embeddings run as before"} if name == "rotary" else {})
    assert "layers.0.0" in report.swapped
    assert_same(ours, theirs, masked, packed)


def test_input_without_a_token_as_if_it_had_no_mask() -> None:
    """Where masked scores are lowered, and all of them are."""
    model = make("gated", plain=False).double()
    nothing = torch.zeros(3, 11, dtype=torch.bool)
    torch.testing.assert_close(call(model, make_data(), nothing, packed=False), call(model, make_data(), None))


@pytest.mark.parametrize("name", MODELS)
def test_restored_as_it_was(name: str) -> None:
    model = make(name, plain=True).double()
    kinds = {name: type(module) for name, module in model.named_modules()}
    data, mask = make_data(), make_mask()
    expected = call(model, data, mask)
    assert accelerate(model) == accelerate(model)
    twin = copy.deepcopy(model)
    assert torch.equal(call(twin, data, mask), call(model, data, mask))
    restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(call(model, data, mask), expected)


def test_stand_ins_are_left() -> None:
    report = accelerate(make("gated", plain=False))
    assert set(report.left.values()) == {"it is this library's already, in place of flash-attn's"}
    assert not report.swapped


def test_no_trace_of_flash_attn_remains() -> None:
    flash_perceiver(plain=False)
    assert not [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None


def test_stand_ins_can_be_looked_for() -> None:
    with without_flash_attn():
        assert importlib.util.find_spec("flash_attn") is not None
        assert importlib.util.find_spec("flash_attn.modules.mha") is not None


def test_wrapped_layers_are_left() -> None:
    class Adapter(nn.Linear):
        pass

    model = make("gelu", plain=True)
    model.layers[0][0].mixer.Wkv.__class__ = Adapter
    model.layers[0][1][0].mlp.fc1.register_forward_hook(lambda *_: None)
    report = accelerate(model)
    assert report.left == {
        "layers.0.0.mixer": "Wkv is Adapter, must be Linear, not wrapped, and without hooks",
        "layers.0.1.0": "fc1 is Linear, must be Linear, not wrapped, and without hooks",
    }


@pytest.mark.parametrize("plain", [False, True])
def test_dropout_in_training_only(plain: bool) -> None:
    library = flash_perceiver(plain=plain)
    model = library.Perceiver(**SIZES, **HEADS, depth=1, cross_attn_dropout=0.4, latent_attn_dropout=0.4)
    accelerate(model)
    data = make_data().float()
    assert torch.equal(model.eval()(data), model(data))
    model.train()
    assert not torch.equal(model(data), model(data))


def test_what_stand_ins_refuse() -> None:
    from perceiver_kernels.integrations import flash_attn_stand_ins as stand_ins

    with pytest.raises(NotImplementedError, match="causal is True: that needs flash-attn, which is not installed"):
        stand_ins.MHA(8, 2, causal=True)
    with pytest.raises(ValueError, match="num_heads is 3, must divide embed_dim 8"):
        stand_ins.MHA(8, 3)
    with pytest.raises(ValueError, match="rotary_emb_dim is 4, must be 0 for cross-attention"):
        stand_ins.MHA(8, 2, cross_attn=True, rotary_emb_dim=4)
    with pytest.raises(NotImplementedError, match="ParallelMHA needs flash-attn"):
        stand_ins.ParallelMHA(8, 2)
