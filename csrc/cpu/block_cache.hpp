// Writing to the block cache's open slot without reading it back through attention.
#pragma once

#include "depth_attention.hpp"

namespace attnres::cpu {
namespace {

template <typename Access>
void block_cache_write(const BlockCacheWrite& p, int64_t begin, int64_t end) {
  using A = typename Access::A;
  for (int64_t m = begin; m < end; ++m) {
    const MutableRow slot = row(p.slot, m);
    const Row partial = p.add ? Row{slot.data, slot.dtype} : Row{};
    A product, squares;
    add_and_score<Access>(partial, row(p.delta, m), slot, Row{slot.data, slot.dtype},
                          static_cast<const A*>(nullptr), p.hidden, product, squares);
    static_cast<A*>(p.rstd)[m] = inverse_rms<A>(squares, p.hidden, p.eps);
  }
}

}  // namespace
}  // namespace attnres::cpu
