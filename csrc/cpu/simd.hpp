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
#elif defined(__aarch64__)
#include <arm_neon.h>
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

template <typename, typename>
constexpr bool kSame = false;
template <typename T>
constexpr bool kSame<T, T> = true;
// Whether values of type T are of a dtype.
template <typename T>
ATTNRES_INLINE constexpr bool holds(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kSame<T, float>;
    case DType::kFloat64:
      return kSame<T, double>;
    case DType::kBFloat16:
      return kSame<T, BFloat16>;
    case DType::kFloat16:
      return kSame<T, Float16>;
    case DType::kNone:
      break;
  }
  return false;
}

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

// Any vector's bits.
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
template <typename V>
ATTNRES_INLINE Bits bits_of(V v) {
  return reinterpret_cast<Bits>(v);
}

// `kLanes<A>` storage values as they lie in memory, in as many bytes as those take.
template <typename A, typename T>
struct PackedType {
  typedef T type __attribute__((vector_size(kLanes<A> * sizeof(T))));
};
template <typename A>
struct PackedType<A, BFloat16> : PackedType<A, uint16_t> {};
template <typename A>
struct PackedType<A, Float16> : PackedType<A, uint16_t> {};
template <typename A, typename T>
using Packed = typename PackedType<A, T>::type;

// Packed storage values to a vector of the compute type, and back.
template <typename A, typename T>
struct Convert {
  ATTNRES_INLINE Vec<A> widen(Packed<A, T> packed) {
    return __builtin_convertvector(packed, Vec<A>);
  }
  ATTNRES_INLINE Packed<A, T> narrow(Vec<A> v) {
    using Narrow = Packed<A, T>;
    return __builtin_convertvector(v, Narrow);
  }
};

// Rounds to nearest, ties to even, in the upper half of each lane; the lower is to be ignored. A
// NaN would round to infinity, or over to zero, and is cut off instead: what arithmetic makes is
// quiet.
ATTNRES_INLINE Bits round_to_bfloat16(Vec<float> v) {
  const Bits increment = 0x7fff + ((bits_of(v) >> 16) & 1);
  return bits_of(v) + (increment & bits_of(v == v));
}

template <>
struct Convert<float, BFloat16> {
  using Half = Packed<float, BFloat16>;

  // By name where vectors are wide: GCC 12 converts them in halves, with three shuffles for one.
  ATTNRES_INLINE Vec<float> widen(Half packed) {
#if defined(__AVX512F__)
    const __m512i bits = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(packed));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
#elif defined(__AVX2__)
    const __m256i bits = _mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(packed));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
#else
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(packed, Bits) << 16);
#endif
  }
  ATTNRES_INLINE Half narrow(Vec<float> v) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Half>(_mm512_cvtneps_pbh(v));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return reinterpret_cast<Half>(vcvt_bf16_f32(reinterpret_cast<float32x4_t>(v)));
#else
    // What is only loaded, and not computed, may be a NaN that is one in its lower half alone.
    const Bits quiet = bits_of(v) | (bits_of(v != v) & 0x400000);
    return __builtin_convertvector(round_to_bfloat16(reinterpret_cast<Vec<float>>(quiet)) >> 16,
                                   Half);
#endif
  }
};

#if defined(__F16C__)
template <>
struct Convert<float, Float16> {
  using Half = Packed<float, Float16>;
  static constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

#if defined(__AVX512F__)
  ATTNRES_INLINE Vec<float> widen(Half packed) {
    return _mm512_cvtph_ps(reinterpret_cast<__m256i>(packed));
  }
  ATTNRES_INLINE Half narrow(Vec<float> v) {
    return reinterpret_cast<Half>(_mm512_cvtps_ph(v, kRounding));
  }
#else
  ATTNRES_INLINE Vec<float> widen(Half packed) {
    return _mm256_cvtph_ps(reinterpret_cast<__m128i>(packed));
  }
  ATTNRES_INLINE Half narrow(Vec<float> v) {
    return reinterpret_cast<Half>(_mm256_cvtps_ph(v, kRounding));
  }
#endif
};
#elif defined(__aarch64__)
template <>
struct Convert<float, Float16> {
  using Half = Packed<float, Float16>;

