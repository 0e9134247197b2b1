// What the depth attention kernels have in common: policies, and what one thread does with its
// chunks of a row.
#pragma once

#include "common/elements.cuh"
#include "common/loaders.cuh"
#include "common/reduce.cuh"
#include "kernels/depth_attention_args.cuh"

namespace attnres::cuda {

template <typename ElementsPolicy, template <typename, int, typename> class LoaderPolicy,
          int kChunksPerThread, typename TeamPolicy = OneCta>
struct DepthAttentionPolicy {
  using Elements = ElementsPolicy;
  using Team = TeamPolicy;
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
  // A segment: 16 values of a row for each lane of a warp, or all that a thread has where chunks
  // are single values.
  static constexpr int kSegmentChunks = kWidth == 1 ? kChunks : 16 / kWidth;
  static constexpr int kSegments = kChunks / kSegmentChunks;  // of a warp
  static_assert(kChunks % kSegmentChunks == 0 && (kSegments == 1 || !Args::Team::kIsCluster));
  // A warp adds up so many sources' sums at once, in 9 shuffles for four and 6 for two, where one
  // takes 5. In a cluster few warps have to hide the time that a chain of shuffles takes; in a CTA
  // of its own a warp has others beside it, and two keep it within its registers, or one if it
  // copies for itself. Of the policies that look at a row's dtype for every chunk, several copies
  // would be large.
  static constexpr int kSourcesAtOnce = !Elements::kUniform                                ? 1
                                        : Args::Team::kIsCluster                           ? 4
                                        : Policy::template Loader<Args>::kExtraThreads > 0 ? 2
                                                                                           : 1;
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
      const int chunk = chunk_in_span<kChunks>(k);
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

  // partials[segment, source] += (sum v^2, <query, v>) over this warp's segments, for kCount
  // sources from `first` on, but for those from `last` on. visit(source, add) calls add(load) once,
  // where load(chunk of the row, chunk of the span, x) gets values of v.
  template <int kCount, typename Visit>
  __device__ __forceinline__ static void add_some_partials(const Args& args, int span, int first,
                                                           int last, const Share& query,
                                                           Pair<Compute>* partials, Visit&& visit) {
    constexpr int kSums = 2 * kCount;
    Compute sums[kSegments][kSums] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= last) continue;
      visit(first + i, [&](auto&& load) {
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
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          sums[k / kSegmentChunks][2 * i] += squares[k];
          sums[k / kSegmentChunks][2 * i + 1] += dots[k];
        }
      });
    }
    const int lane = thread_rank() % kWarpSize;
    const int number = lane / (kWarpSize / kSums);
    const int source = first + number / 2;
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      const Compute sum = warp_sums(sums[segment], lane);
      if (lane % (kWarpSize / kSums) == 0 && source < last) {
        Pair<Compute>& partial = partials[(first_segment() + segment) * args.num_sources + source];
        Compute& total = number % 2 == 0 ? partial.first : partial.second;
        total = span == 0 ? sum : total + sum;
      }
    }
  }
  // For all sources before `last`.
  template <typename Visit>
  __device__ __forceinline__ static void add_partials(const Args& args, int span, int last,
                                                      const Share& query, Pair<Compute>* partials,
                                                      Visit&& visit) {
    for (int source = 0; source < last; source += kSourcesAtOnce) {
      add_some_partials<kSourcesAtOnce>(args, span, source, last, query, partials, visit);
    }
  }

  // Of this warp, in its CTA.
  __device__ __forceinline__ static int first_segment() {
    return thread_rank() / kWarpSize * kSegments;
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
