// How values lie in memory: chunks of kWidth elements that one thread reads, computes on and
// writes.
//
// `Uniform<T>`: every row has storage type T, a chunk is 16 bytes. `Mixed<Compute, kWidth>`: each
// row's own dtype is looked at per chunk, a branch that goes the same way for a whole CTA. A width
// of 1 needs no alignment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "attnres/params.hpp"
#include "common/instructions.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// f(T{}) for the storage type T of the dtype of something that is there. A float computation meets
// float64 only among gains.
template <typename F>
__device__ __forceinline__ decltype(auto) with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kFloat32:
      return f(float{});
    case DType::kNone:
      break;
  }
  never();
}

__device__ __forceinline__ int bytes_of(DType dtype) {
  return with_storage(dtype, [](auto type) { return static_cast<int>(sizeof(type)); });
}

template <typename T>
constexpr DType kDTypeOf = DType::kNone;
template <>
inline constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
inline constexpr DType kDTypeOf<float> = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<__nv_bfloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<__half> = DType::kFloat16;

// Bytes that threads of this CTA may still be writing to, or that arrived in shared memory.
struct SharedView {
  const std::byte* base;
  template <typename V>
  __device__ __forceinline__ V read(int64_t offset) const {
    return *reinterpret_cast<const V*>(base + offset);
  }
};

// Bytes in global memory that nobody writes once the previous kernel has ended.
struct GlobalView {
  const std::byte* base;
  template <typename V>
  __device__ __forceinline__ V read(int64_t offset) const {
    return load_global<V>(base + offset);
  }
};

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// 16 bytes <-> values.
template <typename Compute>
__device__ __forceinline__ void unpack(uint4 bits, float, Compute* x) {
  const auto v = bits_as<float4>(bits);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
template <typename Compute>
__device__ __forceinline__ void unpack(uint4 bits, double, Compute* x) {
  const auto v = bits_as<double2>(bits);
  x[0] = static_cast<Compute>(v.x), x[1] = static_cast<Compute>(v.y);
}
template <typename Compute>
__device__ __forceinline__ void unpack(uint4 bits, __nv_bfloat16, Compute* x) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    // A bf16 is the upper half of a float: one instruction each, where the library's conversion
    // takes three for two.
    x[2 * w] = bits_as<float>(words[w] << 16);
    x[2 * w + 1] = bits_as<float>(words[w] & 0xffff0000u);
  }
}
template <typename Compute>
__device__ __forceinline__ void unpack(uint4 bits, __half, Compute* x) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 pair = __half22float2(bits_as<__half2>(words[w]));
    x[2 * w] = pair.x, x[2 * w + 1] = pair.y;
  }
}

__device__ __forceinline__ uint4 pack(float, const float* x) {
  return bits_as<uint4>(make_float4(x[0], x[1], x[2], x[3]));
}
__device__ __forceinline__ uint4 pack(double, const double* x) {
  return bits_as<uint4>(make_double2(x[0], x[1]));
}
__device__ __forceinline__ uint4 pack(__nv_bfloat16, const float* x) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = bits_as<uint32_t>(__floats2bfloat162_rn(x[2 * w], x[2 * w + 1]));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ uint4 pack(__half, const float* x) {
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = bits_as<uint32_t>(__floats2half2_rn(x[2 * w], x[2 * w + 1]));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Two values in a word.
__device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, const float (&x)[2]) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
}
__device__ __forceinline__ uint32_t pack_pair(__half, const float (&x)[2]) {
  return bits_as<uint32_t>(__floats2half2_rn(x[0], x[1]));
}

// One value <-> storage.
template <typename Compute>
__device__ __forceinline__ Compute widen(float x) {
  return x;
}
template <typename Compute>
__device__ __forceinline__ Compute widen(double x) {
  return static_cast<Compute>(x);
}
template <typename Compute>
__device__ __forceinline__ Compute widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename Compute>
__device__ __forceinline__ Compute widen(__half x) {
  return __half2float(x);
}

