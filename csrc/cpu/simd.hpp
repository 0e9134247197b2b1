// Vectors of the instruction set that this translation unit is compiled for, on GCC's and Clang's
// vector extension.
//
// The kernels are compiled once per instruction set into one library. Everything here has internal
// linkage or is always inlined, and nothing of the C++ library is instantiated: the linker merges
// equal inline functions, and must never hand AVX-512 code to a machine without it.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attnres/params.hpp"

#define ATTNRES_INLINE static inline __attribute__((always_inline))

namespace attnres::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage types of 16 bits are known by their bit patterns: not every compiler has types for them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <DType kDType>
struct StorageOf;
template <>
struct StorageOf<DType::kFloat32> {
  using type = float;
};
template <>
struct StorageOf<DType::kFloat64> {
  using type = double;
};
template <>
struct StorageOf<DType::kBFloat16> {
  using type = BFloat16;
};
template <>
struct StorageOf<DType::kFloat16> {
  using type = Float16;
};

// A is the compute type, float or double.
template <typename A>
struct VectorType;
template <>
struct VectorType<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorType<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VectorType<A>::type;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename T, int kCount>
struct ArrayOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T)), aligned(1), may_alias));
};

// One vector of `kLanes<A>` storage values at any alignment, converted to the compute type.
template <typename A, typename T>
struct Convert;

template <typename A>
struct Convert<A, A> {
  using Packed = typename ArrayOf<A, kLanes<A>>::type;
  ATTNRES_INLINE Vec<A> load(const A* p) { return *reinterpret_cast<const Packed*>(p); }
  ATTNRES_INLINE void store(A* p, Vec<A> v) { *reinterpret_cast<Packed*>(p) = v; }
};

template <>
struct Convert<double, float> {
  using Packed = typename ArrayOf<float, kLanes<double>>::type;
  ATTNRES_INLINE Vec<double> load(const float* p) {
    return __builtin_convertvector(*reinterpret_cast<const Packed*>(p), Vec<double>);
  }
  ATTNRES_INLINE void store(float* p, Vec<double> v) {
    *reinterpret_cast<Packed*>(p) = __builtin_convertvector(v, Packed);
  }
};

template <>
struct Convert<float, BFloat16> {
  static constexpr int kCount = kLanes<float>;
  using Packed = typename ArrayOf<uint16_t, kCount>::type;
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));

  // By name where vectors are wide: GCC 12 converts them in halves, with three shuffles for one.
  ATTNRES_INLINE Vec<float> load(const BFloat16* p) {
#if defined(__AVX512F__)
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
#elif defined(__AVX2__)
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
#else
    const Bits bits = __builtin_convertvector(*reinterpret_cast<const Packed*>(p), Bits) << 16;
    return reinterpret_cast<Vec<float>>(bits);
#endif
  }
  ATTNRES_INLINE void store(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
    const __m256bh packed = _mm512_cvtneps_pbh(v);
    __builtin_memcpy(p, &packed, sizeof(packed));
#else
    // Round to nearest, ties to even; a NaN would round to infinity and is made quiet instead.
    const Bits bits = reinterpret_cast<Bits>(v);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits quiet = (bits >> 16) | 0x40;
    const Signed is_nan = v != v;
    const Bits mask = reinterpret_cast<Bits>(is_nan);
    const Bits chosen = (rounded & ~mask) | (quiet & mask);
    *reinterpret_cast<Packed*>(p) = __builtin_convertvector(chosen, Packed);
#endif
  }
};

