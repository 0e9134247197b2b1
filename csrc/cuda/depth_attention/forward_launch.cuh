// From what an operator asks for to one instantiation of a body, its arguments and its launch
// shape. The ring of the architecture serves aligned rows; rows that 16-byte copies cannot reach,
// and float64, are read in place. Where the architecture has clusters they serve few tokens, and
// rows that do not fit one CTA.
#pragma once

#include "depth_attention/rows_forward.cuh"
#include "depth_attention/tile_launch.cuh"
#include "launch_shape.hpp"
#include "merge_partial/merge_launch.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(DepthAttentionForwardArgs<double, kMaxSources, OneCta>) < 32764,
              "limit of kernel parameters");

inline bool rows_are_aligned(const DepthAttentionForward& p) {
  bool aligned = p.hidden % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.mix, 16) &&
                 is_aligned(p.query.data, 16) && is_aligned(p.key_weight.data, 16) &&
                 is_aligned(p.out_weight.data, 16);
  aligned = aligned && is_aligned(p.delta, 16) && is_aligned(p.new_partial, 16);
  for (int i = 0; i < p.num_sources; ++i) aligned = aligned && is_aligned(p.sources[i], 16);
  return aligned;
}

// Of all rows that are there, or kNone.
inline DType shared_dtype(const DepthAttentionForward& p) {
  SharedDType shared;
  shared.add(p.sources, p.num_sources);
  shared.add(p.delta);
  shared.add(p.new_partial);
  shared.add(p.out);
  return shared.get();
}

// Rows that the first sweep over a token loads.
inline int num_forward_steps(const DepthAttentionForward& p) {
  const bool two_summands = p.delta.data != nullptr && p.sources[p.num_sources - 1].data != nullptr;
  return p.num_sources + (two_summands ? 1 : 0);
}

static_assert(depth_attention_team_bytes(2, 3, 5) ==
              Exchange::bytes(3 * 5 * static_cast<int>(sizeof(Pair<float>))));

// What the general bodies' arguments have in common.
template <typename Args, typename Params>
void set_depth_attention_args(Args& args, const Params& p, int width,
                              const DepthAttentionTile& tile) {
  using Compute = decltype(args.eps);
  set_read_args(args, p);
  args.row_chunks = static_cast<int>(p.hidden / width);
  args.num_sources = p.num_sources;
  args.first_logit = static_cast<const Compute*>(p.first_logit);
  args.tile = tile;
  for (int i = 0; i < p.num_sources; ++i) {
    args.sources[i] = byte_rows<const std::byte>(p.sources[i], p.num_tokens);
  }
}

template <typename Compute, int kCapacity, typename Team>
auto make_forward_args(const DepthAttentionForward& p, int width, const DepthAttentionTile& tile) {
  DepthAttentionForwardArgs<Compute, kCapacity, Team> args;
  set_depth_attention_args(args, p, width, tile);
  args.num_steps = num_forward_steps(p);
  args.num_later_steps = p.num_sources - (p.delta.data != nullptr ? 1 : 0);
  args.new_partial = byte_rows<std::byte>(p.new_partial, p.num_tokens);
  args.known_rstd = static_cast<const Compute*>(p.known_rstd);
  args.num_known_rstd = p.num_known_rstd;
  args.last_rstd = static_cast<Compute*>(p.last_rstd);
  args.out = byte_rows<std::byte>(p.out, p.num_tokens);
  args.mix = byte_rows<std::byte>(p.mix, p.num_tokens);
  args.weights = static_cast<Compute*>(p.weights);
  args.stats = static_cast<Compute*>(p.stats);
  if (p.delta.data != nullptr) {
    args.sources[args.num_steps - 1] = byte_rows<const std::byte>(p.delta, p.num_tokens);
  }
  return args;
}

template <typename Policy>
DepthAttentionShape forward_shape(const DepthAttentionForward& p) {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Args = DepthAttentionForwardArgs<Compute, 1, typename Policy::Team>;
  using Thread = DepthAttentionThread<Policy, Args>;
  const int64_t widest =
      std::max({widest_source(p), value_bytes(p.delta), value_bytes(p.new_partial)});
  return {.row_chunks = p.hidden / Elements::kWidth,
          .chunk_bytes = Elements::kWidth * static_cast<int>(widest),
          .chunks_per_thread = Policy::kChunks,
          .segments_per_warp = Thread::kSegments,
          .registers = depth_attention_registers(Policy::kShareBytes, Elements::kDispatchRegisters),
          .num_sources = p.num_sources,
          .num_steps = num_forward_steps(p),
          .compute_bytes = sizeof(Compute),
          .values_per_segment = 1,
          .values_per_source = 1,
          .values_per_chunk = 0,
          .uses_slots = Policy::template Loader<Args>::kUsesSlots};
}

