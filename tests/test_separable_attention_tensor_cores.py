"""Separable attention by TensorFloat-32 products, csrc/cuda: a mode of its own, with tolerances of its own.

TensorFloat-32 has 10 bits of mantissa. An operand is rounded by up to EPS = 2^-11 of it; a weight, which the tensor
cores cut off, by up to 2 EPS. So a score is off by EPS times the sum of its products' absolute values, which is at most
`amplitude`, and a weight by as much relatively; a softmax weight by that twice, once through the sum that divides it.
With the second product's operands this makes EPS (2 amplitude + 5) of a sum of absolute values. Errors have either
sign, and sums of many terms come nowhere near that bound: the RMS error of all entries of a result is to be at most RMS
of their RMS value.
"""

from __future__ import annotations

from dataclasses import dataclass

import machine_code
import pytest
import torch
from numerics import root_mean_square, tf32_allowed
from shapes import available_backends, device_of
from torch import Tensor

from perceiver_kernels.backends.cuda import separable_attention as launchers
from perceiver_kernels.backends.reference import separable_attention as reference

needs_kernels = pytest.mark.skipif("cuda" not in available_backends("separable_attention"), reason="no CUDA")

EPS = 2.0**-11
RMS, RMS_OF_MANY_CHANNELS = 2.0 * EPS, 3.0 * EPS
UNDERFLOW = 1e-35


@dataclass(frozen=True)
class Plane:
    batch: int
    query_batch: int
    rows: int
    channels: int
    grid: tuple[int, int]

    def __str__(self) -> str:
        sizes = f"B{self.batch}-Q{self.query_batch}-R{self.rows}-c{self.channels}"
        return f"{sizes}-{self.grid[0]}x{self.grid[1]}"


PLANES = [
    Plane(1, 1, 1, 1, (1, 1)),
    Plane(2, 1, 5, 3, (4, 6)),
    Plane(2, 2, 33, 2, (3, 40)),
    Plane(1, 1, 40, 3, (19, 33)),  # several chunks of outer positions
    Plane(2, 1, 17, 3, (9, 70)),
    Plane(1, 1, 3, 3, (40, 130)),  # blocks with several strips
    Plane(1, 1, 300, 1, (2, 65)),  # several blocks of rows, the last with idle warps
    Plane(2, 1, 17, 9, (5, 40)),  # many channels
    Plane(1, 1, 40, 70, (4, 21)),
    Plane(0, 1, 3, 2, (2, 3)),
    Plane(2, 1, 3, 2, (2, 0)),
    Plane(2, 1, 0, 2, (2, 3)),
]


@dataclass
class Call:
    """A call's tensors, float32 and where kernels run, and what is expected of the results: in float64 on the CPU."""

    form: Tensor
    x: Tensor
    r: Tensor | None
    d_sums: Tensor
    d_lse: Tensor

    def forward(self) -> reference.State:
        with tf32_allowed(True):
            return launchers.separable_attention_fwd(self.form, self.x, self.r, None, 0.0, 0)

    def backward(self, saved: reference.State) -> Tensor:
        with tf32_allowed(True):
            return self._backward(launchers.separable_attention_bwd, saved)

    def _backward(self, backward, saved: reference.State) -> Tensor:  # type: ignore[no-untyped-def]
        upstream = self.d_sums, self.d_lse, torch.zeros_like(self.d_lse)
        needs = True, False, False
        return backward(self.form, self.x, self.r, None, 0.0, 0, saved, upstream, needs)[0]

    def exact(self) -> Call:
        tensors = (self.form, self.x, self.r, self.d_sums, self.d_lse)
        return Call(*(None if value is None else value.cpu().double() for value in tensors))  # type: ignore[arg-type]


def make(plane: Plane, with_r: bool = True, dtype: torch.dtype = torch.float32) -> Call:
    g = torch.Generator().manual_seed(0)
    device = device_of("cuda")
    rand = lambda *size: torch.randn(*size, generator=g).to(device)  # noqa: E731
    entries = plane.channels + sum(plane.grid)
    x = rand(plane.batch, plane.channels, *plane.grid).permute(0, 2, 3, 1)
    form = rand(plane.query_batch, entries, plane.rows)
    form[:, : plane.channels] /= max(1.0, plane.channels / 3) ** 0.5
    return Call(
        form,
        (60 * x + 128).clamp(0, 255).to(dtype) if dtype == torch.uint8 else x.to(dtype),
        rand(plane.batch, *plane.grid).abs() + 0.1 if with_r else None,
        rand(plane.batch, entries, plane.rows),
        rand(plane.batch, plane.rows).double(),
    )


