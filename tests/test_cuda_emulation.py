"""The emulation of CUDA is honest: what would go wrong on a GPU goes wrong in it, and matrix products are products."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_emulation
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(not cuda_emulation.compiler(), reason="there is no C++ compiler")

# Kernels that are right, and the same with one thing wrong; each entry point runs one and returns the error's text.
SOURCE = r"""
#include "launch.h"
#include "primitives.h"
#include "emulation.cpp"

using namespace pk::cuda;

namespace {

__global__ void reverse_kernel(const float* in, float* out, bool wait) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  if (wait) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Without waiting for the others, warp by warp.
__global__ void warp_kernel(const float* in, float* out, bool wait) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  if (wait) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 31];
}

__global__ void late_copy_kernel(const float* in, float* out, int wait) {
  float* shared = shared_memory<float>();
  async_copy(shared + 4 * threadIdx.x, in + 4 * threadIdx.x);
  async_commit();
  if (wait == 0) async_wait<0>();
  if (wait == 1) async_wait<1>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}

__global__ void reuse_kernel(const float* in, float* out, bool wait) {
  float* shared = shared_memory<float>();
  const int own = 4 * threadIdx.x;
  async_copy(shared + own, in + own);
  async_commit();
  async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = shared[own ^ 16];
  if (wait) __syncthreads();
  async_copy(shared + own, in + 4 * blockDim.x + own);
  async_commit();
  async_wait<0>();
}

__global__ void bulk_kernel(const float* in, float* out, int what) {
  uint64_t* barrier = shared_memory<uint64_t>();
  float* shared = shared_memory<float>() + 4;
  if (threadIdx.x == 0) {
    if (what != 1) barrier_init(barrier, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(barrier, what == 2 ? 272 : 256);
    bulk_copy(shared, in, 256, barrier);
  }
  if (what != 3) barrier_wait(barrier, 0);
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void reach_kernel(float* out, int index) {
  float* shared = shared_memory<float>();
  shared[index] = 1.0f;
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void misaligned_kernel(const float* in, float* out, int shift) {
  float* shared = shared_memory<float>();
  async_copy(shared, in + shift);
  async_commit();
  async_wait<0>();
  out[0] = shared[0];
}

__global__ void wide_kernel(const float* in, float* out, int shift) {
  *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + shift);
}

__global__ void divergent_kernel(float* out, int least) {
  if (static_cast<int>(threadIdx.x) >= least) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void alone_kernel(float* out, unsigned mask) {
  out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<float>(threadIdx.x), 1);
}

// d (16 x 8) += a b, of one warp, through the layouts that primitives.h describes.
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* d, bool half) {
  const int group = threadIdx.x / 4, quarter = threadIdx.x % 4;
  uint16_t* shared = shared_memory<uint16_t>();  // a [16, 16], then b [16, 8]
  for (int i = threadIdx.x; i < 256; i += 32) shared[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) shared[256 + i] = b[i];
  __syncwarp();
  uint32_t of_a[4], both[4];
  const int matrix = threadIdx.x / 8, row = threadIdx.x % 8;
  load_matrices(of_a, shared + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
  load_matrices_transposed(both, shared + 256 + (row + matrix % 2 * 8) * 8);
  const uint32_t of_b[2] = {both[0], both[1]};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(group + i / 2 * 8) * 8 + 2 * quarter + i % 2];
  if (half) mma_half(sums, of_a, of_b); else mma_bfloat16(sums, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * quarter + i % 2] = sums[i];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* d) {
  const int group = threadIdx.x / 4, quarter = threadIdx.x % 4;
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) of_a[i] = round_tf32(a[(group + i % 2 * 8) * 8 + quarter + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) of_b[i] = round_tf32(b[(quarter + i * 4) * 8 + group]);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(group + i / 2 * 8) * 8 + 2 * quarter + i % 2];
  mma_tf32(sums, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * quarter + i % 2] = sums[i];
}

__global__ void numbers_kernel(const float* in, float* out, int what) {
  const float x = in[threadIdx.x];
  out[threadIdx.x] = what == 0   ? exp2_approx(x)
                     : what == 1 ? half_to_float(float_to_half(x))
                     : what == 2 ? __uint_as_float(pack_bfloat16(0.0f, x))
                     : what == 3 ? half_to_float(static_cast<uint16_t>(pack_half(x, 0.0f)))
                                 : __uint_as_float(round_tf32(x));
}

const char* text(pk::Status status) { return status.code ? status.message : ""; }

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) const char*

