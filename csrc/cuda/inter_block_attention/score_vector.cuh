// What a query's logits are products with: scale * query * key_weight.
#pragma once

#include "common/elements.cuh"
#include "common/rows.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// Of 8 or 1 columns.
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

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