def check(plane: Plane, call: Call) -> None:
    """The results against float64, by the bounds at the top of this file."""
    saved = call.forward()
    d_form = call.backward(saved).cpu()
    exact = call.exact()
    truth = reference.separable_attention_fwd(exact.form, exact.x, exact.r, None, 0.0, 0)
    if not (exact.x.numel() and plane.rows):
        assert torch.equal(saved[0].cpu().double(), truth[0]) and not d_form.any()
        return
    _, factor, _, p = reference._weights(exact.form, exact.x, exact.r, None)
    factor, x = factor.abs(), exact.x.abs()
    products = exact.form.abs()
    products[:, plane.channels + plane.grid[0] :] = 0  # the columns' table is exact
    amplitude = (factor * reference._over_tokens(products, x)).max().item()
    sums, lse, total = (value.cpu() for value in saved)
    of_lse = EPS * (amplitude + 2)
    assert (lse - truth[1]).abs().max() <= of_lse
    assert (total - 1).abs().max() <= 1e-6
    of_weights = EPS * (2 * amplitude + 5)
    scale = reference._sums(p * factor, x)
    assert ((sums - truth[0]).abs() <= of_weights * scale + UNDERFLOW).all()
    rms = RMS if plane.channels <= launchers.TENSOR_CORES_MAX_CHANNELS else RMS_OF_MANY_CHANNELS
    assert root_mean_square(sums - truth[0]) <= rms * root_mean_square(truth[0])

    d_form_truth = exact._backward(reference.separable_attention_bwd, truth)
    u = factor * reference._over_tokens(exact.d_sums.abs(), x)
    delta = (exact.d_sums.abs() * scale).sum(1) + exact.d_lse.abs()
    scale = reference._sums(p * (u + delta[..., None]) * factor, x)
    if plane.query_batch == 1:
        scale = scale.sum(0, keepdim=True)
    assert ((d_form - d_form_truth).abs() <= 2 * of_weights * scale + UNDERFLOW).all()
    assert root_mean_square(d_form - d_form_truth) <= 2 * rms * root_mean_square(d_form_truth)


@needs_kernels
@pytest.mark.parametrize("with_r", [True, False], ids=["r", "no_r"])
@pytest.mark.parametrize("plane", PLANES, ids=str)
def test_results(plane: Plane, with_r: bool) -> None:
    check(plane, make(plane, with_r))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_data_of_other_dtypes(dtype: torch.dtype) -> None:
    call = make(PLANES[1], dtype=dtype)
    if dtype == torch.uint8:
        call.form[:, :3] /= 60.0
    check(PLANES[1], call)


@needs_kernels
def test_cut_off_weights_are_made_up_for() -> None:
    """Over many tokens, what tensor cores cut off the weights is as much for every row: 3.5e-4 if nothing were done."""
    plane = Plane(1, 1, 40, 3, (40, 64))
    sums, _, _ = make(plane, with_r=False).forward()
    for marginal in sums[:, plane.channels :].split(plane.grid, 1):
        assert (marginal.sum(1) - 1).mean().abs() < 5e-5


@needs_kernels
def test_scores_far_above_the_first() -> None:
    """The reference is then the largest score: sums stay finite, and the weights right."""
    plane = Plane(1, 1, 6, 2, (3, 40))
    call = make(plane, with_r=False)
    call.form[:, plane.channels + plane.grid[0] + 30] += 300.0
    check(plane, call)


@needs_kernels
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
def test_table_entries_that_exclude(value: float) -> None:
    plane = Plane(1, 1, 6, 2, (4, 40))
    call = make(plane)
    call.form[:, plane.channels + 1, :3] = value
    call.form[:, plane.channels + 4 + 7, 2:] = value
    if value == -torch.inf:
        call.form[:, plane.channels : plane.channels + 4, 5] = value  # a row with nothing to attend to
    exact = call.exact()
    saved = call.forward()
    truth = reference.separable_attention_fwd(exact.form, exact.x, exact.r, None, 0.0, 0)
    gradients = call.backward(saved), exact._backward(reference.separable_attention_bwd, truth)
    for found, true in (*zip(saved, truth, strict=True), gradients):
        torch.testing.assert_close(found.cpu().double(), true, rtol=0.0, atol=20 * EPS)


@needs_kernels
def test_nan_reaches_the_rows_that_attend_to_it() -> None:
    plane = Plane(2, 1, 40, 3, (4, 6))
    call = make(plane)
    call.x[0, 2, 3, 1] = torch.nan
    saved = call.forward()
    assert saved[0][0].isnan().any(0).all() and saved[1][0].isnan().all()
    assert saved[0][1].isfinite().all()
    call = make(plane)
    call.form[0, 1, 7] = torch.nan
    saved = call.forward()
    d_form = call.backward(saved)
    for result in (saved[0].transpose(0, 1), saved[1], d_form.transpose(0, 1)):
        rows = result.isnan().reshape(-1, plane.rows)
        assert rows[:, 7].any() and not rows[:, :7].any() and not rows[:, 8:].any()


def test_which_calls_run_by_tensor_cores() -> None:
    form, x = torch.zeros(1, 12, 2), torch.zeros(1, 4, 5, 3, dtype=torch.bfloat16)
    with tf32_allowed(False):
        assert not launchers.tensor_core_products(form, x, None, 0.0)
    with tf32_allowed(True):
        assert launchers.tensor_core_products(form, x, None, 0.0)
        assert not launchers.tensor_core_products(form, x, torch.ones(1, 4, 5, dtype=torch.bool), 0.0)
        assert not launchers.tensor_core_products(form, x, None, 0.1)
        assert not launchers.tensor_core_products(form, x.flatten(1, 2), None, 0.0)
        assert not launchers.tensor_core_products(form, torch.zeros(1, 4, 5, 4), None, 0.0)


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(
    ("kernel", "per_pair", "products"),
    [
        # By hand 4.6: two multiply-adds, EX2, half a product; half of the loads; 20 a position for the outer sum.
        ("separable_attention_fwd_tensor_cores_kernel", 5.5, 16),
        # 7.2: another multiply-add, a product of its own, a quarter of a product.
        ("separable_attention_bwd_rows_tensor_cores_kernel", 8.5, 24),
    ],
)
def test_machine_code(kernel: str, per_pair: float, products: int, arch: str) -> None:
    found = machine_code.built(kernel, arch)
    assert found.exponentials == 32
    assert found.per_pair <= per_pair
    assert found.tensor_core == products
    assert found.spills == found.shuffles == 0
    assert found.registers <= 168  # three blocks of 128 threads on a multiprocessor