ENTRY reverse(const float* in, float* out, int threads, bool wait) {
  return text(launch(reverse_kernel, 1, threads, threads * sizeof(float), nullptr, in, out, wait));
}
ENTRY warp(const float* in, float* out, bool wait) {
  return text(launch(warp_kernel, 1, 64, 64 * sizeof(float), nullptr, in, out, wait));
}
ENTRY late_copy(const float* in, float* out, int wait) {
  return text(launch(late_copy_kernel, 1, 8, 32 * sizeof(float), nullptr, in, out, wait));
}
ENTRY reuse(const float* in, float* out, bool wait) {
  return text(launch(reuse_kernel, 1, 32, 128 * sizeof(float), nullptr, in, out, wait));
}
ENTRY bulk(const float* in, float* out, int what) {
  return text(launch(bulk_kernel, 1, 64, 16 + 256, nullptr, in, out, what));
}
ENTRY reach(float* out, int index) { return text(launch(reach_kernel, 1, 4, 16, nullptr, out, index)); }
ENTRY misaligned(const float* in, float* out, int shift) {
  return text(launch(misaligned_kernel, 1, 1, 16, nullptr, in, out, shift));
}
ENTRY wide(const float* in, float* out, int shift) {
  return text(launch(wide_kernel, 1, 1, 0, nullptr, in, out, shift));
}
ENTRY divergent(float* out, int least) { return text(launch(divergent_kernel, 2, 64, 0, nullptr, out, least)); }
ENTRY alone(float* out, unsigned mask) { return text(launch(alone_kernel, 1, 32, 0, nullptr, out, mask)); }
ENTRY mma(const uint16_t* a, const uint16_t* b, float* d, bool half) {
  return text(launch(mma_kernel, 1, 32, 1024, nullptr, a, b, d, half));
}
ENTRY mma_float(const float* a, const float* b, float* d) {
  return text(launch(mma_tf32_kernel, 1, 32, 0, nullptr, a, b, d));
}
ENTRY numbers(const float* in, float* out, int count, int what) {
  return text(launch(numbers_kernel, 1, count, 0, nullptr, in, out, what));
}
ENTRY too_much(float* out, int threads, int64_t shared) {
  return text(launch(reach_kernel, 1, threads, static_cast<size_t>(shared), nullptr, out, 0));
}
"""


class Kernels:
    """The entry points of a compiled SOURCE. Tensors are given by address, everything else as int64."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name: str, *arguments: Tensor | int) -> str:
        """Runs the kernel; what it was found to do wrong, or nothing."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        plain = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments]
        return function(*plain).decode()


def compiled(folder: Path, *flags: str) -> Path:
    source, target = folder / "kernels.cu", folder / "kernels.so"
    source.write_text(SOURCE)
    includes = [f"-I{cuda_emulation.HERE}", f"-I{cuda_emulation.CUDA}"]
    options = [*cuda_emulation.FLAGS, "-O0", *flags, *includes, "-DEMULATED_ARCH=900"]
    command = [*cuda_emulation.compiler(), "-x", "c++", *options, "-shared", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(compiled(tmp_path_factory.mktemp("emulated")))


def orders(kernels: Kernels, seeds: range) -> Iterator[int]:
    """Sets each order in turn, the plain one last."""
    for seed in (*seeds, 0):
        kernels.library.emulation_shuffle(ctypes.c_uint(seed))
        yield seed


def test_kernels_compile() -> None:
    assert not cuda_emulation.failure, cuda_emulation.failure


@pytest.mark.parametrize("name, threads", [("reverse", 96), ("warp", 64)])
def test_a_missing_wait_shows(kernels: Kernels, name: str, threads: int) -> None:
    x = torch.arange(float(threads))
    expected = x.flip(0) if name == "reverse" else x.view(-1, 32).flip(1).flatten()
    sizes = [threads] if name == "reverse" else []
    for wait in (1, 0):
        right = []
        for _ in orders(kernels, range(1, 5)):
            out = torch.full((threads,), -1.0)
            assert kernels(name, x, out, *sizes, wait) == ""
            right.append(torch.equal(out, expected))
            assert wait or out.isnan().any(), "what is read too soon is NaN"
        assert all(right) if wait else not any(right)


def test_a_stage_that_is_filled_again_too_soon_shows(kernels: Kernels) -> None:
    x = torch.arange(256.0)
    for wait in (1, 0):
        right = []
        for _ in orders(kernels, range(1, 5)):
            out = torch.zeros(32)
            assert kernels("reuse", x, out, wait) == ""
            right.append(torch.equal(out, x[:128:4].view(-1, 2, 4).flip(1).flatten()))
        assert all(right) if wait else not all(right)


def test_copies_arrive_when_they_are_waited_for(kernels: Kernels) -> None:
    x = torch.arange(32.0)
    for wait, arrives in ((0, True), (1, False), (2, False)):
        out = torch.zeros(32)
        assert kernels("late_copy", x, out, wait) == ""
        assert torch.equal(out, x) if arrives else out.isnan().all()


@pytest.mark.parametrize("what, error", [(0, ""), (1, "before barrier_init"), (2, "threads that never come"), (3, "")])
def test_bulk_copies(kernels: Kernels, what: int, error: str) -> None:
    """As it should be; without barrier_init; with more bytes expected than come; without a wait."""
    x, out = torch.arange(64.0), torch.zeros(64)
    found = kernels("bulk", x, out, what)
    assert error in found and bool(error) == bool(found)
    if not error:
        assert torch.equal(out, x) == (what == 0) and out.isnan().all() == (what == 3)


def test_misaligned_copies(kernels: Kernels) -> None:
    x, out = torch.arange(8.0), torch.zeros(4)
    assert kernels("misaligned", x, out, 4) == "" and out[0] == 4.0
    assert "a copy's source is not aligned (thread 0 of block 0)" in kernels("misaligned", x, out, 1)


def test_barriers_that_some_never_reach(kernels: Kernels) -> None:
    out = torch.zeros(64)
    for _ in orders(kernels, range(1, 3)):
        assert kernels("divergent", out, 0) == ""
        assert "threads wait for threads that never come (block" in kernels("divergent", out, 1)
        assert kernels("divergent", out, 64) == ""


def test_lanes_outside_the_mask(kernels: Kernels) -> None:
    out = torch.zeros(32)
    assert kernels("alone", out, 0xFFFFFFFF) == "" and torch.equal(out, (torch.arange(32) ^ 1).float())
    assert "a lane calls with a mask that leaves it out" in kernels("alone", out, 0x0000FFFF)


def test_launches_that_no_gpu_takes(kernels: Kernels) -> None:
    out = torch.zeros(1024)
    assert kernels("too_much", out, 1024, 4096) == ""
    assert "too many" in kernels("too_much", out, 1025, 8192)
    assert "no threads" in kernels("too_much", out, 0, 16)
    assert "more shared memory than a block of this GPU may have" in kernels("too_much", out, 4, 228 << 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_matrices(kernels: Kernels, dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    expected = d + a.float() @ b.float()
    assert kernels("mma", a, b, d, dtype == torch.float16) == ""
    torch.testing.assert_close(d, expected)


def test_products_of_tf32_matrices(kernels: Kernels) -> None:
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    expected = d + rounded_tf32(a) @ rounded_tf32(b)
    assert kernels("mma_float", a, b, d) == ""
    torch.testing.assert_close(d, expected)


def rounded_tf32(x: Tensor) -> Tensor:
    """To 10 bits of mantissa, ties away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = torch.ldexp(mantissa, torch.tensor(11))
    return torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor(), exponent - 11).float()


