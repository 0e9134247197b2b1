// Writing to the block cache's open slot without reading it back through attention.
#pragma once

#include "depth_attention.hpp"

namespace attnres::cpu {
namespace {

template <typename Access>
struct WriteScratch {
  int64_t columns;
  typename Access::A* no_query;
  Summation<Access> summation;

  WriteScratch(Arena& arena, const BlockCacheWrite& p)
      : columns(whole_pairs<typename Access::A>(p.hidden)),
        no_query(arena.take<typename Access::A>(columns)),
        summation(arena, columns) {}
};

template <typename Access>
void block_cache_write(const BlockCacheWrite& p, TokenRange range) {
  using A = typename Access::A;
  using T = typename Access::T;
  Arena arena(range.scratch);
  const WriteScratch<Access> s(arena, p);
  for (int64_t c = 0; c < s.columns; ++c) s.no_query[c] = 0;
  s.summation.fill(s.columns);
  ConstRows partial;
  if (p.add) partial = as_const(p.slot);
  for (int64_t m = range.begin; m < range.end; ++m) {
    A product, squares;
    const int64_t after = token_after(m, range);
    const T* delta = row_ahead<Access>(p.delta, after, p.hidden, s.summation.delta);
    const T* slot = row_ahead<Access>(partial, after, p.hidden, delta);
    s.summation.add(partial, p.delta, p.slot, m, p.hidden, false, {delta, slot, slot}, s.no_query,
                    product, squares);
    static_cast<A*>(p.rstd)[m] = inverse_rms<A>(squares, p.hidden, p.eps);
  }
}

}  // namespace
}  // namespace attnres::cpu
