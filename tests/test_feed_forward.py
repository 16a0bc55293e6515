"""feed_forward on every backend: values, gradients, what is saved, registration, the module built on it, bad input."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from another_process import INSTRUCTION_SETS, check_at
from machine_code import Build, figures, needs_triton
from numerics import assert_no_worse
from shapes import available_backends, declared, device_of, dtypes_of, interpreted
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.backends import matrix_product, native_linear
from perceiver_kernels.ops.feed_forward import OP, feed_forward
from perceiver_kernels.ops.linear import ACTIVATIONS

BACKENDS = available_backends(OP)
DOUBLE = [backend for backend in BACKENDS if torch.float64 in dtypes_of(OP, backend)]
NAMES = ("x", "norm_weight", "norm_bias", "weight_in", "bias_in", "weight_out", "bias_out", "residual")
# rows (any leading dimensions), dim, hidden, out_features
SHAPES = [((), 7, 4, 2), ((1,), 5, 34, 5), ((2, 3), 16, 66, 17), ((0,), 4, 6, 4), ((2, 200), 24, 130, 24)]
# In the interpreter: several parts of rows.
SMALLER = {SHAPES[-1]: ((2, 37), 24, 66, 24)}
CASES = [
    (backend, SMALLER.get(shape, shape) if interpreted(backend) else shape, dtype)
    for backend in BACKENDS
    for shape in SHAPES
    for dtype in dtypes_of(OP, backend)
]


def make_inputs(
    leading: tuple[int, ...], dim: int, hidden: int, width: int, activation: str, dtype: torch.dtype
) -> list[Tensor]:
    """The arguments in the order of NAMES; x with strides of its own."""
    inner = hidden // 2 if activation.startswith("geglu") else hidden
    x = torch.randn(*leading, 2 * dim, dtype=torch.float64)[..., ::2]
    parameters = [
        1 + 0.3 * torch.randn(dim, dtype=torch.float64),
        torch.randn(dim, dtype=torch.float64),
        torch.randn(hidden, dim, dtype=torch.float64) / dim**0.5,
        torch.randn(hidden, dtype=torch.float64),
        torch.randn(width, inner, dtype=torch.float64) / inner**0.5,
        torch.randn(width, dtype=torch.float64),
    ]
    residual = torch.randn(*leading, width, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (x, *parameters, residual)]


def plain(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    product = F.linear(normed, weight_in, bias_in)
    approximate = "tanh" if activation.endswith("_tanh") else "none"
    if activation.startswith("geglu"):
        values, gates = product.chunk(2, dim=-1)
        inner = values * F.gelu(gates, approximate=approximate)
    else:
        inner = F.gelu(product, approximate=approximate)
    out = F.linear(inner, weight_out, bias_out)
    return out if residual is None else out + residual


def ours(*arguments: Any, save_hidden: bool = True) -> Tensor:
    *tensors, residual, activation = arguments
    return feed_forward(*tensors, activation=activation, residual=residual, save_hidden=save_hidden)


def recomputing(*arguments: Any) -> Tensor:
    return ours(*arguments, save_hidden=False)


def results(
    function: Any, inputs: list[Tensor | None], activation: str, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """The output and the gradients of a fixed weighting of it, computed on a device."""
    own = [None if t is None else t.detach().to(device, dtype).requires_grad_() for t in inputs]
    out = function(*own, activation)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = {name: t for name, t in zip(NAMES, own, strict=True) if t is not None}
    gradients = torch.autograd.grad((out * weighting.to(out)).sum(), list(leaves.values()))
    return {"out": out.detach().cpu(), **{name: g.cpu() for name, g in zip(leaves, gradients, strict=True)}}


def assert_matches(
    function: Any, inputs: list[Tensor | None], activation: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    actual = results(function, inputs, activation, dtype, device)
    expected, truth = results(plain, inputs, activation, dtype), results(plain, inputs, activation, torch.float64)
    for name, exact in truth.items():
        assert actual[name].dtype == dtype
        assert_no_worse(actual[name], expected[name], exact, name)


def without(inputs: list[Tensor], *names: str) -> list[Tensor | None]:
    return [None if name in names else tensor for name, tensor in zip(NAMES, inputs, strict=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "shape", "dtype"), CASES, ids=str)
def test_matches_plain_torch(backend: str, shape: tuple[Any, ...], activation: str, dtype: torch.dtype) -> None:
    inputs, device = make_inputs(*shape, activation, dtype), device_of(backend)
    with pk.use_backend(backend):
        assert_matches(ours, [*inputs], activation, dtype, device)
        assert_matches(recomputing, without(inputs, "residual", "bias_in", "bias_out"), activation, dtype, device)
        assert_matches(ours, without(inputs, "norm_weight", "norm_bias"), activation, dtype, device)


@pytest.mark.parametrize("function", [ours, recomputing])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for b in BACKENDS for dtype in (torch.float32, torch.bfloat16) if dtype in dtypes_of(OP, b)],
    ids=str,
)
def test_several_tiles(backend: str, dtype: torch.dtype, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_linear, "_FEWEST_ROWS", 16)
    monkeypatch.setattr(native_linear, "_TILE_BYTES", 1)
    inputs = make_inputs((3, 37), 24, 40, 24, "geglu", dtype)
    with pk.use_backend(backend):
        assert_matches(function, [*inputs], "geglu", dtype, device_of(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("provider", list(matrix_product.PROVIDERS))
def test_every_provider(provider: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced product is used; one that this machine has not says why."""
    inputs = make_inputs((40,), 24, 48, 24, "geglu", dtype)
    monkeypatch.setenv(matrix_product.ENVIRONMENT, provider)
    reason = matrix_product.PROVIDERS[provider].reason(dtype)
    if reason:
        with pytest.raises(RuntimeError, match=f"cannot be used: {re.escape(reason)}"):
            ours(*inputs, "geglu")
        return
    for function in (ours, recomputing):
        assert_matches(function, [*inputs], "geglu", dtype)


