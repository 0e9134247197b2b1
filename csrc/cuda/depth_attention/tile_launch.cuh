// From what an operator asks for to one instantiation of the tile, its arguments and its launch
// shape.
#pragma once

#include "common/tile_teams.cuh"
#include "depth_attention/tile_forward.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(DepthAttentionTileArgs) < 4096,
              "a launch copies them, and old drivers take no more");

// The next row's number is an int, too.
constexpr int64_t kMaxTileTokens = int64_t{1} << 30;

inline DepthAttentionRead tile_read(const DepthAttentionForward& p) {
  const bool stores_sum = p.delta.data != nullptr;
  return {.hidden = p.hidden,
          .num_sources = p.num_sources,
          .adds = stores_sum && p.sources[p.num_sources - 1].data != nullptr,
          .stores_sum = stores_sum,
          .has_norm = p.out_weight.data != nullptr};
}

// 16-bit rows that bulk copies can reach; all that is computed of them but merging. Vectors may lie
// where they like: each is read once. Results are new tensors, whose rows follow one another.
inline bool tile_serves(const DepthAttentionForward& p) {
  const DType dtype = p.out.dtype;
  const auto is_same = [&](const auto& rows) {
    return rows.data == nullptr || (rows.dtype == dtype && is_aligned(rows, 16));
  };
  const auto has_one_level = [&](const Rows& rows) {
    return byte_rows<std::byte>(rows, p.num_tokens).inner >= p.num_tokens;
  };
  bool serves = (dtype == DType::kBFloat16 || dtype == DType::kFloat16) &&
                p.compute == DType::kFloat32 && p.num_tokens <= kMaxTileTokens &&
                p.hidden % 8 == 0 && p.query.data != nullptr && p.out.data != nullptr &&
                p.first_logit == nullptr && is_same(p.out) && is_same(p.delta) &&
                is_same(p.new_partial) && has_one_level(p.out) &&
                (p.mix.data == nullptr || has_one_level(p.mix));
  for (int i = 0; serves && i < p.num_sources; ++i) serves = is_same(p.sources[i]);
  return serves;
}

// Where the tile does not serve, warps are 0.
inline DepthAttentionConfig tile_config(const DepthAttentionForward& p,
                                        const DeviceLimits& limits) {
  if (!tile_serves(p)) return {};
  return choose_depth_attention_config(tile_read(p), limits, depth_attention_wishes());
}

inline DepthAttentionTileArgs make_tile_args(const DepthAttentionForward& p,
                                             const DepthAttentionConfig& config) {
  const DepthAttentionRead read = tile_read(p);
  DepthAttentionTileArgs args = {};
  args.config = config;
  args.layout = lay_out(config, read);
  set_read_args(args, p);
  args.hidden = static_cast<int>(p.hidden);
  args.num_sources = p.num_sources;
  args.num_rows = p.num_sources + (read.adds ? 1 : 0);
  args.known_rstd = static_cast<const float*>(p.known_rstd);
  args.num_known_rstd = p.known_rstd == nullptr ? 0 : p.num_known_rstd;
  args.new_partial = byte_rows<std::byte>(p.new_partial, p.num_tokens);
  args.out = byte_rows<std::byte>(p.out, p.num_tokens);
  args.mix = byte_rows<std::byte>(p.mix, p.num_tokens);
  args.weights = static_cast<float*>(p.weights);
  args.stats = static_cast<float*>(p.stats);
  args.last_rstd = static_cast<float*>(p.last_rstd);
  for (int i = 0; i < p.num_sources; ++i) {
    args.rows[i] = byte_rows<const std::byte>(p.sources[i], p.num_tokens);
  }
  if (read.stores_sum) {
    args.rows[args.num_rows - 1] = byte_rows<const std::byte>(p.delta, p.num_tokens);
  }
  return args;
}

// launch<kernel>(args, LaunchShape) for the configuration chosen; otherwise() where the device runs
// no clusters of its size.
template <auto kKernel, typename Launch, typename Otherwise>
auto launch_tile_kernel(const DepthAttentionForward& p, const DepthAttentionConfig& config,
                        const DeviceLimits& limits, Launch&& launch, Otherwise&& otherwise) {
  DepthAttentionTileArgs args = make_tile_args(p, config);
  const TileTeams teams = tile_teams<kKernel>(config, helper_warps(tile_read(p)), args.layout.bytes,
                                              p.num_tokens, limits, launch);
  if (teams.count == 0) return otherwise();
  args.out_step = teams.count * args.out.inner_bytes;
  return launch.template operator()<kKernel>(args, teams.shape);
}

template <typename T, typename Launch, typename Otherwise>
auto launch_tile_columns(const DepthAttentionForward& p, const DepthAttentionConfig& config,
                         const DeviceLimits& limits, Launch&& launch, Otherwise&& otherwise) {
  switch (config.columns) {
    case 64:
      return launch_tile_kernel<depth_attention_tile_fwd_kernel<T, 64>>(p, config, limits, launch,
                                                                        otherwise);
    case 128:
      return launch_tile_kernel<depth_attention_tile_fwd_kernel<T, 128>>(p, config, limits, launch,
                                                                         otherwise);
    case 192:
      return launch_tile_kernel<depth_attention_tile_fwd_kernel<T, 192>>(p, config, limits, launch,
                                                                         otherwise);
    default:
      return launch_tile_kernel<depth_attention_tile_fwd_kernel<T, 256>>(p, config, limits, launch,
                                                                         otherwise);
  }
}

template <typename Launch, typename Otherwise>
auto launch_depth_attention_tile(const DepthAttentionForward& p, const DepthAttentionConfig& config,
                                 const DeviceLimits& limits, Launch&& launch,
                                 Otherwise&& otherwise) {
  return p.out.dtype == DType::kBFloat16
             ? launch_tile_columns<__nv_bfloat16>(p, config, limits, launch, otherwise)
             : launch_tile_columns<__half>(p, config, limits, launch, otherwise);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