// launch<kernel>(args, LaunchShape) for the policies chosen; otherwise() where the device runs no
// clusters of the tile's size.
template <typename Policy, int kCapacity, typename Launch, typename Otherwise>
auto launch_forward_tile(const DepthAttentionForward& p, DepthAttentionTile tile,
                         const DeviceLimits& limits, Launch&& launch, Otherwise&& otherwise) {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Team = typename Policy::Team;
  using Args = DepthAttentionForwardArgs<Compute, kCapacity, Team>;
  using Loader = typename Policy::template Loader<Args>;
  constexpr auto kKernel = depth_attention_fwd_kernel<Policy, kCapacity>;
  // Nobody comes back for a row whose mix is not wanted.
  if (p.out.data == nullptr) tile.resident = false;
  LaunchShape shape = {tile.ctas_per_multiprocessor * limits.num_multiprocessors,
                       tile.num_threads + Loader::kExtraThreads, tile.shared_bytes,
                       Loader::kUsesSlots, Team::kIsCluster ? tile.cluster_size : 0};
  int64_t teams = shape.num_ctas;
  if constexpr (Team::kIsCluster) {
    if (tile.cluster_size > 1) teams = launch.template num_clusters<kKernel>(shape, p.num_tokens);
    if (teams == 0) return otherwise();
  }
  shape.num_ctas = static_cast<int>(std::min(p.num_tokens, teams)) * tile.cluster_size;
  return launch.template operator()<kKernel>(
      make_forward_args<Compute, kCapacity, Team>(p, Elements::kWidth, tile), shape);
}

template <typename Policy, int kCapacity, typename Launch>
auto launch_forward_with(const DepthAttentionForward& p, const DeviceLimits& limits,
                         Launch&& launch) {
  static_assert(!Policy::Team::kIsCluster);
  return launch_forward_tile<Policy, kCapacity>(
      p, choose_depth_attention_tile(forward_shape<Policy>(p), limits), limits, launch, nullptr);
}

// One or several CTAs for a row, whichever is better; `Alone` is the policy for one, and `Shared`
// that of a CTA in a cluster.
template <typename Alone, typename Shared, int kCapacity, typename Launch>
auto launch_forward_alone_or_shared(const DepthAttentionForward& p, const DeviceLimits& limits,
                                    Launch&& launch) {
  const auto launch_alone = [&] {
    return launch_forward_with<Alone, kCapacity>(p, limits, launch);
  };
  if constexpr (Shared::Team::kIsCluster) {
    const DepthAttentionShape shape = forward_shape<Shared>(p);
    const DepthAttentionTile alone = choose_depth_attention_tile(forward_shape<Alone>(p), limits);
    int size = 0;
    if (p.out.data != nullptr) size = large_row_cluster_size(shape, alone, limits);
    // A row in several spans adds up its sums in another order than a cluster.
    if (p.num_tokens <= limits.num_multiprocessors && (size > 0 || alone.num_spans == 1)) {
      size = std::max(
          size, few_token_cluster_size(
                    p.num_tokens, choose_depth_attention_tile(shape, limits, true, 1).num_segments,
                    shape.num_steps * shape.row_chunks * shape.chunk_bytes, limits));
    }
    if (size > 0) {
      const DepthAttentionTile tile = choose_depth_attention_tile(shape, limits, true, size);
      // A cluster's CTA has its columns in registers, and the sums of all others in shared memory.
      if (tile.num_spans == 1 && tile.shared_bytes <= limits.shared_bytes_per_cta) {
        return launch_forward_tile<Shared, kCapacity>(p, tile, limits, launch, launch_alone);
      }
    }
  }
  return launch_alone();
}

