"""Published models: their parameters counted, and the official ones against transformers' with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parity import randomise
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels import presets
from perceiver_kernels.modules.official import OfficialPerceiver

# Of the last two, transformers has the published sizes only of its own making; these are what its classes count.
KNOWN = {
    "imagenet_fourier": 48_440_627,
    "imagenet_learned": 62_255_848,
    "imagenet_conv": 48_646_522,
    "optical_flow": 41_057_134,
    "multimodal_autoencoding": 19_858_855,
    "language_model": 201_108_230,
}
# The released checkpoints' arguments where they are not transformers' defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "imagenet_fourier": {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6},
    "optical_flow": {
        "num_latents": 2048,
        "d_latents": 512,
        "num_blocks": 1,
        "num_self_attends_per_block": 24,
        "num_self_attention_heads": 16,
    },
    "multimodal_autoencoding": {
        "num_latents": 784,
        "d_latents": 512,
        "num_blocks": 1,
        "num_self_attends_per_block": 8,
        "num_labels": 700,
    },
    "language_model": {"qk_channels": 256, "v_channels": 1280},
}
CONFIGS["imagenet_conv"] = CONFIGS["imagenet_fourier"]
CONFIGS["imagenet_learned"] = CONFIGS["imagenet_fourier"] | {"image_size": 224}
CLASSES = {
    "imagenet_fourier": "PerceiverForImageClassificationFourier",
    "imagenet_learned": "PerceiverForImageClassificationLearned",
    "imagenet_conv": "PerceiverForImageClassificationConvProcessing",
    "optical_flow": "PerceiverForOpticalFlow",
    "multimodal_autoencoding": "PerceiverForMultimodalAutoencoding",
    "language_model": "PerceiverForMaskedLM",
}
SMALL_CONFIG: dict[str, Any] = {"num_latents": 6, "num_self_attends_per_block": 2, "num_blocks": 2}


def transformers_model(name: str, **arguments: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    heads = {} if name == "language_model" else {"num_cross_attention_heads": 1}
    labels = {"num_labels": 1000} if name.startswith("imagenet") else {}
    config = transformers.PerceiverConfig(**heads | labels | arguments, attention_probs_dropout_prob=0.0)
    return getattr(transformers, CLASSES[name])(config).eval()


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert presets.PRESETS[name].num_parameters == KNOWN[name]
    with torch.device("meta"):
        theirs = transformers_model(name, **CONFIGS[name])
    assert sum(parameter.numel() for parameter in theirs.parameters()) == KNOWN[name]


PAPER = ["imagenet_paper", "audioset_paper", "audioset_video_paper", "cifar10_study", "mnist_study"]


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_as_many_as_perceiver_pytorch_has(name: str) -> None:
    peer = pytest.importorskip("perceiver_pytorch")
    preset = presets.PRESETS[name]
    with torch.device("meta"):
        theirs = peer.Perceiver(**preset.arguments)
    assert preset.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())


def test_every_preset_is_tested() -> None:
    assert {*KNOWN, *PAPER, "modelnet40_paper"} == set(presets.PRESETS)
    for name, preset in presets.PRESETS.items():
        assert preset.name == name
        assert getattr(pk.presets, name) is preset


SMALL: dict[str, dict[str, Any]] = {
    "imagenet_paper": {"num_latents": 4, "latent_dim": 16, "latent_dim_head": 4, "depth": 2},
    "audioset_paper": {"num_latents": 4, "latent_dim": 16, "latent_dim_head": 4},
    "audioset_video_paper": {"num_latents": 4, "latent_dim": 16, "latent_dim_head": 4},
    "modelnet40_paper": {"num_latents": 4, "latent_dim": 16, "latent_dim_head": 4},
    "cifar10_study": {"num_latents": 4, "latent_dim": 16},
    "mnist_study": {"num_latents": 4, "latent_dim": 16},
}


@pytest.mark.parametrize("name", SMALL)
def test_reads_an_input_of_the_published_shape(name: str) -> None:
    """With fewer latents, all of which see every token."""
    preset = presets.PRESETS[name]
    assert isinstance(preset.input_shape, tuple)
    with torch.no_grad():
        out = preset(**SMALL[name])(torch.rand(preset.input_shape))
    assert out.ndim == 2
    assert out.isfinite().all()


# --- the same weights in transformers ---------------------------------------------------------------------------------


def layer_weights(attention: Any, mlp_holder: Any) -> dict[str, dict[str, Tensor]]:
    """transformers' PerceiverLayer as our attention and MLP."""
    inner = attention.self
    parameters: dict[str, Any] = {
        "norm": inner.layernorm1,
        "fn.to_q": inner.query,
        "fn.to_out": attention.output.dense,
    }
    if isinstance(inner.layernorm2, nn.LayerNorm):
        parameters["norm_context"] = inner.layernorm2
    weights = {f"{name}.{key}": value for name, module in parameters.items() for key, value in named(module)}
    for key in ("weight", "bias"):
        weights[f"fn.to_kv.{key}"] = torch.cat((getattr(inner.key, key), getattr(inner.value, key)))
    mlp = {"norm": mlp_holder.layernorm, "fn.net.0": mlp_holder.mlp.dense1, "fn.net.2": mlp_holder.mlp.dense2}
    return {
        "attention": weights,
        "mlp": {f"{name}.{key}": value for name, module in mlp.items() for key, value in named(module)},
    }


