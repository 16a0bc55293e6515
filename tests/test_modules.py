"""CrossAttention, SelfAttention and FeedForward, one at a time, and the map for old checkpoints."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import PATHS, assert_parity, force_path, randomise
from torch import Tensor, nn

from perceiver_kernels.encodings import FourierGrid
from perceiver_kernels.modules import CrossAttention, FeedForward, SelfAttention, upgrade_state_dict

QUERY_DIM = 12
GRIDS = {
    "1_axis": FourierGrid((7,), num_bands=3, max_freq=6.0),
    "2_axes": FourierGrid((4, 5), num_bands=3, max_freq=8.0),
    "3_axes": FourierGrid((2, 3, 4), num_bands=2, max_freq=4.0),
}
GRID = GRIDS["2_axes"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every path in turn."""
    force_path(monkeypatch, request.param)
    return request.param


def make_inputs(grid: FourierGrid = GRID, batch: int = 2, latents_batch: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and raw data of three channels, in float64."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(latents_batch, 6, QUERY_DIM, generator=generator, dtype=torch.float64)
    return latents, torch.randn(batch, *grid.shape, 3, generator=generator, dtype=torch.float64)


def make_mask(grid: FourierGrid = GRID, batch: int = 2) -> Tensor:
    """Hide about half the tokens of every input, but none at position 1 of the last axis."""
    mask = torch.rand(batch, *grid.shape, generator=torch.Generator().manual_seed(6)) > 0.5
    mask[..., 1] = True
    return mask


def make_module(grid: FourierGrid = GRID, **options: Any) -> CrossAttention:
    torch.manual_seed(0)
    module = CrossAttention(QUERY_DIM, 3 + grid.num_channels, **{"heads": 2, "head_dim": 5, **options})
    randomise(module)
    return module


def dense_tokens(data: Tensor, grid: FourierGrid = GRID) -> Tensor:
    """The data with its features written out."""
    features = grid.encode(dtype=data.dtype)
    return torch.cat((data.flatten(1, -2), features.expand(len(data), -1, -1)), dim=-1)


class PlainCrossAttention(nn.Module):
    """CrossAttention by its formula, on dense tokens, with the parameters of `module`."""

    def __init__(self, module: CrossAttention) -> None:
        super().__init__()
        self.fn, self.norm, self.norm_context = copy.deepcopy((module.fn, module.norm, module.norm_context))
        self.heads, self.head_dim = module.heads, module.head_dim

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = context if self.norm_context is None else self.norm_context(context)
        q, k, v = (
            part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for part in (self.fn.to_q(self.norm(latents)), *self.fn.to_kv(tokens).chunk(2, dim=-1))
        )
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.flatten(1)[:, None, None], -torch.finfo(scores.dtype).max)
        return self.fn.to_out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def peer_cross_attention(module: CrossAttention) -> nn.Module:
    """perceiver-pytorch's pre-norm cross-attention with the parameters of `module`."""
    peer = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    attention = peer.Attention(module.query_dim, module.context_dim, heads=module.heads, dim_head=module.head_dim)
    wrapped = peer.PreNorm(module.query_dim, attention, context_dim=module.context_dim)
    wrapped.load_state_dict(module.state_dict(), strict=True)
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("latents_batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_cross_attention_matches_peer(
    grid: FourierGrid, masked: bool, latents_batch: int, dtype: torch.dtype, path: str
) -> None:
    ours = make_module(grid)
    theirs = peer_cross_attention(ours)
    mask = make_mask(grid) if masked else None
    assert_parity(
        ours,
        theirs,
        make_inputs(grid, latents_batch=latents_batch),
        dtype,
        call_ours=lambda latents, data: ours(latents, data, grid=grid, mask=mask),
        call_theirs=lambda latents, data: theirs(
            latents.expand(2, -1, -1), context=dense_tokens(data, grid), mask=mask
        ),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_inverted_matches_peer(masked: bool) -> None:
    ours = make_module()
    theirs = peer_cross_attention(ours)
    mask = make_mask() if masked else None
    if mask is not None:
        mask[0] = False
    assert_parity(
        ours,
        theirs,
        make_inputs(),
        torch.float64,
        call_ours=lambda latents, data: ours(latents, data, grid=GRID, mask=mask, inverted=True),
        call_theirs=lambda latents, data: theirs(
            latents.expand(2, -1, -1), context=dense_tokens(data), mask=mask, inverted_attention=True
        ),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"context_norm": False},
        {"query_norm": False},
        {"qkv_bias": True},
        {"qkv_bias": True, "context_norm": False, "out_bias": False},
        {"eps": 0.1},
        {"heads": 1, "head_dim": 9},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], path: str) -> None:
    ours = make_module(**options)
    theirs = PlainCrossAttention(ours)
    mask = make_mask()
    assert_parity(
        ours,
        theirs,
        make_inputs(),
        torch.float64,
        call_ours=lambda latents, data: ours(latents, data, grid=GRID, mask=mask),
        call_theirs=lambda latents, data: theirs(latents, dense_tokens(data), mask),
    )


