"""transformers' eight Perceivers, accelerated against not: results, gradients, behaviour, and undoing it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_no_worse
from parity import assert_parity, outputs_and_gradients, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrize

import perceiver_kernels as pk

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import PerceiverConfig
from transformers.models.perceiver import modeling_perceiver as theirs

from perceiver_kernels import integrations
from perceiver_kernels.integrations import transformers as ours
from perceiver_kernels.integrations.swap import Accelerated
from perceiver_kernels.integrations.unbuilt import Unbuilt

SIZES: dict[str, Any] = {
    "num_latents": 10,
    "d_latents": 20,
    "d_model": 24,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 2,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 12,
    "vocab_size": 30,
    "num_labels": 3,
    "image_size": 12,
    "train_size": [8, 10],
    "num_frames": 2,
    "audio_samples_per_frame": 40,
    "samples_per_patch": 8,
    "output_shape": [1, 2, 12, 12],
    "output_num_channels": 16,
    "_label_trainable_num_channels": 12,
}
FOURIER = {"num_bands": 3, "max_resolution": (8, 6), "concat_pos": True, "sine_only": False}
TEXT = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(1))


def with_preprocessor(**options: Any) -> Callable[[PerceiverConfig], nn.Module]:
    """PerceiverModel with a PerceiverImagePreprocessor of these options and a classifier."""

    def build(config: PerceiverConfig) -> nn.Module:
        preprocessor = theirs.PerceiverImagePreprocessor(
            config,
            **{"fourier_position_encoding_kwargs": FOURIER, "spatial_downsample": 1, "out_channels": 5} | options,
        )
        decoder = theirs.PerceiverClassificationDecoder(
            config, num_channels=20, trainable_position_encoding_kwargs={"num_channels": 20, "index_dims": 1}
        )
        return theirs.PerceiverModel(config, decoder=decoder, input_preprocessor=preprocessor)

    return build


def base(config: PerceiverConfig) -> nn.Module:
    """PerceiverModel with nothing before or after it."""
    return theirs.PerceiverModel(config)


Inputs = tuple[tuple[int, ...], ...]
IMAGE: Inputs = ((2, 3, 12, 12),)
MULTIMODAL: Inputs = ((2, 2, 3, 12, 12), (2, 80, 1), (2, 3))

# What builds a model, and the shapes of its floating-point inputs; without any it reads TEXT.
EIGHT: dict[str, tuple[Callable[[PerceiverConfig], nn.Module], Inputs]] = {
    "masked_lm": (theirs.PerceiverForMaskedLM, ()),
    "sequence": (theirs.PerceiverForSequenceClassification, ()),
    "learned": (theirs.PerceiverForImageClassificationLearned, IMAGE),
    "fourier": (theirs.PerceiverForImageClassificationFourier, IMAGE),
    "conv": (theirs.PerceiverForImageClassificationConvProcessing, ((2, 3, 24, 24),)),
    "flow": (theirs.PerceiverForOpticalFlow, ((2, 2, 27, 8, 10),)),
    "multimodal": (theirs.PerceiverForMultimodalAutoencoding, MULTIMODAL),
    "base": (base, ((2, 9, 24),)),
}
PREPROCESSORS: dict[str, tuple[Callable[[PerceiverConfig], nn.Module], Inputs]] = {
    "pixels": (with_preprocessor(prep_type="pixels"), IMAGE),
    "conv1x1": (with_preprocessor(prep_type="conv1x1", spatial_downsample=2), IMAGE),
    "patches": (with_preprocessor(prep_type="patches", spatial_downsample=3), IMAGE),
    "video": (
        with_preprocessor(prep_type="pixels", fourier_position_encoding_kwargs=FOURIER | {"max_resolution": (2, 8, 6)}),
        ((2, 4, 3, 5, 7),),
    ),
    "sine_only": (
        with_preprocessor(prep_type="pixels", fourier_position_encoding_kwargs=FOURIER | {"sine_only": True}),
        IMAGE,
    ),
    "add": (with_preprocessor(prep_type="conv1x1", out_channels=14, concat_or_add_pos="add"), IMAGE),
    "projected": (with_preprocessor(prep_type="conv1x1", out_channels=14, project_pos_dim=6), IMAGE),
}
MODELS = EIGHT | PREPROCESSORS
all_eight = pytest.mark.parametrize("name", EIGHT)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = PerceiverConfig(**SIZES | options)
    model = MODELS[name][0](config)
    randomise(model)
    return model.eval()


def make_inputs(name: str, seed: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in MODELS[name][1])


def arguments(name: str, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """The keyword arguments of a model's forward."""
    if not inputs:
        return {"inputs": TEXT}
    if name != "multimodal":
        return {"inputs": inputs[0]}
    points = {"image": torch.arange(2 * 12 * 12), "audio": torch.tensor([3, 1, 7]), "label": None}
    return {"inputs": dict(zip(("image", "audio", "label"), inputs, strict=True)), "subsampled_output_points": points}


