// Passes over rows of D values: the vocabulary of the CPU kernels. See simd.hpp for why nothing
// here is linked externally.
#pragma once

#include "simd.hpp"

namespace attnres::cpu {
namespace {

// A row of a tensor as the inner loops see it.
struct Row {
  const void* data = nullptr;
  DType dtype = DType::kNone;
};
struct MutableRow {
  void* data = nullptr;
  DType dtype = DType::kNone;
  bool streamed = false;  // written past the caches, see `streams`
};

ATTNRES_INLINE const void* row_at(const void* data, DType dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * size_of(dtype);
}
ATTNRES_INLINE Row row(const ConstRows& rows, int64_t m) {
  return {row_at(rows.data, rows.dtype, rows.offset(m)), rows.dtype};
}
ATTNRES_INLINE MutableRow row(const Rows& rows, int64_t m) {
  return {const_cast<void*>(row_at(rows.data, rows.dtype, rows.offset(m))), rows.dtype};
}

// Results of so many bytes are gone from a core's caches before anybody reads them.
constexpr int64_t kStreamedBytes = 16 << 20;

// Whether to write rows past the caches, given the bytes of all results of a call.
ATTNRES_INLINE bool streams(const Rows& rows, int64_t result_bytes) {
  const auto at_line = [](int64_t bytes) __attribute__((always_inline)) { return bytes % 64 == 0; };
  if (!kCanStream || rows.data == nullptr || result_bytes < kStreamedBytes) return false;
  const int64_t item = size_of(rows.dtype);
  return at_line(reinterpret_cast<intptr_t>(rows.data)) && at_line(rows.inner_stride * item) &&
         at_line(rows.outer_stride * item);
}

// How a kernel reads and writes rows. `Uniform`: every row has storage type T, known when compiled.
// `Mixed`: each row's own dtype is looked at once per vector, a branch that goes the same way for
// every token.
template <typename Compute, typename T>
struct Uniform {
  using A = Compute;
  ATTNRES_INLINE Vec<A> load(Row row, int64_t c) {
    return cpu::load<A>(static_cast<const T*>(row.data) + c);
  }
  ATTNRES_INLINE Vec<A> load_tail(Row row, int64_t c, int64_t count) {
    return cpu::load_tail<A>(static_cast<const T*>(row.data) + c, count);
  }
  ATTNRES_INLINE void store(MutableRow row, int64_t c, Vec<A> v) {
    cpu::store<A>(static_cast<T*>(row.data) + c, v);
  }
  ATTNRES_INLINE void store_tail(MutableRow row, int64_t c, Vec<A> v, int64_t count) {
    cpu::store_tail<A>(static_cast<T*>(row.data) + c, v, count);
  }
  ATTNRES_INLINE void store_pair(MutableRow row, int64_t c, Vec<A> v, Vec<A> w) {
    T* p = static_cast<T*>(row.data) + c;
    if (row.streamed) return cpu::stream_pair<A>(p, v, w);
    cpu::store_pair<A>(p, v, w);
  }
};

constexpr int64_t kCacheLine = 64;

template <typename A, typename F>
ATTNRES_INLINE auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      // Only float64 computations meet float64 rows; this branch keeps the float instantiation
      // compilable.
      return f(static_cast<A*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kNone:
      break;
  }
  no_such_dtype();
}

template <typename Compute>
struct Mixed {
  using A = Compute;
  ATTNRES_INLINE Vec<A> load(Row row, int64_t c) {
    return with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      return Uniform<A, T>::load(row, c);
    });
  }
  ATTNRES_INLINE Vec<A> load_tail(Row row, int64_t c, int64_t count) {
    return with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      return Uniform<A, T>::load_tail(row, c, count);
    });
  }
  ATTNRES_INLINE void store(MutableRow row, int64_t c, Vec<A> v) {
    with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      Uniform<A, T>::store(row, c, v);
    });
  }
  ATTNRES_INLINE void store_tail(MutableRow row, int64_t c, Vec<A> v, int64_t count) {
    with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      Uniform<A, T>::store_tail(row, c, v, count);
    });
  }
  ATTNRES_INLINE void store_pair(MutableRow row, int64_t c, Vec<A> v, Vec<A> w) {
    store(row, c, v);
    store(row, c + kLanes<A>, w);
  }
};

// Whether every row that an Access reads holds values of the compute type.
template <typename Access>
constexpr bool kIsCompute = false;
template <typename A>
constexpr bool kIsCompute<Uniform<A, A>> = true;

// `kVectors` whole vectors from column c on, or the partial vector at the end of a row. Loops over
// a row are written once, as a function of a tile.
template <typename Access, int kVectors>
struct WholeTile {
  using A = typename Access::A;
  static constexpr int kCount = kVectors;
  int64_t c;

