// From what an operator asks for to one instantiation of a body, its arguments and its launch
// shape. The ring of the architecture serves aligned rows; rows that 16-byte copies cannot reach,
// and float64, are read in place.
#pragma once

#include "attnres/dispatch.hpp"
#include "kernels/depth_attention_fwd.cuh"
#include "kernels/launch_shape.hpp"

namespace attnres::cuda {

// The table of sources is part of a kernel's parameters, and a launch copies all of them: 32 bytes
// a source.
constexpr int kShortTable = 16;
static_assert(sizeof(DepthAttentionForwardArgs<double, kMaxSources>) < 32764,
              "limit of kernel parameters");

inline bool rows_are_aligned(const DepthAttentionForward& p) {
  bool aligned = p.hidden % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.mix, 16) &&
                 is_aligned(p.query.data, 16) && is_aligned(p.key_weight.data, 16) &&
                 is_aligned(p.out_weight.data, 16);
  aligned = aligned && is_aligned(p.delta, 16) && is_aligned(p.new_partial, 16);
  for (int i = 0; i < p.num_sources; ++i) aligned = aligned && is_aligned(p.sources[i], 16);
  return aligned;
}

inline bool one_dtype(const DepthAttentionForward& p) {
  const DType dtype = p.sources[0].dtype;
  bool same = (p.out.data == nullptr || p.out.dtype == dtype) &&
              (p.delta.data == nullptr || (p.delta.dtype == dtype && p.new_partial.dtype == dtype));
  for (int i = 0; i < p.num_sources; ++i) same = same && p.sources[i].dtype == dtype;
  return same;
}

// Rows that the first sweep over a token loads.
inline int num_forward_steps(const DepthAttentionForward& p) {
  const bool two_summands = p.delta.data != nullptr && p.sources[p.num_sources - 1].data != nullptr;
  return p.num_sources + (two_summands ? 1 : 0);
}

inline GainVector gain_vector(const ConstVector& v) {
  return {static_cast<const std::byte*>(v.data), v.dtype};
}

template <typename Compute, int kCapacity>
auto make_forward_args(const DepthAttentionForward& p, int width, const DepthAttentionTile& tile) {
  DepthAttentionForwardArgs<Compute, kCapacity> args;
  args.num_tokens = p.num_tokens;
  args.row_chunks = static_cast<int>(p.hidden / width);
  args.num_sources = p.num_sources;
  args.num_steps = num_forward_steps(p);
  args.num_later_steps = p.num_sources - (p.delta.data != nullptr ? 1 : 0);
  args.inverse_hidden = static_cast<Compute>(1.0 / static_cast<double>(p.hidden));
  args.eps = static_cast<Compute>(p.eps);
  args.out_eps = static_cast<Compute>(p.out_eps);
  args.scale = static_cast<Compute>(p.scale);
  args.query = gain_vector(p.query);
  args.key_weight = gain_vector(p.key_weight);
  args.out_weight = gain_vector(p.out_weight);
  args.new_partial = byte_rows<std::byte>(p.new_partial, p.num_tokens);
  args.first_logit = static_cast<const Compute*>(p.first_logit);
  args.known_rstd = p.known_rstd;
  args.num_known_rstd = p.num_known_rstd;
  args.last_rstd = p.last_rstd;
  args.out = byte_rows<std::byte>(p.out, p.num_tokens);
  args.mix = byte_rows<std::byte>(p.mix, p.num_tokens);
  args.weights = static_cast<Compute*>(p.weights);
  args.stats = static_cast<Compute*>(p.stats);
  args.tile = tile;
  for (int i = 0; i < p.num_sources; ++i) {
    args.sources[i] = byte_rows<const std::byte>(p.sources[i], p.num_tokens);
  }
  if (p.delta.data != nullptr) {
    args.sources[args.num_steps - 1] = byte_rows<const std::byte>(p.delta, p.num_tokens);
  }
  return args;
}

