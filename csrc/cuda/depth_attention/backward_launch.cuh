// The backward's counterpart of forward_launch.cuh: two kernels, the second for the weight
// gradients. A ring serves rows of one span; longer ones, too, are read in place. Where the
// architecture has clusters they serve the rows that do not fit one CTA.
#pragma once

#include "depth_attention/forward_launch.cuh"
#include "depth_attention/rows_backward.cuh"
#include "depth_attention/tile_backward_launch.cuh"
#include "launch_shape.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(DepthAttentionBackwardArgs<double, kMaxSources, OneCta>) < 32764,
              "limit of kernel parameters");

inline bool rows_are_aligned(const DepthAttentionBackward& p) {
  bool aligned = p.hidden % 8 == 0 && is_aligned(p.grad_out, 16) && is_aligned(p.mix, 16) &&
                 is_aligned(p.query.data, 16) && is_aligned(p.key_weight.data, 16) &&
                 is_aligned(p.out_weight.data, 16) && is_aligned(p.parts, 16);
  for (int i = 0; i < p.num_sources; ++i) {
    aligned = aligned && is_aligned(p.sources[i], 16) && is_aligned(p.grad_sources[i], 16) &&
              is_aligned(p.grad_base[i], 16);
  }
  return aligned;
}

// Of all rows that are there, or kNone.
inline DType shared_dtype(const DepthAttentionBackward& p) {
  SharedDType shared;
  shared.add(p.sources, p.num_sources);
  shared.add(p.grad_out);
  shared.add(p.grad_sources, p.num_sources);
  shared.add(p.grad_base, p.num_sources);
  return shared.get();
}

template <typename Compute, int kCapacity, typename Team>
auto make_backward_args(const DepthAttentionBackward& p, int width, const DepthAttentionTile& tile,
                        bool sums_are_shared) {
  DepthAttentionBackwardArgs<Compute, kCapacity, Team> args;
  set_depth_attention_args(args, p, width, tile);
  args.num_steps = args.num_later_steps = p.num_sources;
  args.grad_out = byte_rows<const std::byte>(p.grad_out, p.num_tokens);
  args.mix = byte_rows<const std::byte>(p.mix, p.num_tokens);
  args.grad_weights = static_cast<const Compute*>(p.grad_weights);
  args.stats = static_cast<const Compute*>(p.stats);
  args.grad_first_logit = static_cast<Compute*>(p.grad_first_logit);
  args.parts = p.num_parts > 0 ? static_cast<Compute*>(p.parts) : nullptr;
  args.sums_are_shared = sums_are_shared;
  for (int i = 0; i < p.num_sources; ++i) {
    args.grads[i] = byte_rows<std::byte>(p.grad_sources[i], p.num_tokens);
    args.bases[i] = byte_rows<const std::byte>(p.grad_base[i], p.num_tokens);
  }
  return args;
}

template <typename Compute, typename Launch>
auto launch_weight_gradients(const DepthAttentionBackward& p, int num_parts, Launch&& launch) {
  const auto gradient = [](const Vector& v) {
    return GainGradient{static_cast<std::byte*>(v.data), dtype_of(v)};
  };
  const WeightGradientArgs<Compute> args = {static_cast<const Compute*>(p.parts),
                                            num_parts,
                                            static_cast<int>(p.hidden),
                                            static_cast<Compute>(p.scale),
                                            gain_vector(p.query),
                                            gain_vector(p.key_weight),
                                            gradient(p.grad_query),
                                            gradient(p.grad_key_weight),
                                            gradient(p.grad_out_weight)};
  const int column_blocks = static_cast<int>((p.hidden + kWarpSize - 1) / kWarpSize);
  constexpr int kThreads = kWeightGradientWarps * kWarpSize;
  const LaunchShape shape = {2 * column_blocks, kThreads,
                             kThreads * static_cast<int>(sizeof(Compute)), false};
  return launch.template operator()<depth_attention_weight_gradient_kernel<Compute>>(args, shape);
}