def result(name: str, model: nn.Module, *inputs: Tensor, **options: Any) -> Tensor:
    """All of a model's results in one tensor."""
    out = model(**arguments(name, inputs), **options)
    logits = out.last_hidden_state if name == "base" else out.logits
    parts = logits.values() if isinstance(logits, dict) else [logits]
    return torch.cat([part.flatten() for part in parts])


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """No array of tokens or queries may be built."""

    def forbidden(self: Unbuilt) -> Tensor:
        raise AssertionError("an array of tokens was built")

    monkeypatch.setattr(Unbuilt, "materialize", forbidden)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("nothing_built")
def test_parity(name: str) -> None:
    """Results, and gradients of inputs and all parameters, in float64."""
    plain = build(name)
    fast = copy.deepcopy(plain)
    assert pk.accelerate(fast).swapped
    assert_parity(
        fast,
        plain,
        make_inputs(name),
        torch.float64,
        call_ours=lambda *inputs: result(name, fast, *inputs),
        call_theirs=lambda *inputs: result(name, plain, *inputs),
    )


@all_eight
def test_parity_in_float32(name: str) -> None:
    """The largest error over six inputs, of which one or two tell most, is no worse than that of transformers."""
    plain = build(name, num_blocks=1, num_self_attends_per_block=1)
    fast = copy.deepcopy(plain)
    pk.accelerate(fast)
    runs: dict[str, list[dict[str, Tensor]]] = {"fast": [], "plain": [], "truth": []}
    for seed in range(6):
        inputs = make_inputs(name, seed)
        for run, model in (("fast", fast), ("plain", plain), ("truth", plain)):
            dtype = torch.float64 if run == "truth" else torch.float32
            runs[run].append(outputs_and_gradients(model, partial(result, name, model), inputs, dtype))
    largest = max(tensor.abs().max() for found in runs["truth"] for tensor in found.values())
    for key in runs["truth"][0]:
        actual, expected, truth = (torch.stack([found[key] for found in runs[run]]) for run in runs)
        if truth.abs().max() > 1e-13 * largest:  # zero by symmetry otherwise
            assert_no_worse(actual, expected, truth, key)


@pytest.mark.usefixtures("nothing_built")
def test_published_grid() -> None:
    """224 x 224 pixels with 64 bands: angles of hundreds of radians, rounded as transformers rounds them."""
    plain = build("fourier", image_size=224, num_blocks=1, num_self_attends_per_block=1)
    fast = copy.deepcopy(plain)
    pk.accelerate(fast)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        truth = plain.double()(inputs=image.double()).logits
        error, plain_error = ((m.float()(inputs=image).logits - truth).abs().max() for m in (fast, plain))
    assert error <= 2 * plain_error + 16 * torch.finfo(torch.float32).eps * truth.abs().max()


def same(actual: Any, expected: Any) -> None:
    """Equal in structure, and in numbers but for rounding."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            same(actual[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other)
    else:
        assert actual == expected


def compare(name: str, model: nn.Module, inputs: tuple[Tensor, ...] | None = None, **options: Any) -> None:
    """The model accelerated gives what it gives restored."""
    inputs = make_inputs(name) if inputs is None else inputs
    with torch.no_grad():
        pk.restore(model)
        expected = model(**arguments(name, inputs), **options)
        pk.accelerate(model)
        same(model(**arguments(name, inputs), **options), expected)


@all_eight
def test_attentions_hidden_states_and_tuples(name: str) -> None:
    if name == "multimodal":  # its sub-decoders give no attentions; transformers' own fails to add them up
        compare(name, build(name), output_hidden_states=True)
        return
    for return_dict in (True, False):
        compare(name, build(name), output_attentions=True, output_hidden_states=True, return_dict=return_dict)


@pytest.mark.parametrize("name", ["masked_lm", "fourier", "multimodal"])
def test_chunked_feed_forward(name: str) -> None:
    """Also where the queries' number is no multiple of the chunk size, which transformers refuses."""
    compare(name, build(name, chunk_size_feed_forward=1))
    model = build("masked_lm", chunk_size_feed_forward=7)
    for accelerated in (False, True):
        if accelerated:
            pk.accelerate(model)
        with pytest.raises(ValueError, match="multiple of the chunk size"):
            model(TEXT)