  ATTNRES_INLINE Vec<float> widen(Half packed) {
    return reinterpret_cast<Vec<float>>(vcvt_f32_f16(reinterpret_cast<float16x4_t>(packed)));
  }
  ATTNRES_INLINE Half narrow(Vec<float> v) {
    return reinterpret_cast<Half>(vcvt_f16_f32(reinterpret_cast<float32x4_t>(v)));
  }
};
#else
template <>
struct Convert<float, Float16> {
  using Half = Packed<float, Float16>;

  ATTNRES_INLINE Bits select(Bits mask, Bits yes, Bits no) { return (yes & mask) | (no & ~mask); }
  ATTNRES_INLINE Vec<float> value(Bits bits) { return reinterpret_cast<Vec<float>>(bits); }

  // The exponent moves from a bias of 15 to one of 127. A half below its smallest normal number is
  // a normal float: its bits are put below those of 2^-14, which is then subtracted.
  ATTNRES_INLINE Vec<float> widen(Half packed) {
    const Bits half = __builtin_convertvector(packed, Bits);
    const Bits magnitude = (half & 0x7fff) << 13;
    const Bits exponent = magnitude & 0x0f800000;
    const Bits normal = magnitude + (112u << 23);
    const Bits tiny = bits_of(value(magnitude + (113u << 23)) - value(Bits{} + (113u << 23)));
    const Bits special = magnitude + (224u << 23);  // infinity and NaN
    const Bits is_tiny = bits_of(exponent == 0);
    const Bits is_special = bits_of(exponent == 0x0f800000);
    const Bits result = select(is_tiny, tiny, select(is_special, special, normal));
    return value(result | (half & 0x8000) << 16);
  }
  // Rounds to nearest, ties to even. A NaN becomes quiet.
  ATTNRES_INLINE Half narrow(Vec<float> v) {
    const Bits sign = bits_of(v) & 0x80000000;
    const Bits magnitude = bits_of(v) ^ sign;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 1/2 shifts a small number's last bit of a half to the last bit of a float, and rounds
    // there.
    const Bits tiny = bits_of(value(magnitude) + value(Bits{} + (126u << 23))) - (126u << 23);
    const Bits is_nan = bits_of(magnitude > 0x7f800000);
    const Bits special = select(is_nan, Bits{} + 0x7e00, Bits{} + 0x7c00);
    const Bits is_tiny = bits_of(magnitude < (113u << 23));
    const Bits is_special = bits_of(magnitude >= (143u << 23));
    const Bits result = select(is_tiny, tiny, select(is_special, special, normal)) | sign >> 16;
    return __builtin_convertvector(result, Half);
  }
};
#endif

// Half types in a float64 computation: rare (one fp64 source among bf16 ones), so one value at a
// time through float.
template <typename T>
struct ConvertThroughFloat {
  using Half = Packed<double, T>;

  ATTNRES_INLINE Vec<double> widen(Half half) {
    Packed<float, T> packed = {};
    for (int lane = 0; lane < kLanes<double>; ++lane) packed[lane] = half[lane];
    const Vec<float> wide = Convert<float, T>::widen(packed);
    Vec<double> v;
    for (int lane = 0; lane < kLanes<double>; ++lane) v[lane] = static_cast<double>(wide[lane]);
    return v;
  }
  ATTNRES_INLINE Half narrow(Vec<double> v) {
    Vec<float> wide = {};
    for (int lane = 0; lane < kLanes<double>; ++lane) wide[lane] = static_cast<float>(v[lane]);
    const Packed<float, T> packed = Convert<float, T>::narrow(wide);
    Half half;
    for (int lane = 0; lane < kLanes<double>; ++lane) half[lane] = packed[lane];
    return half;
  }
};
template <>
struct Convert<double, BFloat16> : ConvertThroughFloat<BFloat16> {};
template <>
struct Convert<double, Float16> : ConvertThroughFloat<Float16> {};

// A vector of values at any alignment.
template <typename A, typename T>
ATTNRES_INLINE Vec<A> load(const T* p) {
  Packed<A, T> packed;
  __builtin_memcpy(&packed, p, sizeof(packed));
  return Convert<A, T>::widen(packed);
}
template <typename A, typename T>
ATTNRES_INLINE void store(T* p, Vec<A> v) {
  const Packed<A, T> packed = Convert<A, T>::narrow(v);
  __builtin_memcpy(p, &packed, sizeof(packed));
}
// The first `bytes` bytes, fewer than all, of a vector at the end of a row: the others read as zero
// and are not written, as they belong to somebody else.
template <typename V>
ATTNRES_INLINE V load_bytes(const void* p, int64_t bytes) {
#if defined(__AVX512BW__)
  const uint64_t mask = (uint64_t{1} << bytes) - 1;
  if constexpr (sizeof(V) == 64) return reinterpret_cast<V>(_mm512_maskz_loadu_epi8(mask, p));
  if constexpr (sizeof(V) == 32) {
    return reinterpret_cast<V>(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), p));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {  // values of four or of eight bytes
    const __m256i first = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bytes)), first);
    return reinterpret_cast<V>(_mm256_maskload_epi32(static_cast<const int*>(p), mask));
  }