template <typename Policy>
DepthAttentionShape backward_shape(const DepthAttentionBackward& p, bool sums_are_shared) {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Args = DepthAttentionBackwardArgs<Compute, 1, typename Policy::Team>;
  using Thread = DepthAttentionThread<Policy, Args>;
  return {.row_chunks = p.hidden / Elements::kWidth,
          .chunk_bytes = Elements::kWidth * static_cast<int>(widest_source(p)),
          .chunks_per_thread = Policy::kChunks,
          .segments_per_warp = Thread::kSegments,
          .registers =
              depth_attention_backward_registers(Policy::kShareBytes, Elements::kDispatchRegisters),
          .num_sources = p.num_sources,
          .num_steps = p.num_sources,
          .compute_bytes = sizeof(Compute),
          .values_per_segment = 2,
          .values_per_source = 3,
          .values_per_chunk = sums_are_shared ? 2 * Elements::kWidth : 0,
          .uses_slots = Policy::template Loader<Args>::kUsesSlots};
}

struct BackwardTile {
  DepthAttentionTile tile;
  bool sums_are_shared;
};

// The tile for one CTA, or for a cluster's.
template <typename Policy>
BackwardTile choose_backward_tile(const DepthAttentionBackward& p, const DeviceLimits& limits,
                                  int cluster_size) {
  constexpr bool kIsCluster = Policy::Team::kIsCluster;
  const auto choose = [&](bool sums_are_shared) {
    const DepthAttentionShape shape = backward_shape<Policy>(p, sums_are_shared);
    return choose_depth_attention_tile(shape, limits, kIsCluster, cluster_size);
  };
  const DepthAttentionTile without = choose(false);
  // Sums over rows are read and written once a row: in shared memory where that leaves half of it
  // to the slots, else in the part itself, which stays in the second-level cache.
  const int64_t slots_bytes = without.num_slots * (static_cast<int64_t>(without.slot_bytes) + 16);
  const int64_t sum_bytes = backward_shape<Policy>(p, true).values_per_chunk *
                            static_cast<int64_t>(without.slice_chunks) *
                            backward_shape<Policy>(p, true).compute_bytes;
  const bool shares =
      without.slot_bytes > 0 && p.num_parts > 0 &&
      2 * (without.shared_bytes - slots_bytes + sum_bytes) <= limits.shared_bytes_per_cta;
  return {shares ? choose(true) : without, shares};
}

// otherwise(): where the device runs no clusters of the tile's size.
template <typename Policy, int kCapacity, typename Launch, typename Otherwise>
auto launch_backward_tile(const DepthAttentionBackward& p, const BackwardTile& chosen,
                          const DeviceLimits& limits, Launch&& launch, Otherwise&& otherwise) {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Team = typename Policy::Team;
  using Args = DepthAttentionBackwardArgs<Compute, kCapacity, Team>;
  using Loader = typename Policy::template Loader<Args>;
  constexpr auto kKernel = depth_attention_bwd_kernel<Policy, kCapacity>;
  const DepthAttentionTile& tile = chosen.tile;
  LaunchShape shape = {
      std::min(tile.ctas_per_multiprocessor, kPartsPerMultiprocessor) * limits.num_multiprocessors,
      tile.num_threads + Loader::kExtraThreads, tile.shared_bytes, Loader::kUsesSlots,
      Team::kIsCluster ? tile.cluster_size : 0};
  int64_t teams = shape.num_ctas;
  if constexpr (Team::kIsCluster) {
    if (tile.cluster_size > 1) teams = launch.template num_clusters<kKernel>(shape, p.num_tokens);
    if (teams == 0) return otherwise();
  }
  teams = std::min(teams, p.num_tokens);
  if (p.num_parts > 0) teams = std::min(teams, p.num_parts);
  shape.num_ctas = static_cast<int>(teams) * tile.cluster_size;
  const auto status =
      launch.template operator()<kKernel>(make_backward_args<Compute, kCapacity, Team>(
                                              p, Elements::kWidth, tile, chosen.sums_are_shared),
                                          shape);
  if (p.num_parts == 0 || status != decltype(status){}) return status;
  return launch_weight_gradients<Compute>(p, static_cast<int>(teams), launch);
}

template <typename Policy, int kCapacity, typename Launch>
auto launch_backward_with(const DepthAttentionBackward& p, const DeviceLimits& limits,
                          Launch&& launch) {
  static_assert(!Policy::Team::kIsCluster);
  return launch_backward_tile<Policy, kCapacity>(p, choose_backward_tile<Policy>(p, limits, 1),
                                                 limits, launch, nullptr);
}

