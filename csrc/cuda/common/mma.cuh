// Products of small matrices on tensor cores, behind a name: tests/simt gives it to a CPU.
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

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