template <typename T, typename Compute>
__device__ __forceinline__ T narrow(Compute x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <int kCount, typename Compute>
__device__ __forceinline__ void clear(Compute (&x)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) x[j] = 0;
}

template <typename T>
struct Uniform {
  using Compute = float;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr bool kUniform = true;
  static constexpr int kDispatchRegisters = 0;

  __device__ static constexpr int bytes(DType) { return sizeof(T); }

  // Chunk number `chunk` of a row.
  template <typename View>
  __device__ __forceinline__ static void load(View row, DType, int chunk, Compute (&x)[kWidth]) {
    unpack(row.template read<uint4>(static_cast<int64_t>(chunk) * 16), T{}, x);
  }
  // The same, or zeros.
  template <typename View>
  __device__ __forceinline__ static void load_if(bool present, View row, DType, int chunk,
                                                 Compute (&x)[kWidth]) {
    // One load that is not always carried out, and no branch around what is done with it.
    uint4 bits = {0, 0, 0, 0};
    if (present) bits = row.template read<uint4>(static_cast<int64_t>(chunk) * 16);
    unpack(bits, T{}, x);
  }
  __device__ __forceinline__ static void store(std::byte* row, DType, int chunk,
                                               const Compute (&x)[kWidth]) {
    *reinterpret_cast<uint4*>(row + static_cast<int64_t>(chunk) * 16) = pack(T{}, x);
  }
  // What a load after a store would give.
  __device__ __forceinline__ static void round(DType, Compute (&x)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] = widen<Compute>(narrow<T>(x[j]));
  }
};

template <typename ComputeType, int kChunkWidth>
struct Mixed {
  using Compute = ComputeType;
  static constexpr int kWidth = kChunkWidth;
  static constexpr bool kUniform = false;
  static_assert(kWidth == 1 || kWidth == 4 || kWidth == 8);
  // What addresses of rows of any dtype take beside the values.
  static constexpr int kDispatchRegisters = 6 * sizeof(Compute);

  __device__ static constexpr int bytes(DType dtype) { return bytes_of(dtype); }

  template <typename View>
  __device__ __forceinline__ static void load(View row, DType dtype, int chunk,
                                              Compute (&x)[kWidth]) {
    const int64_t first = static_cast<int64_t>(chunk) * kWidth;
    with_storage(dtype, [&](auto type) {
      using T = decltype(type);
      constexpr int kPerRead = 16 / sizeof(T);
      if constexpr (kWidth % kPerRead == 0) {
#pragma unroll
        for (int j = 0; j < kWidth; j += kPerRead) {
          unpack(row.template read<uint4>((first + j) * static_cast<int64_t>(sizeof(T))), T{},
                 x + j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          x[j] =
              widen<Compute>(row.template read<T>((first + j) * static_cast<int64_t>(sizeof(T))));
        }
      }
    });
  }
  template <typename View>
  __device__ __forceinline__ static void load_if(bool present, View row, DType dtype, int chunk,
                                                 Compute (&x)[kWidth]) {
    clear(x);
    if (present) load(row, dtype, chunk, x);
  }
  __device__ __forceinline__ static void store(std::byte* row, DType dtype, int chunk,
                                               const Compute (&x)[kWidth]) {
    const int64_t first = static_cast<int64_t>(chunk) * kWidth;
    with_storage(dtype, [&](auto type) {
      using T = decltype(type);
      constexpr int kPerWrite = 16 / sizeof(T);
      if constexpr (kWidth % kPerWrite == 0 &&
                    std::is_same_v<T, double> == std::is_same_v<Compute, double>) {
#pragma unroll
        for (int j = 0; j < kWidth; j += kPerWrite) {
          *reinterpret_cast<uint4*>(row + (first + j) * static_cast<int64_t>(sizeof(T))) =
              pack(T{}, x + j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          reinterpret_cast<T*>(row)[first + j] = narrow<T>(x[j]);
        }
      }
    });
  }
  __device__ __forceinline__ static void round(DType dtype, Compute (&x)[kWidth]) {
    with_storage(dtype, [&](auto type) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] = widen<Compute>(narrow<decltype(type)>(x[j]));
    });
  }
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
