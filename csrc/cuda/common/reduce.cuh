// Sums and maxima over the lanes of a warp and the warps of a CTA, always in the same order.
#pragma once

#include "common/instructions.cuh"

namespace attnres::cuda {

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

// Both sums of a warp with 6 shuffles instead of 10: the halves of the warp first share the work,
// one sum each. Lane 0 gets the first sum and lane 16 the second.
template <typename T>
__device__ __forceinline__ T warp_sum_pair(Pair<T> value, int lane) {
  const bool lower = lane < kWarpSize / 2;
  const T sent = shuffle_xor(lower ? value.second : value.first, kWarpSize / 2);
  T sum = (lower ? value.first : value.second) + sent;
#pragma unroll
  for (int mask = kWarpSize / 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// The sum over all `num_warps` warps of values that are equal within a warp; `scratch` holds one
// value a warp. Every one of the first 32 * num_warps threads takes part and gets the sum.
template <typename T>
__device__ __forceinline__ T cta_sum(T value, T* scratch, int num_warps) {
  const int lane = thread_rank() % kWarpSize;
  if (lane == 0) scratch[thread_rank() / kWarpSize] = value;
  sync_first_threads(num_warps * kWarpSize);
  return warp_sum(lane < num_warps ? scratch[lane] : T(0));
}

}  // namespace attnres::cuda