def test_numbers(kernels: Kernels) -> None:
    """Roundings to nearest, and 2^x with everything that is not a normal number."""
    x = torch.cat([torch.randn(40) * 30, torch.tensor([0.0, -0.0, 1.0, 127.0, -126.0, -127.0, -200.0, 70000.0])])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    powers = torch.where(x < -126, 0.0, x.double().exp2()).float()
    expected = [powers, x.half().float(), x.bfloat16().float(), x.half().float()]
    expected.append(torch.where(x.isfinite(), rounded_tf32(x.nan_to_num()), x))
    for what, truth in enumerate(expected):
        out = torch.zeros_like(x)
        assert kernels("numbers", x, out, len(x), what) == ""
        torch.testing.assert_close(out, truth, rtol=1e-6 if what == 0 else 0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not cuda_emulation.sanitizer_libraries():
        pytest.skip("the compiler has no sanitizers")
    return compiled(tmp_path_factory.mktemp("sanitized"), *cuda_emulation.SANITIZERS)


@pytest.mark.parametrize(
    "call, error",
    [
        ("reach(out, 3)", ""),
        ("reach(out, 4)", "AddressSanitizer: use-after-poison"),
        ("reach(out, -1)", "AddressSanitizer"),  # in front of it is poison, or another allocation's end
        ("reach(out, 4000)", "AddressSanitizer"),
        ("wide(x, out, 0)", ""),
        ("wide(x, out, 1)", "misaligned address"),
        ("wide(x, out, 16)", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_sanitizers_see_where_kernels_reach(sanitized: Path, call: str, error: str) -> None:
    """Past the end of shared or of global memory, and 16 bytes at an address that is not a multiple of that."""
    name, arguments = call[:-1].split("(")
    code = (
        f"import ctypes; library = ctypes.CDLL({str(sanitized)!r}); library.malloc.restype = ctypes.c_void_p\n"
        "x, out = (ctypes.c_void_p(library.malloc(ctypes.c_size_t(64))) for _ in range(2))\n"
        f"library.{name}({arguments})\n"
    )
    environment = {**os.environ, **cuda_emulation.sanitizer_environment()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert error in done.stderr and bool(error) == bool(done.returncode), done.stderr[-2000:]
