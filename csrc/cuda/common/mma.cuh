// Small matrices of 16-bit values: from shared memory to registers and back, and their products on
// tensor cores. Behind names: tests/simt gives them to a CPU.
//
// A matrix is 8 x 8 values, and lane 4 * g + t holds values 2t and 2t + 1 of its row g in one word.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/instructions.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// c [16, 8] += a [16, 16] * b [16, 8] in float32, by a warp; 8.0 and later. With lane = 4 * g + t,
// a lane holds
//
//   a: rows g and g + 8 (a[0], a[1]) of columns 2t and 2t + 1, and the same of columns 2t + 8 and
//      2t + 9 (a[2], a[3]); two values of T to a word
//   b: of column g, rows 2t and 2t + 1 (b[0]), 2t + 8 and 2t + 9 (b[1])
//   c: of row g, columns 2t and 2t + 1 (c[0], c[1]); of row g + 8 the same (c[2], c[3])
__device__ __forceinline__ void multiply_add_16x8x16(__nv_bfloat16, float (&c)[4],
                                                     const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add_16x8x16(__half, float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 8] * b [8, 8]: of the above a[0], a[1] and b[0]. `a` holds two matrices and b
// the transpose of one, so that the words of a matrix may be both: a product of rows with rows
// needs no other copy of them.
__device__ __forceinline__ void multiply_add_16x8x8(__nv_bfloat16, float (&c)[4], uint32_t a0,
                                                    uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ void multiply_add_16x8x8(__half, float (&c)[4], uint32_t a0, uint32_t a1,
                                                    uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Four matrices, by a warp: lane 8 * j + i gives the address of row i of matrix j, 16 bytes,
// aligned. Rows of a matrix in different sixteenths of 128 bytes are read at once.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}
// The transposes of those matrices: lane 4 * g + t gets values g of rows 2t and 2t + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}
// Back to where they would be loaded from; 9.0 and later.
__device__ __forceinline__ void store_matrices(SharedAddress row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(SharedAddress row,
                                                          const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
