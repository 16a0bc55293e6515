// What kernels use beyond the CUDA language: single instructions, and the shared memory of a block. nvcc compiles them
// from here; tests/cuda_emulation defines the same functions for the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)

namespace pk {
namespace cuda {

// --- memory ---

// The block's dynamic shared memory, the only kind that kernels use: its size is what the launch says.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char block_memory[];
  return reinterpret_cast<T*>(block_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, both aligned to 16: there once async_wait says so of the group they are in.
__device__ __forceinline__ void async_copy(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// The same where there is something to copy, else 16 bytes of zeros: the address is not read.
__device__ __forceinline__ void async_copy_or_zeros(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void async_copy_word(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the `pending` latest have arrived; other threads still need __syncthreads.
template <int pending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A barrier in shared memory whose phase ends when `arrivals` threads have arrived and all bytes expected are there.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to bulk copies; __syncthreads makes them known to other threads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase wait for so many bytes of bulk copies.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended; phases count from 0.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// One thread's copy from global to shared memory; addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

#endif

// --- numbers ---

// The value as if it were new: what follows from it is computed here, not kept in registers from before a loop.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 2^x to 2 units in the last place; 0 below the smallest normal number.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
}

// Two numbers as one operand of a matrix product, the first in the low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// As an operand of a TensorFloat-32 product: 10 bits of mantissa, rounded to nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// --- matrix products of a warp: d += a b ---
//
// With group = lane / 4 and quarter = lane % 4 a lane holds of d (16 x 8) rows group and group + 8, columns 2 quarter
// and 2 quarter + 1: d[0], d[1] of the first row, d[2], d[3] of the second.

// a (16 x 16, row-major) and b (16 x 8), two numbers a register. a[0]: row group, columns 2 quarter and + 1; a[1]: row
// group + 8; a[2], a[3]: the same rows, columns + 8. b[0]: rows 2 quarter and + 1 of column group; b[1]: rows + 8.
__device__ __forceinline__ void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a (16 x 8, row-major) and b (8 x 8), a TensorFloat-32 a register. a[0]: row group, column quarter; a[1]: row group +
// 8; a[2], a[3]: the same rows, column quarter + 4. b[0]: row quarter of column group; b[1]: row quarter + 4.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit numbers: lanes 8 i to 8 i + 7 give the addresses of the rows (16 bytes) of matrix i. Of
// each a lane gets row group, columns 2 quarter and + 1, one register a matrix. The row is a shared_address or a
// pointer.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* row) {
  load_matrices(d, shared_address(row));
}

// The same of the matrices transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  load_matrices_transposed(d, shared_address(row));
}

// --- matrix products of a warpgroup: 128 threads, 64 rows, asynchronous ---

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PK_WARPGROUP_PRODUCTS

// 64 rows of 128 bytes in shared memory, or 16 of them, from a row that is a multiple of 8: their 16-byte pieces lie in
// the order of their number XOR the row's (the 128-byte swizzle; the memory it begins anew in is aligned to 1024).
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t shared_address) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kEightRows << 32 | kEightRows << 16 | (shared_address & 0x3FFFF) >> 4;
}

// What this thread's copies wrote to shared memory is there for products after it (and a __syncthreads).
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and before one of whose registers others than products made something.
__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all committed products are done: before that their registers and matrices are nobody else's.
__device__ __forceinline__ void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// What the program does to registers before or after this, the compiler does, too.
__device__ __forceinline__ void pin(float (&x)[4]) {
  asm volatile("" : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])::"memory");
}
__device__ __forceinline__ void pin(uint32_t (&x)[4]) {
  asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
}

// d (64 x 64) += a b, or = a b, for every warp its 16 rows: d[j] and a as in the products of a warp, b (16 x 64) a
// swizzled_matrix. Of 16 rows where they are b's rows; of 64 where they are its columns, of which the product takes the
// 16 numbers (32 bytes) that the address points to.
#define PK_WARPGROUP_PRODUCT(NAME, TYPE)                                                                           \
  template <bool rows>                                                                                             \
  __device__ __forceinline__ void NAME(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {    \
    asm volatile(                                                                                                  \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
        "%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, %38;\n}\n"                                           \
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), \
          "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), \
          "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), \
          "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
          "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(rows ? 1 : 0) \
        : "memory");                                                                                               \
  }
PK_WARPGROUP_PRODUCT(warpgroup_product_bfloat16, "bf16")
PK_WARPGROUP_PRODUCT(warpgroup_product_half, "f16")
#undef PK_WARPGROUP_PRODUCT

#endif

}  // namespace cuda
}  // namespace pk

#else
#include <emulated_primitives.h>
#endif