def named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.state_dict().items()]


def load(ours: Any, theirs: Any, decoder: Any) -> None:
    """Encoder, blocks and decoder; decoder is transformers' PerceiverBasicDecoder."""
    perceiver = theirs.perceiver
    ours.encoder.latents.data = perceiver.embeddings.latents.data.clone()
    layers = [(ours.encoder.attention, ours.encoder.mlp, perceiver.encoder.cross_attention)]
    layers += [(*pair, layer) for pair, layer in zip(ours.blocks.layers, perceiver.encoder.self_attends, strict=True)]
    layers.append((ours.decoder.attention, ours.decoder.mlp, decoder.decoding_cross_attention))
    for attention, mlp, layer in layers:
        weights = layer_weights(layer.attention, layer)
        attention.load_state_dict(weights["attention"])
        mlp.load_state_dict(weights["mlp"])
    ours.decoder.final.load_state_dict(decoder.final_layer.state_dict())


@pytest.fixture
def exact_positions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers' positions are float32 and its frequencies of the default dtype, whatever the data's."""

    def linear_positions(shape: Any, output_range: Any = (-1.0, 1.0), device: Any = None) -> Tensor:
        axes = (torch.linspace(*output_range, size, dtype=torch.float64, device=device) for size in shape)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)

    name = "transformers.models.perceiver.modeling_perceiver.build_linear_positions"
    pytest.importorskip("transformers")
    monkeypatch.setattr(name, linear_positions)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.usefixtures("exact_positions")
def test_classifier_matches_transformers() -> None:
    sizes = {"num_latents": 6, "latent_dim": 32, "layers": 2, "blocks": 2}
    theirs = transformers_model("imagenet_fourier", **SMALL_CONFIG, d_latents=32).double()
    randomise(theirs)
    ours = presets.imagenet_fourier(**sizes).double()
    decoder = theirs.perceiver.decoder.decoder
    load(ours, theirs, decoder)
    ours.queries.embeddings.data = decoder.output_position_encodings.position_embeddings.data.clone()
    image = torch.rand(1, 224, 224, 3, dtype=torch.float64)
    expected = theirs(inputs=image.movedim(-1, 1)).logits
    torch.testing.assert_close(ours(image), expected)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_language_model_matches_transformers(masked: bool) -> None:
    theirs = transformers_model(
        "language_model",
        **SMALL_CONFIG | {"num_blocks": 1},
        d_latents=32,
        d_model=24,
        qk_channels=256,
        v_channels=32,
        max_position_embeddings=12,
    ).double()
    randomise(theirs)
    ours = presets.language_model(length=12, channels=24, num_latents=6, latent_dim=32, layers=2).double()
    load(ours, theirs, theirs.perceiver.decoder)
    text = theirs.perceiver.input_preprocessor
    ours.inputs.embeddings.load_state_dict(text.embeddings.state_dict())
    ours.inputs.positions.load_state_dict(text.position_embeddings.state_dict())
    embeddings = theirs.perceiver.decoder.output_position_encodings.position_embeddings
    ours.queries.embeddings.data = embeddings.data.clone()
    ours.bias.data = theirs.embedding_decoder.bias.data.clone()
    tokens = torch.randint(262, (2, 12))
    mask = torch.rand(2, 12) > 0.4 if masked else None
    expected = theirs(inputs=tokens, attention_mask=mask).logits
    torch.testing.assert_close(ours(tokens, mask), expected)
    chosen = torch.tensor([3, 0, 11])
    torch.testing.assert_close(ours(tokens, mask, chosen), expected[:, chosen])


@torch.no_grad()
@pytest.mark.usefixtures("exact_positions")
def test_optical_flow_matches_transformers() -> None:
    """Its queries are on a grid and never built; some of them decoded give what all of them give there."""
    theirs = transformers_model(
        "optical_flow", **SMALL_CONFIG | {"num_blocks": 1}, d_latents=32, num_self_attention_heads=16, train_size=[6, 9]
    ).double()
    randomise(theirs)
    ours = presets.optical_flow(shape=(6, 9), num_latents=6, latent_dim=32, layers=2).double()
    load(ours, theirs, theirs.perceiver.decoder.decoder)
    ours.inputs.projection.load_state_dict(theirs.perceiver.input_preprocessor.conv_after_patches.state_dict())
    frames = torch.rand(1, 2, 27, 6, 9, dtype=torch.float64)
    data = frames.permute(0, 3, 4, 1, 2).flatten(3)
    expected = theirs(inputs=frames).logits.flatten(1, 2)
    torch.testing.assert_close(ours(data), expected)
    chosen = torch.tensor([3, 0, 53])
    torch.testing.assert_close(ours(data, indices=chosen), ours(data)[:, chosen])


def make_autoencoder() -> Any:
    return presets.multimodal_autoencoding(
        frames=2, size=8, samples=64, classes=5, num_latents=6, latent_dim=32, layers=2
    )


@torch.no_grad()
@pytest.mark.usefixtures("exact_positions")
def test_autoencoder_matches_transformers() -> None:
    """Three modalities under one softmax, their paddings and mask tokens; and the label's output."""
    theirs = transformers_model(
        "multimodal_autoencoding",
        **SMALL_CONFIG | {"num_blocks": 1},
        d_latents=32,
        num_frames=2,
        image_size=8,
        audio_samples_per_frame=32,
        samples_per_patch=16,
        output_shape=[1, 2, 8, 8],
        num_labels=5,
    ).double()
    randomise(theirs)
    ours = make_autoencoder().double()
    decoder = theirs.perceiver.decoder
    load(ours, theirs, decoder.decoder)
    inputs = theirs.perceiver.input_preprocessor
    for name, head in theirs.perceiver.output_postprocessor.modalities.items():
        ours.heads[name].load_state_dict(head.classifier.state_dict())
        ours.inputs.padding[name].data = inputs.padding[name].data[0].clone()
        ours.inputs.mask[name].data = inputs.mask[name].data[0].clone()
        ours.queries[name].parts[1].embeddings.data = decoder.padding[name].data.clone()
    label = decoder.modalities["label"].decoder.output_position_encodings.position_embeddings
    ours.queries["label"].parts[0].embeddings.data = label.data.clone()
    video, audio = (torch.rand(shape, dtype=torch.float64) for shape in ((1, 2, 3, 8, 8), (1, 64, 1)))
    # transformers decodes chosen points only, and puts them at -1 + 2 i / size, where the encoder has linspace(-1, 1).
    points = {"image": torch.arange(128), "audio": torch.arange(4), "label": None}
    inputs_of_all = {"image": video, "audio": audio, "label": torch.zeros(1, 5)}
    expected = theirs(inputs=inputs_of_all, subsampled_output_points=points).logits
    patches = video.unflatten(4, (2, 4)).unflatten(3, (2, 4)).permute(0, 1, 3, 5, 4, 6, 2).flatten(4)
    out = ours({"image": patches, "audio": audio.reshape(1, 4, 16)})
    torch.testing.assert_close(out["label"], expected["label"].reshape(1, 1, 5))


