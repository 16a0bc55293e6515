"""linear on every backend and by every product: values, gradients, kept forms of weights, registration, bad input."""

from __future__ import annotations

import gc
import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from another_process import INSTRUCTION_SETS, check_at
from machine_code import Build, figures, needs_triton
from numerics import assert_no_worse, error
from shapes import available_backends, device_of, dtypes_of, interpreted
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels.backends import matrix_product, native
from perceiver_kernels.backends.native_linear import tiles
from perceiver_kernels.ops.linear import ACTIVATIONS, DTYPES, OP, linear, small_on_gpu

BACKENDS = available_backends(OP)
DOUBLE = [backend for backend in BACKENDS if torch.float64 in dtypes_of(OP, backend)]
KINDS = (None, *ACTIVATIONS)
# rows (any leading dimensions), in_features, out_features
SHAPES = [
    ((), 3, 2), ((1,), 1, 4), ((5,), 7, 30), ((2, 3), 16, 34), ((17,), 33, 258), ((0,), 4, 6), ((2, 0), 4, 6),
    ((2, 200), 24, 1100), ((700,), 5, 16),
]  # fmt: skip
# In the interpreter: several strips of columns, several parts of rows.
SMALLER = {((2, 200), 24, 1100): ((3,), 24, 1100), ((700,), 5, 16): ((150,), 5, 16)}
CASES = [
    (backend, *(SMALLER.get(shape, shape) if interpreted(backend) else shape), dtype)
    for backend in BACKENDS
    for shape in SHAPES
    for dtype in dtypes_of(OP, backend)
]


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    matrix_product.prepared.clear()


@pytest.fixture
def no_small_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls as small as a test's take the way of large ones."""
    monkeypatch.setattr(matrix_product, "SMALL", 0)
    monkeypatch.setattr(matrix_product, "_timings", {})
    yield


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None, residual: Tensor | None) -> Tensor:
    out = F.linear(x, weight, bias)
    approximate = "tanh" if kind in ("gelu_tanh", "geglu_tanh") else "none"
    if kind in ("gelu", "gelu_tanh"):
        out = F.gelu(out, approximate=approximate)
    elif kind is not None:
        values, gates = out.chunk(2, dim=-1)
        out = values * F.gelu(gates, approximate=approximate)
    return out if residual is None else out + residual


