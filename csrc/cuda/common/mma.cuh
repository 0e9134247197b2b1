// Products of small matrices on tensor cores, behind a name: tests/simt gives it to a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm80.hpp>

#include "common/instructions.cuh"

namespace attnres::cuda {

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
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0],
                                            b[1], c[0], c[1], c[2], c[3]);
}
__device__ __forceinline__ void multiply_add_16x8x16(__half, float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0],
                                          b[1], c[0], c[1], c[2], c[3]);
}

}  // namespace attnres::cuda
