"""Separable attention of 5 to 128 data channels by tensor cores, csrc/cuda: float32's accuracy, and the machine code.

Its mode for where TensorFloat-32 is allowed is in test_separable_attention_tensor_cores.py.
"""

from __future__ import annotations

import cuda_emulation
import machine_code
import pytest
import torch
from shapes import SeparableShape
from test_separable_attention import cast, check_against_reference, make_inputs, outputs, run

from perceiver_kernels.backends.cuda import runtime
from perceiver_kernels.backends.cuda import separable_attention as launchers
from perceiver_kernels.benchmarking.gpu_roofline import tf32_allowed

needs_kernels = pytest.mark.skipif(runtime.unavailable() is not None, reason="the CUDA module cannot be used here")

SHAPES = [
    SeparableShape(1, 1, 1, 5, (1,)),
    SeparableShape(2, 1, 17, 8, (5, 20)),
    SeparableShape(2, 2, 70, 9, (4, 33)),
    SeparableShape(1, 1, 33, 16, (40,)),
    SeparableShape(2, 1, 130, 17, (3, 17)),  # several blocks of rows, the last with idle warps
    SeparableShape(2, 1, 5, 6, (3, 4, 5)),
    SeparableShape(1, 1, 4, 33, (2, 3, 2, 17)),
    SeparableShape(1, 1, 19, 64, (19, 18)),
    SeparableShape(2, 1, 66, 65, (2, 3)),
    SeparableShape(1, 1, 3, 128, (9, 33)),
    SeparableShape(1, 1, 2, 7, (40, 130)),  # blocks with several strips and stages
    SeparableShape(0, 1, 3, 5, (2, 3)),
    SeparableShape(2, 1, 0, 5, (2, 3)),
]


@needs_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: SeparableShape, masked: bool) -> None:
    check_against_reference(make_inputs(shape, with_r=not masked, masked=masked), "cuda", torch.float32)


@needs_kernels
@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_data_that_are_exact(dtype: torch.dtype, channels: int) -> None:
    """Two products for one."""
    inputs = make_inputs(SeparableShape(2, 1, 18, channels, (5, 21)))
    if dtype == torch.uint8:
        inputs["x"] = (60 * inputs["x"] + 128).clamp(0, 255)
        inputs["a"] /= 60.0
    check_against_reference(inputs, "cuda", torch.float32, dtype)


@needs_kernels
@pytest.mark.parametrize("slope", [30.37, -30.37])
def test_scores_that_grow_and_fall(slope: float) -> None:
    """A reference that follows scales what is in registers, outer marginals and those of earlier strips."""
    inputs = make_inputs(SeparableShape(1, 1, 3, 5, (12, 50)))
    inputs["tables"][0] += slope * torch.arange(12)
    check_against_reference(inputs, "cuda", torch.float32, amplification=32.0, by_terms=True)
    inputs["tables"][1] += slope * (torch.arange(50) // 16)
    check_against_reference(inputs, "cuda", torch.float32, amplification=32.0, by_terms=True)


@needs_kernels
@pytest.mark.parametrize("where", ["first columns", "an outer row", "everywhere"])
def test_scores_of_minus_infinity_weigh_nothing(where: str) -> None:
    inputs = cast(make_inputs(SeparableShape(1, 1, 3, 6, (5, 40))), torch.float32)
    if where == "first columns":
        inputs["tables"][1][:, :2, :37] = -torch.inf
    else:
        inputs["tables"][0][:, :2, : 1 if where == "an outer row" else 5] = -torch.inf
    actual, expected = run(inputs, "cuda"), run(inputs, "reference")
    del actual["d_r"]  # is 0 times -inf
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_reaches_the_rows_that_attend_to_it(value: float, dtype: torch.dtype) -> None:
    inputs = cast(make_inputs(SeparableShape(2, 1, 18, 9, (5, 40))), torch.float32, dtype)
    inputs["x"][0, 133, 1] = value
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, 133] = False
    for allowed in (False, True):
        with tf32_allowed(allowed):
            acc = outputs(inputs, "cuda")["acc"]
            hidden = outputs({**inputs, "mask": mask}, "cuda")
        assert acc[0].isnan().any(-1).all() and acc[1].isfinite().all()
        assert all(value.isfinite().all() for value in hidden.values())


