"""Several grids and arrays of tokens under one softmax, against the same tokens written out; and pk.CrossAttention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_parity, randomise
from torch import Tensor, nn

from perceiver_kernels import CrossAttention, FourierGrid, GridTokens

VIDEO = FourierGrid((2, 3, 4), num_bands=2, max_freq=(2.0, 3.0, 4.0), order="grouped", precision="float32")  # 15
AUDIO = FourierGrid((9,), num_bands=3, max_freq=9.0)  # 7 features
CHANNELS = 22
TOKENS = 24 + 9 + 5
HEADS = 2

# Data of the two grids, their constant channels, and an array of tokens.
SHAPES = ((2, 2, 3, 4, 3), (4,), (2, 9, 6), (9,), (2, 5, CHANNELS))


def make_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES)


def segments(video: Tensor, embedding: Tensor, audio: Tensor, padding: Tensor, tokens: Tensor) -> list[Any]:
    return [GridTokens(VIDEO, video, embedding), GridTokens(AUDIO, audio, padding), tokens]


def written_out(video: Tensor, embedding: Tensor, audio: Tensor, padding: Tensor, tokens: Tensor) -> Tensor:
    def encoded(data: Tensor, grid: FourierGrid, constant: Tensor) -> Tensor:
        features = grid.encode(dtype=data.dtype).expand(len(data), -1, -1)
        return torch.cat((data.flatten(1, -2), features, constant.expand(*features.shape[:2], -1)), -1)

    return torch.cat((encoded(video, VIDEO, embedding), encoded(audio, AUDIO, padding), tokens), 1)


def make_module(**options: Any) -> CrossAttention:
    module = CrossAttention(10, CHANNELS, **{"heads": HEADS, "head_dim": 5, "qkv_bias": True, **options})
    randomise(module)
    return module


def make_mask(whole_input: bool) -> Tensor:
    mask = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(4)) > 0.5
    mask[0, :24] = False  # a segment without any token
    mask[:, 30] = True
    if whole_input:
        mask[0] = False
    return mask


class PlainAttention(nn.Module):
    """The same by its formula, with the parameters of a CrossAttention."""

    def __init__(self, module: CrossAttention) -> None:
        super().__init__()
        self.module = module

    def attend(self, latents: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        module = self.module
        tokens = tokens if module.norm_context is None else module.norm_context(tokens)
        q = module.fn.to_q(module.norm(latents)).unflatten(2, (HEADS, -1)).transpose(1, 2)
        k, v = module.fn.to_kv(tokens).unflatten(2, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = module.head_dim**-0.5 * q @ k.transpose(2, 3)
        if mask is not None:
            fill = -torch.inf if module.masked_rows == "zeros" else torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask[:, None, None], fill)
        out = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)
        return module.fn.to_out(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"context_norm": False}, {"qkv_bias": False}, {"masked_rows": "mean", "mask": True}, {"mask": False}],
    ids=["plain", "no_norm", "no_bias", "mean", "mask"],
)
def test_parity(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Results, and gradients of data, paddings, embeddings and parameters."""
    options = dict(options)
    mask = make_mask(options.pop("mask")) if "mask" in options else None
    module = make_module(**options)
    plain = PlainAttention(module)
    ours = PlainAttention(module)
    latents = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert_parity(
        ours,
        plain,
        (latents, *make_inputs()),
        dtype,
        call_ours=lambda latents, *rest: module(latents, segments(*rest), mask=mask),
        call_theirs=lambda latents, *rest: plain.attend(latents, written_out(*rest), mask),
    )


def test_materialize() -> None:
    inputs = make_inputs()
    for segment, size in zip(segments(*inputs)[:2], (24, 9), strict=True):
        assert segment.shape == segment.materialize().shape == (2, size, CHANNELS)
    video, audio, _ = segments(*inputs)
    torch.testing.assert_close(
        torch.cat((video.materialize(), audio.materialize(), inputs[4]), 1), written_out(*inputs)
    )


def test_one_segment_needs_no_sequence() -> None:
    module = make_module().double()
    latents, video = torch.randn(2, 6, 10, dtype=torch.float64), segments(*make_inputs())[0]
    torch.testing.assert_close(module(latents, video), module(latents, video.materialize()))
    assert module.explain(latents, video) == "path: segments, merged\n  context[0], (2, 24, 22): separable"


def test_explain_names_the_path_of_each_segment() -> None:
    module, (video, audio, tokens) = make_module(), segments(*make_inputs())
    text = module.explain(torch.randn(2, 6, 10), [video, tokens]).split("\n")
    assert text == [
        "path: segments, merged",
        "  context[0], (2, 24, 22): separable",
        "  context[1], (2, 5, 22): absorbed into its channels",
    ]
    module.fn.to_kv.register_forward_hook(lambda *_: None)
    assert "to_kv or norm_context has been replaced or hooked into" in module.explain(torch.randn(2, 6, 10), [audio])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_an_array_of_another_dtype_than_the_module(dtype: torch.dtype) -> None:
    module, tokens = make_module(), make_inputs()[4].to(dtype)
    latents = torch.randn(2, 6, 10)
    torch.testing.assert_close(module(latents, [tokens]), module(latents, tokens.float()))


