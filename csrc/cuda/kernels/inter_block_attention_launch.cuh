// From what phase 1 is asked for to one instantiation of its body, its arguments and its launch
// shape. Rows of one half-precision dtype go through tensor cores; others, and rows that 16-byte
// copies cannot reach or of which not even one token's fit into shared memory, through ordinary
// arithmetic.
#pragma once

#include "attnres/dispatch.hpp"
#include "kernels/depth_attention_launch.cuh"
#include "kernels/inter_block_attention_fwd.cuh"
#include "kernels/launch_shape.hpp"

namespace attnres::cuda {

static_assert(sizeof(InterBlockForwardArgs<double, kMaxSources>) < 32764,
              "limit of kernel parameters");

inline bool rows_are_aligned(const InterBlockForward& p) {
  bool aligned = p.hidden % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.queries, 16) &&
                 is_aligned(p.key_weights, 16);
  for (int i = 0; i < p.num_sources; ++i) aligned = aligned && is_aligned(p.sources[i], 16);
  return aligned;
}

inline bool one_dtype(const InterBlockForward& p) {
  bool same = true;
  for (int i = 0; i < p.num_sources; ++i) same = same && p.sources[i].dtype == p.out.dtype;
  return same;
}

template <typename Products>
InterBlockTile inter_block_tile(const InterBlockForward& p, const DeviceLimits& limits,
                                bool uses_slots) {
  int64_t largest = 0;
  for (int i = 0; i < p.num_sources; ++i) largest = std::max(largest, size_of(p.sources[i].dtype));
  return choose_inter_block_tile({p.hidden, p.num_sources, p.num_queries, static_cast<int>(largest),
                                  Products::kVectorValueBytes, Products::kVectorParts,
                                  static_cast<int>(sizeof(typename Products::Compute)), uses_slots,
                                  p.num_sources, Products::Scratch::kMatrices, 0},
                                 limits);
}

template <typename Policy, int kCapacity, typename Launch>
auto launch_inter_block_with(const InterBlockForward& p, const InterBlockTile& tile,
                             const DeviceLimits& limits, Launch&& launch) {
  using Compute = typename Policy::Products::Compute;
  using Args = InterBlockForwardArgs<Compute, kCapacity>;
  using Loader = typename Policy::template Loader<Args>;
  Args args;
  args.num_tokens = p.num_tokens;
  args.num_tiles = (p.num_tokens + tile.tokens - 1) / tile.tokens;
  args.hidden = static_cast<int>(p.hidden);
  args.num_sources = p.num_sources;
  args.num_queries = static_cast<int>(p.num_queries);
  args.inverse_hidden = static_cast<Compute>(1.0 / static_cast<double>(p.hidden));
  args.eps = static_cast<Compute>(p.eps);
  args.scale = static_cast<Compute>(p.scale);
  args.queries = byte_rows<const std::byte>(p.queries, p.num_queries);
  args.key_weights = byte_rows<const std::byte>(p.key_weights, p.num_queries);
  args.known_rstd = p.known_rstd;
  args.out = byte_rows<std::byte>(p.out, p.num_queries * p.num_tokens);
  args.lse = static_cast<Compute*>(p.lse);
  args.stats = static_cast<Compute*>(p.stats);
  args.tile = tile;
  for (int i = 0; i < p.num_sources; ++i) {
    args.sources[i] = byte_rows<const std::byte>(p.sources[i], p.num_tokens);
  }
  const int64_t most_ctas =
      static_cast<int64_t>(tile.ctas_per_multiprocessor) * limits.num_multiprocessors;
  const LaunchShape shape = {static_cast<int>(std::min(args.num_tiles, most_ctas)),
                             tile.num_threads + Loader::kExtraThreads, tile.shared_bytes,
                             Loader::kUsesSlots};
  return launch.template operator()<inter_block_attention_fwd_kernel<Policy, kCapacity>>(args,
                                                                                         shape);
}

template <template <typename> class Ring, typename Launch>
auto launch_inter_block_attention_forward(const InterBlockForward& p, const DeviceLimits& limits,
                                          Launch&& launch) {
  const auto in_place = [&]<typename Compute>(Compute) {
    using Products = ScalarProducts<Mixed<Compute, 1>, 1>;
    return launch_inter_block_with<InterBlockPolicy<Products, DirectTiles>, kMaxSources>(
        p, inter_block_tile<Products>(p, limits, false), limits, launch);
  };
  if (p.compute == DType::kFloat64) return in_place(double{});
  if (!rows_are_aligned(p)) return in_place(float{});
  if (one_dtype(p) && p.out.dtype != DType::kFloat32) {
    const auto on_tensor_cores = [&]<typename T>(T) {
      using Products = TensorProducts<T, 1>;
      using Policy = InterBlockPolicy<Products, Ring>;
      const InterBlockTile tile = inter_block_tile<Products>(p, limits, true);
      if (!fits(tile, limits)) return in_place(float{});
      return dispatch_bool(p.num_sources <= kShortTable, [&](auto is_short) {
        return launch_inter_block_with<Policy, is_short.value ? kShortTable : kMaxSources>(
            p, tile, limits, launch);
      });
    };
    return p.out.dtype == DType::kBFloat16 ? on_tensor_cores(__nv_bfloat16{})
                                           : on_tensor_cores(__half{});
  }
  using Products = ScalarProducts<Mixed<float, 8>, 1>;
  const InterBlockTile tile = inter_block_tile<Products>(p, limits, true);
  if (!fits(tile, limits)) return in_place(float{});
  return launch_inter_block_with<InterBlockPolicy<Products, Ring>, kMaxSources>(p, tile, limits,
                                                                                launch);
}

}  // namespace attnres::cuda
