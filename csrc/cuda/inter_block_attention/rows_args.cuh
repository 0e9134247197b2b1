// What the kernels of phase 1 get, by value, and what their threads share.
#pragma once

#include "common/cta_memory.cuh"
#include "common/elements.cuh"
#include "common/rows.cuh"
#include "common/teams.cuh"
#include "inter_block_attention/rows_tile.hpp"
#include "inter_block_attention/score_vector.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// The columns of a row that are this CTA's; the first one is a multiple of kPanelColumns.
struct ColumnSlice {
  int first;
  int count;
};

// A cluster shares out a row's panels evenly, in order.
template <typename Args>
__device__ __forceinline__ ColumnSlice slice_of_cta(const Args& args) {
  if constexpr (!Args::Team::kIsCluster) {
    return {0, args.hidden};
  } else {
    const int rank = Args::Team::rank();
    const int fewest = args.tile.least_panels, larger = args.tile.num_larger_slices;
    const int first = (rank * fewest + (rank < larger ? rank : larger)) * kPanelColumns;
    const int count = (fewest + (rank < larger ? 1 : 0)) * kPanelColumns;
    const int left = args.hidden - first;
    return {first, left < count ? left : count};
  }
}

// The tokens of a launch, a few to a tile.
struct InterBlockTiles {
  int64_t num_tokens;
  int64_t num_tiles;
  InterBlockTile tile;

  __device__ __forceinline__ int64_t first_token(int64_t index) const {
    return index * tile.tokens;
  }
  __device__ __forceinline__ int tokens_in_tile(int64_t index) const {
    const int64_t left = num_tokens - first_token(index);
    return left < tile.tokens ? static_cast<int>(left) : tile.tokens;
  }
};

template <typename Compute, int kCapacity, typename TeamPolicy>
struct InterBlockForwardArgs : InterBlockTiles {
  using Team = TeamPolicy;

  int hidden;
  int num_sources;
  int num_queries;
  Compute inverse_hidden;
  Compute eps;
  Compute scale;
  ConstByteRows queries;      // [S, D]
  ConstByteRows key_weights;  // [S, D], or absent
  const Compute* known_rstd;  // [N, M], or null
  ByteRows out;               // [S * M, D]
  Compute* lse;               // [S, M]
  Compute* stats;             // [N + S * N, M], or null
  ConstByteRows sources[kCapacity];

  // A tile's rows are the sources of its first token, of its second one, and so on.
  __device__ __forceinline__ int rows_of_token() const { return num_sources; }
  __device__ __forceinline__ int rows_in_tile(int64_t index) const {
    return tokens_in_tile(index) * rows_of_token();
  }
  __device__ __forceinline__ const std::byte* tile_row(int64_t index, int r) const {
    const int token = r / num_sources;
    const ConstByteRows& rows = sources[r - token * num_sources];
    return row_at(rows, first_token(index) + token) +
           slice_of_cta(*this).first * bytes_of(rows.dtype);
  }
  __device__ __forceinline__ int row_bytes(int r) const {
    return slice_of_cta(*this).count * bytes_of(sources[r % num_sources].dtype);
  }
};

template <typename Compute, int kCapacity, typename TeamPolicy>
struct InterBlockBackwardArgs : InterBlockTiles {
  using Team = TeamPolicy;

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
  Compute* parts;           // [num_teams, S, D]: sums over each team's tokens of the gradients of
                            // the score vectors (scale * query * key_weight), or null
  bool wants_sources;       // any gradient of a source
  ConstByteRows sources[kCapacity];
  ByteRows grads[kCapacity];       // or absent
  ConstByteRows bases[kCapacity];  // what a gradient is added to, or absent

  // A token's rows are its sources, then the gradients of its outputs.
  __device__ __forceinline__ int rows_of_token() const {
    return num_sources + (grad_out.data != nullptr ? num_queries : 0);
  }
  __device__ __forceinline__ int rows_in_tile(int64_t index) const {
    return tokens_in_tile(index) * rows_of_token();
  }
  __device__ __forceinline__ const std::byte* tile_row(int64_t index, int r) const {
    const int token = r / rows_of_token(), row = r % rows_of_token();
    const int64_t m = first_token(index) + token;
    const std::byte* start = row < num_sources
                                 ? row_at(sources[row], m)
                                 : row_at(grad_out, (row - num_sources) * num_tokens + m);
    return start + slice_of_cta(*this).first * bytes_of(dtype_of_row(row));
  }
  __device__ __forceinline__ int row_bytes(int r) const {
    return slice_of_cta(*this).count * bytes_of(dtype_of_row(r % rows_of_token()));
  }
  __device__ __forceinline__ DType dtype_of_row(int row) const {
    return row < num_sources ? sources[row].dtype : grad_out.dtype;
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

// Shared memory beside slots, barriers and the team's sums. The forward has one matrix of logits,
// the backward three.
template <typename Compute, int kMatrixCount>
struct InterBlockScratch {
  static constexpr int kMatrices = kMatrixCount;

  std::byte* vectors;   // score vectors of a pass: [parts, S] rows of vector_pitch bytes
  Compute* partials;    // [warps, 16, partial_pitch]
  Compute* sums;        // [S, columns of a slice] of the backward, if they are shared
  Compute* logits;      // [kMatrices, tokens, logit_sources, logit_pitch]: products, then weights
  Compute* squares;     // [tokens * N]: sum of v^2
  Compute* factors;     // [tokens * N] of the backward
  Compute* magnitudes;  // [S]: what score vectors were divided by

  template <typename Args>
  __device__ __forceinline__ InterBlockScratch(const Args& args, CtaMemory& memory)
      : vectors(memory.take<std::byte>(args.tile.vector_bytes)),
        partials(memory.take<Compute>(args.tile.num_threads / 32 * kProductRows *
                                      args.tile.partial_pitch)),
        sums(memory.take<Compute>(args.tile.sum_values)),
        logits(memory.take<Compute>(kMatrices * matrix_size(args))),
        squares(memory.take<Compute>(args.tile.tokens * args.num_sources)),
        factors(memory.take<Compute>(args.tile.tokens * args.num_sources)),
        magnitudes(memory.take<Compute>(args.num_queries)) {}

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
  // What adds up to the factor of v_i in dv_i, then the rest of the factors of v_i in du_s.
  template <typename Args>
  __device__ __forceinline__ Compute* summand(const Args& args, int token, int source) const {
    return logit(args, token, source) + 2 * matrix_size(args);
  }
};

// The products of a tile's sources and score vectors, and the sources' squares, over all columns.
template <typename Args, typename Scratch, typename Team>
__device__ __forceinline__ void add_up_scores(const Args& args, int num_tokens,
                                              const Scratch& scratch, Team& team) {
  const int numbers = args.num_queries + 1;
  team.add_up(
      num_tokens * args.num_sources * numbers, args.tile.num_threads, [&](int i) -> decltype(auto) {
        const int row = i / numbers, query = i % numbers;
        return query == args.num_queries
                   ? scratch.squares[row]
                   : scratch.logit(args, row / args.num_sources, row % args.num_sources)[query];
      });
}

// The products of a tile's sources and the gradients of its outputs, likewise.
template <typename Args, typename Scratch, typename Team>
__device__ __forceinline__ void add_up_dots(const Args& args, int num_tokens,
                                            const Scratch& scratch, Team& team) {
  team.add_up(num_tokens * args.num_sources * args.num_queries, args.tile.num_threads,
              [&](int i) -> decltype(auto) {
                const int row = i / args.num_queries;
                return scratch.dot(args, row / args.num_sources,
                                   row % args.num_sources)[i % args.num_queries];
              });
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
