// The backward's counterpart of forward_launch.cuh: two kernels, the second for the
// gradients of queries and gains. Tensor cores serve bfloat16 alone: gradients can be smaller than
// float16 tells from zero.
#pragma once

#include "attnres/dispatch.hpp"
#include "inter_block_attention/forward_launch.cuh"
#include "inter_block_attention/rows_backward.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

static_assert(sizeof(InterBlockBackwardArgs<double, kMaxSources, OneCta>) < 32764,
              "limit of kernel parameters");

inline bool rows_are_aligned(const InterBlockBackward& p) {
  bool aligned = p.hidden % 8 == 0 && is_aligned(p.grad_out, 16) && is_aligned(p.queries, 16) &&
                 is_aligned(p.key_weights, 16) && is_aligned(p.parts, 16);
  for (int i = 0; i < p.num_sources; ++i) {
    aligned = aligned && is_aligned(p.sources[i], 16) && is_aligned(p.grad_sources[i], 16) &&
              is_aligned(p.grad_base[i], 16);
  }
  return aligned;
}

// Of all rows that are there, or kNone.
inline DType shared_dtype(const InterBlockBackward& p) {
  SharedDType shared;
  shared.add(p.sources, p.num_sources);
  shared.add(p.grad_out);
  shared.add(p.grad_sources, p.num_sources);
  shared.add(p.grad_base, p.num_sources);
  return shared.get();
}

// Whether a gradient is added to what another source's has left: those two have an order.
inline bool share_gradients(const InterBlockBackward& p) {
  for (int i = 0; i < p.num_sources; ++i) {
    if (p.grad_base[i].data == nullptr) continue;
    for (int j = 0; j < p.num_sources; ++j) {
      if (j != i && p.grad_sources[j].data == p.grad_base[i].data) return true;
    }
  }
  return false;
}

template <typename Compute, typename Launch>
auto launch_inter_block_weight_gradients(const InterBlockBackward& p, int num_parts,
                                         Launch&& launch) {
  const auto gradient = [](const Rows& rows) {
    return GradientRows{static_cast<std::byte*>(rows.data), dtype_of(rows)};
  };
  const InterBlockWeightGradientArgs<Compute> args = {
      static_cast<const Compute*>(p.parts),
      num_parts,
      static_cast<int>(p.num_queries),
      static_cast<int>(p.hidden),
      static_cast<Compute>(p.scale),
      byte_rows<const std::byte>(p.queries, p.num_queries),
      byte_rows<const std::byte>(p.key_weights, p.num_queries),
      gradient(p.grad_queries),
      gradient(p.grad_key_weights)};
  const int64_t column_blocks = (p.hidden + kWarpSize - 1) / kWarpSize;
  constexpr int kThreads = kWeightGradientWarps * kWarpSize;
  const LaunchShape shape = {static_cast<int>(p.num_queries * column_blocks), kThreads,
                             kThreads * static_cast<int>(sizeof(Compute)), false};
  return launch.template operator()<inter_block_attention_weight_gradient_kernel<Compute>>(args,
                                                                                           shape);
}

// Calls otherwise() where rows are not read in place and not even one token's fit.
template <typename Policy, int kCapacity, typename Launch, typename Otherwise>
auto launch_inter_block_backward_with(const InterBlockBackward& p, const DeviceLimits& limits,
                                      Launch&& launch, Otherwise&& otherwise) {
  using Products = typename Policy::Products;
  using Compute = typename Products::Compute;
  using Args = InterBlockBackwardArgs<Compute, kCapacity, typename Policy::Team>;
  constexpr auto kKernel = inter_block_attention_bwd_kernel<Policy, kCapacity>;
  constexpr bool kUsesSlots = Policy::template Loader<Args>::kUsesSlots;
  // Each team makes a part of the gradients of queries and gains.
  int64_t most_teams = int64_t{kPartsPerMultiprocessor} * limits.num_multiprocessors;
  if (p.num_parts > 0) most_teams = std::min(most_teams, p.num_parts);
  const bool has_out = p.grad_out.data != nullptr;
  const InterBlockShape shape = inter_block_shape<Products, kUsesSlots>(
      p, value_bytes(p.grad_out), p.num_sources + (has_out ? static_cast<int>(p.num_queries) : 0),
      p.num_parts > 0);
  const InterBlockGrid grid =
      inter_block_grid<kKernel, Policy, Args>(shape, p.num_tokens, most_teams, limits, launch);
  if constexpr (kUsesSlots) {
    if (!grid.fits) return otherwise();
  }
  Args args;
  set_inter_block_args(args, p, grid);
  args.grad_out = byte_rows<const std::byte>(p.grad_out, p.num_queries * p.num_tokens);
  args.grad_lse = static_cast<const Compute*>(p.grad_lse);
  args.stats = static_cast<const Compute*>(p.stats);
  args.parts = p.num_parts > 0 ? static_cast<Compute*>(p.parts) : nullptr;
  args.wants_sources = false;
  for (int i = 0; i < p.num_sources; ++i) {
    args.grads[i] = byte_rows<std::byte>(p.grad_sources[i], p.num_tokens);
    args.bases[i] = byte_rows<const std::byte>(p.grad_base[i], p.num_tokens);
    args.wants_sources = args.wants_sources || p.grad_sources[i].data != nullptr;
  }
  const auto status = launch.template operator()<kKernel>(args, grid.shape);
  if (p.num_parts == 0 || status != decltype(status){}) return status;
  return launch_inter_block_weight_gradients<Compute>(p, static_cast<int>(grid.num_teams), launch);
}

template <template <typename> class Ring, typename Team, typename Launch>
auto launch_inter_block_attention_backward(const InterBlockBackward& p, const DeviceLimits& limits,
                                           Launch&& launch) {
  constexpr int kMatrices = 3;
  const auto in_place = [&]<typename Compute>(Compute) {
    using Policy = InterBlockPolicy<ScalarProducts<Mixed<Compute, 1>, kMatrices>, DirectTiles>;
    return launch_inter_block_backward_with<Policy, kMaxSources>(p, limits, launch, nullptr);
  };
  const auto in_place_float = [&] { return in_place(float{}); };
  const auto by_ordinary_arithmetic = [&] {
    using Policy = InterBlockPolicy<ScalarProducts<Mixed<float, 8>, kMatrices>, Ring, Team>;
    return launch_inter_block_backward_with<Policy, kMaxSources>(p, limits, launch, in_place_float);
  };
  if (is_double(p.compute)) return in_place(double{});
  if (!rows_are_aligned(p)) return in_place_float();
  if (shared_dtype(p) != DType::kBFloat16 || share_gradients(p)) return by_ordinary_arithmetic();
  using Policy = InterBlockPolicy<TensorProducts<__nv_bfloat16, kMatrices>, Ring, Team>;
  return dispatch_bool(p.num_sources <= kShortTable, [&](auto is_short) {
    return launch_inter_block_backward_with<Policy, is_short.value ? kShortTable : kMaxSources>(
        p, limits, launch, by_ordinary_arithmetic);
  });
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