#endif
  if constexpr (sizeof(V) <= 16) {
    // By way of two words: a vector loaded from where its parts have just been stored would wait
    // until they are in the cache.
    const char* next = static_cast<const char*>(p);
    uint64_t words[2] = {};
    uint64_t* word = words;
    if (bytes & 8) {
      __builtin_memcpy(word++, next, 8);
      next += 8;
    }
    if (bytes & 4) {
      uint32_t four;
      __builtin_memcpy(&four, next, 4);
      *word = four;
      next += 4;
    }
    if (bytes & 2) {
      uint16_t two;
      __builtin_memcpy(&two, next, 2);
      *word |= uint64_t{two} << (bytes & 4) * 8;
    }
    V v;
    __builtin_memcpy(&v, words, sizeof(v));
    return v;
  }
}

template <int kSize>
ATTNRES_INLINE void copy_bytes(char* to, const char* from, int64_t bytes) {
  if (bytes & kSize) {
    __builtin_memcpy(to, from, kSize);
    to += kSize;
    from += kSize;
  }
  if constexpr (kSize > 2) copy_bytes<kSize / 2>(to, from, bytes);
}
template <typename V>
ATTNRES_INLINE void store_bytes(void* p, V v, int64_t bytes) {
  char whole[sizeof(V)];
  __builtin_memcpy(whole, &v, sizeof(V));
  copy_bytes<sizeof(V) / 2>(static_cast<char*>(p), whole, bytes);
}

// For a vector that several products share: GCC would load it anew for each.
template <typename V>
ATTNRES_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// For memory that is to be loaded again: GCC would keep what it has loaded, and then sums in
// memory.
template <typename T>
ATTNRES_INLINE void load_anew([[maybe_unused]] const T* p) {
#if defined(__x86_64__)
  struct Vectors {
    char bytes[kVectorBytes];
  };
  asm("" : "+m"(*reinterpret_cast<Vectors*>(const_cast<T*>(p))));
#endif
}

// Two vectors side by side. Of bfloat16 the first holds the even columns and the second the odd
// ones: a value is the upper half of a float, so that one load of both takes a shift and a mask to
// take apart and no shuffle. Vectors of the compute type that meet such rows are kept in this order
// (`split_columns`). Widths are whole pairs.
template <typename A, typename T>
constexpr bool kSplitsColumns = false;
template <>
constexpr bool kSplitsColumns<float, BFloat16> = true;
template <typename A>
constexpr int kPair = 2 * kLanes<A>;

ATTNRES_INLINE Bits load_bits(const void* p) {
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits;
}
// Vector `which`, 0 or 1, of the two that begin at p.
template <typename A, typename T>
ATTNRES_INLINE Vec<A> load_of_pair(const T* p, int which) {
  if constexpr (kSplitsColumns<A, T>) {
    const Bits both = in_register(load_bits(p));
    return reinterpret_cast<Vec<A>>(which == 0 ? both << 16 : both & 0xffff0000);
  } else {
    return load<A>(p + which * kLanes<A>);
  }
}

// Past the caches, where p is aligned to a vector and whole cache lines are written that way: a
// line that is stored is first read, one that is streamed is not.
#if defined(__x86_64__)
constexpr bool kCanStream = true;
ATTNRES_INLINE void stream_bits(void* p, Bits bits) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(bits));
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(bits));
#else
  _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(bits));
#endif
}
// After streaming, before other threads are told that results are there.
ATTNRES_INLINE void finish_streaming() { _mm_sfence(); }
#elif defined(__aarch64__)
// A hint there, in two halves: the instruction stores pairs. It is ordered as any store is.
constexpr bool kCanStream = true;
ATTNRES_INLINE void stream_bits(void* p, Bits bits) {
  const uint64x2_t both = reinterpret_cast<uint64x2_t>(bits);
  const uint64x1_t lower = vget_low_u64(both), upper = vget_high_u64(both);
  asm volatile("stnp %d[lower], %d[upper], [%[p]]"
               :
               : [lower] "w"(lower), [upper] "w"(upper), [p] "r"(p)
               : "memory");
}
ATTNRES_INLINE void finish_streaming() {}
#else
constexpr bool kCanStream = false;
ATTNRES_INLINE void stream_bits(void*, Bits) {}
ATTNRES_INLINE void finish_streaming() {}
#endif

