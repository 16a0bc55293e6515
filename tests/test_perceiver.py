"""Perceiver against the one it replaces: parameters, results, gradients, checkpoints; and its errors."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from numerics import assert_no_worse
from parity import PATHS, assert_parity, force_path, outputs_and_gradients, randomise
from torch import Tensor, nn

from perceiver_kernels.modules import Perceiver

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
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "1_axis": {"input_axis": 1},
    "3_axes": {"input_axis": 3, "num_freq_bands": 2},
    "1_channel": {"input_channels": 1},
    "heads": {"cross_heads": 3, "self_per_cross_attn": 2},
    "no_self_attention": {"self_per_cross_attn": 0},
    "tied": {"depth": 4, "weight_tie_layers": True},
    "inverted": {"inverted_cross_attn": True},
    "inverted_first": {"inverted_cross_attn": (True, False)},
    "attn_residual": {"attn_residual": True, "attn_residual_rank": 4},
    "attn_residual_tied": {"depth": 3, "attn_residual": True, "attn_residual_rank": 4, "weight_tie_layers": True},
    "no_fourier": {"fourier_encode_data": False},
    "no_head": {"final_classifier_head": False},
}
SHAPES = {1: (9,), 2: (4, 5), 3: (2, 3, 4)}

all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every path in turn."""
    force_path(monkeypatch, request.param)
    return request.param


def make(**options: Any) -> Perceiver:
    torch.manual_seed(0)
    return Perceiver(**SMALL | options)