@needs_kernels
@pytest.mark.parametrize("place", ["a", "table"])
def test_nan_in_a_row_stays_in_that_row(place: str) -> None:
    inputs = cast(make_inputs(SeparableShape(1, 1, 5, 9, (3, 20))), torch.float32)
    (inputs["a"] if place == "a" else inputs["tables"][1])[0, 2, 7] = torch.nan
    results = run(inputs, "cuda")
    for name in ("acc", "d_a"):
        assert results[name][0, 2].isnan().all()
        assert results[name][0, [0, 1, 3, 4]].isfinite().all()


@needs_kernels
def test_large_data_do_not_overflow_the_lazy_sums() -> None:
    tables = [torch.tensor([0.0, 20.0, 5.0, 0.0]).expand(1, 3, 4), torch.zeros(1, 3, 30)]
    inputs = {"a": torch.zeros(1, 3, 5), "tables": tables, "x": torch.full((1, 120, 5), 1e24), "r": None, "mask": None}
    torch.testing.assert_close(outputs(inputs, "cuda")["acc"], torch.full((1, 3, 5), 1e24))


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6], SHAPES[9]], ids=str)
def test_order_of_threads_changes_nothing(shape: SeparableShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bit, on a GPU that divides the tokens of few rows little or much."""
    inputs = cast(make_inputs(shape, masked=True), torch.float32)
    for multiprocessors in (4, 132):
        monkeypatch.setattr(launchers, "multiprocessors", lambda device, count=multiprocessors: count)
        in_order = run(inputs, "cuda")
        with cuda_emulation.shuffled(7):
            again = run(inputs, "cuda")
        for name, value in in_order.items():
            assert torch.equal(value, again[name]), name


def test_which_products() -> None:
    form, x = torch.zeros(1, 14, 2), torch.zeros(1, 4, 5, 5)
    mask = torch.ones(1, 4, 5, dtype=torch.bool)
    with tf32_allowed(False):
        assert launchers.tensor_core_products(form, x, mask, 0.0) == 3
        assert launchers.tensor_core_products(form, x.flatten(1, 2), None, 0.0) == 3
        assert launchers.tensor_core_products(form, x.bfloat16(), None, 0.0) == 2
        assert launchers.tensor_core_products(form, x, None, 0.1) == 0
        assert launchers.tensor_core_products(form, x[..., :4], None, 0.0) == 0
    with tf32_allowed(True):
        assert launchers.tensor_core_products(form, x.bfloat16(), mask, 0.0) == 1


# Instructions per pair without those of channels; a step of eight channels of a lane's pairs has 12 or 24 products.
@pytest.mark.skipif(machine_code.cuda_module() is None, reason="the CUDA module is not built")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("products", [1, 2, 3])
@pytest.mark.parametrize("capacity", [16, 32, 64, 128])
@pytest.mark.parametrize(("kernel", "per_pair"), [("fwd", 21.5), ("bwd_rows", 25.0)])
def test_machine_code(kernel: str, per_pair: float, capacity: int, products: int, arch: str) -> None:
    steps, forms = capacity // 8, 1 if kernel == "fwd" else 2
    name, arguments = f"separable_attention_{kernel}_many_channels_kernel", f"ILi{steps}ELi{products}E"
    found = machine_code.built(name, arch, arguments)
    assert found.spills == 0
    assert found.registers <= 255  # two blocks on a multiprocessor
    instructions, pairs = found.shortest
    assert pairs == (32 if capacity < (128 if kernel == "fwd" else 64) else 16)
    assert instructions / pairs <= per_pair
    of_step = products * pairs // 4
    assert found.tensor_core == of_step * (steps + forms)
    loops = machine_code.built_loops(name, arch, arguments)
    of_forms = [loop for loop in loops if machine_code.count(loop, "HMMA") == of_step]
    assert len(of_forms) == forms and all(len(loop) <= (90 if pairs == 32 else 65) for loop in of_forms)