def test_padded_again() -> None:
    video = segments(*make_inputs())[0]
    again = video.padded(torch.ones(2, dtype=torch.float64))
    assert isinstance(again, GridTokens)
    expected = torch.cat((video.materialize(), torch.ones(2, 24, 2)), 2)
    torch.testing.assert_close(again.materialize(), expected)


def test_values_of_another_width() -> None:
    module, inputs = make_module(head_dim_v=8).double(), make_inputs()
    latents = torch.randn(2, 6, 10, dtype=torch.float64)
    written = module(latents, written_out(*inputs))
    torch.testing.assert_close(module(latents, segments(*inputs)), written)


def test_order_does_not_matter() -> None:
    module, inputs = make_module().double(), make_inputs()
    latents = torch.randn(2, 6, 10, dtype=torch.float64)
    parts = segments(*inputs)
    torch.testing.assert_close(module(latents, parts), module(latents, parts[::-1]))


def test_dropout_has_the_right_mean() -> None:
    """Over many draws dropout's results average to the result without it, weights of segments and biases included."""
    module = make_module(dropout=0.4).double()
    latents = torch.randn(1, 6, 10, dtype=torch.float64)
    parts = segments(*make_inputs())
    with torch.no_grad():
        draws = torch.stack([module(latents, parts) for _ in range(200)])
        expected = module.eval()(latents, parts)
    deviation = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert draws.std(0).min() > 0
    assert deviation.square().mean() < 1.5


def test_long_axis_and_replaced_layers_take_dense_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid whose table would be as large as its scores, and a module with hooks, get their tokens written out."""
    module, inputs = make_module().double(), make_inputs()
    latents = torch.randn(2, 6, 10, dtype=torch.float64)
    expected = module(latents, segments(*inputs))
    monkeypatch.setattr("perceiver_kernels.modules.folding.LONGEST_SINGLE_AXIS", 5)
    torch.testing.assert_close(module(latents, segments(*inputs)), expected)
    seen = []
    module.fn.to_kv.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(latents, segments(*inputs)), expected)
    assert seen


def test_autocast_and_half() -> None:
    module, inputs = make_module(), [tensor.float() for tensor in make_inputs()]
    latents = torch.randn(2, 6, 10)
    expected = module(latents, segments(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(latents, segments(*inputs))
    half = module.bfloat16()(latents.bfloat16(), segments(*(tensor.bfloat16() for tensor in inputs)))
    assert mixed.dtype == half.dtype == torch.bfloat16
    for actual in (mixed, half):
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


def grid_tokens(data: Tensor | None = None, constant: Tensor | None = None) -> Callable[[], Any]:
    return lambda: GridTokens(AUDIO, torch.randn(2, 9, 6) if data is None else data, constant)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (grid_tokens(torch.randn(2, 8, 6)), r"data has shape \(2, 8, 6\), must be \(batch, 9, channels\)"),
        (grid_tokens(torch.ones(2, 9, 6, dtype=torch.int64)), "data has dtype torch.int64, must be floating-point"),
        (lambda: GridTokens(AUDIO), "data is a NoneType, must be a tensor"),
        (grid_tokens(constant=torch.ones(1, 9)), r"constant has shape \(1, 9\), must be \(channels,\)"),
        (lambda: [], "context is an empty sequence, must have at least one segment"),
        (lambda: [torch.randn(2, 5, CHANNELS), "text"], r"context\[1\] is a str, must be GridTokens or a tensor"),
        (
            lambda: [torch.randn(2, 5, 8)],
            rf"context\[0\] has tokens of shape \(2, 5, 8\), must be \(2, tokens, {CHANNELS}\)",
        ),
        (
            lambda: [torch.randn(2, 5, CHANNELS), torch.randn(3, 5, CHANNELS)],
            rf"context\[1\] has tokens of shape \(3, 5, {CHANNELS}\), must be \(2, tokens",
        ),
        (
            lambda: [torch.ones(2, 5, CHANNELS, dtype=torch.int64)],
            r"context\[0\] has dtype torch.int64, must be floating",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module()(torch.randn(2, 6, 10), make())


def test_bad_grid_and_mask() -> None:
    module, parts, latents = make_module(), [torch.randn(2, 5, CHANNELS)], torch.randn(2, 6, 10)
    with pytest.raises(ValueError, match="grid is given, must be None for segments"):
        module(latents, parts, grid=AUDIO)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\), but must be \(2, 5\)"):
        module(latents, parts, mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="latents has batch 3, but context has 2"):
        module(torch.randn(3, 6, 10), parts)


def test_inverted_attention_builds_the_tokens() -> None:
    module, inputs = make_module(heads=1).double(), make_inputs()
    latents = torch.randn(2, 6, 10, dtype=torch.float64)
    expected = module(latents, written_out(*inputs), inverted=True)
    torch.testing.assert_close(module(latents, segments(*inputs), inverted=True), expected)
