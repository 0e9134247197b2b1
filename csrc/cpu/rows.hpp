// Passes over rows of D values: the vocabulary of the CPU kernels. See simd.hpp for why nothing
// here is linked externally.
#pragma once

#include "simd.hpp"

namespace attnres::cpu {
namespace {

// How a kernel computes, and what rows hold that it reads and writes. Rows are whole pairs of
// vectors (see staging.hpp); the columns of vectors of the compute type that meet them, the score
// vector or sums over tokens, are in the order in which pairs are loaded.
template <typename Compute, typename Storage>
struct Uniform {
  using A = Compute;
  using T = Storage;
  static constexpr bool kSplits = kSplitsColumns<A, T>;
};

// Where a row of results is written.
template <typename T>
struct MutableRow {
  T* data = nullptr;
  bool streamed = false;  // past the caches, see `streams`
};

ATTNRES_INLINE const void* row_at(const ConstRows& rows, int64_t m) {
  return static_cast<const char*>(rows.data) + rows.offset(m) * size_of(rows.dtype);
}
ATTNRES_INLINE void* row_at(const Rows& rows, int64_t m) {
  return static_cast<char*>(rows.data) + rows.offset(m) * size_of(rows.dtype);
}

ATTNRES_INLINE ConstRows as_const(const Rows& rows) {
  return {rows.data, rows.inner, rows.outer_stride, rows.inner_stride, rows.dtype};
}

// Results of so many bytes are gone from a core's caches before anybody reads them.
constexpr int64_t kStreamedBytes = 8 << 20;

// Whether to write rows past the caches, given the bytes of all results of a call.
ATTNRES_INLINE bool streams(const Rows& rows, int64_t result_bytes) {
  const auto at_line = [](int64_t bytes) __attribute__((always_inline)) { return bytes % 64 == 0; };
  if (!kCanStream || rows.data == nullptr || result_bytes < kStreamedBytes) return false;
  const int64_t item = size_of(rows.dtype);
  return at_line(reinterpret_cast<intptr_t>(rows.data)) && at_line(rows.inner_stride * item) &&
         at_line(rows.outer_stride * item);
}

constexpr int64_t kCacheLine = 64;

// Asks for bytes [first, last) of a row.
template <typename T>
ATTNRES_INLINE void prefetch_bytes(const T* row, int64_t first, int64_t last) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (; first < last; first += kCacheLine) __builtin_prefetch(bytes + first, 0, 2);
}

// `kVectors` vectors from column c on, whole pairs. Loops over a row are written once, as a
// function of a tile.
template <typename Access, int kVectors>
struct Tile {
  using A = typename Access::A;
  using T = typename Access::T;
  static_assert(kVectors % 2 == 0);
  static constexpr int kCount = kVectors;
  int64_t c;

  ATTNRES_INLINE int64_t step(int k) { return k * kLanes<A>; }
  // Of a row, or of a vector of the compute type.
  template <typename S>
  Vec<A> load(const S* row, int k) const {
    if constexpr (kSame<S, A>) return cpu::load<A>(row + c + step(k));
    return load_of_pair<A>(row + c + step(k & ~1), k & 1);
  }
  void store(A* p, int k, Vec<A> v) const { cpu::store<A>(p + c + step(k), v); }
  // All of the tile's vectors. Inlined always: else they would have to lie in memory.
  template <bool kStreamed>
  __attribute__((always_inline)) void store_pairs(T* row, const Vec<A>* v) const {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; k += 2) {
      store_pair<kStreamed, A>(row + c + step(k), v[k], v[k + 1]);
    }
  }
  __attribute__((always_inline)) void store_all(MutableRow<T> row, const Vec<A>* v) const {
    if (row.streamed) return store_pairs<true>(row.data, v);
    store_pairs<false>(row.data, v);
  }
  // Asks for what of half of a row, `which` is 0 or 1, is to the half as the tile is to the row.
  __attribute__((always_inline)) void prefetch_half(const T* row, int which,
                                                    int64_t columns) const {
    constexpr int64_t kBytes = kVectors * kLanes<A> * sizeof(T) / 2;
    const auto* first = reinterpret_cast<const char*>(row) + (c + which * columns) * sizeof(T) / 2;
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < kBytes; byte += kCacheLine) {
      __builtin_prefetch(first + byte, 0, 2);
    }
  }
};