def make_both(**options: Any) -> tuple[Perceiver, nn.Module]:
    """Our Perceiver and perceiver-pytorch's, with the same, randomised parameters."""
    peer = pytest.importorskip("perceiver_pytorch")
    ours = make(**options)
    randomise(ours)
    theirs = peer.Perceiver(**SMALL | options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def make_data(batch: int = 2, *, input_axis: int = 2, input_channels: int = 3, **_: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPES[input_axis], input_channels, generator=generator, dtype=torch.float64)


def make_mask(data: Tensor) -> Tensor:
    """Hide about half the tokens, and all of the first input's."""
    mask = torch.rand(data.shape[:-1], generator=torch.Generator().manual_seed(2)) > 0.5
    mask[:1] = False
    return mask


def test_same_interface() -> None:
    """Names, order, kinds and defaults of the constructor's and forward's arguments; ours has two more, the last."""
    theirs = pytest.importorskip("perceiver_pytorch").Perceiver
    for method in ("__init__", "forward"):
        parameters = (inspect.signature(getattr(cls, method)).parameters.values() for cls in (Perceiver, theirs))
        ours, expected = ([(p.name, p.kind, p.default) for p in each] for each in parameters)
        if method == "__init__":
            assert [name for name, *_ in ours[-2:]] == ["mlp_recompute", "activation_checkpointing"]
            ours = ours[:-2]
        assert ours == expected


@all_options
def test_same_parameters_from_the_same_seed(options: dict[str, Any]) -> None:
    """Keys, their order, the order an optimizer sees, and values."""
    peer = pytest.importorskip("perceiver_pytorch")
    ours = make(**options)
    torch.manual_seed(0)
    theirs = peer.Perceiver(**SMALL | options)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@all_options
def test_checkpoints_load_both_ways(options: dict[str, Any]) -> None:
    ours, theirs = make_both(**options)
    fresh = make(**options)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@all_options
def test_matches_peer(options: dict[str, Any], masked: bool, dtype: torch.dtype, path: str) -> None:
    """Output and gradients of data and parameters, in training mode; one masked input has nothing to attend to."""
    ours, theirs = make_both(**options)
    data = make_data(**options)
    mask = make_mask(data) if masked else None
    assert_parity(
        ours,
        theirs,
        (data,),
        dtype,
        call_ours=lambda data: ours(data, mask=mask),
        call_theirs=lambda data: theirs(data, mask=mask),
    )


@pytest.mark.parametrize("name", ["default", "attn_residual"])
def test_matches_peer_in_eval_mode(name: str, path: str) -> None:
    """With dropout set, which eval mode switches off."""
    ours, theirs = make_both(attn_dropout=0.3, ff_dropout=0.3, **OPTIONS[name])
    assert_parity(ours.eval(), theirs.eval(), (make_data(),), torch.float32)


@pytest.mark.parametrize("return_embeddings", [False, True])
@pytest.mark.parametrize("given", ["nothing", "tensor", "list"])
@pytest.mark.parametrize("name", ["default", "attn_residual"])
def test_hidden_states(name: str, given: str, return_embeddings: bool) -> None:
    """return_hiddens and block_outputs give the same lists, and leave the caller's alone."""
    ours, theirs = (model.double() for model in make_both(**OPTIONS[name]))
    earlier = torch.randn(3, 2, SMALL["num_latents"], SMALL["latent_dim"], dtype=torch.float64)
    block_outputs = {"nothing": None, "tensor": earlier[0], "list": list(earlier)}[given]
    arguments = {"block_outputs": block_outputs, "return_hiddens": True, "return_embeddings": return_embeddings}
    out, hiddens = ours(make_data(), **arguments)
    expected_out, expected_hiddens = theirs(make_data(), **arguments)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(hiddens, expected_hiddens)
    assert given != "list" or len(block_outputs) == len(earlier)


def test_embeddings() -> None:
    ours, theirs = (model.double() for model in make_both())
    torch.testing.assert_close(ours(make_data(), return_embeddings=True), theirs(make_data(), return_embeddings=True))


def test_mask_shapes() -> None:
    model = make().double()
    data = make_data()
    mask = make_mask(data)
    assert torch.equal(model(data, mask), model(data, mask.flatten(1)))


def test_mask_without_fourier_features() -> None:
    """The mask may have the grid's shape even where no grid is encoded."""
    model = make(fourier_encode_data=False).double()
    data = make_data()
    mask = make_mask(data)
    assert torch.equal(model(data, mask), model(data, mask.flatten(1)))


def test_axes_may_change_between_calls() -> None:
    ours, theirs = (model.double() for model in make_both())
    for shape in ((4, 5), (5, 4), (1, 6), (4, 5)):
        data = torch.randn(2, *shape, 3, dtype=torch.float64)
        torch.testing.assert_close(ours(data), theirs(data))


def test_channels_first_memory(path: str) -> None:
    """Images as loaders give them, seen channels last without a copy."""
    model = make().double()
    data = make_data()
    channels_first = data.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(model(channels_first), model(data))


def test_positions_are_exact() -> None:
    """Features come from float64 positions: at high frequency float32 is far closer to float64 than the original."""
    ours, theirs = make_both(max_freq=2000.0, num_freq_bands=8)
    data = make_data()
    actual, plain, truth = (
        outputs_and_gradients(model, model, (data,), dtype)["output"]
        for model, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
    )
    assert_no_worse(actual, plain, truth)
    assert (actual - truth).abs().max() < 0.1 * (plain - truth).abs().max()


def test_tied_layers_share_parameters() -> None:
    model = make(depth=4, weight_tie_layers=True, attn_residual=True)
    for layers in (model.layers, model.attn_residuals):
        assert layers[0] is not layers[1]
        assert layers[1] is layers[2] is layers[3]


def test_dropout_in_training_only(path: str) -> None:
    model = make(attn_dropout=0.5).double()
    data = make_data()
    assert not torch.equal(model(data), model(data))
    model.eval()
    assert torch.equal(model(data), model(data))


OLD_PARTS = {"cross_attn.": "0.", "cross_ff.": "1.", "self_attns.": "2."}


def as_old_release(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same checkpoint with the keys of releases 0.7.1 to 0.9."""
    renamed = {}
    for key, value in state_dict.items():
        for new, old in OLD_PARTS.items():
            key = key.replace(new, old, 1)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", ["default", "heads", "tied"])
def test_old_checkpoints_load(name: str) -> None:
    model, fresh = make(**OPTIONS[name]), make(**OPTIONS[name])
    randomise(model)
    old = as_old_release(model.state_dict())
    assert "layers.1.0.norm_context.weight" in old
    keys = [*old]
    fresh.load_state_dict(old, strict=True)
    assert [*old] == keys
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_old_checkpoints_load_inside_a_larger_model() -> None:
    model, fresh = (nn.ModuleDict({"encoder": make(), "head": nn.Linear(2, 2)}) for _ in range(2))
    randomise(model)
    fresh.load_state_dict(as_old_release(model.state_dict()), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_wrong_checkpoints_do_not_load() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.cross_attn"):
        make(depth=2).load_state_dict(make(depth=1).state_dict())


def test_pickle_and_deepcopy() -> None:
    model = make().double()
    data = make_data()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(data), model(data))
        twin.load_state_dict(as_old_release(model.state_dict()), strict=True)


def test_explain_has_a_line_per_layer(path: str) -> None:
    lines = make(inverted_cross_attn=(False, True)).explain(make_data()).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"layers.0.cross_attn: path: {path}; ")
    assert lines[1].startswith("layers.1.cross_attn: path: inverted; ")


@pytest.mark.parametrize("name", ["default", "attn_residual", "no_fourier"])
def test_empty_batch(name: str, path: str) -> None:
    out = make(**OPTIONS[name]).double()(make_data(batch=0))
    assert out.shape == (0, SMALL["num_classes"])
    out.sum().backward()


def test_nan_stays_in_its_input(path: str) -> None:
    model = make().double()
    data = make_data()
    data[1, 2, 3, 0] = torch.nan
    out = model(data)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"data": torch.zeros(2, 20, 3)}, r"data has shape \(2, 20, 3\), but must have 2 axes"),
    "channels": ({"data": torch.zeros(2, 4, 5, 4)}, "data has 4 channels, but input_channels is 3"),
    "channels_first": ({"data": torch.zeros(2, 3, 4, 5)}, "data has 5 channels, but input_channels is 3"),
    "empty_grid": ({"data": torch.zeros(2, 0, 5, 3)}, r"data has shape \(2, 0, 5, 3\), but no axis"),
    "pixels": ({"data": torch.zeros(2, 4, 5, 3, dtype=torch.uint8)}, r"data has dtype torch\.uint8"),
    "integers": ({"data": torch.zeros(2, 4, 5, 3, dtype=torch.int64)}, r"data has dtype torch\.int64"),
    "complex": ({"data": torch.zeros(2, 4, 5, 3, dtype=torch.complex64)}, r"data has dtype torch\.complex64"),
    "device": ({"data": torch.zeros(2, 4, 5, 3, device="meta")}, "data is on meta, but the parameters are on cpu"),
    "mask_dtype": ({"mask": torch.ones(2, 4, 5, dtype=torch.int64)}, r"mask has dtype torch\.int64, but must be"),
    "mask_shape": ({"mask": torch.ones(2, 5, 4, dtype=torch.bool)}, r"mask has shape \(2, 5, 4\), but must be"),
    "mask_length": ({"mask": torch.ones(2, 19, dtype=torch.bool)}, r"mask has shape \(2, 19\), but must be"),
    "mask_batch": ({"mask": torch.ones(3, 20, dtype=torch.bool)}, r"mask has shape \(3, 20\), but must be"),
    "mask_device": ({"mask": torch.ones(2, 20, dtype=torch.bool, device="meta")}, "mask is on meta"),
}


@pytest.mark.parametrize("method", ["forward", "explain"])
@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input(arguments: dict[str, Any], message: str, method: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(make(), method)(**{"data": make_data().float(), **arguments})


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"depth": 0}, "depth is 0, but must be at least 1"),
    "inverted_cross_attn": ({"inverted_cross_attn": (True,)}, "inverted_cross_attn has 1 entries, but depth is 2"),
    "attn_dropout": ({"attn_dropout": 1.5}, r"dropout is 1\.5, but must be in \[0, 1\)"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(masked: bool, path: str) -> None:
    """One graph, forward and backward, with the results of eager mode."""
    model = make(depth=1)
    data = make_data().float()
    mask = make_mask(data) if masked else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        out = function(data, mask=mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))))
    torch.testing.assert_close(*results)
