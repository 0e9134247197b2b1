// From what phase 1 is asked for to one instantiation of its tile, its arguments and its launch
// shape.
#pragma once

#include "common/tile_teams.cuh"
#include "inter_block_attention/tile_forward.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(InterBlockTileArgs) < 4096,
              "a launch copies them, and old drivers take no more");

// The number of the token after the last one is an int, too.
constexpr int64_t kMostInterBlockTileTokens = int64_t{1} << 30;

inline InterBlockRead tile_read(const InterBlockForward& p) {
  return {.hidden = p.hidden, .num_sources = p.num_sources, .num_queries = p.num_queries};
}

// 16-bit rows that bulk copies can reach.
inline bool tile_serves(const InterBlockForward& p) {
  const DType dtype = p.out.dtype;
  const auto is_same = [&](const auto& rows) {
    return rows.dtype == dtype && is_aligned(rows, 16);
  };
  bool serves = (dtype == DType::kBFloat16 || dtype == DType::kFloat16) &&
                p.compute == DType::kFloat32 && p.num_tokens <= kMostInterBlockTileTokens &&
                p.hidden % 8 == 0 && is_same(p.out) && is_aligned(p.queries, 16) &&
                is_aligned(p.key_weights, 16);
  for (int i = 0; serves && i < p.num_sources; ++i) serves = is_same(p.sources[i]);
  return serves;
}

inline InterBlockTileArgs make_tile_args(const InterBlockForward& p,
                                         const InterBlockConfig& config) {
  InterBlockTileArgs args = {};
  args.config = config;
  args.layout = lay_out(config, tile_read(p));
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.hidden = static_cast<int>(p.hidden);
  args.num_sources = p.num_sources;
  args.num_queries = static_cast<int>(p.num_queries);
  args.inverse_hidden = static_cast<float>(1.0 / static_cast<double>(p.hidden));
  args.eps = static_cast<float>(p.eps);
  args.scale = static_cast<float>(p.scale);
  args.queries = byte_rows<const std::byte>(p.queries, p.num_queries);
  args.key_weights = byte_rows<const std::byte>(p.key_weights, p.num_queries);
  args.known_rstd = static_cast<const float*>(p.known_rstd);
  args.out = byte_rows<std::byte>(p.out, p.num_queries * p.num_tokens);
  args.lse = static_cast<float*>(p.lse);
  args.stats = static_cast<float*>(p.stats);
  for (int i = 0; i < p.num_sources; ++i) {
    args.rows[i] = byte_rows<const std::byte>(p.sources[i], p.num_tokens);
  }
  return args;
}

// f<kernel>() for the one that a configuration is of.
template <typename T, int kTokens, typename F>
auto with_tile_columns(const InterBlockConfig& config, F&& f) {
  switch (config.columns) {
    case 128:
      return f.template operator()<inter_block_attention_tile_fwd_kernel<T, 128, kTokens>>();
    case 192:
      return f.template operator()<inter_block_attention_tile_fwd_kernel<T, 192, kTokens>>();
    default:
      return f.template operator()<inter_block_attention_tile_fwd_kernel<T, 224, kTokens>>();
  }
}
template <typename F>
auto with_tile_kernel(DType dtype, const InterBlockConfig& config, F&& f) {
  const auto with = [&]<typename T>(T) {
    return config.tokens == 1 ? with_tile_columns<T, 1>(config, f)
                              : with_tile_columns<T, 2>(config, f);
  };
  return dtype == DType::kBFloat16 ? with(__nv_bfloat16{}) : with(__half{});
}

// launch<kernel>(args, LaunchShape); otherwise() where the tile does not serve, or the device runs
// no clusters of which it would take one.
template <typename Launch, typename Otherwise>
auto launch_inter_block_attention_tile(const InterBlockForward& p, const DeviceLimits& limits,
                                       Launch&& launch, Otherwise&& otherwise) {
  if (!tile_serves(p)) return otherwise();
  const InterBlockWishes wishes = inter_block_wishes();
  // Clusters of 16 are for devices that say that they run them.
  for (const int most : {kMostInterBlockCluster, kMostCtasInCluster, 1}) {
    const InterBlockConfig config = choose_inter_block_config(tile_read(p), limits, wishes, most);
    if (config.warps == 0) break;
    const InterBlockTileArgs args = make_tile_args(p, config);
    const int helpers = num_warps(config, args.layout.num_groups) - config.warps;
    const int64_t stages = (p.num_tokens + config.tokens - 1) / config.tokens;
    bool runs = false;
    const auto status = with_tile_kernel(p.out.dtype, config, [&]<auto kKernel>() {
      const TileTeams teams =
          tile_teams<kKernel>(config, helpers, args.layout.bytes, stages, limits, launch);
      runs = teams.count > 0;
      return runs ? launch.template operator()<kKernel>(args, teams.shape)
                  : decltype(launch.template operator()<kKernel>(args, teams.shape)) {};
    });
    if (runs) return status;
    if (wishes.config.cluster > 0) break;
  }
  return otherwise();
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