def make_inputs(
    leading: tuple[int, ...], in_features: int, out_features: int, kind: str | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and residual; x with strides of its own."""
    width = out_features // 2 if kind is not None and kind.startswith("geglu") else out_features
    x = torch.randn(*leading, 2 * in_features, dtype=torch.float64)[..., ::2]
    weight = torch.randn(out_features, in_features, dtype=torch.float64) / in_features**0.5
    bias, residual = (torch.randn(s, dtype=torch.float64) for s in ((out_features,), (*leading, width)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype), residual.to(dtype)


def results(
    function: Any, inputs: tuple[Tensor | None, ...], kind: str | None, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """The output and the gradients of a fixed weighting of it, computed on a device."""
    own = [None if t is None else t.detach().to(device, dtype).requires_grad_() for t in inputs]
    x, weight, bias, residual = own
    out = function(x, weight, bias, kind, residual)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [t for t in own if t is not None]
    gradients = torch.autograd.grad((out * weighting.to(out)).sum(), leaves)
    return [out.detach().cpu(), *(gradient.cpu() for gradient in gradients)]


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str | None, residual: Tensor | None) -> Tensor:
    return linear(x, weight, bias, activation=kind, residual=residual)


def assert_matches(inputs: tuple[Tensor | None, ...], kind: str | None, device: str = "cpu") -> None:
    dtype = inputs[0].dtype  # type: ignore[union-attr]
    actual = results(ours, inputs, kind, dtype, device)
    expected, truth = results(plain, inputs, kind, dtype), results(plain, inputs, kind, torch.float64)
    for name, *values in zip(("out", "first", "second", "third", "fourth"), actual, expected, truth, strict=False):
        assert values[0].dtype == dtype
        assert_no_worse(*values, name=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend, leading, in_features, out_features, dtype", CASES, ids=str)
def test_matches_plain_torch(
    backend: str, leading: tuple[int, ...], in_features: int, out_features: int, kind: str | None, dtype: torch.dtype
) -> None:
    x, weight, bias, residual = make_inputs(leading, in_features, out_features, kind, dtype)
    with pk.use_backend(backend):
        assert_matches((x, weight, bias, residual), kind, device_of(backend))
        assert_matches((x, weight, None, None), kind, device_of(backend))


@pytest.mark.parametrize("kind", KINDS)
def test_small_calls(kind: str | None) -> None:
    inputs = make_inputs((2, 3), 4, 6, kind, torch.float64)
    assert_matches(inputs, kind)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t[:3], kind, t[3]), leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", list(matrix_product.PROVIDERS))
def test_every_provider(provider: str, dtype: torch.dtype, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced product is used; one that this machine has not says why."""
    inputs = make_inputs((40,), 24, 48, kind, dtype)
    monkeypatch.setenv(matrix_product.ENVIRONMENT, provider)
    reason = matrix_product.PROVIDERS[provider].reason(dtype)
    if reason:
        with pytest.raises(RuntimeError, match=f"cannot be used: {re.escape(reason)}"):
            ours(*inputs[:3], kind, inputs[3])
        return
    for _ in range(2):  # the second time with what was kept of the first
        assert_matches(inputs, kind)
    with torch.no_grad():
        x, weight, bias, residual = inputs
        outs = [ours(x, weight, bias, kind, residual) for _ in range(3)]
    assert_no_worse(
        outs[2], plain(*inputs[:3], kind, residual), plain(*(t.double() for t in inputs[:3]), kind, residual.double())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measured_choice(dtype: torch.dtype, no_small_calls: None) -> None:
    inputs = make_inputs((300,), 64, 96, "geglu", dtype)
    for _ in range(2):
        assert_matches(inputs, "geglu")
    (timings,) = (t for key, t in matrix_product._timings.items() if key[0] == dtype)
    assert set(timings) == {name for name, provider in matrix_product.PROVIDERS.items() if not provider.reason(dtype)}


def test_a_tie_keeps_torch() -> None:
    timing = matrix_product.Timing
    assert matrix_product.fastest({"torch": timing(1.0, 0.0), "onednn": timing(0.8, 0.1)}) == "torch"
    assert matrix_product.fastest({"torch": timing(1.0, 0.0), "onednn": timing(0.5, 0.1)}) == "onednn"


def test_without_packed_products(monkeypatch: pytest.MonkeyPatch, no_small_calls: None) -> None:
    """A torch built without oneDNN and MKL."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    inputs = make_inputs((300,), 64, 96, "gelu", torch.float32)
    assert_matches(inputs, "gelu")
    (timings,) = matrix_product._timings.values()
    assert list(timings) == ["torch"]
    for name, library in (("onednn", "oneDNN"), ("mkl", "MKL")):
        monkeypatch.setenv(matrix_product.ENVIRONMENT, name)
        with pytest.raises(
            RuntimeError, match=f"is '{name}', which cannot be used: this torch was built without {library}"
        ):
            linear(*inputs[:3], activation="gelu")


def test_forced_provider_that_cannot_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, _ = make_inputs((4,), 3, 6, "gelu", torch.float32)
    monkeypatch.setenv(matrix_product.ENVIRONMENT, "widened")
    with pytest.raises(
        RuntimeError, match="'widened', which cannot be used: multiplies bfloat16 and float16, not float32"
    ):
        linear(x, weight, bias, activation="gelu")
    monkeypatch.setenv(matrix_product.ENVIRONMENT, "mkl")
    with pytest.raises(RuntimeError, match="'mkl', which cannot be used: multiplies float32, not float64"):
        linear(x.double(), weight.double(), activation="gelu")
    monkeypatch.setenv(matrix_product.ENVIRONMENT, "cublas")
    with pytest.raises(
        ValueError, match="PERCEIVER_KERNELS_LINEAR is 'cublas', must be one of auto, torch, onednn, mkl"
    ):
        linear(x, weight, bias, activation="gelu")


KEPT = {"onednn": torch.float32, "mkl": torch.float32, "widened": torch.bfloat16}


@pytest.fixture(params=[name for name, dtype in KEPT.items() if not matrix_product.PROVIDERS[name].reason(dtype)])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each provider that keeps a form of the weight, forced; the dtype it does so for."""
    dtype = KEPT[request.param]
    monkeypatch.setenv(matrix_product.ENVIRONMENT, request.param)
    return dtype


def assert_current(x: Tensor, weight: Tensor) -> None:
    """Several uses of the weight in a row give what it says now."""
    with torch.no_grad():
        for _ in range(3):
            out = linear(x, weight, activation="gelu")
            torch.testing.assert_close(
                out,
                F.gelu(F.linear(x, weight)),
                rtol=2e-2 if x.dtype != torch.float32 else 1e-5,
                atol=1e-2 if x.dtype != torch.float32 else 1e-5,
            )


def test_changed_weights_are_noticed(kept: torch.dtype) -> None:
    x, layer = torch.randn(40, 24, dtype=kept), nn.Linear(24, 48, bias=False, dtype=kept)
    weight, other = layer.weight, torch.randn(48, 24, dtype=kept)
    assert_current(x, weight)
    assert len(matrix_product.prepared) == 1
    with torch.no_grad():
        weight.mul_(2.0)
    assert_current(x, weight)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    linear(x, weight, activation="gelu").sum().backward()
    optimizer.step()
    assert_current(x, weight)
    weight.data = other
    assert_current(x, weight)
    weight.data = other * 3
    assert_current(x, weight)
    weight.data.mul_(-1.0)  # moves neither the version counter nor the address
    assert_current(x, weight)
    layer.load_state_dict({"weight": other + 1})
    assert_current(x, weight)
    layer.load_state_dict({"weight": other - 1}, assign=True)
    assert_current(x, layer.weight)


def test_a_weight_is_prepared_once_and_freed_with_its_tensor(kept: torch.dtype) -> None:
    x = torch.randn(40, 24, dtype=kept)
    weight = torch.randn(48, 24, dtype=kept)
    tied = nn.Parameter(weight)
    first, second = nn.Linear(24, 48, bias=False), nn.Linear(24, 48, bias=False)
    first.weight = second.weight = tied
    del weight, tied
    for layer in (first, second, first, second):
        assert_current(x, layer.weight)
    assert len(matrix_product.prepared) == 1
    del first, second, layer
    gc.collect()
    assert len(matrix_product.prepared) == 0


def test_training_prepares_nothing(monkeypatch: pytest.MonkeyPatch, no_small_calls: None) -> None:
    """A weight that every step changes is met for the first time each time."""
    timing = matrix_product.Timing
    monkeypatch.setattr(matrix_product, "measure", lambda *_: {"torch": timing(1.0, 0.0), "onednn": timing(0.5, 10.0)})
    layer = nn.Linear(24, 48)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        linear(torch.randn(9, 24), layer.weight, layer.bias, activation="gelu").sum().backward()
        optimizer.step()
        assert len(matrix_product.prepared) == 0


def test_weight_made_in_inference_mode(kept: torch.dtype) -> None:
    with torch.inference_mode():
        x, weight = torch.randn(40, 24, dtype=kept), torch.randn(48, 24, dtype=kept)
        assert_current(x, weight)
        weight.mul_(2)
        assert_current(x, weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", DOUBLE)
def test_gradcheck(backend: str, activation: str) -> None:
    x, weight, bias, residual = (t.requires_grad_() for t in make_inputs((2, 3), 4, 6, activation, torch.float64))
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x, w, b, r: linear(x, w, b, activation=activation, residual=r), (x, weight, bias, residual)
        )


def test_second_derivatives() -> None:
    x, weight, bias, residual = (t.requires_grad_() for t in make_inputs((3,), 4, 6, None, torch.float64))
    with pk.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x, w, b, r: linear(x, w, b, residual=r), (x, weight, bias, residual))
        (d_x,) = torch.autograd.grad(linear(x, weight, activation="gelu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        d_x.sum().backward()


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("save_product", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_some(backend: str, save_product: bool, needed: tuple[bool, ...]) -> None:
    dtype = torch.float64 if backend in DOUBLE else torch.float32
    inputs = (t.to(device_of(backend)) for t in make_inputs((9,), 4, 6, "geglu", dtype)[:3])
    leaves = [t.requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    with pk.use_backend(backend):
        out, _ = torch.ops.perceiver_kernels.linear_fwd(*leaves, None, "geglu", dtype, dtype, save_product)
        out.sum().backward()
    wanted = [t for t in leaves if t.requires_grad]
    expected = torch.autograd.grad(plain(*leaves, "geglu", None).sum(), wanted)
    for leaf, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu", "geglu_tanh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, activation: str, requires_grad: bool) -> None:
    inputs = make_inputs((5,), 4, 6, None if activation == "none" else activation, torch.float32)
    x, weight, bias, residual = (t.to(device_of(backend)).requires_grad_(requires_grad) for t in inputs)
    save = requires_grad and activation != "none"
    options = (activation, torch.float32, torch.float32, save)
    with pk.use_backend(backend):
        torch.library.opcheck(torch.ops.perceiver_kernels.linear_fwd, (x, weight, bias, residual, *options))
        torch.library.opcheck(torch.ops.perceiver_kernels.linear_fwd, (x, weight, None, None, *options))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_breaks(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    layer, second = nn.Linear(8, 24), nn.Linear(12, 8)

    def block(x: Tensor) -> Tensor:
        return linear(linear(x, layer.weight, layer.bias, activation="geglu"), second.weight, second.bias, residual=x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        x = torch.randn(2, rows, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x), block(x))
        for function in (compiled, block):
            function(x).square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x))
        half = x.detach().bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(half), block(half), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", ["auto", "torch", "widened"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, provider: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(matrix_product.ENVIRONMENT, provider)
    inputs = make_inputs((2, 33), 24, 48, kind, torch.float32)[:3]
    narrow = dtypes_of(OP, backend)[-1]

    def all_of(function: Any, dtype: torch.dtype, enabled: bool, device: str = "cpu") -> list[Tensor]:
        with torch.autocast(device, narrow, enabled=enabled):
            return results(function, (*inputs, None), kind, dtype, device)

    with pk.use_backend(backend):
        actual = all_of(ours, torch.float32, True, device_of(backend))
    expected, truth = all_of(plain, torch.float32, True), all_of(plain, torch.float64, False)
    assert actual[0].dtype == expected[0].dtype == narrow
    for name, one, other, exact in zip(("out", "x", "weight", "bias"), actual, expected, truth, strict=True):
        assert one.dtype == other.dtype
        assert_no_worse(one.to(narrow), other.to(narrow), exact, name)


def test_measuring_under_autocast_measures_the_dtype_it_names(no_small_calls: None) -> None:
    """Autocast must not turn the float32 product of "widened" into the 16-bit one it is compared with."""
    seen = []
    multiply = matrix_product.PROVIDERS["widened"].multiply
    provider = matrix_product.Provider(
        matrix_product.NARROW,
        lambda weight, _: weight.float(),
        lambda *arguments: seen.append(multiply(*arguments).dtype),  # type: ignore[arg-type, func-returns-value]
    )
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setitem(matrix_product.PROVIDERS, "widened", provider)
        linear(torch.randn(300, 64), torch.randn(96, 64), activation="gelu")
    assert set(seen) == {torch.float32}


def test_autocast_residual_promotes() -> None:
    x, weight, bias, residual = make_inputs((9,), 4, 6, "gelu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, bias, activation="gelu", residual=residual)
        assert out.dtype == (F.linear(x, weight, bias) + residual).dtype == torch.float32
    torch.testing.assert_close(out, plain(x, weight, bias, "gelu", residual), rtol=0.02, atol=0.02)


def test_float32_precision_settings_stay_as_they_are() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        linear(torch.randn(300, 64), torch.randn(128, 64), activation="gelu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_layouts() -> None:
    x, weight, bias, residual = make_inputs((6, 5), 4, 8, "geglu", torch.float64)
    expected = plain(x, weight, bias, "geglu", residual)
    with pk.use_backend("native"):
        transposed = linear(
            x.mT.contiguous().mT,
            weight.t().contiguous().t(),
            bias,
            activation="geglu",
            residual=residual.mT.contiguous().mT,
        )
        expanded = linear(x[:1].expand(6, 5, 4), weight, bias[:1].expand(8), activation="geglu")
    torch.testing.assert_close(transposed, expected)
    torch.testing.assert_close(expanded, plain(x[:1].expand(6, 5, 4), weight, bias[:1].expand(8), "geglu", None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_rows(backend: str) -> None:
    x, weight, _, _ = make_inputs((6,), 4, 40, "gelu", torch.float32)
    x[2, 1], x[4, 0] = torch.nan, torch.inf
    for kind in ACTIVATIONS:
        leaf = x.to(device_of(backend)).requires_grad_()
        with pk.use_backend(backend):
            out = linear(leaf, weight.to(leaf.device), activation=kind)
            (d_x,) = torch.autograd.grad(out.sum(), leaf)
        assert out[2].isnan().all() and not out[4].isfinite().all()
        assert out[[0, 1, 3, 5]].isfinite().all()
        assert d_x[2].isnan().all() and d_x[[0, 1, 3, 5]].isfinite().all()


@pytest.mark.skipif("native" not in BACKENDS, reason="no compiled module")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("span", [(-1.0, 1.0), (-9.0, 0.0), (-40.0, 40.0)], ids=str)
def test_gelu_is_no_worse_than_torchs(activation: str, span: tuple[float, float]) -> None:
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    x = torch.linspace(*span, 200_001)[None]
    exact = x.double().requires_grad_()
    truth = F.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    single = x.clone().requires_grad_()
    torchs = F.gelu(single, approximate=approximate)
    (torchs_slope,) = torch.autograd.grad(torchs.sum(), single)
    out, d_product = torch.empty_like(x), torch.empty_like(x)
    native.linear_epilogue_fwd(x, None, None, activation, out)
    native.linear_epilogue_bwd(x, None, torch.ones_like(x), activation, d_product, None)
    assert error(out, truth) <= 2 * error(torchs, truth)
    assert error(d_product, slope) <= 2 * error(torchs_slope, slope)


def test_deterministic_on_any_number_of_threads() -> None:
    product, d_out = torch.randn(1000, 70), torch.randn(1000, 35)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            d_product, d_bias = torch.empty_like(product), torch.empty(70)
            native.linear_epilogue_bwd(product, None, d_out, "geglu", d_product, d_bias)
            found.append((d_product, d_bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 256, 257, 5000])
def test_tiles_cover_all_rows(rows: int) -> None:
    stretches = list(tiles(rows, 1 << 20, torch.float32))
    assert [row for first, last in stretches for row in range(first, last)] == list(range(rows))


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_every_instruction_set(level: str) -> None:
    """Each level that this processor runs passes the same cases."""
    check_at(
        level,
        "test_linear",
        """
        for dtype in t.DTYPES:
            for kind in t.KINDS:
                for shape in t.SHAPES[:6]:
                    t.test_matches_plain_torch("native", *shape, kind, dtype)
        for kind in ("gelu", "gelu_tanh"):
            t.test_gelu_is_no_worse_than_torchs(kind, (-9.0, 9.0))
        """,
    )


def test_a_gpu_s_small_calls_are_composed() -> None:
    weight = torch.zeros(1, 1).expand(4096, 1024)
    assert small_on_gpu(2000, weight) and not small_on_gpu(3000, weight)


@needs_triton
@pytest.mark.parametrize("name", ["onednn", "widened"])
def test_triton_heeds_no_product_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its availability nor the dtype that it would multiply in."""
    monkeypatch.setenv(matrix_product.ENVIRONMENT, name)
    monkeypatch.setattr(matrix_product, "PROVIDERS", {})
    for dtype in (torch.float32, torch.float16):
        with pk.use_backend("triton"):
            assert_matches(make_inputs((5,), 7, 30, "geglu", dtype), "geglu", device_of("triton"))


@pytest.mark.parametrize("kind", ["none", "gelu", "geglu_tanh"])
def test_two_runs_are_bitwise_equal(kind: str) -> None:
    for backend in BACKENDS:
        product, d_out = torch.randn(150, 70), torch.randn(150, 35 if kind == "geglu_tanh" else 70)
        x, weight, bias = torch.randn(150, 3), torch.randn(70, 3), torch.randn(70)
        tensors = [tensor.to(device_of(backend)) for tensor in (d_out, x, weight, bias, product)]
        with pk.use_backend(backend):
            first, second = (torch.ops.perceiver_kernels.linear_bwd(*tensors, kind, True, True, True) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


POINTERS = ("product", "bias", "residual", "out", "d_out", "d_product", "inner")


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "dtype", "tanh", "arch"),
    [("fwd", torch.bfloat16, False, 90), ("bwd", torch.bfloat16, False, 80), ("bwd", torch.float32, True, 90)],
    ids=str,
)
def test_machine_code(kernel: str, dtype: torch.dtype, tanh: bool, arch: int) -> None:
    """Nothing is spilled in a gated epilogue, and half of a multiprocessor's threads have registers."""
    kernels = importlib.import_module("perceiver_kernels.backends.triton.linear")
    choice = kernels.default_tiles(4096)
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    names = POINTERS[:4] if kernel == "fwd" else ("product", "bias", "d_out", "d_product", "inner")
    strides = ("residual_row", "residual_column") if kernel == "fwd" else ("d_out_row", "d_out_column")
    signature = {
        **dict.fromkeys(names, kind),
        **({} if kernel == "fwd" else {"d_bias": "*fp32"}),
        **dict.fromkeys((strides[0], "rows", "width", "features"), "i32"),
    }
    constants: dict[str, Any] = {
        "ACTIVATED": True, "TANH": tanh, "GATED": True, "ROWS": choice.rows, "COLUMNS": choice.columns,
        strides[1]: 1,
        **({} if kernel == "fwd" else {"ROWS_OF_PART": kernels.ROWS_OF_PART}),
    }  # fmt: skip
    aligned = (strides[0], "width", "features")
    found = figures(Build(f"linear:linear_{kernel}_kernel", signature, constants, arch, choice.warps, aligned=aligned))
    assert found.spills == 0
    assert found.registers <= 168


def test_explain_names_what_runs_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(3, 2), torch.zeros(4, 2)
    assert "torch's own operators, since the call is small: runs this call" in pk.explain(linear, x, weight)
    assert f"{DOUBLE[0]}: would do" in pk.explain(linear, x, weight)
    monkeypatch.setattr(matrix_product, "SMALL", 0)
    assert f"{DOUBLE[0]}: runs this call" in pk.explain(linear, x, weight)


def test_explain_leaves_a_product_alone_to_torch_except_on_a_cpu() -> None:
    x, weight = torch.zeros(3, 2, device="meta"), torch.zeros(4, 2, device="meta")
    assert "torch's F.linear, after which nothing follows: runs this call" in pk.explain(linear, x, weight)
    assert "F.linear" not in pk.explain(linear, x, weight, activation="gelu")


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
def test_explain_says_whose_products_they_are() -> None:
    x, weight = (torch.zeros(size, device=device_of("triton")) for size in ((3, 2), (4, 2)))
    with pk.use_backend("triton"):
        text = pk.explain(linear, x, weight, activation="gelu")
    assert "triton: runs this call, but for its products, which are torch's" in text


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 5, 3), "weight": torch.zeros(4, 3), "bias": torch.zeros(4), "activation": "gelu",
    "residual": torch.zeros(2, 5, 4),
}  # fmt: skip
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "relu"}, "activation is 'relu', must be None or one of gelu, gelu_tanh, geglu"),
    "x_dtype": ({"x": torch.zeros(2, 5, 3, dtype=torch.int64)}, "x has dtype torch.int64"),
    "x_scalar": ({"x": torch.tensor(1.0)}, r"x has shape \(\), must be \(..., 3\)"),
    "x_shape": ({"x": torch.zeros(2, 5, 4)}, r"x has shape \(2, 5, 4\), must be \(..., 3\)"),
    "weight_dims": ({"weight": torch.zeros(4)}, "weight has 1 dimensions, must have 2"),
    "weight_odd": ({"weight": torch.zeros(5, 3), "activation": "geglu"}, "weight has 5 rows, must have an even number"),
    "weight_dtype": ({"weight": torch.zeros(4, 3).double()}, "weight has dtype torch.float64, must be torch.float32"),
    "weight_device": ({"weight": torch.zeros(4, 3, device="meta")}, "weight is on meta, must be on cpu"),
    "bias_shape": ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), must be \(4,\)"),
    "bias_dtype": ({"bias": torch.zeros(4).half()}, "bias has dtype torch.float16, must be torch.float32"),
    "bias_device": ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
    "residual_shape": ({"residual": torch.zeros(5, 4)}, r"residual has shape \(5, 4\), must be \(2, 5, 4\)"),
    "residual_geglu": ({"activation": "geglu"}, r"residual has shape \(2, 5, 4\), must be \(2, 5, 2\)"),
    "residual_dtype": ({"residual": torch.zeros(2, 5, 4).half()}, "residual has dtype torch.float16"),
    "residual_device": ({"residual": torch.zeros(2, 5, 4, device="meta")}, "residual is on meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    changes, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        linear(**{**GOOD, **changes})


def test_bad_input_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"bias has dtype torch\.int64"):
        linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
