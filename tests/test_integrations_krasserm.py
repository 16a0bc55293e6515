"""krasserm's perceiver-io accelerated in place: results, gradients and interface stay, and all of it is undone."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import assert_parity, randomise
from torch import Tensor, nn

from perceiver_kernels.integrations import accelerate, restore

pytest.importorskip("perceiver.model.core", reason="krasserm's perceiver-io, or the fairscale it needs, is missing")
from perceiver.model.core import config as configs
from perceiver.model.core import modules as theirs


def backend(name: str) -> ModuleType:
    """A model's own file, without what its package imports besides: Lightning, data sets, tokenizers."""
    for parent in (name.rpartition(".")[0], name):
        package = f"perceiver.model.{parent}"
        if package not in sys.modules:
            module = ModuleType(package)
            module.__path__ = [str(Path(theirs.__file__).parents[1].joinpath(*parent.split(".")))]
            sys.modules[package] = module
    return importlib.import_module(f"perceiver.model.{name}.backend")


def encoder(**options: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "num_cross_attention_heads": 2,
        "num_self_attention_heads": 2,
        "num_self_attention_layers_per_block": 2,
        "num_self_attention_blocks": 2,
    }
    return sizes | options


DECODER: dict[str, Any] = {"num_cross_attention_heads": 2}
LATENTS: dict[str, Any] = {"num_latents": 5, "num_latent_channels": 16}


def image_classifier(**options: Any) -> nn.Module:
    vision = backend("vision.image_classifier")
    config = configs.PerceiverIOConfig(
        vision.ImageEncoderConfig(image_shape=(6, 7, 3), num_frequency_bands=3, **encoder(**options)),
        configs.ClassificationDecoderConfig(num_classes=4, num_output_query_channels=8, **DECODER),
        **LATENTS,
    )
    config.encoder.num_cross_attention_heads = 1
    return vision.ImageClassifier(config)


def optical_flow() -> nn.Module:
    flow = backend("vision.optical_flow")
    config = configs.PerceiverIOConfig(
        flow.OpticalFlowEncoderConfig(
            image_shape=(4, 5),
            num_patch_input_channels=3,
            num_patch_hidden_channels=4,
            num_frequency_bands=2,
            **encoder(),
        ),
        flow.OpticalFlowDecoderConfig(image_shape=(4, 5), cross_attention_residual=False, **DECODER),
        **LATENTS,
    )
    return flow.OpticalFlow(config)


def language_model() -> nn.Module:
    backend("text.common")
    text = backend("text.mlm")
    config = configs.PerceiverIOConfig(
        sys.modules["perceiver.model.text.common.backend"].TextEncoderConfig(
            vocab_size=30, max_seq_len=9, num_input_channels=12,
            **encoder(num_cross_attention_qk_channels=4, num_cross_attention_v_channels=6, num_self_attention_blocks=1),
        ),
        text.TextDecoderConfig(vocab_size=30, max_seq_len=9, cross_attention_residual=False, **DECODER),
        **LATENTS,
    )  # fmt: skip
    return text.MaskedLanguageModel(config)


MODELS = {"image": image_classifier, "flow": optical_flow, "text": language_model}


@pytest.fixture(scope="module", autouse=True)
def text_package() -> None:
    """perceiver.model.text.mlm imports names from its sibling's package."""
    common = backend("text.common")
    vars(sys.modules["perceiver.model.text.common"]).update(
        TextEncoder=common.TextEncoder, TextEncoderConfig=common.TextEncoderConfig
    )


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    randomise(model)
    return model.double().eval()


def make_input(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "text":
        return torch.randint(30, (2, 9), generator=generator)
    shape = (2, 6, 7, 3) if name == "image" else (2, 2, 3, 4, 5)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pad_mask(name: str) -> Tensor | None:
    """True = pad; all of the first input's."""
    if name == "flow":
        return None
    mask = torch.rand(2, 42 if name == "image" else 9, generator=torch.Generator().manual_seed(2)) > 0.6
    mask[0] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_same_results_and_gradients(name: str, masked: bool) -> None:
    """One masked input is pads alone: all its tokens then count alike."""
    original, ours = make(name), make(name)
    report = accelerate(ours)
    assert not report.left
    data, mask = make_input(name), pad_mask(name) if masked else None
    options = {} if mask is None else {"pad_mask": mask}
    inputs = () if name == "text" else (data,)
    assert_parity(
        ours,
        original,
        inputs,
        torch.float64,
        call_ours=lambda *given: ours(*(given or (data,)), **options),
        call_theirs=lambda *given: original(*(given or (data,)), **options),
    )


def test_pixels_of_lower_precision_than_the_model() -> None:
    """Both concatenate pixels with positions in float32."""
    original, ours = make("image").float(), make("image").float()
    accelerate(ours)
    pixels = make_input("image").half()
    torch.testing.assert_close(ours(pixels), original(pixels))
    adapter = "encoder.input_adapter"
    theirs = original.get_submodule(adapter)(pixels)
    torch.testing.assert_close(torch.as_tensor(ours.get_submodule(adapter)(pixels).materialize()), theirs)


@pytest.mark.parametrize("name", ["image", "flow"])
def test_positions_are_not_written_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from perceiver.model.core.position import FourierPositionEncoding

    from perceiver_kernels.integrations.unbuilt import Unbuilt

    model = make(name).float()
    accelerate(model)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("positions are written out")

    monkeypatch.setattr(FourierPositionEncoding, "forward", refuse)
    if name == "flow":  # neither for the encoder nor for the decoder's queries
        monkeypatch.setattr(Unbuilt, "materialize", refuse)
    with torch.no_grad():
        model(make_input(name).float())


@pytest.mark.parametrize("name", MODELS)
def test_restored_as_it_was(name: str) -> None:
    model = make(name)
    kinds = {name: type(module) for name, module in model.named_modules()}
    keys = [*model.state_dict()]
    data = make_input(name)
    expected = model(data)
    assert accelerate(model) == accelerate(model)
    assert [*model.state_dict()] == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(data), model(data))
    torch.testing.assert_close(model(data), expected)
    restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(data), expected)


