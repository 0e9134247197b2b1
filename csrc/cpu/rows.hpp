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
constexpr int64_t kStreamedBytes = 8 << 20;

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
  static constexpr bool kSplits = kSplitsColumns<A, T>;
  static constexpr int kMostVectors = 8;  // of a tile
  ATTNRES_INLINE int64_t size(Row) { return sizeof(T); }
  ATTNRES_INLINE Vec<A> load(Row row, int64_t c) {
    return cpu::load<A>(static_cast<const T*>(row.data) + c);
  }
  ATTNRES_INLINE Vec<A> load_of_pair(Row row, int64_t c, int which) {
    return cpu::load_of_pair<A>(static_cast<const T*>(row.data) + c, which);
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
  template <bool kStreamed>
  ATTNRES_INLINE void store_pair(MutableRow row, int64_t c, Vec<A> v, Vec<A> w) {
    cpu::store_pair<kStreamed, A>(static_cast<T*>(row.data) + c, v, w);
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
  static constexpr bool kSplits = false;
  static constexpr int kMostVectors = 2;
  ATTNRES_INLINE int64_t size(Row row) { return size_of(row.dtype); }
  ATTNRES_INLINE Vec<A> load(Row row, int64_t c) {
    return with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      return Uniform<A, T>::load(row, c);
    });
  }
  ATTNRES_INLINE Vec<A> load_of_pair(Row row, int64_t c, int which) {
    return load(row, c + which * kLanes<A>);
  }
  static __attribute__((noinline)) Vec<A> load_tail(Row row, int64_t c, int64_t count) {
    return with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      return Uniform<A, T>::load_tail(row, c, count);
    });
  }
  ATTNRES_INLINE void store(MutableRow row, int64_t c, Vec<A> v) {
    with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      Uniform<A, T>::store(row, c, v);
    });
  }
  static __attribute__((noinline)) void store_tail(MutableRow row, int64_t c, Vec<A> v,
                                                   int64_t count) {
    with_storage<A>(row.dtype, [&]<typename T>(T*) __attribute__((always_inline)) {
      Uniform<A, T>::store_tail(row, c, v, count);
    });
  }
  template <bool>
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

// Vectors of a whole tile, at least.
constexpr int kUnroll = 4;

// `kVectors` whole vectors from column c on, or the partial vector at the end of a row. Loops over
// a row are written once, as a function of a tile. The columns of a tile of several vectors are in
// the order in which Access loads pairs, in rows as in vectors of the compute type.
template <typename Access, int kVectors>
struct WholeTile {
  using A = typename Access::A;
  static constexpr int kCount = kVectors;
  int64_t c;