@pytest.mark.parametrize("dense_path", ["absorbed", "projected"])
def test_dense_context(dense_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_path(monkeypatch, dense_path)
    ours = make_module()
    latents, data = make_inputs()
    assert_parity(ours, PlainCrossAttention(ours), (latents, dense_tokens(data)), torch.float64)


def test_all_masked_gives_zeros(path: str) -> None:
    """Row 0 has no token to attend to: what is left is the output bias, and only row 1 has gradients."""
    module = make_module().double()
    latents, data = make_inputs()
    data.requires_grad_()
    mask = make_mask()
    mask[0] = False
    out = module(latents, data, grid=GRID, mask=mask)
    torch.testing.assert_close(out[0], module.fn.to_out.bias.expand_as(out[0]))
    out.sum().backward()
    assert data.grad is not None
    assert not data.grad[0].any()
    assert data.grad[1].any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_all_masked_gives_mean(path: str) -> None:
    """As the formula with its finite fill, in values and gradients."""
    ours = make_module(masked_rows="mean")
    theirs = PlainCrossAttention(ours)
    mask = make_mask()
    mask[0] = False
    assert_parity(
        ours,
        theirs,
        make_inputs(),
        torch.float64,
        call_ours=lambda latents, data: ours(latents, data, grid=GRID, mask=mask),
        call_theirs=lambda latents, data: theirs(latents, dense_tokens(data), mask),
    )


def test_layouts_of_data_and_mask(path: str) -> None:
    """Flat or on the grid, channels first or last in memory: the same result."""
    module = make_module().double()
    latents, data = make_inputs()
    mask = make_mask()
    expected = module(latents, data, grid=GRID, mask=mask)
    channels_first = data.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(module(latents, channels_first, grid=GRID, mask=mask.flatten(1)), expected)
    torch.testing.assert_close(module(latents, data.flatten(1, 2), grid=GRID, mask=mask), expected)


def test_half_precision_data(path: str) -> None:
    """Data of a narrower dtype is read as it is: nothing else is rounded."""
    module = make_module()
    latents, data = make_inputs()
    latents, data = latents.float(), data.bfloat16()
    torch.testing.assert_close(
        module(latents, data, grid=GRID), module(latents, data.float(), grid=GRID), rtol=1e-5, atol=1e-5
    )


def test_autocast(path: str) -> None:
    module = make_module()
    latents, data = (tensor.float() for tensor in make_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(latents, data, grid=GRID)
    torch.testing.assert_close(out.float(), module(latents, data, grid=GRID), rtol=0.05, atol=0.05)


def test_nan_stays_in_its_input(path: str) -> None:
    module = make_module()
    latents, data = (tensor.float() for tensor in make_inputs())
    data[0, 1, 2, 0] = torch.nan
    out = module(latents, data, grid=GRID)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_empty_batch(path: str) -> None:
    module = make_module()
    latents, data = (tensor.float() for tensor in make_inputs(batch=0))
    out = module(latents, data, grid=GRID, mask=make_mask(batch=0))
    assert out.shape == (0, 6, QUERY_DIM)
    out.sum().backward()


def test_dropout_keeps_the_mean(path: str) -> None:
    """Many inputs alike: their outputs differ, and average to the output without dropout."""
    module = make_module(dropout=0.4)
    latents, data = (tensor.float() for tensor in make_inputs(batch=1))
    expected = module.eval()(latents, data, grid=GRID)
    torch.manual_seed(3)
    samples = module.train()(latents, data.expand(1500, -1, -1, -1), grid=GRID)
    standard_error = samples.std(dim=0) / len(samples) ** 0.5
    assert (standard_error > 0).all()
    assert ((samples.mean(dim=0) - expected[0]).abs() < 5 * standard_error).all()
    torch.testing.assert_close(module.eval()(latents, data, grid=GRID), expected)


def test_explain_names_the_path(path: str) -> None:
    latents, data = make_inputs()
    assert f"path: {path}\n" in make_module().explain(latents, data, grid=GRID)


def test_explain_says_that_inverted_attention_is_not_fused() -> None:
    latents, data = make_inputs()
    assert "no fused path" in make_module().explain(latents, data, grid=GRID, inverted=True)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "latents_axes": (
        {"latents": torch.zeros(6, QUERY_DIM)},
        r"latents has shape \(6, 12\), but must be \(batch, N, 12\)",
    ),
    "latents_channels": ({"latents": torch.zeros(1, 6, 11)}, r"latents has shape \(1, 6, 11\)"),
    "latents_batch": ({"latents": torch.zeros(3, 6, QUERY_DIM)}, r"latents has batch 3, but context has 2"),
    "context_channels": (
        {"context": torch.zeros(2, 4, 5, 4)},
        r"context has shape \(2, 4, 5, 4\), but must be \(batch, 20, 3\) or \(batch, 4, 5, 3\)",
    ),
    "context_axes": ({"context": torch.zeros(2, 5, 4, 3)}, r"context has shape \(2, 5, 4, 3\), but must be"),
    "context_dtype": ({"context": torch.zeros(2, 4, 5, 3, dtype=torch.uint8)}, r"context has dtype torch.uint8"),
    "context_device": (
        {"context": torch.zeros(2, 4, 5, 3, device="meta")},
        r"context is on meta, but latents is on cpu",
    ),
    "dense_channels": (
        {"context": torch.zeros(2, 20, 3), "grid": None},
        r"context has shape \(2, 20, 3\), but must be \(batch, 20, 17\)",
    ),
    "dense_empty": (
        {"context": torch.zeros(2, 0, 17), "grid": None},
        r"context has shape \(2, 0, 17\): there is no token",
    ),
    "grid_channels": (
        {"grid": FourierGrid((4, 5), num_bands=4, max_freq=8.0)},
        r"grid has 18 channels, but must have fewer than 17",
    ),
    "mask_dtype": ({"mask": torch.ones(2, 4, 5)}, r"mask has dtype torch.float32, but must be torch.bool"),
    "mask_shape": (
        {"mask": torch.ones(2, 5, 4, dtype=torch.bool)},
        r"mask has shape \(2, 5, 4\), but must be \(2, 20\) or \(2, 4, 5\)",
    ),
    "mask_batch": ({"mask": torch.ones(1, 20, dtype=torch.bool)}, r"mask has shape \(1, 20\)"),
    "mask_device": ({"mask": torch.ones(2, 20, dtype=torch.bool, device="meta")}, r"mask is on meta"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    latents, data = (tensor.float() for tensor in make_inputs())
    good = {"latents": latents, "context": data, "grid": GRID}
    with pytest.raises(ValueError, match=message):
        make_module()(**{**good, **arguments})


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"dropout is 1\.0, but must be in \[0, 1\)"):
        CrossAttention(QUERY_DIM, dropout=1.0)
    with pytest.raises(ValueError, match=r"dropout is -0\.1"):
        SelfAttention(QUERY_DIM, dropout=-0.1)
    with pytest.raises(ValueError, match='masked_rows is \'nan\', but must be "zeros" or "mean"'):
        CrossAttention(QUERY_DIM, masked_rows="nan")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_self_attention_matches_peer(dtype: torch.dtype) -> None:
    peer = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    ours = SelfAttention(QUERY_DIM, heads=3, head_dim=4)
    randomise(ours)
    theirs = peer.PreNorm(QUERY_DIM, peer.Attention(QUERY_DIM, heads=3, dim_head=4))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    latents, _ = make_inputs(latents_batch=2)
    assert_parity(ours, theirs, (latents,), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feed_forward_matches_peer(dtype: torch.dtype) -> None:
    peer = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    ours = FeedForward(QUERY_DIM)
    randomise(ours)
    theirs = peer.PreNorm(QUERY_DIM, peer.FeedForward(QUERY_DIM))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    latents, _ = make_inputs(latents_batch=2)
    assert_parity(ours, theirs, (latents,), dtype)


def test_dropout_only_in_training() -> None:
    latents, _ = make_inputs(latents_batch=2)
    for module in (SelfAttention(QUERY_DIM, dropout=0.5), FeedForward(QUERY_DIM, dropout=0.5)):
        module.double()
        assert not torch.equal(module(latents), module(latents))
        module.eval()
        assert torch.equal(module(latents), module(latents))


def test_device_and_dtype_of_parameters() -> None:
    factory: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    modules = (
        CrossAttention(QUERY_DIM, 17, **factory),
        SelfAttention(QUERY_DIM, **factory),
        FeedForward(QUERY_DIM, **factory),
    )
    for module in modules:
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())


def test_pickle_and_deepcopy() -> None:
    module = make_module().double()
    latents, data = make_inputs()
    expected = module(latents, data, grid=GRID)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(latents, data, grid=GRID), expected)


def test_upgrade_renames_list_layers() -> None:
    tensor = torch.zeros(1)
    renamed = {
        "latents": "latents",
        "layers.0.0.fn.to_q.weight": "layers.0.cross_attn.fn.to_q.weight",
        "layers.0.0.norm_context.bias": "layers.0.cross_attn.norm_context.bias",
        "layers.12.1.fn.net.0.weight": "layers.12.cross_ff.fn.net.0.weight",
        "layers.1.2.0.0.fn.to_kv.weight": "layers.1.self_attns.0.0.fn.to_kv.weight",
        "layers.1.2.3.1.norm.weight": "layers.1.self_attns.3.1.norm.weight",
        "layers.2.0.fn.to_out.0.weight": "layers.2.cross_attn.fn.to_out.weight",
        "layers.2.1.fn.net.3.bias": "layers.2.cross_ff.fn.net.2.bias",
        "layers.1.3.to_attn_logits.1.weight": "attn_residuals.1.to_attn_logits.1.weight",
        "to_logits.1.weight": "to_logits.1.weight",
        "to_logits.2.bias": "to_logits.2.bias",
    }
    upgraded = upgrade_state_dict(dict.fromkeys(renamed, tensor))
    assert list(upgraded) == list(renamed.values())
    assert upgrade_state_dict(upgraded) == upgraded


def test_upgrade_keeps_to_its_prefix() -> None:
    tensor = torch.zeros(1)
    state_dict = {"encoder.layers.0.0.norm.bias": tensor, "layers.0.0.norm.bias": tensor}
    expected = ["encoder.layers.0.cross_attn.norm.bias", "layers.0.0.norm.bias"]
    assert list(upgrade_state_dict(state_dict, prefix="encoder.")) == expected


def test_upgrade_of_the_first_releases_warns() -> None:
    tensor = torch.zeros(1)
    with pytest.warns(UserWarning, match=r"0\.7\.0 or earlier"):
        upgraded = upgrade_state_dict({"to_logits.0.weight": tensor, "to_logits.1.weight": tensor})
    assert list(upgraded) == ["to_logits.1.weight", "to_logits.2.weight"]


def test_geglu_is_exact() -> None:
    """The gate is the GELU of the error function, not its tanh approximation."""
    module = FeedForward(QUERY_DIM).double()
    latents, _ = make_inputs()
    values, gates = module.fn.net[0](module.norm(latents)).chunk(2, dim=-1)
    torch.testing.assert_close(module(latents), module.fn.net[2](values * F.gelu(gates, approximate="none")))


@pytest.mark.parametrize("inverted", [False, True])
def test_values_of_another_width(path: str, inverted: bool) -> None:
    module = make_module(head_dim_v=7, qkv_bias=True).double()
    latents, data = make_inputs()
    attention, tokens = module.fn, module.norm_context(dense_tokens(data))
    k, v = attention.to_kv(tokens).split((10, 14), -1)
    q, k, v = (tensor.unflatten(-1, (2, -1)).transpose(1, 2) for tensor in (attention.to_q(module.norm(latents)), k, v))
    weights = (q @ k.mT * 5**-0.5).softmax(-2 if inverted else -1)
    weights = F.normalize(weights, p=1.0, dim=-1)
    expected = attention.to_out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(latents, data, grid=GRID, inverted=inverted), expected)


def test_self_attention_with_values_of_another_width() -> None:
    module = SelfAttention(12, heads=2, head_dim=3, head_dim_v=5).double()
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    normed = module.norm(x)
    q, (k, v) = module.fn.to_q(normed), module.fn.to_kv(normed).split((6, 10), -1)
    q, k, v = (tensor.unflatten(-1, (2, -1)).transpose(1, 2) for tensor in (q, k, v))
    expected = module.fn.to_out(((q @ k.mT * 3**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected)
