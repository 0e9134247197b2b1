// What the depth attention kernels have in common: policies, and what one thread does with its
// chunks of a row.
#pragma once

#include "common/elements.cuh"
#include "common/loaders.cuh"
#include "common/reduce.cuh"
#include "kernels/depth_attention_args.cuh"

namespace attnres::cuda {

template <typename ElementsPolicy, template <typename, int, typename> class LoaderPolicy,
          int kChunksPerThread>
struct DepthAttentionPolicy {
  using Elements = ElementsPolicy;
  template <typename Args>
  using Loader = LoaderPolicy<Elements, kChunksPerThread, Args>;
  static constexpr int kChunks = kChunksPerThread;
};

template <typename Policy, typename Args>
struct DepthAttentionThread {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  static constexpr int kChunks = Policy::kChunks;
  static constexpr int kWidth = Elements::kWidth;
  // A thread's share of a span: values of chunk k are x[k].
  using Share = Compute[kChunks][kWidth];
  // Vectors that all rows share, in dtypes of their own.
  using Gains = Mixed<Compute, kWidth>;

  // f(k, chunk of the row, chunk of the span) for the chunks of a span that this thread owns.
  template <typename F>
  __device__ __forceinline__ static void for_chunks(const Args& args, int span, F&& f) {
    const int first = first_chunk<kChunks>(args, span);
    const int count = chunks_in_span<kChunks>(args, span);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int chunk = thread_rank() + k * args.tile.num_threads;
      if (chunk < count) f(k, first + chunk, chunk);
    }
  }

  __device__ __forceinline__ static void load_query(const Args& args, int span, Share& query) {
    if (args.query.data == nullptr) return;
    for_chunks(args, span, [&](int k, int chunk, int) {
      Gains::load(GlobalView{args.query.data}, args.query.dtype, chunk, query[k]);
      if (args.key_weight.data != nullptr) {
        Compute gain[kWidth];
        Gains::load(GlobalView{args.key_weight.data}, args.key_weight.dtype, chunk, gain);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) query[k][j] *= gain[j];
      }
    });
  }

  // partials[warp, source] += this warp's share of (sum v^2, <query, v>), where
  // load(chunk of the row, chunk of the span, x) gets values of v.
  template <typename Load>
  __device__ __forceinline__ static void add_partial(const Args& args, int span, int source,
                                                     const Share& query, Pair<Compute>* partials,
                                                     Load&& load) {
    Compute squares[kChunks] = {};
    Compute dots[kChunks] = {};
    for_chunks(args, span, [&](int k, int row_chunk, int chunk) {
      Compute x[kWidth];
      load(row_chunk, chunk, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        squares[k] += x[j] * x[j];
        dots[k] += x[j] * query[k][j];
      }
    });
    Pair<Compute> sums = {squares[0], dots[0]};
#pragma unroll
    for (int k = 1; k < kChunks; ++k) {
      sums.first += squares[k];
      sums.second += dots[k];
    }
    const int lane = thread_rank() % kWarpSize;
    const Compute sum = warp_sum_pair(sums, lane);
    if (lane % (kWarpSize / 2) == 0) {
      Pair<Compute>& partial = partials[thread_rank() / kWarpSize * args.num_sources + source];
      Compute& total = lane == 0 ? partial.first : partial.second;
      total = span == 0 ? sum : total + sum;
    }
  }

  // mix += weight * v.
  template <typename Load>
  __device__ __forceinline__ static void add_weighted(const Args& args, int span, Compute weight,
                                                      Share& mix, Load&& load) {
    for_chunks(args, span, [&](int k, int row_chunk, int chunk) {
      Compute x[kWidth];
      load(row_chunk, chunk, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) mix[k][j] += weight * x[j];
    });
  }
};

}  // namespace attnres::cuda
