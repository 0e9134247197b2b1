// csrc/cuda/common/mma.cuh for the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "common/instructions.cuh"

namespace attnres::cuda {

inline double value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double value_of(__half x) { return __half2float(x); }

template <typename T>
double value_of(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  T x;
  std::memcpy(static_cast<void*>(&x), &bits, sizeof(x));
  return value_of(x);
}

// Products are exact, and every sum is cut off, not rounded: tensor cores do no better. kHalves
// times 8 columns of a and rows of b.
template <typename T, int kHalves>
void multiply_add(float (&c)[4], const uint32_t (&a)[2 * kHalves], const uint32_t (&b)[kHalves]) {
  struct Operands {
    uint32_t a[2 * kHalves];
    uint32_t b[kHalves];
  } mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const auto* lanes = static_cast<const Operands*>(simt::gather(&mine, sizeof(mine)));
  const int lane = thread_rank() % simt::kWarpSize;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, upper = i / 2, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8 * kHalves; ++k) {
      const int pair = k % 8 / 2, late = k / 8;
      sum += value_of<T>(lanes[4 * row + pair].a[2 * late + upper], k % 2) *
             value_of<T>(lanes[4 * column + pair].b[late], k % 2);
    }
    c[i] = static_cast<float>(sum);
    if (std::abs(c[i]) > std::abs(sum)) c[i] = std::nextafter(c[i], 0.0f);
  }
}
template <typename T>
void multiply_add_16x8x16(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add<T, 2>(c, a, b);
}
template <typename T>
void multiply_add_16x8x8(T, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  multiply_add<T, 1>(c, {a0, a1}, {b});
}

// f(word of this lane in matrix j, where its first value is, where its second one is).
template <typename F>
void for_all_matrices(SharedAddress row, bool transposed, F&& f) {
  const uint32_t* rows = simt::gather_rows(row);
  const int g = thread_rank() % simt::kWarpSize / 4, t = thread_rank() % 4;
  for (int j = 0; j < 4; ++j) {
    const auto at = [&](int r, int column) {
      return dynamic_shared_memory() + rows[8 * j + r] + 2 * column;
    };
    transposed ? f(j, at(2 * t, g), at(2 * t + 1, g)) : f(j, at(g, 2 * t), at(g, 2 * t + 1));
  }
}
inline void load_matrices_as(bool transposed, uint32_t (&x)[4], SharedAddress row) {
  for_all_matrices(row, transposed, [&](int j, const std::byte* first, const std::byte* second) {
    std::memcpy(&x[j], first, 2);
    std::memcpy(reinterpret_cast<std::byte*>(&x[j]) + 2, second, 2);
  });
}
inline void store_matrices_as(bool transposed, SharedAddress row, const uint32_t (&x)[4]) {
  for_all_matrices(row, transposed, [&](int j, std::byte* first, std::byte* second) {
    std::memcpy(first, &x[j], 2);
    std::memcpy(second, reinterpret_cast<const std::byte*>(&x[j]) + 2, 2);
  });
}
inline void load_matrices(uint32_t (&x)[4], SharedAddress row) { load_matrices_as(false, x, row); }
inline void load_matrices_transposed(uint32_t (&x)[4], SharedAddress row) {
  load_matrices_as(true, x, row);
}
inline void store_matrices(SharedAddress row, const uint32_t (&x)[4]) {
  store_matrices_as(false, row, x);
}
inline void store_matrices_transposed(SharedAddress row, const uint32_t (&x)[4]) {
  store_matrices_as(true, row, x);
}

}  // namespace attnres::cuda
