// Kernels read and write rows of one storage type that are whole pairs of vectors. Rows of another
// dtype, or of a width that pairs do not divide, come and go by way of copies in the compute type
// or their own, filled up with zeros: so that there is one loop for all.
#pragma once

#include "rows.hpp"

namespace attnres::cpu {
namespace {

template <typename A>
ATTNRES_INLINE int64_t whole_pairs(int64_t hidden) {
  return (hidden + kPair<A> - 1) / kPair<A> * kPair<A>;
}

template <typename Access>
ATTNRES_INLINE bool is_in_place(DType dtype, int64_t hidden) {
  return holds<typename Access::T>(dtype) && hidden % kPair<typename Access::A> == 0;
}
// Whether any row of a call has to be copied.
template <typename Access, typename Params>
ATTNRES_INLINE bool needs_copies(const Params& p) {
  return !is_in_place<Access>(shared_dtype(p), p.hidden);
}

// `count` values, and zeros up to the end of a pair.
template <typename A, typename From, typename To>
__attribute__((noinline)) void copy_in(const From* from, int64_t count, To* to) {
  const int64_t columns = whole_pairs<A>(count);
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    Packed<A, From> packed = {};
    if (c + kLanes<A> <= count) {
      __builtin_memcpy(&packed, from + c, sizeof(packed));
    } else if (c < count) {
      packed = load_bytes<Packed<A, From>>(from + c, (count - c) * sizeof(From));
    }
    if constexpr (kSame<From, To>) {
      __builtin_memcpy(to + c, &packed, sizeof(packed));
    } else {
      store<A>(to + c, Convert<A, From>::widen(packed));
    }
  }
}
template <typename A, typename From, typename To>
__attribute__((noinline)) void copy_out(const From* from, int64_t count, To* to) {
  for (int64_t c = 0; c < count; c += kLanes<A>) {
    Packed<A, To> packed;
    if constexpr (kSame<From, To>) {
      __builtin_memcpy(&packed, from + c, sizeof(packed));
    } else {
      packed = Convert<A, To>::narrow(load<A>(from + c));
    }
    if (c + kLanes<A> <= count) {
      __builtin_memcpy(to + c, &packed, sizeof(packed));
    } else {
      store_bytes(to + c, packed, (count - c) * sizeof(To));
    }
  }
}

// f(T*) for the type T that a row holds. All rows have the storage type of Access, but where that
// is the compute type.
template <typename Access, typename F>
ATTNRES_INLINE void with_storage(DType dtype, F&& f) {
  using A = typename Access::A;
  using T = typename Access::T;
  if constexpr (!kSame<A, T>) {
    return f(static_cast<T*>(nullptr));
  } else {
    switch (dtype) {
      case DType::kFloat64:
        // Only float64 computations meet float64 rows.
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
}

// Columns [begin, end) of row m for a kernel: `copy + begin` holds them where they are not read in
// place. Returns where column 0 is, or would be.
template <typename Access, typename T = typename Access::T>
ATTNRES_INLINE const T* bring(const ConstRows& rows, int64_t m, int64_t begin, int64_t end,
                              int64_t hidden, T* copy) {
  const void* row = row_at(rows, m);
  if (is_in_place<Access>(rows.dtype, hidden)) return static_cast<const T*>(row);
  with_storage<Access>(rows.dtype, [&]<typename From>(From*) __attribute__((always_inline)) {
    const int64_t last = end < hidden ? end : hidden;
    copy_in<typename Access::A>(static_cast<const From*>(row) + begin, last - begin, copy + begin);
  });
  return copy;
}
template <typename Access, typename T = typename Access::T>
ATTNRES_INLINE const T* bring(const ConstRows& rows, int64_t m, int64_t hidden, T* copy) {
  return bring<Access>(rows, m, 0, hidden, hidden, copy);
}

// Where a kernel writes row m, which is there: in `copy` where it cannot in place, and then
// `put_back` has to follow.
template <typename Access, typename T = typename Access::T>
ATTNRES_INLINE MutableRow<T> place(const Rows& rows, int64_t m, int64_t hidden, bool streamed,
                                   T* copy) {
  if (!is_in_place<Access>(rows.dtype, hidden)) return {copy, false};
  return {static_cast<T*>(row_at(rows, m)), streamed};
}
template <typename Access, typename T = typename Access::T>
ATTNRES_INLINE void put_back(const Rows& rows, int64_t m, int64_t begin, int64_t end,
                             int64_t hidden, const T* copy) {
  if (is_in_place<Access>(rows.dtype, hidden)) return;
  with_storage<Access>(rows.dtype, [&]<typename To>(To*) __attribute__((always_inline)) {
    const int64_t last = end < hidden ? end : hidden;
    copy_out<typename Access::A>(copy + begin, last - begin,
                                 static_cast<To*>(row_at(rows, m)) + begin);
  });
}
template <typename Access, typename T = typename Access::T>
ATTNRES_INLINE void put_back(const Rows& rows, int64_t m, int64_t hidden, const T* copy) {
  put_back<Access>(rows, m, 0, hidden, hidden, copy);
}

// Row m where it is read in place, for fetching it ahead; else what is in a cache already.
template <typename Access, typename T = typename Access::T>
ATTNRES_INLINE const T* row_ahead(const ConstRows& rows, int64_t m, int64_t hidden, const T* copy) {
  if (rows.data == nullptr || !is_in_place<Access>(rows.dtype, hidden)) return copy;
  return static_cast<const T*>(row_at(rows, m));
}

// A vector [D] of the compute type with columns in the order of Access; `copy` has room for it.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE const A* as_loaded(const void* vector, int64_t hidden, A* copy) {
  const auto* values = static_cast<const A*>(vector);
  if (vector == nullptr || (!Access::kSplits && hidden % kPair<A> == 0)) return values;
  copy_in<A>(values, hidden, copy);
  split_columns<Access>(copy, whole_pairs<A>(hidden));
  return copy;
}
// sums [D] += a vector in the order of Access, whose order is lost.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void add_joined(A* vector, int64_t hidden, A* sums) {
  join_columns<Access>(vector, whole_pairs<A>(hidden));
  for (int64_t c = 0; c < hidden; ++c) sums[c] += vector[c];
}

}  // namespace
}  // namespace attnres::cpu