@pytest.mark.parametrize("save_hidden", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", DOUBLE)
def test_gradcheck(backend: str, activation: str, save_hidden: bool) -> None:
    inputs = [t.requires_grad_() for t in make_inputs((2, 3), 4, 6, 5, activation, torch.float64)]
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *t: ours(*t, activation, save_hidden=save_hidden), inputs)


@pytest.mark.parametrize("needed", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one(backend: str, needed: str) -> None:
    dtype = torch.float64 if backend in DOUBLE else torch.float32
    inputs = [t.to(device_of(backend)) for t in make_inputs((9,), 4, 6, 5, "geglu", dtype)]
    leaf = inputs[NAMES.index(needed)].requires_grad_()
    with pk.use_backend(backend):
        (actual,) = torch.autograd.grad(ours(*inputs, "geglu").sum(), leaf)
    (expected,) = torch.autograd.grad(plain(*inputs, "geglu").sum(), leaf)
    torch.testing.assert_close(actual, expected)


def test_no_second_derivatives() -> None:
    inputs = [t.requires_grad_() for t in make_inputs((3,), 4, 6, 4, "gelu", torch.float64)]
    with pk.use_backend("reference"):
        (d_x,) = torch.autograd.grad(ours(*inputs, "gelu").sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="feed_forward has no second derivatives"):
        d_x.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend: str) -> None:
    """x, the parameters and, unless it is to be computed again, the first product: no other activation."""
    inputs = make_inputs((50,), 8, 64, 8, "geglu", torch.float32)
    inputs = [t.to(device_of(backend)).requires_grad_() for t in inputs]
    for save_hidden, expected in ((True, 50 * 64), (False, 0)):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with pk.use_backend(backend), hooks:
            ours(*inputs, "geglu", save_hidden=save_hidden)
        parameters = sum(t.numel() for t in inputs[1:6])
        assert sum(sizes.values()) == parameters + 50 * 8 + expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend: str) -> None:
    inputs = make_inputs((50,), 8, 64, 8, "geglu", torch.float32)
    inputs = [t.to(device_of(backend)).requires_grad_() for t in inputs]
    with pk.use_backend(backend):
        out = ours(*inputs, "geglu").sum()
        first = torch.autograd.grad(out, inputs, retain_graph=True)
        ours(*(t.detach() + 1 for t in inputs), "geglu")  # overwrites the memory that is kept from call to call
        second = torch.autograd.grad(out, inputs)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "geglu_tanh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, activation: str, requires_grad: bool) -> None:
    inputs = make_inputs((5,), 4, 6, 5, activation, torch.float32)
    inputs = [t.to(device_of(backend)).requires_grad_(requires_grad) for t in inputs]
    options = (activation, 1e-5, torch.float32, torch.float32, requires_grad)
    with pk.use_backend(backend):
        torch.library.opcheck(torch.ops.perceiver_kernels.feed_forward_fwd, (*inputs, *options))
        fewer = without(inputs, "norm_weight", "norm_bias", "bias_in", "bias_out", "residual")
        torch.library.opcheck(torch.ops.perceiver_kernels.feed_forward_fwd, (*fewer, *options))


