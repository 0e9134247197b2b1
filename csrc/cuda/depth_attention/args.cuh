// What a depth attention kernel gets: one struct, by value, so that a launch captured in a CUDA
// graph needs no other memory.
#pragma once

#include "common/rows.cuh"
#include "common/teams.cuh"
#include "depth_attention/rows_tile.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

struct GainVector {
  const std::byte* data;  // [D] or null
  DType dtype;
};
inline GainVector gain_vector(const ConstVector& v) {
  return {static_cast<const std::byte*>(v.data), dtype_of(v)};
}

// What the arguments of all of depth attention's kernels have in common.
template <typename Args, typename Params>
void set_read_args(Args& args, const Params& p) {
  using Compute = decltype(args.eps);
  args.num_tokens = static_cast<decltype(args.num_tokens)>(p.num_tokens);
  args.inverse_hidden = static_cast<Compute>(1.0 / static_cast<double>(p.hidden));
  args.eps = static_cast<Compute>(p.eps);
  args.out_eps = static_cast<Compute>(p.out_eps);
  args.scale = static_cast<Compute>(p.scale);
  args.query = gain_vector(p.query);
  args.key_weight = gain_vector(p.key_weight);
  args.out_weight = gain_vector(p.out_weight);
}

// Room for kCapacity sources: a launch copies all of it, so short lists use a short table.
template <typename Compute, int kCapacity, typename TeamPolicy>
struct DepthAttentionForwardArgs {
  using Team = TeamPolicy;

  int64_t num_tokens;
  int row_chunks;  // D / kWidth
  int num_sources;
  // Rows that a token's first sweep loads, and those that each later sweep loads: block summation
  // loads a partial and a delta first, and reads their sum where it put it after that.
  int num_steps;
  int num_later_steps;
  Compute inverse_hidden;
  Compute eps;
  Compute out_eps;
  Compute scale;
  GainVector query;  // or absent: the last source is only summed
  GainVector key_weight;
  GainVector out_weight;
  ByteRows new_partial;        // the sum, or absent
  const Compute* first_logit;  // [M], or null
  const Compute* known_rstd;   // [num_known_rstd, M], or null
  int num_known_rstd;
  ByteRows out;        // or absent
  ByteRows mix;        // Compute, or absent
  Compute* weights;    // [N, M], or null
  Compute* stats;      // [2N + 1, M], or null
  Compute* last_rstd;  // [M], or null
  DepthAttentionTile tile;
  // With block summation the last source is the first summand, and one more row its second one if
  // there are two.
  ConstByteRows sources[kCapacity + 1];
};

template <typename Compute, int kCapacity, typename TeamPolicy>
struct DepthAttentionBackwardArgs {
  using Team = TeamPolicy;

  int64_t num_tokens;
  int row_chunks;
  int num_sources;
  int num_steps;  // N, in every sweep
  int num_later_steps;
  Compute inverse_hidden;
  Compute eps;
  Compute out_eps;
  Compute scale;
  GainVector query;
  GainVector key_weight;
  GainVector out_weight;
  ConstByteRows grad_out;
  ConstByteRows mix;            // Compute, or absent
  const Compute* grad_weights;  // [N, M], or null
  const Compute* stats;         // [2N + 1, M], or null
  const Compute* first_logit;   // [M], or null
  Compute* grad_first_logit;    // [M], or null
  Compute* parts;  // [num_teams, 2, D]: sums over each team's rows of the gradients of the score
                   // vector (scale * query * key_weight) and of out_weight, or null
  bool sums_are_shared;  // made in shared memory first
  DepthAttentionTile tile;
  ConstByteRows sources[kCapacity];
  ByteRows grads[kCapacity];       // or absent
  ConstByteRows bases[kCapacity];  // what a gradient is added to, or absent
};

struct GainGradient {
  std::byte* data;  // [D] or null
  DType dtype;
};

template <typename Compute>
struct WeightGradientArgs {
  const Compute* parts;  // [num_parts, 2, D]
  int num_parts;
  int hidden;
  Compute scale;
  GainVector query;
  GainVector key_weight;
  GainGradient grad_query;
  GainGradient grad_key_weight;
  GainGradient grad_out_weight;
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