// By one CTA, rows that 16-byte copies reach.
template <template <typename, int, typename> class Ring, typename Launch>
auto launch_backward_alone(const DepthAttentionBackward& p, const DeviceLimits& limits,
                           Launch&& launch) {
  // 16 values of a row a thread: see depth_attention_backward_registers().
  constexpr int kMostInOneSpan = 16 * kMaxComputeThreads;
  if (p.hidden > kMostInOneSpan) {
    using Policy = DepthAttentionPolicy<Mixed<float, 8>, Direct, 2>;
    return launch_backward_with<Policy, kMaxSources>(p, limits, launch);
  }
  const DType dtype = p.num_sources > kShortTable ? DType::kNone : shared_dtype(p);
  switch (dtype) {
    case DType::kNone:
      return launch_backward_with<DepthAttentionPolicy<Mixed<float, 8>, Ring, 2>, kMaxSources>(
          p, limits, launch);
    case DType::kBFloat16:
      return launch_backward_with<DepthAttentionPolicy<Uniform<__nv_bfloat16>, Ring, 2>,
                                  kShortTable>(p, limits, launch);
    case DType::kFloat16:
      return launch_backward_with<DepthAttentionPolicy<Uniform<__half>, Ring, 2>, kShortTable>(
          p, limits, launch);
    case DType::kFloat32:
      return launch_backward_with<DepthAttentionPolicy<Uniform<float>, Ring, 4>, kShortTable>(
          p, limits, launch);
    case DType::kFloat64:
      break;
  }
  no_such_dtype();
}

// The general body. `Ring` and `Team` are the architecture's: the loader for aligned rows, and
// CtaCluster where there are clusters.
template <template <typename, int, typename> class Ring, typename Team, typename Launch>
auto launch_depth_attention_backward_rows(const DepthAttentionBackward& p,
                                          const DeviceLimits& limits, Launch&& launch) {
  if (is_double(p.compute)) {
    using Policy = DepthAttentionPolicy<Mixed<double, 1>, Direct, 4>;
    return launch_backward_with<Policy, kMaxSources>(p, limits, launch);
  }
  if (!rows_are_aligned(p)) {
    using Policy = DepthAttentionPolicy<Mixed<float, 1>, Direct, 8>;
    return launch_backward_with<Policy, kMaxSources>(p, limits, launch);
  }
  const auto launch_alone = [&] { return launch_backward_alone<Ring>(p, limits, launch); };
  if constexpr (Team::kIsCluster) {
    using Alone = DepthAttentionPolicy<Mixed<float, 8>, Ring, 2>;
    using Shared = DepthAttentionPolicy<Mixed<float, 8>, Ring, 2, Team>;
    const int size = large_row_cluster_size(backward_shape<Shared>(p, p.num_parts > 0),
                                            choose_backward_tile<Alone>(p, limits, 1).tile, limits);
    if (size > 0) {
      return launch_backward_tile<Shared, kMaxSources>(
          p, choose_backward_tile<Shared>(p, limits, size), limits, launch, launch_alone);
    }
  }
  return launch_alone();
}

// What merges serves the rows that it can, and where there are clusters so does the tile.
template <template <typename, int, typename> class Ring, typename Team, typename Launch>
auto launch_depth_attention_backward(const DepthAttentionBackward& p, const DeviceLimits& limits,
                                     Launch&& launch) {
  const auto add_up = [&](int num_parts) {
    return launch_weight_gradients<float>(p, num_parts, launch);
  };
  const MergeConfig merge = merge_config_of(p, limits);
  if (merge.warps > 0) return launch_merge(p, merge, launch, add_up);
  const auto launch_rows = [&] {
    return launch_depth_attention_backward_rows<Ring, Team>(p, limits, launch);
  };
  if constexpr (Team::kIsCluster) {
    const DepthAttentionConfig config = backward_tile_config(p, limits);
    if (config.warps > 0) {
      return launch_depth_attention_backward_tile(p, config, limits, launch, add_up, launch_rows);
    }
  }
  return launch_rows();
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