#if defined(__AVX512F__)
template <>
struct Convert<float, Float16> {
  ATTNRES_INLINE Vec<float> load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  ATTNRES_INLINE void store(Float16* p, Vec<float> v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
#elif defined(__F16C__)
template <>
struct Convert<float, Float16> {
  ATTNRES_INLINE Vec<float> load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  ATTNRES_INLINE void store(Float16* p, Vec<float> v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};
#else
template <>
struct Convert<float, Float16> {
  static constexpr int kCount = kLanes<float>;
  using Packed = typename ArrayOf<uint16_t, kCount>::type;
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

  ATTNRES_INLINE Bits select(Bits mask, Bits yes, Bits no) { return (yes & mask) | (no & ~mask); }
  ATTNRES_INLINE Vec<float> value(Bits bits) { return reinterpret_cast<Vec<float>>(bits); }
  ATTNRES_INLINE Bits bits_of(Vec<float> v) { return reinterpret_cast<Bits>(v); }

  // The exponent moves from a bias of 15 to one of 127. A half below its smallest normal number is
  // a normal float: its bits are put below those of 2^-14, which is then subtracted.
  ATTNRES_INLINE Vec<float> load(const Float16* p) {
    const Bits half = __builtin_convertvector(*reinterpret_cast<const Packed*>(p), Bits);
    const Bits magnitude = (half & 0x7fff) << 13;
    const Bits exponent = magnitude & 0x0f800000;
    const Bits normal = magnitude + (112u << 23);
    const Bits tiny = bits_of(value(magnitude + (113u << 23)) - value(Bits{} + (113u << 23)));
    const Bits special = magnitude + (224u << 23);  // infinity and NaN
    const Bits is_tiny = reinterpret_cast<Bits>(exponent == 0);
    const Bits is_special = reinterpret_cast<Bits>(exponent == 0x0f800000);
    const Bits result = select(is_tiny, tiny, select(is_special, special, normal));
    return value(result | (half & 0x8000) << 16);
  }
  // Rounds to nearest, ties to even. A NaN becomes quiet.
  ATTNRES_INLINE void store(Float16* p, Vec<float> v) {
    const Bits sign = bits_of(v) & 0x80000000;
    const Bits magnitude = bits_of(v) ^ sign;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 1/2 shifts a small number's last bit of a half to the last bit of a float, and rounds
    // there.
    const Bits tiny = bits_of(value(magnitude) + value(Bits{} + (126u << 23))) - (126u << 23);
    const Bits is_nan = reinterpret_cast<Bits>(magnitude > 0x7f800000);
    const Bits special = select(is_nan, Bits{} + 0x7e00, Bits{} + 0x7c00);
    const Bits is_tiny = reinterpret_cast<Bits>(magnitude < (113u << 23));
    const Bits is_special = reinterpret_cast<Bits>(magnitude >= (143u << 23));
    const Bits result = select(is_tiny, tiny, select(is_special, special, normal)) | sign >> 16;
    *reinterpret_cast<Packed*>(p) = __builtin_convertvector(result, Packed);
  }
};
#endif

// Half types in a float64 computation: rare (one fp64 source among bf16 ones), so one value at a
// time through float.
template <typename T>
struct ConvertThroughFloat {
  ATTNRES_INLINE Vec<double> load(const T* p) {
    T packed[kLanes<float>] = {};
    __builtin_memcpy(packed, p, kLanes<double> * sizeof(T));
    const Vec<float> wide = Convert<float, T>::load(packed);
    Vec<double> v;
    for (int lane = 0; lane < kLanes<double>; ++lane) v[lane] = static_cast<double>(wide[lane]);
    return v;
  }
  ATTNRES_INLINE void store(T* p, Vec<double> v) {
    Vec<float> wide = {};
    for (int lane = 0; lane < kLanes<double>; ++lane) wide[lane] = static_cast<float>(v[lane]);
    T packed[kLanes<float>];
    Convert<float, T>::store(packed, wide);
    __builtin_memcpy(p, packed, kLanes<double> * sizeof(T));
  }
};
template <>
struct Convert<double, BFloat16> : ConvertThroughFloat<BFloat16> {};
template <>
struct Convert<double, Float16> : ConvertThroughFloat<Float16> {};

template <typename A, typename T>
ATTNRES_INLINE Vec<A> load(const T* p) {
  return Convert<A, T>::load(p);
}
template <typename A, typename T>
ATTNRES_INLINE void store(T* p, Vec<A> v) {
  Convert<A, T>::store(p, v);
}

// Two vectors, one after the other. AVX-512 rounds two to bfloat16 for the price of one, and makes
// one store of either 16-bit type.
template <typename A, typename T>
struct Pair {
  ATTNRES_INLINE void store(T* p, Vec<A> v, Vec<A> w) {
    Convert<A, T>::store(p, v);
    Convert<A, T>::store(p + kLanes<A>, w);
  }
};
#if defined(__AVX512BF16__)
template <>
struct Pair<float, BFloat16> {
  ATTNRES_INLINE void store(BFloat16* p, Vec<float> v, Vec<float> w) {
    const __m512bh packed = _mm512_cvtne2ps_pbh(w, v);
    __builtin_memcpy(p, &packed, sizeof(packed));
  }
};
#endif
#if defined(__AVX512F__)
template <>
struct Pair<float, Float16> {
  ATTNRES_INLINE __m256i round(Vec<float> v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  ATTNRES_INLINE void store(Float16* p, Vec<float> v, Vec<float> w) {
    const __m512i lower = _mm512_castsi256_si512(round(v));
    _mm512_storeu_si512(p, _mm512_inserti64x4(lower, round(w), 1));
  }
};
#endif

template <typename A, typename T>
ATTNRES_INLINE void store_pair(T* p, Vec<A> v, Vec<A> w) {
  Pair<A, T>::store(p, v, w);
}

// The same past the caches, where whole cache lines can be written that way: a line that is stored
// is first read, one that is streamed is not. p lies at the beginning of a line.
constexpr bool kCanStream = kVectorBytes == 64;
template <typename A, typename T>
ATTNRES_INLINE void stream_pair(T* p, Vec<A> v, Vec<A> w) {
#if defined(__AVX512F__)
  T packed[2 * kLanes<A>];
  store_pair<A>(packed, v, w);
  for (unsigned byte = 0; byte < sizeof(packed); byte += kVectorBytes) {
    __m512i line;
    __builtin_memcpy(&line, reinterpret_cast<const char*>(packed) + byte, sizeof(line));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(reinterpret_cast<char*>(p) + byte), line);
  }
#else
  store_pair<A>(p, v, w);
#endif
}

// After streaming, before other threads are told that results are there.
ATTNRES_INLINE void finish_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The first `count` < kLanes values of a row's end; the others read as zero and are not written.
// Not inlined: the array would be cleared on the way to where it is not needed.
template <typename A, typename T>
static __attribute__((noinline)) Vec<A> load_tail(const T* p, int64_t count) {
  T padded[kLanes<A>] = {};
  __builtin_memcpy(padded, p, count * sizeof(T));
  return Convert<A, T>::load(padded);
}
template <typename A, typename T>
static __attribute__((noinline)) void store_tail(T* p, Vec<A> v, int64_t count) {
  T padded[kLanes<A>];
  Convert<A, T>::store(padded, v);
  __builtin_memcpy(p, padded, count * sizeof(T));
}

template <typename A>
ATTNRES_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // not +, which would have to make 0 of -0
}

// For a vector that several products share: GCC would load it anew for each.
template <typename V>
ATTNRES_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// While one lives, numbers below the smallest normal one count as zero. Softmax weights of sources
// that a query dislikes are such numbers, and x86 processors take some 150 cycles for each
// operation on one: a mix of 9 rows of 2304 values went from 14 to 2 us. What is lost is
// below 1.2e-38.
class DenormalsAreZero {
 public:
#if defined(__x86_64__)
  DenormalsAreZero() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero);
  }
  ~DenormalsAreZero() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
  unsigned before_;
#endif
};

// Adds lanes pairwise: the rounding error grows with the logarithm of the width.
template <typename A>
ATTNRES_INLINE A sum_lanes(Vec<A> v) {
  A lanes[kLanes<A>];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

}  // namespace
}  // namespace attnres::cpu