def test_autoencoder_decodes_some_as_all() -> None:
    ours = make_autoencoder().double()
    randomise(ours)
    data = {"image": torch.rand(2, 2, 2, 2, 48).double(), "audio": torch.rand(2, 4, 16).double()}
    whole = ours(data)
    assert {name: tuple(out.shape) for name, out in whole.items()} == {
        "audio": (2, 4, 16),
        "image": (2, 128, 3),
        "label": (2, 1, 5),
    }
    chosen = torch.tensor([5, 127])
    torch.testing.assert_close(ours(data, {"image": chosen})["image"], whole["image"][:, chosen])
    # Joined and one after the other, the last two maps give the same.
    ours.heads["image"].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(ours(data)["image"], whole["image"])


def test_gradients_of_a_streamed_decoder() -> None:
    """Queries on a grid and the same queries written out have the same gradients."""
    model = presets.optical_flow(shape=(4, 5), num_latents=3, latent_dim=16, layers=1).double()
    assert isinstance(model, OfficialPerceiver)
    randomise(model)
    data = torch.rand(2, 4, 5, 54, dtype=torch.float64)
    everything = torch.arange(20)
    results = []
    for indices in (None, everything):
        out = model(data, indices=indices)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("build", "data", "message"),
    [
        (lambda: presets.imagenet_fourier(size=8, num_latents=2, latent_dim=16, layers=1),
         torch.zeros(1, 8, 9, 3), r"data has shape \(1, 8, 9, 3\), must be \(batch, 8, 8, 3\)"),
        (lambda: presets.imagenet_fourier(size=8, num_latents=2, latent_dim=16, layers=1),
         torch.zeros(1, 8, 8, 3, dtype=torch.uint8), r"data has dtype torch\.uint8, must be floating-point"),
        (lambda: presets.imagenet_conv(size=8, num_latents=2, latent_dim=16, layers=1),
         torch.zeros(1, 8, 9, 3), r"image has shape \(1, 8, 9, 3\), must be \(batch, 8, 8, 3\)"),
        (lambda: presets.imagenet_learned(size=8, num_latents=2, latent_dim=16, layers=1),
         torch.zeros(1, 8, 9, 3), r"image has shape \(1, 8, 9, 3\), must be \(batch, 8, 8, 3\)"),
        (lambda: presets.language_model(length=6, channels=8, num_latents=2, latent_dim=16, layers=1, qk=8),
         torch.zeros(1, 7, dtype=torch.int64), r"tokens has shape \(1, 7\), must be \(batch, n\), n from 1 to 6"),
        (make_autoencoder, {"image": torch.zeros(1, 2, 2, 2, 48)}, r"modalities are \['image'\], must be \['audio', "),
    ],
)  # fmt: skip
def test_bad_input(build: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(data)


@pytest.mark.parametrize("name", ["imagenet_conv", "imagenet_learned"])
def test_other_inputs_train(name: str) -> None:
    model = presets.PRESETS[name](size=16, num_latents=3, latent_dim=16, layers=1, blocks=2, classes=5)
    out = model(torch.rand(2, 16, 16, 3))
    assert out.shape == (2, 5)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