def test_resized_and_interpolated_inputs() -> None:
    larger = (torch.randn(2, 3, 14, 9),)
    compare("fourier", build("fourier"), larger)
    compare("learned", build("learned"), (torch.randn(2, 3, 15, 15),), interpolate_pos_encoding=True)


@pytest.mark.parametrize("name", ["masked_lm", "fourier"])
def test_masks(name: str) -> None:
    """Padding; an input masked as a whole, gradients included; and a mask that differs from query to query."""
    model = build(name)
    tokens = 12 if name == "masked_lm" else 144
    padding = torch.ones(2, tokens)
    padding[0, tokens // 2 :] = 0
    compare(name, model, attention_mask=padding)
    whole = padding.clone()
    whole[1] = 0
    compare(name, model, attention_mask=whole)
    free = torch.randn(2, 1, 10, tokens)
    compare(name, model, attention_mask=free)

    def gradients() -> Tensor:
        out = model(**arguments(name, make_inputs(name)), attention_mask=whole).logits
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), list(model.parameters()))])

    accelerated = gradients()
    pk.restore(model)
    same(accelerated, gradients())


@pytest.mark.parametrize("name", ["masked_lm", "fourier", "multimodal"])
def test_training(name: str) -> None:
    """Dropout has the same mean and spread; the same seed gives the same result; eval switches it off."""
    model = build(name, attention_probs_dropout_prob=0.3, num_blocks=1, num_self_attends_per_block=1)
    inputs = make_inputs(name)
    with torch.no_grad():
        draws = {}
        for accelerated in (False, True):
            if accelerated:
                pk.accelerate(model)
            model.train()
            draws[accelerated] = torch.stack([result(name, model, *inputs) for _ in range(40)])
        torch.manual_seed(3)
        first = result(name, model, *inputs)
        torch.manual_seed(3)
        assert torch.equal(first, result(name, model, *inputs))
        model.eval()
        assert torch.equal(result(name, model, *inputs), result(name, model, *inputs))
    (plain, fast), count = (draws[False], draws[True]), 40
    error = (plain.var(0) + fast.var(0)).div(count).sqrt()
    assert (fast.mean(0) - plain.mean(0)).div(error + 1e-6).square().mean() < 2.5
    assert 0.7 < fast.std(0).mean() / plain.std(0).mean() < 1.4


@all_eight
def test_save_and_load(name: str, tmp_path: Path) -> None:
    """Same keys, the original class in the configuration, safetensors; copies and pickles stay accelerated."""
    model = build(name)
    keys = list(model.state_dict())
    pk.accelerate(model)
    expected = result(name, model, *make_inputs(name))
    assert list(model.state_dict()) == keys
    if name != "base":
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert loaded.config.architectures == [type(model).__name__]
        assert type(model).__module__.startswith("transformers.")
        same(result(name, loaded, *make_inputs(name)), expected)
        pk.accelerate(loaded)
        same(result(name, loaded, *make_inputs(name)), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(isinstance(module, Accelerated) for module in twin.modules())
        same(result(name, twin, *make_inputs(name)), expected)


@all_eight
def test_half_precision(name: str) -> None:
    """bfloat16 weights, float16 weights, autocast, and back to float64, all after accelerating."""
    model = build(name)
    pk.accelerate(model)
    inputs = make_inputs(name)
    with torch.no_grad():
        expected = result(name, model, *inputs)
        scale = expected.abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = result(name, model, *inputs)
        assert (mixed.float() - expected).abs().max() < 0.1 * scale
        for dtype in (torch.bfloat16, torch.float16):
            half = result(name, copy.deepcopy(model).to(dtype), *(tensor.to(dtype) for tensor in inputs))
            assert half.dtype == dtype
            assert (half.float() - expected).abs().max() < 0.1 * scale
        double = result(name, model.double(), *(tensor.double() for tensor in inputs))
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), expected, rtol=1e-3, atol=1e-4)


def test_compile() -> None:
    model: Any = build("pixels", num_blocks=1, num_self_attends_per_block=1)
    model.decoder = None
    pk.accelerate(model)
    (image,) = make_inputs("pixels")
    with torch.no_grad():
        same(torch.compile(model, backend="eager")(image).last_hidden_state, model(image).last_hidden_state)
    torch._dynamo.reset()


