// Sums and maxima over the lanes of a warp and the warps of a CTA, always in the same order.
#pragma once

#include "common/instructions.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

constexpr int kWarpSize = 32;

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first;
  T second;
};

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Of values that are not NaN.
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// kCount sums at once, a power of two: the halves of the warp first share them out, then the halves
// of the halves, and so on: 5 shuffles for 2 sums and 9 for 8, where one after the other they would
// take 10 and 40. Lane i gets sum number i / (32 / kCount), added in the order of warp_sum().
template <int kCount, typename T>
__device__ __forceinline__ T warp_sums(T (&values)[kCount], int lane) {
  static_assert(kCount > 1 && kCount <= kWarpSize && (kCount & (kCount - 1)) == 0);
  int mask = kWarpSize / 2;
#pragma unroll
  for (int kept = kCount / 2; kept > 0; kept /= 2, mask /= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const T sent = shuffle_xor(upper ? values[i] : values[kept + i], mask);
      values[i] = (upper ? values[kept + i] : values[i]) + sent;
    }
  }
  T sum = values[0];
#pragma unroll
  for (; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
