// What a depth attention kernel gets: one struct, by value, so that a launch captured in a CUDA
// graph needs no other memory.
#pragma once

#include "common/rows.cuh"
#include "kernels/depth_attention_tile.hpp"

namespace attnres::cuda {

struct GainVector {
  const std::byte* data;  // [D] or null
  DType dtype;
};

// Room for kCapacity sources: a launch copies all of it, so short lists use a short table.
template <typename Compute, int kCapacity>
struct DepthAttentionForwardArgs {
  int64_t num_tokens;
  int row_chunks;  // D / kWidth
  int num_sources;
  Compute inverse_hidden;
  Compute eps;
  Compute out_eps;
  Compute scale;
  GainVector query;
  GainVector key_weight;
  GainVector out_weight;
  ByteRows out;
  ByteRows mix;      // Compute, or absent
  Compute* weights;  // [N, M], or null
  Compute* stats;    // [2N + 1, M], or null
  DepthAttentionTile tile;
  ConstByteRows sources[kCapacity];
};

}  // namespace attnres::cuda