// launch<kernel>(args, LaunchShape) for the policies chosen.
template <typename Policy, int kCapacity, typename Launch>
auto launch_forward_with(const DepthAttentionForward& p, const DeviceLimits& limits,
                         Launch&& launch) {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Loader = typename Policy::template Loader<DepthAttentionForwardArgs<Compute, kCapacity>>;
  int64_t largest = 0;
  for (int i = 0; i < p.num_sources; ++i) largest = std::max(largest, size_of(p.sources[i].dtype));
  if (p.delta.data != nullptr) largest = std::max(largest, size_of(p.delta.dtype));
  const int64_t row_chunks = p.hidden / Elements::kWidth;
  const int num_warps = depth_attention_threads(row_chunks, Policy::kChunks) / kWarpSize;
  DepthAttentionTile tile = choose_depth_attention_tile(
      {row_chunks, Elements::kWidth * static_cast<int>(largest), Policy::kChunks,
       depth_attention_registers(Policy::kChunks * Elements::kWidth * sizeof(Compute),
                                 Elements::kDispatchRegisters),
       num_forward_steps(p),
       depth_attention_scratch_bytes(p.num_sources, num_warps, sizeof(Compute)),
       Loader::kUsesSlots},
      limits);
  // Nobody comes back for a row whose mix is not wanted.
  if (p.out.data == nullptr) tile.resident = false;
  const int64_t most_ctas =
      static_cast<int64_t>(tile.ctas_per_multiprocessor) * limits.num_multiprocessors;
  const LaunchShape shape = {static_cast<int>(std::min(p.num_tokens, most_ctas)),
                             tile.num_threads + Loader::kExtraThreads, tile.shared_bytes,
                             Loader::kUsesSlots};
  return launch.template operator()<depth_attention_fwd_kernel<Policy, kCapacity>>(
      make_forward_args<Compute, kCapacity>(p, Elements::kWidth, tile), shape);
}

// 16 values a thread where that is enough for a row: more threads, fewer registers.
template <typename Elements, template <typename, int, typename> class Ring, typename Launch>
auto launch_forward_through(const DepthAttentionForward& p, const DeviceLimits& limits,
                            Launch&& launch) {
  constexpr int kFew = 16 / Elements::kWidth;
  constexpr int kMany = Elements::kWidth == 8 ? 2 * kFew : kFew;
  return dispatch_bool(p.hidden <= 16 * kMaxComputeThreads, [&](auto few) {
    using Policy = DepthAttentionPolicy<Elements, Ring, few.value ? kFew : kMany>;
    return dispatch_bool(p.num_sources <= kShortTable, [&](auto is_short) {
      return launch_forward_with<Policy, is_short.value ? kShortTable : kMaxSources>(p, limits,
                                                                                     launch);
    });
  });
}

template <template <typename, int, typename> class Ring, typename Launch>
auto launch_depth_attention_forward(const DepthAttentionForward& p, const DeviceLimits& limits,
                                    Launch&& launch) {
  if (p.compute == DType::kFloat64) {
    using Policy = DepthAttentionPolicy<Mixed<double, 1>, Direct, 4>;
    return launch_forward_with<Policy, kMaxSources>(p, limits, launch);
  }
  if (!rows_are_aligned(p)) {
    using Policy = DepthAttentionPolicy<Mixed<float, 1>, Direct, 8>;
    return launch_forward_with<Policy, kMaxSources>(p, limits, launch);
  }
  if (!one_dtype(p)) {
    using Policy = DepthAttentionPolicy<Mixed<float, 8>, Ring, 2>;
    return launch_forward_with<Policy, kMaxSources>(p, limits, launch);
  }
  switch (p.out.dtype) {
    case DType::kBFloat16:
      return launch_forward_through<Uniform<__nv_bfloat16>, Ring>(p, limits, launch);
    case DType::kFloat16:
      return launch_forward_through<Uniform<__half>, Ring>(p, limits, launch);
    default:
      return launch_forward_through<Uniform<float>, Ring>(p, limits, launch);
  }
}

}  // namespace attnres::cuda
