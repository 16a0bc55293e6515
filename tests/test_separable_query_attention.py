"""Separable attention of queries on a grid: reference against loops, every backend against it, registration, bad input,
and what the Triton kernels compile to."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from another_process import INSTRUCTION_SETS, check_at
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import Build, Figures, figures, needs_triton
from numerics import assert_no_worse
from shapes import QUERY_SHAPES, QueryShape, available_backends, device_of, dtypes_of
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.backends.reference.philox import dropout_scales
from perceiver_kernels.backends.triton.tiles import Tiles
from perceiver_kernels.ops.separable_query_attention import OP, explain, separable_query_attention

BACKENDS = [backend for backend in available_backends(OP) if backend != "reference"]


TYPED = [(backend, dtype) for backend in BACKENDS for dtype in dtypes_of(OP, backend)]


def make_inputs(
    shape: QueryShape, *, with_r: bool = True, with_h: bool = True, masked: bool = False, spread: float = 1.0
) -> dict[str, Any]:
    """Float64 inputs of one call; the last batch entry of a masked call has nothing to attend to."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    per_key = (shape.heads, shape.keys)
    inputs: dict[str, Any] = {
        "tables": [spread * rand(shape.table_batch, *per_key, size) for size in shape.grid],
        "v": rand(shape.batch, *per_key, shape.head_dim_v),
        "h": rand(shape.batch if shape.query_batch == 1 else 1, *per_key) if with_h else None,
        "k": None,
        "x": None,
        "r": rand(shape.query_batch, *shape.grid).abs() + 0.1 if with_r else None,
        "mask": None,
    }
    if shape.channels >= 0:
        inputs["k"] = spread * rand(shape.table_batch, *per_key, shape.channels) / max(shape.channels, 1) ** 0.5
        inputs["x"] = rand(shape.query_batch, math.prod(shape.grid), shape.channels)
    if masked:
        inputs["mask"] = torch.rand(shape.batch, shape.keys, generator=g) > 0.3
        inputs["mask"][-1:] = False
    return inputs


