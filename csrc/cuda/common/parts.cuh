// Float32 numbers as sums of 16-bit ones, which is how they go into tensor cores: docs/numerics.md.
#pragma once

#include "common/elements.cuh"
#include "common/reduce.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// What pack_pair() took.
__device__ __forceinline__ Pair<float> unpack_pair(__nv_bfloat16, uint32_t word) {
  return {bits_as<float>(word << 16), bits_as<float>(word & 0xffff0000u)};
}
__device__ __forceinline__ Pair<float> unpack_pair(__half, uint32_t word) {
  const float2 pair = __half22float2(bits_as<__half2>(word));
  return {pair.x, pair.y};
}

// The word next to `x`, which becomes what that leaves out: called again and again, parts of `x` in
// falling order.
template <typename T>
__device__ __forceinline__ uint32_t split_off(T type, Pair<float>& x) {
  const uint32_t word = pack_pair(type, {x.first, x.second});
  const Pair<float> taken = unpack_pair(type, word);
  x = {x.first - taken.first, x.second - taken.second};
  return word;
}

// x as a sum of 16-bit values, each the rest of those before it.
template <int kParts, typename T>
__device__ __forceinline__ void split(float x, T (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = narrow<T>(x);
    x -= widen<float>(parts[i]);
  }
}

// bfloat16 has float32's exponents. Parts of float16 are of numbers times a power of two, so that
// the largest of them lies in [2^14, 2^15) and small ones keep their bits.
template <typename T>
constexpr bool kScalesParts = std::is_same_v<T, __half>;

// The power of two for `largest`, which is not negative, and its inverse, which is exact too.
__device__ __forceinline__ float scale_of(float largest) {
  constexpr int kBias = 127, kExponent = 14;
  const int exponent = static_cast<int>(bits_as<uint32_t>(largest) >> 23);
  int field = 2 * kBias + kExponent - exponent;
  field = field > 2 * kBias - 1 ? 2 * kBias - 1 : field;
  return bits_as<float>(static_cast<uint32_t>(field) << 23);
}
__device__ __forceinline__ float inverse_of_scale(float scale) {
  return bits_as<float>((uint32_t{254} << 23) - bits_as<uint32_t>(scale));
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
