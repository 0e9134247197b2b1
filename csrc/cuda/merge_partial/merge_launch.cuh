// From what depth attention is asked for to the kernels that merge: which calls they take, their
// arguments and their launch shapes. Warps are 0 in the configuration of a call that they leave to
// the general body.
#pragma once

#include "depth_attention/config.hpp"
#include "launch_shape.hpp"
#include "merge_partial/merge_backward.cuh"
#include "merge_partial/merge_forward.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(MergeForwardArgs) < 4096 && sizeof(MergeBackwardArgs) < 4096,
              "a launch copies them, and old drivers take no more");

// The next row's number is an int, too.
constexpr int64_t kMostMergeTokens = int64_t{1} << 30;

// A state and one source, in rows of one 16-bit dtype that loads of 16 bytes can reach. `rows` are
// all that are read or written but the sources.
template <typename Params, typename... Rows>
bool is_merge(const Params& p, DType dtype, const Rows&... rows) {
  const auto fits = [&](const auto& of) {
    return of.data == nullptr || (of.dtype == dtype && is_aligned(of, 16));
  };
  return p.first_logit != nullptr && p.num_sources == 2 && p.query.data != nullptr &&
         (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && !is_double(p.compute) &&
         p.hidden % 8 == 0 && p.num_tokens <= kMostMergeTokens && fits(p.sources[0]) &&
         fits(p.sources[1]) && (fits(rows) && ...);
}

inline MergeConfig merge_config_of(const DepthAttentionForward& p, const DeviceLimits& limits) {
  const bool serves = p.out.data != nullptr && p.mix.data == nullptr && p.weights == nullptr &&
                      p.stats == nullptr && p.known_rstd == nullptr &&
                      is_merge(p, p.out.dtype, p.out, p.delta, p.new_partial);
  if (!serves || depth_attention_wishes().rows) return {};
  return merge_config(p.num_tokens, p.hidden, limits);
}

inline MergeConfig merge_config_of(const DepthAttentionBackward& p, const DeviceLimits& limits) {
  const bool serves = p.grad_weights == nullptr && p.grad_base[0].data == nullptr &&
                      is_aligned(p.parts, 16) &&
                      is_merge(p, p.grad_out.dtype, p.grad_out, p.grad_sources[0],
                               p.grad_sources[1], p.grad_base[1]);
  if (!serves || depth_attention_wishes().backward_rows) return {};
  return merge_backward_config(p.num_tokens, p.hidden, limits);
}

// What the arguments of forward and backward have in common.
template <typename Args, typename Params>
Args make_merge_args(const Params& p, const MergeConfig& config) {
  Args args = {};
  args.config = config;
  set_read_args(args, p);
  args.hidden = static_cast<int>(p.hidden);
  args.lse = static_cast<const float*>(p.first_logit);
  args.state = byte_rows<const std::byte>(p.sources[0], p.num_tokens);
  return args;
}

inline LaunchShape merge_shape(const MergeConfig& config) {
  return {config.ctas, config.teams * config.warps * kWarpSize, config.shared_bytes, false};
}

// start<T, chunks>() for the dtype and the configuration.
template <const auto& kChoices, typename Start>
auto with_merge_types(DType dtype, const MergeConfig& config, Start&& start) {
  const auto with_chunks = [&]<typename T>() {
    return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
      decltype(start.template operator()<T, 1>()) status {};
      ((config.chunks == kChoices[kIndex].chunks &&
        (status = start.template operator()<T, kChoices[kIndex].chunks>(), true)) ||
       ...);
      return status;
    }(std::make_index_sequence<std::size(kChoices)>{});
  };
  return dtype == DType::kBFloat16 ? with_chunks.template operator()<__nv_bfloat16>()
                                   : with_chunks.template operator()<__half>();
}

template <typename Launch>
auto launch_merge(const DepthAttentionForward& p, const MergeConfig& config, Launch&& launch) {
  auto args = make_merge_args<MergeForwardArgs>(p, config);
  // A partial sum that is absent counts as zero.
  int summands = 0;
  for (const ConstRows& rows : {p.sources[1], p.delta}) {
    if (rows.data == nullptr) continue;
    args.summands[summands++] = byte_rows<const std::byte>(rows, p.num_tokens);
  }
  args.new_partial = byte_rows<std::byte>(p.new_partial, p.num_tokens);
  args.out = byte_rows<std::byte>(p.out, p.num_tokens);
  args.last_rstd = static_cast<float*>(p.last_rstd);
  return with_merge_types<kMergeChoices>(p.out.dtype, config, [&]<typename T, int kChunks>() {
    return launch.template operator()<merge_partial_fwd_kernel<T, kChunks>>(args,
                                                                            merge_shape(config));
  });
}

// Each CTA makes one of the parts that add_up(number of parts) adds up.
template <typename Launch, typename AddUp>
auto launch_merge(const DepthAttentionBackward& p, const MergeConfig& config, Launch&& launch,
                  AddUp&& add_up) {
  auto args = make_merge_args<MergeBackwardArgs>(p, config);
  args.value = byte_rows<const std::byte>(p.sources[1], p.num_tokens);
  args.grad_out = byte_rows<const std::byte>(p.grad_out, p.num_tokens);
  args.grad_base = byte_rows<const std::byte>(p.grad_base[1], p.num_tokens);
  args.grad_state = byte_rows<std::byte>(p.grad_sources[0], p.num_tokens);
  args.grad_value = byte_rows<std::byte>(p.grad_sources[1], p.num_tokens);
  args.grad_lse = static_cast<float*>(p.grad_first_logit);
  args.parts = p.num_parts > 0 ? static_cast<float*>(p.parts) : nullptr;
  LaunchShape shape = merge_shape(config);
  if (p.num_parts > 0) {
    shape.num_ctas = static_cast<int>(std::min<int64_t>(shape.num_ctas, p.num_parts));
  }
  const auto status = with_merge_types<kMergeBackwardChoices>(
      p.grad_out.dtype, config, [&]<typename T, int kChunks>() {
        return launch.template operator()<merge_partial_bwd_kernel<T, kChunks>>(args, shape);
      });
  if (p.num_parts == 0 || status != decltype(status){}) return status;
  return add_up(shape.num_ctas);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
