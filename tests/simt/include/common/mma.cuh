// csrc/cuda/common/mma.cuh for the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "common/instructions.cuh"

namespace attnres::cuda {

inline double value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double value_of(__half x) { return __half2float(x); }

// Products are exact, and every sum is cut off, not rounded: tensor cores do no better.
template <typename T>
void multiply_add_16x8x16(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4];
    uint32_t b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* lanes = static_cast<const Operands*>(simt::gather(&mine, sizeof(mine)));
  const auto value = [](uint32_t word, int half) {
    const auto bits = static_cast<uint16_t>(word >> (16 * half));
    T x;
    std::memcpy(static_cast<void*>(&x), &bits, sizeof(x));
    return value_of(x);
  };
  const int lane = thread_rank() % simt::kWarpSize;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, upper = i / 2, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, late = k / 8;
      sum += value(lanes[4 * row + pair].a[2 * late + upper], k % 2) *
             value(lanes[4 * column + pair].b[late], k % 2);
    }
    c[i] = static_cast<float>(sum);
    if (std::abs(c[i]) > std::abs(sum)) c[i] = std::nextafter(c[i], 0.0f);
  }
}

}  // namespace attnres::cuda
