// From what phase 1 is asked for to one instantiation of its body, its arguments and its launch
// shape. Rows of one half-precision dtype go through tensor cores, others through ordinary
// arithmetic. Rows that 16-byte copies cannot reach, or of which not even one token's fit into the
// shared memory of the largest team, are read in place.
#pragma once

#include "attnres/dispatch.hpp"
#include "inter_block_attention/rows_forward.cuh"
#include "inter_block_attention/tile_launch.cuh"
#include "launch_shape.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(InterBlockForwardArgs<double, kMaxSources, OneCta>) < 32764,
              "limit of kernel parameters");

inline bool rows_are_aligned(const InterBlockForward& p) {
  bool aligned = p.hidden % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.queries, 16) &&
                 is_aligned(p.key_weights, 16);
  for (int i = 0; i < p.num_sources; ++i) aligned = aligned && is_aligned(p.sources[i], 16);
  return aligned;
}

// Of all rows that are there, or kNone.
inline DType shared_dtype(const InterBlockForward& p) {
  SharedDType shared;
  shared.add(p.sources, p.num_sources);
  shared.add(p.out);
  return shared.get();
}

static_assert(inter_block_team_bytes(2, 24) == Exchange::bytes(24));

// How a kernel of phase 1 is launched: its tile, and how many teams take tiles.
struct InterBlockGrid {
  InterBlockTile tile;
  LaunchShape shape;  // of `num_teams` teams
  int64_t num_tiles;
  int64_t num_teams;
  bool fits;  // else there is nothing to launch
};

// `most_teams`: there is nothing for more to do.
template <auto kKernel, typename Policy, typename Args, typename Launch>
InterBlockGrid inter_block_grid(const InterBlockShape& shape, int64_t num_tokens,
                                int64_t most_teams, const DeviceLimits& limits, Launch&& launch) {
  using Loader = typename Policy::template Loader<Args>;
  constexpr bool kIsCluster = Policy::Team::kIsCluster;
  const auto choose = [&](int most_ctas) {
    InterBlockGrid grid;
    grid.tile = choose_inter_block_team(shape, limits, most_ctas);
    const InterBlockTile& tile = grid.tile;
    grid.fits = fits(tile, limits);
    grid.num_tiles = (num_tokens + tile.tokens - 1) / tile.tokens;
    grid.shape = {tile.ctas_per_multiprocessor * limits.num_multiprocessors,
                  tile.num_threads + Loader::kExtraThreads, tile.shared_bytes, Loader::kUsesSlots,
                  kIsCluster ? tile.cluster_size : 0};
    grid.num_teams = grid.shape.num_ctas;
    if (grid.fits && tile.cluster_size > 1) {
      grid.num_teams = launch.template num_clusters<kKernel>(grid.shape, grid.num_tiles);
      grid.fits = grid.num_teams > 0;
    }
    grid.num_teams = std::min({grid.num_teams, grid.num_tiles, most_teams});
    grid.shape.num_ctas = static_cast<int>(grid.num_teams) * tile.cluster_size;
    return grid;
  };
  InterBlockGrid grid = choose(kIsCluster ? kMostCtasInLargeCluster : 1);
  for (const int fewer : {kMostCtasInCluster, 1}) {
    if (!grid.fits && grid.tile.cluster_size > fewer) grid = choose(fewer);
  }
  return grid;
}

// `row_value_bytes`: at least; sources may be wider.
template <typename Products, bool kUsesSlots, typename Params>
InterBlockShape inter_block_shape(const Params& p, int64_t row_value_bytes, int rows_of_token,
                                  bool makes_sums) {
  return {p.hidden,
          p.num_sources,
          p.num_queries,
          static_cast<int>(std::max(row_value_bytes, widest_source(p))),
          Products::kVectorValueBytes,
          Products::kVectorParts,
          static_cast<int>(sizeof(typename Products::Compute)),
          kUsesSlots,
          rows_of_token,
          Products::Scratch::kMatrices,
          makes_sums};
}