// In a cluster 16 values a thread are always enough. Where the table of sources is short each
// thread copies what it will read itself: the copies of a few tokens then start with no barriers to
// set up.
template <typename Elements, template <typename, int, typename> class Ring, typename Team,
          int kChunks, typename Launch>
auto launch_forward_chunks(const DepthAttentionForward& p, const DeviceLimits& limits,
                           Launch&& launch) {
  using Alone = DepthAttentionPolicy<Elements, Ring, kChunks>;
  if (p.num_sources <= kShortTable) {
    using Shared = DepthAttentionPolicy<Elements, CpAsyncRing, 16 / Elements::kWidth, Team>;
    return launch_forward_alone_or_shared<Alone, Shared, kShortTable>(p, limits, launch);
  }
  using Shared = DepthAttentionPolicy<Elements, Ring, 16 / Elements::kWidth, Team>;
  return launch_forward_alone_or_shared<Alone, Shared, kMaxSources>(p, limits, launch);
}

// 16 values a thread where that is enough for a row: more threads, fewer registers. And where
// shared memory has no room for spans of twice as many.
template <typename Elements, template <typename, int, typename> class Ring, typename Team,
          typename Launch>
auto launch_forward_through(const DepthAttentionForward& p, const DeviceLimits& limits,
                            Launch&& launch) {
  constexpr int kFew = 16 / Elements::kWidth;
  constexpr int kMany = Elements::kWidth == 8 ? 2 * kFew : kFew;
  const auto have_room = [&] {
    using Policy = DepthAttentionPolicy<Elements, Ring, kMany>;
    return choose_depth_attention_tile(forward_shape<Policy>(p), limits).shared_bytes <=
           limits.shared_bytes_per_cta;
  };
  if (p.hidden <= 16 * kMaxComputeThreads || !have_room()) {
    return launch_forward_chunks<Elements, Ring, Team, kFew>(p, limits, launch);
  }
  return launch_forward_chunks<Elements, Ring, Team, kMany>(p, limits, launch);
}

// `Ring` and `Team` are the architecture's: the loader for aligned rows, and CtaCluster where there
// are clusters.
template <template <typename, int, typename> class Ring, typename Team, typename Launch>
auto launch_depth_attention_rows(const DepthAttentionForward& p, const DeviceLimits& limits,
                                 Launch&& launch) {
  if (is_double(p.compute)) {
    using Policy = DepthAttentionPolicy<Mixed<double, 1>, Direct, 4>;
    return launch_forward_with<Policy, kMaxSources>(p, limits, launch);
  }
  if (!rows_are_aligned(p)) {
    using Policy = DepthAttentionPolicy<Mixed<float, 1>, Direct, 8>;
    return launch_forward_with<Policy, kMaxSources>(p, limits, launch);
  }
  switch (shared_dtype(p)) {
    case DType::kNone: {
      using Alone = DepthAttentionPolicy<Mixed<float, 8>, Ring, 2>;
      using Shared = DepthAttentionPolicy<Mixed<float, 8>, Ring, 2, Team>;
      return launch_forward_alone_or_shared<Alone, Shared, kMaxSources>(p, limits, launch);
    }
    case DType::kBFloat16:
      return launch_forward_through<Uniform<__nv_bfloat16>, Ring, Team>(p, limits, launch);
    case DType::kFloat16:
      return launch_forward_through<Uniform<__half>, Ring, Team>(p, limits, launch);
    case DType::kFloat32:
      return launch_forward_through<Uniform<float>, Ring, Team>(p, limits, launch);
    case DType::kFloat64:
      break;
  }
  no_such_dtype();
}

// Through what merges where it serves; through the tile where there are clusters and it does; else
// through the general body.
template <template <typename, int, typename> class Ring, typename Team, typename Launch>
auto launch_depth_attention_forward(const DepthAttentionForward& p, const DeviceLimits& limits,
                                    Launch&& launch) {
  const MergeConfig merge = merge_config_of(p, limits);
  if (merge.warps > 0) return launch_merge(p, merge, launch);
  const auto launch_rows = [&] {
    return launch_depth_attention_rows<Ring, Team>(p, limits, launch);
  };
  if constexpr (Team::kIsCluster) {
    const DepthAttentionConfig config = tile_config(p, limits);
    if (config.warps > 0) {
      return launch_depth_attention_tile(p, config, limits, launch, launch_rows);
    }
  }
  return launch_rows();
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