def cast(inputs: dict[str, Any], dtype: torch.dtype, v_dtype: torch.dtype | None = None) -> dict[str, Any]:
    def to(value: Any) -> Any:
        if isinstance(value, list):
            return [to(v) for v in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {**{name: to(value) for name, value in inputs.items()}, "v": inputs["v"].to(v_dtype or dtype)}


def named_leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    tables = {f"tables[{k}]": table for k, table in enumerate(inputs["tables"])}
    others = {name: inputs[name] for name in ("v", "h", "k", "x", "r") if inputs[name] is not None}
    return {**tables, **others}


def upstream(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)


def run(inputs: dict[str, Any], backend: str, **options: Any) -> dict[str, Tensor]:
    """out and the gradients of all floating inputs, on the CPU; the inputs' strides are kept."""
    device = device_of(backend)
    leaves = {name: value.detach().to(device).requires_grad_() for name, value in named_leaves(inputs).items()}
    tables = [leaves[f"tables[{k}]"] for k in range(len(inputs["tables"]))]
    arguments = {name: leaves.get(name) for name in ("h", "k", "x", "r")}
    mask = None if inputs["mask"] is None else inputs["mask"].to(device)
    with pk.use_backend(backend):
        out = separable_query_attention(tables, leaves["v"], mask=mask, **arguments, **options)
        gradients = torch.autograd.grad(out, list(leaves.values()), upstream(out))
    results = {"out": out.detach(), **{f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}}
    return {name: value.cpu() for name, value in results.items()}


def check_against_reference(
    inputs: dict[str, Any], backend: str, v_dtype: torch.dtype, amplification: float = 1.0, **options: Any
) -> dict[str, Tensor]:
    typed = cast(inputs, torch.float64 if v_dtype == torch.float64 else torch.float32, v_dtype)
    truth = run(cast(typed, torch.float64), "reference", **options)
    plain, actual = run(typed, "reference", **options), run(typed, backend, **options)
    for name, value in actual.items():
        leaf = typed["v"] if name == "out" else named_leaves(typed)[name.removeprefix("d_")]
        assert value.dtype == leaf.dtype, name
        # With a single key, scores have no gradients: what is left are differences of equal terms, each rounded.
        if name not in ("out", "d_v") and truth[name].numel() and truth[name].abs().max() < 1e-12:
            assert value.abs().max() < 64 * torch.finfo(v_dtype).eps, name
            continue
        # Gradients of scores hold delta = d_out . out: with 16-bit values, they are as exact as out is in 16 bits.
        assert_no_worse(value.to(v_dtype), plain[name].to(v_dtype), truth[name], name, amplification)
    return actual


# --- the reference against explicit loops ---------------------------------------------------------------------------


def loops(inputs: dict[str, Any]) -> Tensor:
    tables, v, h, k, x, r, mask = (inputs[name] for name in ("tables", "v", "h", "k", "x", "r", "mask"))
    batch, heads, keys, head_dim_v = v.shape
    grid = [table.shape[3] for table in tables]
    out = torch.zeros(batch, heads, math.prod(grid), head_dim_v, dtype=v.dtype)
    at = lambda tensor, b: tensor[b if tensor.shape[0] > 1 else 0]  # noqa: E731
    for b, head, (o, position) in itertools.product(
        range(batch), range(heads), enumerate(itertools.product(*map(range, grid)))
    ):
        scores = {
            n: at(r, b).flatten()[o]
            * (
                at(x, b)[o] @ at(k, b)[head, n]
                + sum(at(table, b)[head, n, j] for table, j in zip(tables, position, strict=True))
            )
            + at(h, b)[head, n]
            for n in range(keys)
            if mask[b, n]
        }
        total = sum(score.exp() for score in scores.values())
        for n, score in scores.items():
            out[b, head, o] += score.exp() / total * v[b, head, n]
    return out


@pytest.mark.parametrize("query_batch", [1, 3])
def test_reference_is_the_formula(query_batch: int) -> None:
    inputs = make_inputs(QueryShape(3, 1, query_batch, 2, 5, 2, 3, (2, 3, 2)), masked=True)
    with pk.use_backend("reference"):
        out = separable_query_attention(**inputs)
    torch.testing.assert_close(out, loops(inputs))
    assert (out[-1] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("batches", [(1, 2), (2, 1)])
@pytest.mark.parametrize("backend", ["reference", *(["native"] if "native" in BACKENDS else [])])
def test_gradcheck(backend: str, batches: tuple[int, int], masked: bool, dropout_p: float) -> None:
    inputs = make_inputs(QueryShape(2, *batches, 2, 4, 2, 3, (2, 3)), masked=masked)
    leaves = {name: value.requires_grad_() for name, value in named_leaves(inputs).items()}

    def f(t0: Tensor, t1: Tensor, v: Tensor, h: Tensor, k: Tensor, x: Tensor, r: Tensor) -> Tensor:
        return separable_query_attention(
            (t0, t1), v, h=h, k=k, x=x, r=r, mask=inputs["mask"], dropout_p=dropout_p, seed=3
        )

    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(f, tuple(leaves.values()))


# --- every backend against the float64 reference ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", QUERY_SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), TYPED, ids=str)
def test_shape_grid(backend: str, dtype: torch.dtype, shape: QueryShape) -> None:
    check_against_reference(make_inputs(shape), backend, dtype)


# What is more than one of in CUDA: stretches of keys, tiles of a plane's columns and outer positions, of a line's
# columns, warps along the outer positions, chunks of wide values, parts of the queries.
CUDA_SHAPES = [
    QueryShape(1, 1, 1, 1, 70, -1, 64, (17, 33)),
    QueryShape(1, 1, 1, 2, 33, 1, 136, (9, 34)),
    QueryShape(2, 2, 2, 1, 33, -1, 24, (1, 2, 70)),
    QueryShape(1, 1, 1, 1, 40, -1, 72, (150,)),
    QueryShape(1, 1, 1, 2, 140, 2, 8, (5, 3, 8)),
]
# The same in C++ for CPUs: blocks of keys and of queries, outer positions in a block, parts of the queries, depths of a
# product over channels.
NATIVE_SHAPES = [
    QueryShape(1, 1, 1, 2, 140, 2, 8, (5, 3, 8)),
    QueryShape(2, 1, 1, 2, 300, 20, 17, (40, 1, 3)),
    QueryShape(1, 1, 1, 1, 129, 128, 322, (150,)),
]
LARGE = [(backend, shape) for backend, shapes in (("cuda", CUDA_SHAPES), ("native", NATIVE_SHAPES)) for shape in shapes]


@pytest.mark.parametrize(("backend", "shape"), [(b, shape) for b, shape in LARGE if b in BACKENDS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_of_several_tiles(dtype: torch.dtype, backend: str, shape: QueryShape) -> None:
    check_against_reference(make_inputs(shape, masked=shape.batch > 1), backend, dtype)


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_instruction_sets(level: str) -> None:
    check_at(
        level,
        "test_separable_query_attention",
        """
        for shape in (t.QueryShape(2, 1, 1, 2, 37, 5, 19, (5, 12)), t.QueryShape(1, 1, 1, 1, 300, -1, 3, (2, 2, 15))):
            inputs = t.make_inputs(shape, masked=shape.batch > 1)
            for dtype in (torch.float32, torch.float64):
                t.check_against_reference(inputs, "native", dtype)
        """,
    )


def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = cast(make_inputs(QueryShape(2, 1, 1, 2, 150, 3, 20, (9, 40))), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, "native", dropout_p=0.2, seed=4))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


SMALL = QueryShape(2, 1, 1, 2, 18, 2, 6, (2, 5))


@pytest.mark.parametrize(("with_h", "with_r", "masked"), list(itertools.product([False, True], repeat=3))[:-1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_inputs(backend: str, with_h: bool, with_r: bool, masked: bool) -> None:
    shape = QueryShape(2, 1, 1, 1, 18, 2 if masked else -1, 6, (2, 5))
    results = check_against_reference(
        make_inputs(shape, with_h=with_h, with_r=with_r, masked=masked), backend, torch.float32
    )
    if masked:
        assert (results["out"][-1] == 0).all()
        assert (results["d_v"][-1] == 0).all()


@settings(max_examples=4, deadline=None)
@given(
    shared=st.tuples(st.booleans(), st.booleans()),
    sizes=st.tuples(*[st.integers(*limits) for limits in ((1, 2), (1, 2), (1, 20), (-1, 4), (1, 9))]),
    grid=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    with_h=st.booleans(),
    with_r=st.booleans(),
    masked=st.booleans(),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_small_shape(
    backend: str, shared: tuple[bool, bool], sizes: tuple[int, ...], grid: list[int], **inputs: bool
) -> None:
    batch, *others = sizes
    table_batch, query_batch = (1 if one else batch for one in shared)
    shape = QueryShape(batch, table_batch, query_batch, *others, tuple(grid))
    check_against_reference(make_inputs(shape, **inputs), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_same_on_every_backend(backend: str) -> None:
    check_against_reference(make_inputs(SMALL, masked=True), backend, torch.float32, dropout_p=0.4, seed=2**40 + 7)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dropout_mask_is_that_of_its_counters(backend: str) -> None:
    """With equal scores and the identity as values, the output is the mask."""
    batch, heads, grid, keys = 2, 2, (2, 3), 19
    device = device_of(backend)
    tables = [torch.zeros(1, heads, keys, size, device=device) for size in grid]
    v = torch.eye(keys, device=device).expand(batch, heads, keys, keys)
    with pk.use_backend(backend):
        out = separable_query_attention(tables, v, dropout_p=0.3, seed=11)
    rows = torch.Size((batch, heads * math.prod(grid), keys))
    scales = dropout_scales(rows, 0.3, 11, torch.float32, torch.device(device))
    assert torch.equal(out != 0, scales.view(out.shape) != 0)


def test_dropout_draws_from_torch_s_generator() -> None:
    inputs = make_inputs(SMALL)
    torch.manual_seed(5)
    first, second = (separable_query_attention(**inputs, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(separable_query_attention(**inputs, dropout_p=0.3), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    inputs = cast(make_inputs(SMALL), torch.float32)
    strided = {
        **inputs,
        "tables": [table.transpose(2, 3).contiguous().transpose(2, 3) for table in inputs["tables"]],
        "v": torch.stack([inputs["v"].transpose(1, 2)] * 2, 2)[:, :, 0].transpose(1, 2),
        "h": inputs["h"][..., None].repeat(1, 1, 1, 2)[..., 0],
        "x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "r": inputs["r"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert all(not value.is_contiguous() for name, value in named_leaves(strided).items() if name != "k")
    actual, expected = run(strided, backend), run(inputs, backend)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient(backend: str) -> None:
    inputs = cast(make_inputs(QueryShape(1, 1, 1, 2, 5, -1, 3, (2, 3))), torch.float32)
    results = []
    for name in ("reference", backend):
        table = inputs["tables"][1].to(device_of(name)).requires_grad_()
        others = {key: inputs[key].to(device_of(name)) for key in ("v", "h", "r")}
        with pk.use_backend(name):
            out = separable_query_attention((inputs["tables"][0].to(table), table), **others)
            results.append(torch.autograd.grad(out.sum(), table)[0].cpu())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_results_lie_as_the_projections_read_them(backend: str) -> None:
    inputs = cast(make_inputs(QueryShape(2, 1, 1, 2, 3, -1, 4, (2, 3))), torch.float32)
    tables, v = [table.to(device_of(backend)) for table in inputs["tables"]], inputs["v"].to(device_of(backend))
    with pk.use_backend(backend):
        assert separable_query_attention(tables, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_asked_for(backend: str) -> None:
    inputs = cast(make_inputs(QueryShape(1, 1, 1, 1, 5, 2, 3, (2, 3))), torch.float32)
    expected = run(inputs, backend)
    for wanted in ("v", "r", "x", "h"):
        arguments = {n: None if t is None else t.to(device_of(backend)) for n, t in inputs.items() if n != "tables"}
        arguments[wanted].requires_grad_()
        with pk.use_backend(backend):
            out = separable_query_attention([t.to(device_of(backend)) for t in inputs["tables"]], **arguments)
            (gradient,) = torch.autograd.grad(out, arguments[wanted], upstream(out))
        assert torch.equal(gradient.cpu(), expected[f"d_{wanted}"]), wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_the_thousands(backend: str) -> None:
    inputs = make_inputs(QueryShape(1, 1, 1, 1, 70, -1, 4, (2, 5)), spread=1000.0)
    check_against_reference(inputs, backend, torch.float32, amplification=1000.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bitwise(backend: str) -> None:
    inputs = cast(make_inputs(SMALL, masked=True), torch.float32)
    first, second = (run(inputs, backend, dropout_p=0.2, seed=1) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_reaches_what_attends_to_it_and_nothing_from_behind_a_mask(backend: str, value: float) -> None:
    inputs = cast(make_inputs(QueryShape(2, 2, 1, 1, 18, 2, 4, (2, 5))), torch.float32)
    inputs["tables"][1][0, 0, 7, 3] = value
    out = run(inputs, backend)["out"]
    on_grid = out.unflatten(2, (2, 5))
    assert on_grid[0, :, :, 3].isnan().all()
    assert on_grid[0, :, :, [0, 1, 2, 4]].isfinite().all()
    assert out[1].isfinite().all()
    for name in ("v", "h", "k"):
        inputs[name][0, 0, 7] = value
    inputs["mask"] = torch.ones(2, 18, dtype=torch.bool)
    inputs["mask"][0, 7] = False
    assert all(result.isfinite().all() for result in run(inputs, backend).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_minus_infinity_weigh_nothing(backend: str) -> None:
    inputs = cast(make_inputs(QueryShape(1, 1, 1, 1, 40, -1, 4, (2, 5))), torch.float32)
    inputs["tables"][1][..., :35, 1] = -math.inf
    inputs["tables"][1][..., 2] = -math.inf
    actual, expected = run(inputs, backend), run(inputs, "reference")
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert (actual["out"].unflatten(2, (2, 5))[:, :, :, 2] == 0).all()


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend: str, masked: bool) -> None:
    inputs = cast(make_inputs(QueryShape(2, 1, 1, 1, 3, 2 if masked else -1, 2, (2, 2)), masked=masked), torch.float32)
    on = lambda tensor: None if tensor is None else tensor.to(device_of(backend))  # noqa: E731
    leaf = lambda tensor: None if tensor is None else on(tensor).requires_grad_()  # noqa: E731
    parts = [part for part in (inputs["k"], *inputs["tables"]) if part is not None]
    form = torch.cat([part.transpose(2, 3) for part in parts], 2)
    r = inputs["r"].flatten(1)
    arguments = *map(leaf, (form, inputs["v"], inputs["h"], inputs["x"], r)), on(inputs["mask"])
    random, dropout_p = (torch.tensor([3]), 0.5) if masked else (None, 0.0)
    with pk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.perceiver_kernels.separable_query_attention_fwd.default, (*arguments, random, [2, 2], dropout_p)
        )


def test_compiles_whole_with_dynamic_shapes() -> None:
    def f(t0: Tensor, t1: Tensor, v: Tensor, h: Tensor, k: Tensor, x: Tensor, r: Tensor) -> Tensor:
        return separable_query_attention((t0, t1), v, h=h, k=k, x=x, r=r).transpose(1, 2).flatten(2).square().sum() * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for grid in ((4, 5), (6, 3)):
        inputs = cast(make_inputs(QueryShape(2, 1, 1, 3, 7, 2, 4, grid)), torch.float32)
        leaves = [[v.clone().requires_grad_() for v in named_leaves(inputs).values()] for _ in range(2)]
        results = [g(*ls) for g, ls in zip((f, compiled), leaves, strict=True)]
        torch.testing.assert_close(results[0], results[1])
        gradients = [torch.autograd.grad(v, ls) for v, ls in zip(results, leaves, strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_autocast_casts_the_values() -> None:
    inputs = cast(make_inputs(SMALL), torch.float32)
    expected = separable_query_attention(**{**inputs, "v": inputs["v"].bfloat16()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(separable_query_attention(**inputs), expected)
        assert separable_query_attention(**cast(inputs, torch.float64)).dtype == torch.float64


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(SMALL)
    v = inputs.pop("v").requires_grad_()
    out = separable_query_attention(v=v, **inputs)
    (gradient,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="separable_query_attention has no second derivatives"):
        gradient.sum().backward()


def test_explain_and_a_forced_backend_that_cannot_run() -> None:
    inputs = make_inputs(SMALL)
    assert f"{BACKENDS[-1] if 'native' in BACKENDS else 'reference'}: runs this call" in explain(**inputs)
    assert "triton: no, device is cpu" in explain(**inputs)
    with pk.use_backend("triton"), pytest.raises(dispatch.BackendError, match="compute dtype is float64"):
        separable_query_attention(**inputs)


# --- machine code ---------------------------------------------------------------------------------------------------

INTEGERS = (
    "N", "heads", "outers", "columns", "column_entry", "entries", "head_dim", "size_1", "size_2", "size_3",
    "form_batch", "h_batch", "x_batch", "x_query", "x_channel", "r_batch",
)  # fmt: skip
ALIGNED = ("N", "columns", "head_dim", "form_batch", "h_batch", "d_out_batch", "d_out_head", "d_out_query")


def built(kernel: str, arch: int, dtype: str, tiles: Tiles, ones: bool = False) -> Figures:
    """Two axes, h and r, no data, no mask; `kernel` is fwd, bwd_queries, bwd_keys or, for d_v alone, bwd_values.

    ones: every size and stride is 1, which Triton makes a constant of the code.
    """
    chunk = 64
    pointers = {"form": "*fp32", "v": f"*{dtype}", "h": "*fp32", "r": "*fp32", "lse": "*fp32"}
    scalars = {**dict.fromkeys(INTEGERS, "i32"), "seed": "i64", "threshold": "i64", "keep_scale": "fp32"}
    constants: dict[str, Any] = {"x": None, "mask": None, "AXES": 2, "CHANNELS": 0, "DROPOUT": False}
    constants |= {"PRECISION": "ieee", "COMPILED": True, "QUERIES": tiles.rows, "KEYS": tiles.columns, "CHUNK": chunk}
    if kernel == "fwd":
        pointers["out"] = f"*{dtype}"
    else:
        pointers |= {"d_out": f"*{dtype}", "delta": "*fp32"}
        scalars |= dict.fromkeys(("d_out_batch", "d_out_head", "d_out_query"), "i32")
        constants |= {"d_out_channel": 1, "WHOLE": True}
    if kernel == "bwd_queries":
        pointers["d_r"], scalars["batches"] = "*fp32", "i32"
        constants |= {"d_x": None, "DATA": 16, "DATA_PRECISION": "ieee"}
    if kernel in ("bwd_keys", "bwd_values"):
        results = ("d_entries", "d_table", "d_h") if kernel == "bwd_keys" else ("d_v",)
        pointers |= dict.fromkeys(results, "*fp32")
        constants |= dict.fromkeys({"d_entries", "d_table", "d_h", "d_v"}.difference(results))
        scalars |= {"column_parts": "i32", "outer_parts": "i32"}
    if ones:
        constants |= dict.fromkeys(INTEGERS, 1)
        scalars = {name: kind for name, kind in scalars.items() if name not in INTEGERS}
    name = "bwd_keys" if kernel == "bwd_values" else kernel
    signature = pointers | scalars
    return figures(
        Build(
            f"separable_query_attention:separable_query_attention_{name}_kernel",
            signature,
            constants,
            arch,
            tiles.warps,
            tiles.stages,
            tuple(argument for argument in ALIGNED if argument in signature),
        )
    )


@needs_triton
@pytest.mark.parametrize("kernel", ["fwd", "bwd_queries", "bwd_keys", "bwd_values"])
def test_compiles_where_every_size_is_one(kernel: str) -> None:
    assert built(kernel, 90, "fp32", SMALL_TILES, ones=True).registers


WIDE, NARROW, SMALL_TILES = Tiles(64, 64), Tiles(32, 64), Tiles(32, 32)


# The limits are what was measured on sm_90, and a little: registers, and instructions per pair.
@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "tiles", "registers", "per_pair"),
    [
        ("fwd", WIDE, 168, 15.5),
        ("bwd_queries", WIDE, 168, 18.5),
        ("bwd_keys", NARROW, 184, 28),
        ("bwd_values", NARROW, 136, 15),
    ],
)
def test_compiles_for_gpus_with_16_bit_values(
    kernel: str, tiles: Tiles, registers: int, per_pair: float, arch: int
) -> None:
    result = built(kernel, arch, "bf16", tiles)
    assert result.spills == 0
    assert result.tensor_core
    if arch == 90:
        assert result.registers <= registers
        assert result.per_pair <= per_pair


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "tiles"), [("fwd", SMALL_TILES), ("bwd_keys", SMALL_TILES), ("bwd_values", SMALL_TILES)]
)
def test_compiles_for_gpus_in_float32(kernel: str, tiles: Tiles) -> None:
    result = built(kernel, 80, "fp32", tiles)
    assert result.spills == 0
    assert not result.tensor_core


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": []}, "tables has 0 entries, must have one per grid axis, 1 to 4"),
        ({"tables": [torch.zeros(1, 2, 18, 2)] * 5}, "tables has 5 entries, must have one per grid axis, 1 to 4"),
        ({"tables": [torch.zeros(1, 2, 18, 10).half()]}, "tables.0. has dtype torch.float16, must be torch.float32 or"),
        (
            {"tables": [torch.zeros(1, 2, 18, 2), torch.zeros(1, 2, 17, 5)]},
            r"tables\[1\] has shape \(1, 2, 17, 5\), must be \(1 or 2, 2, 18, positions\) for v",
        ),
        (
            {"tables": [torch.zeros(1, 2, 18, 2), torch.zeros(2, 2, 18, 5)]},
            r"tables\[1\] has batch 2, must be 1 as tables\[0\] has",
        ),
        (
            {"tables": [torch.zeros(1, 2, 18, 2), torch.zeros(1, 2, 18, 5).double()]},
            r"tables\[1\] has dtype torch.float64, must be torch.float32 as tables\[0\] has",
        ),
        (
            {"tables": [torch.zeros(1, 2, 18, 1).expand(1, 2, 18, 2**16)] * 2},
            "tables span 4294967296 queries in 2 heads, must span fewer than 2147483648 together",
        ),
        ({"v": torch.zeros(2, 18, 6)}, "v has 3 dimensions, must have 4"),
        ({"v": torch.zeros(2, 2, 18, 0)}, "v has head_dim_v 0, must have at least 1"),
        (
            {"v": torch.zeros(2, 2, 18, 6).double()},
            "v has dtype torch.float64, must be bfloat16, float16 or torch.floa",
        ),
        ({"h": torch.zeros(2, 2, 17)}, r"h has shape \(2, 2, 17\), must be \(1 or 2, 2, 18\) for v"),
        ({"h": torch.zeros(2, 2, 18).double()}, "h has dtype torch.float64, must be torch.float32 as"),
        ({"k": None}, "k is None, must be given as x is"),
        ({"x": None}, "x is None, must be given as k is"),
        ({"k": torch.zeros(1, 2, 18, 3)}, "x has 2 channels, must have 3 as k has"),
        ({"k": torch.zeros(2, 2, 18, 2)}, r"k has batch 2, must be 1 as tables\[0\] has"),
        ({"k": torch.zeros(1, 2, 18, 129), "x": torch.zeros(1, 10, 129)}, "x has 129 channels, must have 0 to 128"),
        (
            {"x": torch.zeros(1, 11, 2)},
            r"x has shape \(1, 11, 2\), must be \(1 or 2, 10, channels\) or \(1 or 2, 2, 5, channels\) for the grid",
        ),
        ({"r": torch.zeros(3, 10)}, r"r has shape \(3, 10\), must be \(1 or 2, 10\) or \(1 or 2, 2, 5\) for the grid"),
        ({"mask": torch.ones(2, 18)}, "mask has dtype torch.float32, must be torch.bool"),
        ({"mask": torch.ones(1, 18, dtype=torch.bool)}, r"mask has shape \(1, 18\), must be \(2, 18\): batch and keys"),
        ({"h": torch.zeros(2, 2, 18, device="meta")}, r"h is on meta, must be on cpu as tables\[0\] is"),
        ({"v": torch.zeros(2, 2, 18, 6, device="meta")}, r"v is on meta, must be on cpu as tables\[0\] is"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0, must be at least 0 and less than 1"),
        ({"seed": -1}, r"seed is -1, must be from 0 to 2\^63 - 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    inputs = {**cast(make_inputs(SMALL), torch.float32), **changes}
    with pytest.raises(ValueError, match=message):
        separable_query_attention(**inputs)