// What the arguments of forward and backward have in common.
template <typename Args, typename Params>
void set_inter_block_args(Args& args, const Params& p, const InterBlockGrid& grid) {
  using Compute = decltype(args.eps);
  args.num_tokens = p.num_tokens;
  args.num_tiles = grid.num_tiles;
  args.hidden = static_cast<int>(p.hidden);
  args.num_sources = p.num_sources;
  args.num_queries = static_cast<int>(p.num_queries);
  args.inverse_hidden = static_cast<Compute>(1.0 / static_cast<double>(p.hidden));
  args.eps = static_cast<Compute>(p.eps);
  args.scale = static_cast<Compute>(p.scale);
  args.queries = byte_rows<const std::byte>(p.queries, p.num_queries);
  args.key_weights = byte_rows<const std::byte>(p.key_weights, p.num_queries);
  args.tile = grid.tile;
  for (int i = 0; i < p.num_sources; ++i) {
    args.sources[i] = byte_rows<const std::byte>(p.sources[i], p.num_tokens);
  }
}

// Calls otherwise() where rows are not read in place and not even one token's fit.
template <typename Policy, int kCapacity, typename Launch, typename Otherwise>
auto launch_inter_block_with(const InterBlockForward& p, const DeviceLimits& limits,
                             Launch&& launch, Otherwise&& otherwise) {
  using Products = typename Policy::Products;
  using Compute = typename Products::Compute;
  using Args = InterBlockForwardArgs<Compute, kCapacity, typename Policy::Team>;
  constexpr auto kKernel = inter_block_attention_fwd_kernel<Policy, kCapacity>;
  constexpr bool kUsesSlots = Policy::template Loader<Args>::kUsesSlots;
  const InterBlockGrid grid = inter_block_grid<kKernel, Policy, Args>(
      inter_block_shape<Products, kUsesSlots>(p, 0, p.num_sources, false), p.num_tokens, INT64_MAX,
      limits, launch);
  if constexpr (kUsesSlots) {
    if (!grid.fits) return otherwise();
  }
  Args args;
  set_inter_block_args(args, p, grid);
  args.known_rstd = static_cast<const Compute*>(p.known_rstd);
  args.out = byte_rows<std::byte>(p.out, p.num_queries * p.num_tokens);
  args.lse = static_cast<Compute*>(p.lse);
  args.stats = static_cast<Compute*>(p.stats);
  return launch.template operator()<kKernel>(args, grid.shape);
}

// `Ring` and `Team` are the architecture's: the loader for aligned rows, and CtaCluster where there
// are clusters.
template <template <typename> class Ring, typename Team, typename Launch>
auto launch_inter_block_attention_rows(const InterBlockForward& p, const DeviceLimits& limits,
                                       Launch&& launch) {
  const auto in_place = [&]<typename Compute>(Compute) {
    using Policy = InterBlockPolicy<ScalarProducts<Mixed<Compute, 1>, 1>, DirectTiles>;
    return launch_inter_block_with<Policy, kMaxSources>(p, limits, launch, nullptr);
  };
  const auto in_place_float = [&] { return in_place(float{}); };
  if (is_double(p.compute)) return in_place(double{});
  if (!rows_are_aligned(p)) return in_place_float();
  const auto on_tensor_cores = [&]<typename T>(T) {
    using Policy = InterBlockPolicy<TensorProducts<T, 1>, Ring, Team>;
    return dispatch_bool(p.num_sources <= kShortTable, [&](auto is_short) {
      return launch_inter_block_with<Policy, is_short.value ? kShortTable : kMaxSources>(
          p, limits, launch, in_place_float);
    });
  };
  switch (shared_dtype(p)) {
    case DType::kBFloat16:
      return on_tensor_cores(__nv_bfloat16{});
    case DType::kFloat16:
      return on_tensor_cores(__half{});
    case DType::kFloat32:
    case DType::kNone: {
      using Policy = InterBlockPolicy<ScalarProducts<Mixed<float, 8>, 1>, Ring, Team>;
      return launch_inter_block_with<Policy, kMaxSources>(p, limits, launch, in_place_float);
    }
    case DType::kFloat64:
      break;
  }
  no_such_dtype();
}

// Where there are clusters, there are bulk copies and all else that the tile takes.
template <template <typename> class Ring, typename Team, typename Launch>
auto launch_inter_block_attention_forward(const InterBlockForward& p, const DeviceLimits& limits,
                                          Launch&& launch) {
  const auto rows = [&] {
    return launch_inter_block_attention_rows<Ring, Team>(p, limits, launch);
  };
  if constexpr (Team::kIsCluster) {
    return launch_inter_block_attention_tile(p, limits, launch, rows);
  } else {
    return rows();
  }
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
