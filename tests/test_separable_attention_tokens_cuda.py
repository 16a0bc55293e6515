"""Gradients of separable attention's tokens by csrc/cuda: shapes that divide the work, and the machine code."""

from __future__ import annotations

import machine_code
import pytest
import torch
from shapes import SeparableShape, available_backends
from test_separable_attention import cast, check_against_reference, make_inputs, on_device, run
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.ops.separable_attention import separable_attention

needs_kernels = pytest.mark.skipif("cuda" not in available_backends("separable_attention"), reason="no CUDA")

SHAPES = [
    SeparableShape(1, 1, 1, 1, (1,)),
    SeparableShape(2, 1, 5, 3, (4, 6)),
    SeparableShape(2, 2, 15, 3, (2, 5, 3)),
    SeparableShape(1, 1, 33, 2, (2, 3, 2, 5)),
    SeparableShape(2, 1, 2, 1, (9, 1)),
    SeparableShape(1, 1, 70, 4, (1, 33)),
    SeparableShape(2, 2, 65, 3, (19,)),
    SeparableShape(1, 1, 130, 3, (3, 9)),  # the rows are split
    SeparableShape(1, 1, 40, 4, (270,)),
    SeparableShape(1, 1, 3, 3, (70, 66)),  # several bands and strips
    SeparableShape(2, 1, 19, 5, (5, 17)),
    SeparableShape(1, 1, 17, 24, (3, 2, 5)),
    SeparableShape(1, 1, 3, 128, (70,)),
]


@needs_kernels
@pytest.mark.parametrize("with_r", [True, False], ids=["r", "no_r"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_tokens(shape: SeparableShape, with_r: bool) -> None:
    check_against_reference(make_inputs(shape, with_r=with_r), "cuda", torch.float32)


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPES[6], SHAPES[7], SHAPES[10]], ids=str)
def test_dropout(shape: SeparableShape) -> None:
    inputs = make_inputs(shape, masked=True)
    check_against_reference(inputs, "cuda", torch.float32, dropout_p=0.4, seed=2**40 + 7)


@needs_kernels
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[7], SHAPES[10]], ids=str)
def test_what_is_masked_does_not_matter(shape: SeparableShape) -> None:
    inputs = cast(make_inputs(shape, masked=True), torch.float32)
    clean = run(inputs, "cuda")
    garbage = run({**inputs, "x": inputs["x"].masked_fill(~inputs["mask"][..., None], torch.nan)}, "cuda")
    assert all(torch.equal(value, garbage[name]) for name, value in clean.items())
    assert not clean["d_x"][~inputs["mask"]].any() and not clean["d_r"][~inputs["mask"]].any()


@needs_kernels
def test_steep_scores() -> None:
    inputs = make_inputs(SeparableShape(1, 1, 40, 3, (5, 12)), spread=20.0)
    check_against_reference(inputs, "cuda", torch.float32, amplification=100.0)


@needs_kernels
@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
def test_table_entries_that_exclude(channels: int, value: float) -> None:
    """Positions that some rows do not attend to, and a row with none to attend to, which has no part in gradients."""
    inputs = make_inputs(SeparableShape(1, 1, 6, channels, (4, 6)))
    inputs["tables"][0][:, :3, 1] = value
    inputs["tables"][1][:, 2:, 2] = value
    inputs["tables"][0][:, 5] = -torch.inf

    def gradients(dtype: torch.dtype, tables: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        given = on_device(cast({**inputs, "tables": tables}, dtype), backend)
        leaves = given["x"].requires_grad_(), given["r"].requires_grad_()
        with pk.use_backend(backend):
            acc = separable_attention(given["a"], given["tables"], *leaves).acc
        return torch.autograd.grad((acc if backend == "cuda" else acc[:, :5]).sum(), leaves)

    clamped = [table.clamp(min=-1e6) for table in inputs["tables"]]
    expected = gradients(torch.float64, clamped, "reference")
    for result, truth in zip(gradients(torch.float32, inputs["tables"], "cuda"), expected, strict=True):
        torch.testing.assert_close(result.cpu().double(), truth, rtol=1e-4, atol=1e-4)


# --- machine code ----------------------------------------------------------------------------------------------------


def few_channels(channels: int, axes: str, with_r: bool, arch: str) -> machine_code.Figures:
    tile = "ILi%dELi1ELi4E" if axes == "one axis" else "ILi%dELi2ELi2E" if channels == 4 else "ILi%dELi4ELi2E"
    name = f"separable_attention_bwd_tokens_kernel{tile % channels}Lb{int(with_r)}E"
    return machine_code.built(name, arch)


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(("with_r", "most"), [(True, 22.0), (False, 19.0)])
def test_instructions_per_pair(with_r: bool, most: float, arch: str) -> None:
    """By hand it is 20: four for the form, score, EX2, four for u, slope, six of d_x, three of d_r; loads for all."""
    found = few_channels(3, "two axes", with_r, arch)
    assert found.exponentials % 8 == 0
    assert found.per_pair <= most
    assert found.spills == found.shuffles == 0
    assert found.registers <= 128  # 16 warps on a multiprocessor


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("axes", ["one axis", "two axes"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_few_channels_fit_the_registers(channels: int, axes: str, arch: str) -> None:
    assert few_channels(channels, axes, True, arch).spills == 0


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("own_channels", [1, 4, 16])
def test_many_channels_fit_the_registers(own_channels: int, arch: str) -> None:
    found = machine_code.built(f"separable_attention_bwd_many_tokens_kernelILi{own_channels}E", arch)
    assert found.spills == 0
    assert found.registers <= 128