  ATTNRES_INLINE int64_t step(int k) { return k * kLanes<A>; }
  Vec<A> load(Row row, int k) const { return Access::load(row, c + step(k)); }
  void store(MutableRow row, int k, Vec<A> v) const { Access::store(row, c + step(k), v); }
  // All of the tile's vectors. A tile of several begins where a cache line does if its row does.
  // Inlined always: else they would have to lie in memory.
  __attribute__((always_inline)) void store_all(MutableRow row, const Vec<A>* v) const {
#pragma GCC unroll 4
    for (int k = 0; k + 1 < kVectors; k += 2) Access::store_pair(row, c + step(k), v[k], v[k + 1]);
    if constexpr (kVectors % 2 == 1) store(row, kVectors - 1, v[kVectors - 1]);
  }
  // Asks for the tile's cache lines of a row that will be read later, if there is one.
  void prefetch(Row row) const {
    if (row.data == nullptr) return;
    const char* first = static_cast<const char*>(row_at(row.data, row.dtype, c));
    for (int64_t byte = 0; byte < step(kVectors) * size_of(row.dtype); byte += kCacheLine) {
      __builtin_prefetch(first + byte, 0, 2);
    }
  }
  Vec<A> load(const A* p, int k) const { return cpu::load<A>(p + c + step(k)); }
  void store(A* p, int k, Vec<A> v) const { cpu::store<A>(p + c + step(k), v); }
};

template <typename Access>
struct TailTile {
  using A = typename Access::A;
  static constexpr int kCount = 1;
  int64_t c;
  int64_t count;

  Vec<A> load(Row row, int) const { return Access::load_tail(row, c, count); }
  void store(MutableRow row, int, Vec<A> v) const { Access::store_tail(row, c, v, count); }
  void store_all(MutableRow row, const Vec<A>* v) const { store(row, 0, v[0]); }
  void prefetch(Row row) const {
    if (row.data != nullptr) __builtin_prefetch(row_at(row.data, row.dtype, c), 0, 2);
  }
  Vec<A> load(const A* p, int) const { return cpu::load_tail<A>(p + c, count); }
  void store(A* p, int, Vec<A> v) const { cpu::store_tail<A>(p + c, v, count); }
};

// f(tile) over all of a row of `hidden` values.
template <typename Access, int kVectors, typename F>
ATTNRES_INLINE void for_tiles(int64_t hidden, F&& f) {
  using A = typename Access::A;
  int64_t c = 0;
  for (; c + kVectors * kLanes<A> <= hidden; c += kVectors * kLanes<A>) {
    f(WholeTile<Access, kVectors>{c});
  }
  if constexpr (kVectors > 1) {
    for (; c + kLanes<A> <= hidden; c += kLanes<A>) f(WholeTile<Access, 1>{c});
  }
  if (c < hidden) f(TailTile<Access>{c, hidden - c});
}

// A running sum with several independent lanes, so that additions do not wait for one another.
template <typename A, int kVectors>
struct Sum {
  Vec<A> parts[kVectors] = {};
  Vec<A> carried[kVectors] = {};

  void carry() {
    for (int k = 0; k < kVectors; ++k) {
      carried[k] += parts[k];
      parts[k] = Vec<A>{};
    }
  }
  A total() const {
    Vec<A> all = carried[0] + parts[0];
    for (int k = 1; k < kVectors; ++k) all += carried[k] + parts[k];
    return sum_lanes<A>(all);
  }
};

// So many additions to one running sum, then it is put aside: with narrow vectors the rounding
// error of a long row would grow with its length.
constexpr int64_t kLongestRun = kVectorBytes == 64 ? 64 : 16;

// f(tile) over all of a row, as for_tiles, adding to `sums`.
template <typename Access, int kVectors, typename F, typename... Sums>
ATTNRES_INLINE void sum_over_tiles(int64_t hidden, F&& f, Sums&... sums) {
  int64_t run = 0;
  for_tiles<Access, kVectors>(hidden, [&](auto tile) __attribute__((always_inline)) {
    f(tile);
    if (++run == kLongestRun) {
      (sums.carry(), ...);
      run = 0;
    }
  });
}

constexpr int kUnroll = 4;

// Scores are exponentiated once per row and source, so the C library's exp is fast enough and exact
// to an ulp.
ATTNRES_INLINE float exponential(float x) { return __builtin_expf(x); }
ATTNRES_INLINE double exponential(double x) { return __builtin_exp(x); }
ATTNRES_INLINE float logarithm(float x) { return __builtin_logf(x); }
ATTNRES_INLINE double logarithm(double x) { return __builtin_log(x); }
ATTNRES_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
ATTNRES_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <typename A>
ATTNRES_INLINE A inverse_rms(A sum_of_squares, int64_t hidden, double eps) {
  return A(1) / square_root(sum_of_squares / static_cast<A>(hidden) + static_cast<A>(eps));
}

// Softmax weights of `count` logits, and their log-sum-exp. NaN logits make NaN weights. Weights
// are divided by the sum rather than taken from the rounded lse, whose last bit is worth 0.1 % of a
// weight when logits reach 1e4.
template <typename A>
ATTNRES_INLINE A softmax(const A* logits, A* weights, int count) {
  // The only source has weight 1, be it a state whose log-sum-exp is -inf; NaN stays NaN.
  if (count == 1 && logits[0] == logits[0]) {
    weights[0] = 1;
    return logits[0];
  }
  A largest = logits[0];
  for (int i = 1; i < count; ++i) {
    if (!(logits[i] <= largest)) largest = logits[i];
  }
  A sum = 0;
  for (int i = 0; i < count; ++i) {
    weights[i] = exponential(logits[i] - largest);
    sum += weights[i];
  }
  for (int i = 0; i < count; ++i) weights[i] /= sum;
  return largest + logarithm(sum);
}

// Carves aligned arrays out of one block of memory that the caller owns.
class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
  int64_t used(const void* memory) const { return next_ - static_cast<const char*>(memory); }

 private:
  char* next_;
};

}  // namespace
}  // namespace attnres::cpu