// Vectors of a tile in most loops.
constexpr int kUnroll = 4;

// f(tile) over columns [begin, end), in tiles of kVectors vectors as long as there are so many, and
// then of two.
template <typename Access, int kVectors, typename F>
ATTNRES_INLINE void for_columns(int64_t begin, int64_t end, F&& f) {
  constexpr int64_t kTile = kVectors * kLanes<typename Access::A>;
  int64_t c = begin;
  for (; c + kTile <= end; c += kTile) f(Tile<Access, kVectors>{c});
  if constexpr (kVectors > 2) for_columns<Access, 2>(c, end, f);
}
// The same over all of a row.
template <typename Access, int kVectors, typename F>
ATTNRES_INLINE void for_tiles(int64_t columns, F&& f) {
  for_columns<Access, kVectors>(0, columns, f);
}

// Columns that are visited in one row before they are in the next. Rows are written past the caches
// in such pieces: line by line over many rows in turn, memory takes four times as long.
constexpr int64_t kRun = 256;
// f(begin, end) for the runs of a row.
template <int64_t kColumns = kRun, typename F>
ATTNRES_INLINE void for_runs(int64_t columns, F&& f) {
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    f(begin, begin + kColumns < columns ? begin + kColumns : columns);
  }
}

// Between columns as they lie in a row and the order in which Access loads them.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void split_columns(A* row, int64_t columns) {
  if constexpr (Access::kSplits) {
    for_tiles<Uniform<A, A>, 2>(columns, [&](auto tile) __attribute__((always_inline)) {
      Vec<A> v = tile.load(row, 0), w = tile.load(row, 1);
      deinterleave(v, w);
      tile.store(row, 0, v);
      tile.store(row, 1, w);
    });
  }
}
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void join_columns(A* row, int64_t columns) {
  if constexpr (Access::kSplits) {
    for_tiles<Uniform<A, A>, 2>(columns, [&](auto tile) __attribute__((always_inline)) {
      Vec<A> v = tile.load(row, 0), w = tile.load(row, 1);
      interleave(v, w);
      tile.store(row, 0, v);
      tile.store(row, 1, w);
    });
  }
}

// A running sum with several independent lanes, so that additions do not wait for one another.
template <typename A, int kVectors>
struct Sum {
  Vec<A> parts[kVectors];
  Vec<A> carried[kVectors];

  // One by one: an array that is cleared as a whole lies in memory.
  __attribute__((always_inline)) Sum() {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) parts[k] = carried[k] = Vec<A>{};
  }
  __attribute__((always_inline)) void carry() {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      carried[k] += parts[k];
      parts[k] = Vec<A>{};
    }
  }
  // From the order in which columns are loaded to their own.
  template <typename Access>
  void restore_order(bool any_carried) {
    if constexpr (Access::kSplits) {
      for (int k = 0; k < kVectors; k += 2) interleave(parts[k], parts[k + 1]);
      if (!any_carried) return;
      for (int k = 0; k < kVectors; k += 2) interleave(carried[k], carried[k + 1]);
    }
  }
  A total() const {
    Vec<A> all = carried[0] + parts[0];
    for (int k = 1; k < kVectors; ++k) all += carried[k] + parts[k];
    return sum_lanes<A>(all);
  }
};

// So many tiles added to one running sum, then it is put aside: with narrow vectors the rounding
// error of a long row would grow with its length.
constexpr int64_t kLongestRun = kVectorBytes == 64 ? 64 : 16;

// f(tile) over all of a row, as for_tiles, adding to `sums`.
template <typename Access, int kVectors, typename F, typename... Sums>
ATTNRES_INLINE void sum_over_tiles(int64_t columns, F&& f, Sums&... sums) {
  constexpr int64_t kColumns = kLongestRun * kVectors * kLanes<typename Access::A>;
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const bool is_full = begin + kColumns <= columns;
    for_columns<Access, kVectors>(begin, is_full ? begin + kColumns : columns, f);
    if (is_full) (sums.carry(), ...);
  }
  (sums.template restore_order<Access>(columns >= kColumns), ...);
}

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
