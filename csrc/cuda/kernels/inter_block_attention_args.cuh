// What the kernels of phase 1 get, by value, and what their threads share.
#pragma once

#include "common/elements.cuh"
#include "common/rows.cuh"
#include "kernels/inter_block_attention_tile.hpp"

namespace attnres::cuda {

template <typename Compute, int kCapacity>
struct InterBlockForwardArgs {
  int64_t num_tokens;
  int64_t num_tiles;
  int hidden;
  int num_sources;
  int num_queries;
  Compute inverse_hidden;
  Compute eps;
  Compute scale;
  ConstByteRows queries;      // [S, D]
  ConstByteRows key_weights;  // [S, D], or absent
  const float* known_rstd;    // [N, M], or null
  ByteRows out;               // [S * M, D]
  Compute* lse;               // [S, M]
  Compute* stats;             // [N + S * N, M], or null
  InterBlockTile tile;
  ConstByteRows sources[kCapacity];

  // A tile's rows are the sources of its first token, of its second one, and so on.
  __device__ __forceinline__ int64_t first_token(int64_t index) const {
    return index * tile.tokens;
  }
  __device__ __forceinline__ int tokens_in_tile(int64_t index) const {
    const int64_t left = num_tokens - first_token(index);
    return left < tile.tokens ? static_cast<int>(left) : tile.tokens;
  }
  __device__ __forceinline__ int rows_of_token() const { return num_sources; }
  __device__ __forceinline__ int rows_in_tile(int64_t index) const {
    return tokens_in_tile(index) * rows_of_token();
  }
  __device__ __forceinline__ const std::byte* tile_row(int64_t index, int r) const {
    const int token = r / num_sources;
    return row_at(sources[r - token * num_sources], first_token(index) + token);
  }
  __device__ __forceinline__ int row_bytes(int r) const {
    return hidden * bytes_of(sources[r % num_sources].dtype);
  }
};

template <typename Compute, int kCapacity>
struct InterBlockBackwardArgs {
  int64_t num_tokens;
  int64_t num_tiles;
  int hidden;
  int num_sources;
  int num_queries;
  Compute inverse_hidden;
  Compute eps;
  Compute scale;
  ConstByteRows queries;
  ConstByteRows key_weights;
  ConstByteRows grad_out;   // [S * M, D], or absent
  const Compute* grad_lse;  // [S, M], or null
  const Compute* stats;     // [N + S * N, M], or null
  Compute* parts;           // [num_ctas, S, D]: sums over each CTA's tokens of the gradients of the
                            // score vectors (scale * query * key_weight), or null
  bool sums_are_shared;     // made in shared memory first
  bool wants_sources;       // any gradient of a source
  InterBlockTile tile;
  ConstByteRows sources[kCapacity];
  ByteRows grads[kCapacity];       // or absent
  ConstByteRows bases[kCapacity];  // what a gradient is added to, or absent

  // A token's rows are its sources, then the gradients of its outputs.
  __device__ __forceinline__ int64_t first_token(int64_t index) const {
    return index * tile.tokens;
  }
  __device__ __forceinline__ int tokens_in_tile(int64_t index) const {
    const int64_t left = num_tokens - first_token(index);
    return left < tile.tokens ? static_cast<int>(left) : tile.tokens;
  }
  __device__ __forceinline__ int rows_of_token() const {
    return num_sources + (grad_out.data != nullptr ? num_queries : 0);
  }
  __device__ __forceinline__ int rows_in_tile(int64_t index) const {
    return tokens_in_tile(index) * rows_of_token();
  }
  __device__ __forceinline__ const std::byte* tile_row(int64_t index, int r) const {
    const int token = r / rows_of_token(), row = r % rows_of_token();
    const int64_t m = first_token(index) + token;
    return row < num_sources ? row_at(sources[row], m)
                             : row_at(grad_out, (row - num_sources) * num_tokens + m);
  }
  __device__ __forceinline__ int row_bytes(int r) const {
    const int row = r % rows_of_token();
    return hidden * bytes_of(row < num_sources ? sources[row].dtype : grad_out.dtype);
  }
};

struct GradientRows {
  std::byte* data;  // [S, D] or null
  DType dtype;
};

template <typename Compute>
struct InterBlockWeightGradientArgs {
  const Compute* parts;  // [num_parts, S, D]
  int num_parts;
  int num_queries;
  int hidden;
  Compute scale;
  ConstByteRows queries;
  ConstByteRows key_weights;
  GradientRows grad_queries;
  GradientRows grad_key_weights;
};

// Shared memory beside slots and barriers. The forward has one matrix of logits, the backward
// three.
template <typename Compute, int kMatrixCount>
struct InterBlockScratch {
  static constexpr int kMatrices = kMatrixCount;

  std::byte* vectors;   // score vectors of a pass: [parts, S] rows of vector_pitch bytes
  Compute* partials;    // [warps, 16, partial_pitch]
  Compute* sums;        // [S, D] of the backward, if they are shared
  Compute* logits;      // [kMatrices, tokens, logit_sources, logit_pitch]: products, then weights
  Compute* squares;     // [tokens * N]: sum of v^2
  Compute* factors;     // [tokens * N] of the backward
  Compute* magnitudes;  // [S]: what score vectors were divided by

  template <typename Args>
  __device__ __forceinline__ InterBlockScratch(const Args& args, std::byte* memory)
      : vectors(memory),
        partials(reinterpret_cast<Compute*>(memory + args.tile.vector_bytes)),
        sums(partials + args.tile.num_threads / 32 * kProductRows * args.tile.partial_pitch),
        logits(sums + args.tile.sum_values),
        squares(logits + kMatrices * matrix_size(args)),
        factors(squares + args.tile.tokens * args.num_sources),
        magnitudes(factors + args.tile.tokens * args.num_sources) {}

  template <typename Args>
  __device__ __forceinline__ static int matrix_size(const Args& args) {
    return args.tile.tokens * args.tile.logit_sources * args.tile.logit_pitch;
  }
  // [S] of one source of a token: logits, then weights.
  template <typename Args>
  __device__ __forceinline__ Compute* logit(const Args& args, int token, int source) const {
    return logits + (token * args.tile.logit_sources + source) * args.tile.logit_pitch;
  }
  // <grad_out_s, v_i>, then factors of u_s in dv_i and of v_i in du_s.
  template <typename Args>
  __device__ __forceinline__ Compute* dot(const Args& args, int token, int source) const {
    return logit(args, token, source) + matrix_size(args);
  }
  // What adds up to the factor of v_i in dv_i.
  template <typename Args>
  __device__ __forceinline__ Compute* summand(const Args& args, int token, int source) const {
    return logit(args, token, source) + 2 * matrix_size(args);
  }
};

// scale * query * key_weight of 8 or 1 columns.
template <int kWidth, typename Compute, typename Args>
__device__ __forceinline__ void load_score_vector(const Args& args, int query, int chunk,
                                                  Compute (&u)[kWidth]) {
  using Gains = Mixed<Compute, kWidth>;
  Gains::load(GlobalView{row_at(args.queries, query)}, args.queries.dtype, chunk, u);
  if (args.key_weights.data != nullptr) {
    Compute gain[kWidth];
    Gains::load(GlobalView{row_at(args.key_weights, query)}, args.key_weights.dtype, chunk, gain);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) u[j] *= gain[j];
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) u[j] *= args.scale;
}

}  // namespace attnres::cuda
