// From what the backward of depth attention is asked for to its tile: which calls that takes, its
// configuration, its arguments and its launch shape.
#pragma once

#include "common/tile_teams.cuh"
#include "depth_attention/tile_backward.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(DepthAttentionBackwardTileArgs) < 32764, "limit of kernel parameters");

inline DepthAttentionGradients tile_gradients(const DepthAttentionBackward& p) {
  DepthAttentionGradients gradients = {.hidden = p.hidden,
                                       .num_sources = p.num_sources,
                                       .num_bases = 0,
                                       .has_norm = p.out_weight.data != nullptr,
                                       .is_float16 = p.grad_out.dtype == DType::kFloat16};
  for (int i = 0; i < p.num_sources; ++i) gradients.num_bases += p.grad_base[i].data != nullptr;
  return gradients;
}

// 16-bit rows that bulk copies can reach; all gradients but those of merging. Vectors may lie where
// they like: each is read once.
inline bool tile_serves(const DepthAttentionBackward& p) {
  const DType dtype = p.grad_out.dtype;
  const auto is_same = [&](const auto& rows) {
    return rows.data == nullptr || (rows.dtype == dtype && is_aligned(rows, 16));
  };
  bool serves = (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && !is_double(p.compute) &&
                p.hidden % 8 == 0 && p.first_logit == nullptr && is_same(p.grad_out);
  for (int i = 0; serves && i < p.num_sources; ++i) {
    serves = is_same(p.sources[i]) && is_same(p.grad_sources[i]) && is_same(p.grad_base[i]);
    // What a gradient is added to is loaded before anything is stored: not for a source that is
    // there twice and leaves its second gradient on top of its first.
    for (int j = 0; serves && j < i && p.grad_base[i].data != nullptr; ++j) {
      serves = p.grad_base[i].data != p.grad_sources[j].data;
    }
  }
  return serves;
}

// Where the tile does not serve, warps are 0.
inline DepthAttentionConfig backward_tile_config(const DepthAttentionBackward& p,
                                                 const DeviceLimits& limits) {
  if (!tile_serves(p)) return {};
  return choose_depth_attention_backward_config(tile_gradients(p), limits,
                                                depth_attention_wishes());
}

inline DepthAttentionBackwardTileArgs make_backward_tile_args(const DepthAttentionBackward& p,
                                                              const DepthAttentionConfig& config) {
  DepthAttentionBackwardTileArgs args = {};
  args.config = config;
  args.layout = lay_out(config, tile_gradients(p));
  set_read_args(args, p);
  args.hidden = static_cast<int>(p.hidden);
  args.num_sources = p.num_sources;
  args.grad_weights = static_cast<const float*>(p.grad_weights);
  args.parts = p.num_parts > 0 ? static_cast<float*>(p.parts) : nullptr;
  int row = 0;
  for (int i = 0; i < p.num_sources; ++i) {
    args.rows[row++] = byte_rows<const std::byte>(p.sources[i], p.num_tokens);
    args.grads[i] = byte_rows<std::byte>(p.grad_sources[i], p.num_tokens);
  }
  args.rows[row++] = byte_rows<const std::byte>(p.grad_out, p.num_tokens);
  for (int i = 0; i < p.num_sources; ++i) {
    if (p.grad_base[i].data == nullptr) continue;
    args.base_rows[i] = static_cast<uint8_t>(row);
    args.rows[row++] = byte_rows<const std::byte>(p.grad_base[i], p.num_tokens);
  }
  args.num_bases = row - p.num_sources - 1;
  return args;
}

// launch<kernel>(args, LaunchShape) for the configuration chosen; each CTA or cluster makes one of
// the parts that add_up(number of parts) adds up. otherwise() where the device runs no clusters of
// its size.
template <auto kKernel, typename Launch, typename AddUp, typename Otherwise>
auto launch_backward_tile_kernel(const DepthAttentionBackward& p,
                                 const DepthAttentionConfig& config, const DeviceLimits& limits,
                                 Launch&& launch, AddUp&& add_up, Otherwise&& otherwise) {
  const DepthAttentionBackwardTileArgs args = make_backward_tile_args(p, config);
  const int64_t most = p.num_parts > 0 ? std::min(p.num_tokens, p.num_parts) : p.num_tokens;
  const TileTeams teams =
      tile_teams<kKernel>(config, kBackwardHelperWarps, args.layout.bytes, most, limits, launch);
  if (teams.count == 0) return otherwise();
  const auto status = launch.template operator()<kKernel>(args, teams.shape);
  if (p.num_parts == 0 || status != decltype(status){}) return status;
  return add_up(teams.count);
}

template <typename Launch, typename AddUp, typename Otherwise>
auto launch_depth_attention_backward_tile(const DepthAttentionBackward& p,
                                          const DepthAttentionConfig& config,
                                          const DeviceLimits& limits, Launch&& launch,
                                          AddUp&& add_up, Otherwise&& otherwise) {
  const auto start = [&]<auto kKernel>() {
    return launch_backward_tile_kernel<kKernel>(p, config, limits, launch, add_up, otherwise);
  };
  if (p.out_weight.data != nullptr) {
    return start.template operator()<depth_attention_tile_bwd_kernel<__nv_bfloat16, true>>();
  }
  return p.grad_out.dtype == DType::kBFloat16
             ? start.template operator()<depth_attention_tile_bwd_kernel<__nv_bfloat16, false>>()
             : start.template operator()<depth_attention_tile_bwd_kernel<__half, false>>();
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