@pytest.mark.parametrize("dynamic", [None, True])
def test_module_compiles_without_graph_breaks(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    module = pk.FeedForward(8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        x = torch.randn(2, rows, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x), module(x))
        for function in (compiled, module):
            function(x).square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(x), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("provider", ["auto", "torch", "widened"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, provider: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(matrix_product.ENVIRONMENT, provider)
    inputs = without(make_inputs((2, 33), 24, 48, 24, activation, torch.float32), "residual")

    narrow = dtypes_of(OP, backend)[-1]

    def all_of(function: Any, dtype: torch.dtype, enabled: bool, device: str = "cpu") -> dict[str, Tensor]:
        with torch.autocast(device, narrow, enabled=enabled):
            return results(function, inputs, activation, dtype, device)

    with pk.use_backend(backend):
        actual = all_of(ours, torch.float32, True, device_of(backend))
    expected, truth = all_of(plain, torch.float32, True), all_of(plain, torch.float64, False)
    assert actual["out"].dtype == expected["out"].dtype == narrow
    for name, exact in truth.items():
        assert actual[name].dtype == expected[name].dtype
        assert_no_worse(actual[name].to(narrow), expected[name].to(narrow), exact, name)


@pytest.mark.parametrize("backend", [*DOUBLE, "auto"])
def test_module_is_the_composition(backend: str) -> None:
    module = pk.FeedForward(12, mult=3, dropout=0.5).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.manual_seed(1)
    with pk.use_backend(backend):
        out = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, module.fn(module.norm(x)))
    module.fn.net[0] = nn.Sequential(module.fn.net[0])  # as adapters do
    torch.manual_seed(1)
    torch.testing.assert_close(module(x), out)


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_every_instruction_set(level: str) -> None:
    """Each level that this processor runs passes the same cases."""
    check_at(
        level,
        "test_feed_forward",
        """
        for dtype in t.dtypes_of(t.OP, "native"):
            for activation in t.ACTIVATIONS:
                for shape in t.SHAPES:
                    t.test_matches_plain_torch("native", shape, activation, dtype)
        """,
    )


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if declared(OP, backend).channels])
def test_more_channels_than_a_backend_takes(backend: str) -> None:
    _, most = declared(OP, backend).channels or (0, 0)
    x, weight_in, weight_out = torch.zeros(1, most + 1), torch.zeros(2, most + 1), torch.zeros(1, 1)
    with pk.use_backend(backend), pytest.raises(dispatch.BackendError, match=f"must be from 1 to {most}"):
        feed_forward(x, None, None, weight_in, None, weight_out, None)


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "kind", "channels", "arch"),
    [("fwd", "*fp32", 16384, 80), ("bwd", "*bf16", 1024, 90), ("bwd", "*fp32", 8192, 80)],
)
def test_machine_code(kernel: str, kind: str, channels: int, arch: int) -> None:
    """Whole rows of LayerNorm stay in registers."""
    kernels = importlib.import_module("perceiver_kernels.backends.triton.feed_forward")
    choice = kernels.default_tiles(channels)
    data = ("x", "weight", "bias", "out") if kernel == "fwd" else ("d_out", "x", "weight", "d_x")
    sums = ("mean", "rstd") if kernel == "fwd" else ("mean", "rstd", "d_weight", "d_bias")
    signature = {
        **dict.fromkeys(data, kind), **dict.fromkeys(sums, "*fp32"),
        **dict.fromkeys(("x_row", "rows", "channels"), "i32"), **({"eps": "fp32"} if kernel == "fwd" else {}),
    }  # fmt: skip
    constants: dict[str, Any] = {"ROWS": choice.rows, "COLUMNS": choice.columns, "x_column": 1}
    if kernel == "bwd":
        constants["ROWS_OF_PART"] = kernels.ROWS_OF_PART
    name = f"feed_forward:layer_norm_{kernel}_kernel"
    found = figures(Build(name, signature, constants, arch, choice.warps, aligned=("x_row", "channels")))
    assert found.spills == 0