def test_data_parallel(tmp_path: Path) -> None:
    """DistributedDataParallel finds a gradient for every parameter."""
    model = build("multimodal")
    pk.accelerate(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            result("multimodal", parallel, *make_inputs("multimodal")).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


class LowRank(nn.Linear):
    """What an adapter makes of a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


def wrap(model: Any) -> None:
    model.perceiver.encoder.cross_attention.attention.self.query.__class__ = LowRank
    model.perceiver.encoder.self_attends[0].mlp.dense2.__class__ = LowRank
    layer = model.perceiver.decoder.decoder.decoding_cross_attention
    parametrize.register_parametrization(layer.attention.output.dense, "weight", nn.Tanh())
    layer.mlp.dense1.register_forward_hook(lambda *values: values[-1] * 2)


def test_wrapped_layers_are_left_alone() -> None:
    model = build("fourier")
    wrap(model)
    report = pk.accelerate(model)
    cross, decoder = "perceiver.encoder.cross_attention", "perceiver.decoder.decoder.decoding_cross_attention"
    assert set(report.left) == {
        "perceiver.input_preprocessor",
        f"{cross}.attention",
        "perceiver.encoder.self_attends.0.mlp",
        f"{decoder}.attention",
        f"{decoder}.mlp",
    }
    assert decoder not in report.swapped and cross in report.swapped
    asked = "must be Linear, not wrapped, and without hooks"
    assert report.left[f"{cross}.attention"] == f"query is LowRank, {asked}"
    assert report.left[f"{decoder}.mlp"] == f"dense1 is Linear, {asked}"
    compare("fourier", model)


@pytest.mark.parametrize("name", ["fourier", "flow"])
def test_wrapped_after_accelerating(name: str) -> None:
    """What happens to layers later is noticed at the next call; so are hooks."""
    plain = build(name)
    fast = copy.deepcopy(plain)
    pk.accelerate(fast)
    for model in (plain, fast):
        wrap(model)
    with torch.no_grad():
        same(result(name, fast, *make_inputs(name)), result(name, plain, *make_inputs(name)))


@pytest.mark.parametrize("name", ["fourier", "flow"])
def test_hooks_are_called(name: str) -> None:
    """Those on any module inside a swapped one, too, as often and with the same results as before."""

    def calls(model: nn.Module) -> list[tuple[str, Tensor]]:
        seen: list[tuple[str, Tensor]] = []
        for path, module in model.named_modules():
            if any(word in path for word in ("attention", "mlp", "final_layer")):
                module.register_forward_hook(lambda _, __, out, path=path: seen.append((path, out)))  # type: ignore[misc]
        with torch.no_grad():
            result(name, model, *make_inputs(name))
        return seen

    plain = build(name)
    fast = copy.deepcopy(plain)
    pk.accelerate(fast)
    same(calls(fast), calls(plain))


@pytest.mark.parametrize("mask_prob", [0.0, 0.5, 1.0])
def test_masked_modality(mask_prob: float) -> None:
    """A modality whose tokens are replaced at random; the same generator gives the same tokens."""
    model: Any = build("multimodal")
    model.perceiver.input_preprocessor.mask_probs = {"image": mask_prob}
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        out = result("multimodal", model, *make_inputs("multimodal"))
        parameters = [*model.perceiver.input_preprocessor.parameters()]
        gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        results.append([out, *(g for g in gradients if g is not None)])
        pk.accelerate(model)
    same(results[1], results[0])


def test_quantised_layers() -> None:
    model = torch.ao.quantization.quantize_dynamic(build("masked_lm"), {nn.Linear}, torch.qint8)
    report = pk.accelerate(model)
    assert report.left and not any("attends" in name for name in report.swapped)
    compare("masked_lm", model)


def test_other_activations() -> None:
    for activation in ("gelu_new", "gelu_pytorch_tanh", "relu"):
        model = build("masked_lm", hidden_act=activation)
        report = pk.accelerate(model)
        assert any("activation" in why for why in report.left.values()) == (activation == "relu")
        compare("masked_lm", model)


def test_biases_of_keys_and_values_are_apart() -> None:
    model = build("fourier")
    inner = model.perceiver.encoder.cross_attention.attention.self
    inner.key = torch.nn.Linear(inner.key.in_features, inner.key.out_features, bias=False)
    torch.nn.init.normal_(inner.value.bias)
    compare("fourier", model)


def test_more_latents_than_inputs() -> None:
    """A layer of its own broadcasts inputs of batch 1."""
    plain = build("fourier").perceiver.encoder.cross_attention
    fast = copy.deepcopy(plain)
    pk.accelerate(fast)
    width = plain.attention.self.key.in_features
    latents, inputs = torch.randn(4, 6, plain.attention.self.query.in_features), torch.randn(1, 9, width)
    with torch.no_grad():
        same(fast(latents, inputs=inputs), plain(latents, inputs=inputs))


def test_operators_build_unbuilt_tokens() -> None:
    model = build("fourier")
    pk.accelerate(model)
    (image,) = make_inputs("fourier")
    tokens, *_ = model.perceiver.input_preprocessor(image)
    array = tokens.materialize()
    for found, expected in ((tokens * 0.5, array * 0.5), (2 - tokens, 2 - array), (-tokens, -array)):
        assert torch.equal(found, expected)
    assert [part.shape for part in tokens] == [part.shape for part in array]


def test_unbuilt_tokens_are_an_array_to_others() -> None:
    """A decoder of one's own, that computes with the preprocessed inputs, gets their values."""

    class Mean(theirs.PerceiverProjectionDecoder):
        num_query_channels = 0

        def decoder_query(self, inputs: Any, *_: Any, **__: Any) -> Any:
            assert inputs.ndim == inputs.dim() == 3 and len(inputs) == inputs.shape[0] == inputs.size(0)
            self.seen = torch.cat([inputs[:, :2], inputs.mean(1, keepdim=True)], 1)
            return None

        def forward(self, query: Any, z: Tensor, **_: Any) -> Any:
            return theirs.PerceiverDecoderOutput(logits=z.mean(1) + self.seen.sum())

    model = build("fourier")
    decoder = Mean(model.config)
    model.perceiver.decoder = decoder
    compare("fourier", model)


@all_eight
def test_restore(name: str) -> None:
    model = build(name)
    classes = [type(module) for module in model.modules()]
    expected = result(name, model, *make_inputs(name))
    report = pk.accelerate(model)
    again = pk.accelerate(model)
    assert report == again
    changed = [type(module) for module in model.modules()]
    assert sum(a is not b for a, b in zip(classes, changed, strict=True)) == len(report.swapped)
    assert str(report).count("accelerated") == len(report.swapped)
    assert pk.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(result(name, model, *make_inputs(name)), expected)
    assert pk.restore(model) is model


def test_failed_swap_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("fourier")
    classes = [type(module) for module in model.modules()]
    planned = ours.plan(model)
    assert planned

    def broken(_: nn.Module) -> Iterator[Any]:
        return iter([*planned, planned[0]])  # the second time its class does not fit any more

    monkeypatch.setattr(ours, "plan", broken)
    with pytest.raises(TypeError, match=r"is a Perceiver\w+, which Perceiver\w+ is not for"):
        pk.accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    monkeypatch.undo()
    pk.accelerate(model)
    accelerated = [type(module) for module in model.modules()]
    monkeypatch.setattr(ours, "plan", broken)
    with pytest.raises(TypeError):
        pk.accelerate(model)
    assert [type(module) for module in model.modules()] == accelerated


def test_another_version_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where methods take other arguments, as with the head masks of old, nothing is swapped."""
    model = build("masked_lm")
    monkeypatch.setattr(theirs.PerceiverLayer, "forward", lambda self, hidden_states, attention_mask, head_mask: None)
    with pytest.raises(ValueError, match=r"PerceiverLayer.forward takes self, .*; it takes self, .*, head_mask"):
        pk.accelerate(model)
    assert not any(isinstance(module, Accelerated) for module in model.modules())


def test_bad_input() -> None:
    for function in (pk.accelerate, pk.restore):
        with pytest.raises(TypeError, match=r"model is a str, must be a torch.nn.Module"):
            function("PerceiverForMaskedLM")  # type: ignore[operator]
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    with pytest.raises(ValueError, match=r"model is a torch.*Sequential of GELU, Linear, must be or hold a"):
        pk.accelerate(model)
    from transformers.activations import NewGELUActivation

    with pytest.raises(ValueError, match=r"NewGELUActivation of nothing, must be or hold a Perceiver of transformers"):
        pk.accelerate(NewGELUActivation())


def test_another_package_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no reason not to accelerate what is known beside it."""
    monkeypatch.setitem(integrations.INTEGRATIONS, "theirs", "perceiver_kernels.integrations.nowhere")
    other = type("Perceiver", (nn.Identity,), {"__module__": "theirs.models"})()
    with pytest.raises(ValueError, match="this theirs is none of those: No module named"):
        pk.accelerate(other)
    assert pk.accelerate(nn.Sequential(other, build("masked_lm"))).swapped