template <bool kStreamed>
ATTNRES_INLINE void store_bits(void* p, Bits bits) {
  if constexpr (kStreamed) return stream_bits(p, bits);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

#if defined(__AVX512F__)
ATTNRES_INLINE Bits join(Packed<float, Float16> lower, Packed<float, Float16> upper) {
  const __m512i whole = _mm512_castsi256_si512(reinterpret_cast<__m256i>(lower));
  return reinterpret_cast<Bits>(_mm512_inserti64x4(whole, reinterpret_cast<__m256i>(upper), 1));
}
#elif defined(__AVX2__)
ATTNRES_INLINE Bits join(Packed<float, Float16> lower, Packed<float, Float16> upper) {
  return reinterpret_cast<Bits>(
      _mm256_set_m128i(reinterpret_cast<__m128i>(upper), reinterpret_cast<__m128i>(lower)));
}
#else
ATTNRES_INLINE Bits join(Packed<float, Float16> lower, Packed<float, Float16> upper) {
  Packed<float, Float16> both[2] = {lower, upper};
  return load_bits(both);
}
#endif

// The two vectors of a pair.
template <bool kStreamed, typename A, typename T>
ATTNRES_INLINE void store_pair(T* p, Vec<A> v, Vec<A> w) {
  if constexpr (kSplitsColumns<A, T>) {
#if defined(__AVX512BF16__)
    const auto round = [](Vec<float> x) __attribute__((always_inline)) {
      const auto half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
      return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(half));
    };
    store_bits<kStreamed>(p, round(v) | round(w) << 16);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    const auto round = [](Vec<float> x) __attribute__((always_inline)) {
      return reinterpret_cast<uint16x8_t>(vcvtq_low_bf16_f32(reinterpret_cast<float32x4_t>(x)));
    };
    store_bits<kStreamed>(p, reinterpret_cast<Bits>(vzip1q_u16(round(v), round(w))));
#else
    const Bits upper = round_to_bfloat16(w) & 0xffff0000;
    store_bits<kStreamed>(p, round_to_bfloat16(v) >> 16 | upper);
#endif
  } else if constexpr (sizeof(T) == sizeof(A)) {
    store_bits<kStreamed>(p, bits_of(v));
    store_bits<kStreamed>(p + kLanes<A>, bits_of(w));
  } else if constexpr (kLanes<A> * sizeof(T) * 2 == kVectorBytes) {
    store_bits<kStreamed>(p, join(Convert<A, T>::narrow(v), Convert<A, T>::narrow(w)));
  } else {
    store<A>(p, v);
    store<A>(p + kLanes<A>, w);
  }
}

// Of two vectors that hold the even and the odd of some columns, their first and their second half.
template <typename V>
ATTNRES_INLINE void interleave(V& even, V& odd) {
  const V e = even, o = odd;
  if constexpr (sizeof(V) == 64) {
    even = __builtin_shufflevector(e, o, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    odd =
        __builtin_shufflevector(e, o, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (sizeof(V) == 32) {
    even = __builtin_shufflevector(e, o, 0, 8, 1, 9, 2, 10, 3, 11);
    odd = __builtin_shufflevector(e, o, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    even = __builtin_shufflevector(e, o, 0, 4, 1, 5);
    odd = __builtin_shufflevector(e, o, 2, 6, 3, 7);
  }
}

// The other way round.
template <typename V>
ATTNRES_INLINE void deinterleave(V& first, V& second) {
  const V v = first, w = second;
  if constexpr (sizeof(V) == 64) {
    first =
        __builtin_shufflevector(v, w, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    second =
        __builtin_shufflevector(v, w, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (sizeof(V) == 32) {
    first = __builtin_shufflevector(v, w, 0, 2, 4, 6, 8, 10, 12, 14);
    second = __builtin_shufflevector(v, w, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    first = __builtin_shufflevector(v, w, 0, 2, 4, 6);
    second = __builtin_shufflevector(v, w, 1, 3, 5, 7);
  }
}

template <typename A>
ATTNRES_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // not +, which would have to make 0 of -0
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