  ATTNRES_INLINE int64_t step(int k) { return k * kLanes<A>; }
  Vec<A> load(Row row, int k) const {
    if constexpr (kVectors == 1) return Access::load(row, c);
    return Access::load_of_pair(row, c + step(k & ~1), k & 1);
  }
  // All of the tile's vectors. Inlined always: else they would have to lie in memory.
  __attribute__((always_inline)) void store_all(MutableRow row, const Vec<A>* v) const {
    if constexpr (kVectors == 1) return Access::store(row, c, v[0]);
    if (row.streamed) return store_pairs<true>(row, v);
    store_pairs<false>(row, v);
  }
  template <bool kStreamed>
  __attribute__((always_inline)) void store_pairs(MutableRow row, const Vec<A>* v) const {
#pragma GCC unroll 8
    for (int k = 0; k + 1 < kVectors; k += 2) {
      Access::template store_pair<kStreamed>(row, c + step(k), v[k], v[k + 1]);
    }
  }
  // Asks for what of half of a row, `which` is 0 or 1, is to the half as the tile is to a row.
  __attribute__((always_inline)) void prefetch_half(Row row, int which, int64_t hidden) const {
    const int64_t bytes = step(kVectors) * Access::size(row) / 2;
    const char* first =
        static_cast<const char*>(row.data) + (c + which * hidden) * Access::size(row) / 2;
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine) {
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
  void store_all(MutableRow row, const Vec<A>* v) const { Access::store_tail(row, c, v[0], count); }
  void prefetch_half(Row, int, int64_t) const {}
  Vec<A> load(const A* p, int) const { return cpu::load_tail<A>(p + c, count); }
  void store(A* p, int, Vec<A> v) const { cpu::store_tail<A>(p + c, v, count); }
};

// f(tile) for whole tiles of at most kVectors vectors, as long as there are any of kUnroll; returns
// the column behind them.
template <typename Access, int kVectors, typename F>
ATTNRES_INLINE int64_t for_whole_tiles(int64_t begin, int64_t end, F&& f) {
  constexpr int64_t kTile = kVectors * kLanes<typename Access::A>;
  int64_t c = begin;
  for (; c + kTile <= end; c += kTile) f(WholeTile<Access, kVectors>{c});
  if constexpr (kVectors > kUnroll) return for_whole_tiles<Access, kUnroll>(c, end, f);
  return c;
}
// f(tile) for what is left of a row.
template <typename Access, typename F>
ATTNRES_INLINE void for_rest(int64_t begin, int64_t hidden, F&& f) {
  constexpr int64_t kTile = kLanes<typename Access::A>;
  int64_t c = begin;
  for (; c + kTile <= hidden; c += kTile) f(WholeTile<Access, 1>{c});
  if (c < hidden) f(TailTile<Access>{c, hidden - c});
}

// Columns of a row that are in whole tiles.
template <typename A>
ATTNRES_INLINE int64_t whole_columns(int64_t hidden) {
  return hidden / (kUnroll * kLanes<A>)*(kUnroll * kLanes<A>);
}

// f(tile) over columns [begin, end) of a row of `hidden` values; begin, and end if it is not the
// row's, are where tiles of kUnroll vectors begin.
template <typename Access, int kVectors, typename F>
ATTNRES_INLINE void for_columns(int64_t begin, int64_t end, int64_t hidden, F&& f) {
  static_assert(kVectors % 2 == 0);
  const int64_t whole = whole_columns<typename Access::A>(hidden);
  for_whole_tiles<Access, kVectors>(begin, end < whole ? end : whole, f);
  if (end == hidden) for_rest<Access>(whole, hidden, f);
}
// The same over all of a row.
template <typename Access, int kVectors, typename F>
ATTNRES_INLINE void for_tiles(int64_t hidden, F&& f) {
  for_columns<Access, kVectors>(0, hidden, hidden, f);
}

// Columns that are visited in one row before they are in the next. Rows are written past the caches
// in such pieces: line by line over many rows in turn, memory takes four times as long.
constexpr int64_t kRun = 256;
// f(begin, end) for the runs of a row.
template <typename F>
ATTNRES_INLINE void for_runs(int64_t hidden, F&& f) {
  for (int64_t begin = 0; begin < hidden; begin += kRun) {
    f(begin, begin + kRun < hidden ? begin + kRun : hidden);
  }
}

// Between columns as they lie in a row and the order in which Access loads them.
template <typename A>
void split_columns(A* row, int64_t hidden) {
  constexpr int kPair = 2 * kLanes<A>;
  for (A* end = row + whole_columns<A>(hidden); row < end; row += kPair) {
    A pair[kPair];
    __builtin_memcpy(pair, row, sizeof(pair));
    for (int c = 0; c < kPair; ++c) row[c % 2 * kLanes<A> + c / 2] = pair[c];
  }
}
template <typename A>
void join_columns(A* row, int64_t hidden) {
  constexpr int kPair = 2 * kLanes<A>;
  for (A* end = row + whole_columns<A>(hidden); row < end; row += kPair) {
    A pair[kPair];
    __builtin_memcpy(pair, row, sizeof(pair));
    for (int c = 0; c < kPair; ++c) row[c] = pair[c % 2 * kLanes<A> + c / 2];
  }
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
ATTNRES_INLINE void sum_over_tiles(int64_t hidden, F&& f, Sums&... sums) {
  using A = typename Access::A;
  constexpr int64_t kColumns = kLongestRun * kVectors * kLanes<A>;
  const int64_t whole = whole_columns<A>(hidden);
  int64_t c = 0;
  for (; c + kColumns <= whole; c += kColumns) {
    for_whole_tiles<Access, kVectors>(c, c + kColumns, f);
    (sums.carry(), ...);
  }
  for_whole_tiles<Access, kVectors>(c, whole, f);
  (sums.template restore_order<Access>(c > 0), ...);
  for_rest<Access>(whole, hidden, f);
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