def test_explain_names_what_runs_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = torch.zeros(3, 2), None, None, torch.zeros(4, 2)
    assert "torch's own operators, since the call is small: runs this call" in pk.explain(feed_forward, *arguments)
    monkeypatch.setattr(matrix_product, "SMALL", 0)
    assert f"{DOUBLE[0]}: runs this call" in pk.explain(feed_forward, *arguments)


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "none"}, "activation is 'none', must be one of gelu, gelu_tanh, geglu, geglu_tanh"),
    "x_dtype": ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x has dtype torch.int64"),
    "x_shape": ({"x": torch.zeros(2, 4)}, r"x has shape \(2, 4\), must be \(..., 3\) as weight_in has"),
    "norm_weight_shape": ({"norm_weight": torch.ones(4)}, r"norm_weight has shape \(4,\), must be \(3,\)"),
    "norm_bias_shape": ({"norm_bias": torch.ones(4)}, r"norm_bias has shape \(4,\), must be \(3,\)"),
    "norm_weight_dtype": ({"norm_weight": torch.ones(3).double()}, "norm_weight has dtype torch.float64"),
    "weight_in_dims": ({"weight_in": torch.zeros(8)}, "weight_in has 1 dimensions, must have 2"),
    "weight_in_odd": ({"weight_in": torch.zeros(9, 3)}, "weight_in has 9 rows, must have an even number for geglu"),
    "bias_in_shape": ({"bias_in": torch.zeros(4)}, r"bias_in has shape \(4,\), must be \(8,\)"),
    "weight_out_dims": ({"weight_out": torch.zeros(4)}, "weight_out has 1 dimensions, must have 2"),
    "weight_out_columns": ({"weight_out": torch.zeros(5, 8)}, "weight_out has 8 columns, must have 4"),
    "weight_out_device": ({"weight_out": torch.zeros(5, 4, device="meta")}, "weight_out is on meta, must be on cpu"),
    "bias_out_shape": ({"bias_out": torch.zeros(4)}, r"bias_out has shape \(4,\), must be \(5,\)"),
    "residual_shape": ({"residual": torch.zeros(5)}, r"residual has shape \(5,\), must be \(2, 5\)"),
    "residual_dtype": ({"residual": torch.zeros(2, 5).half()}, "residual has dtype torch.float16"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    changes, message = BAD_CALLS[name]
    good: dict[str, Any] = {
        "x": torch.zeros(2, 3), "norm_weight": torch.ones(3), "norm_bias": torch.zeros(3),
        "weight_in": torch.zeros(8, 3), "bias_in": torch.zeros(8), "weight_out": torch.zeros(5, 4),
        "bias_out": torch.zeros(5), "activation": "geglu", "residual": torch.zeros(2, 5),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        feed_forward(**{**good, **changes})