def test_outputs_are_module_outputs() -> None:
    layer = theirs.SelfAttentionLayer(num_heads=2, num_channels=8).double().eval()
    x = torch.randn(2, 5, 8).double()
    expected = layer(x)
    accelerate(layer)
    out = layer(x)
    assert type(out) is type(expected)
    assert out.kv_cache is None
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state)


def test_caches_masks_and_heads_in_turn_run_as_before() -> None:
    """Self-attention with pads and with a cache, a prefix, and heads a few at a time."""
    layer = theirs.SelfAttentionLayer(num_heads=2, num_channels=8, max_heads_parallel=1).double().eval()
    cross = theirs.CrossAttention(2, 8, 8).double().eval()
    x, prefix = torch.randn(2, 5, 8).double(), torch.randn(2, 3, 8).double()
    pads = torch.rand(2, 5) > 0.5
    calls = [
        lambda: layer(x, pad_mask=pads),
        lambda: layer(x, kv_cache=layer.empty_kv_cache(x)),
        lambda: cross(x, x_kv_prefix=prefix),
        lambda: cross(x, prefix, pad_mask=pads[:, :3]),
    ]
    expected = [call() for call in calls]
    accelerate(nn.ModuleList([layer, cross]))
    for call, before in zip(calls, expected, strict=True):
        torch.testing.assert_close(call().last_hidden_state, before.last_hidden_state)
    cached = layer(x, kv_cache=layer.empty_kv_cache(x)).kv_cache
    torch.testing.assert_close(cached, expected[1].kv_cache)


def test_causal_attention_is_left() -> None:
    config = configs.CausalSequenceModelConfig(
        num_heads=2, num_self_attention_layers=1, vocab_size=20, max_seq_len=8, max_latents=4, num_channels=16
    )
    model = theirs.CausalSequenceModel(config).eval()
    tokens = torch.randint(20, (2, 8))
    expected = model(tokens, prefix_len=4).logits
    report = accelerate(model)
    assert report.left["self_attention.0.0.module.attention"] == "causal attention has no kernel"
    assert "cross_attention.1.module" in report.swapped
    torch.testing.assert_close(model(tokens, prefix_len=4).logits, expected)


def test_dropout_in_training_only() -> None:
    model = image_classifier(dropout=0.4)
    data = make_input("image").float()
    expected = model.eval()(data)
    accelerate(model)
    torch.testing.assert_close(model(data), expected)
    model.train()
    assert not torch.equal(model(data), model(data))


def test_wrapped_layers_are_left() -> None:
    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    before, after = make("image"), make("image")
    accelerate(after)
    for model in (before, after):
        attention = model.get_submodule("0.cross_attn_1.0.module.attention")
        attention.k_proj = Adapter(attention.k_proj)
    report = accelerate(copy.deepcopy(before))
    why = "attention.k_proj is Adapter, must be Linear, not wrapped, and without hooks"
    assert report.left["0.cross_attn_1.0.module"] == why
    assert report.left["0.input_adapter"] == "a cross-attention that reads it is left"
    data = make_input("image")
    torch.testing.assert_close(after(data), before(data))


def test_changed_positions_are_left() -> None:
    model = make("image")
    model.get_submodule("0.input_adapter.position_encoding").position_encoding.mul_(1.5)
    expected = model(make_input("image"))
    report = accelerate(model)
    assert report.left == {"0.input_adapter": "position_encoding has been changed"}
    torch.testing.assert_close(model(make_input("image")), expected)


def test_bad_input_is_the_originals_error() -> None:
    model = make("image")
    accelerate(model)
    with pytest.raises(ValueError, match=r"Input vision shape \(6, 6, 3\) different from required shape \(6, 7, 3\)"):
        model(torch.zeros(2, 6, 6, 3))
