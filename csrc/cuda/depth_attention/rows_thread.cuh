// What the depth attention kernels have in common: policies, and what one thread does with its
// chunks of a row.
#pragma once

#include "common/cta_memory.cuh"
#include "common/elements.cuh"
#include "common/loaders.cuh"
#include "common/reduce.cuh"
#include "depth_attention/args.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename ElementsPolicy, template <typename, int, typename> class LoaderPolicy,
          int kChunksPerThread, typename TeamPolicy = OneCta>
struct DepthAttentionPolicy {
  using Elements = ElementsPolicy;
  using Team = TeamPolicy;
  template <typename Args>
  using Loader = LoaderPolicy<Elements, kChunksPerThread, Args>;
  static constexpr int kChunks = kChunksPerThread;
  static constexpr int kShareBytes =
      kChunks * Elements::kWidth * sizeof(typename Elements::Compute);
};

template <typename Policy, typename Args>
struct DepthAttentionThread {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Loader = typename Policy::template Loader<Args>;
  static constexpr int kChunks = Policy::kChunks;
  static constexpr int kWidth = Elements::kWidth;
  // A segment: 16 values of a row for each lane of a warp, or all that a thread has where chunks
  // are single values.
  static constexpr int kSegmentChunks = kWidth == 1 ? kChunks : 16 / kWidth;
  static constexpr int kSegments = kChunks / kSegmentChunks;  // of a warp
  static_assert(kChunks % kSegmentChunks == 0 && (kSegments == 1 || !Args::Team::kIsCluster));
  // A warp adds up so many sources' sums at once, in 9 shuffles for four and 6 for two, where one
  // takes 5. In a cluster few warps have to hide the time that a chain of shuffles takes; in a CTA
  // of its own a warp has others beside it, and two keep it within its registers, but for one that
  // has two segments and copies for itself. Of the policies that look at a row's dtype for every
  // chunk, several copies would be large.
  static constexpr int kSourcesAtOnce = !Elements::kUniform                           ? 1
                                        : Args::Team::kIsCluster                      ? 4
                                        : kSegments == 1 || Loader::kExtraThreads > 0 ? 2
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

  // f(k, chunk of the row, chunk of the span, whether this thread owns it) for every k: for sums,
  // to which zeros in the place of a missing chunk add nothing. Without branches the loads of
  // several chunks and sources are under way at the same time.
  template <typename F>
  __device__ __forceinline__ static void for_all_chunks(const Args& args, int span, F&& f) {
    const int first = first_chunk<kChunks>(args, span);
    const int count = chunks_in_span<kChunks>(args, span);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int chunk = chunk_in_span<kChunks>(k);
      f(k, first + chunk, chunk, chunk < count);
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

  // partials[segment, source] += (sum v^2, <query, v>) over this warp's segments, for `count`
  // sources from `first` on, at most kCount. load(i, present, chunk of the row, chunk of the
  // span, x) gets values of the i-th one, or zeros.
  template <int kCount, typename Load>
  __device__ __forceinline__ static void add_some_partials(const Args& args, int span, int first,
                                                           int count, const Share& query,
                                                           Pair<Compute>* partials, Load&& load) {
    constexpr int kSums = 2 * kCount;
    Compute sums[kSegments][kSums];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Compute squares[kChunks] = {};
      Compute dots[kChunks] = {};
      for_all_chunks(args, span, [&](int k, int row_chunk, int chunk, bool owned) {
        Compute x[kWidth];
        load(i, owned && (kCount == 1 || i < count), row_chunk, chunk, x);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          squares[k] += x[j] * x[j];
          dots[k] += x[j] * query[k][j];
        }
      });
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        Compute(&sum)[kSums] = sums[k / kSegmentChunks];
        const bool is_first = k % kSegmentChunks == 0;
        sum[2 * i] = is_first ? squares[k] : sum[2 * i] + squares[k];
        sum[2 * i + 1] = is_first ? dots[k] : sum[2 * i + 1] + dots[k];
      }
    }
    const int lane = thread_rank() % kWarpSize;
    const int number = lane / (kWarpSize / kSums);
    const int source = first + number / 2;
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      const Compute sum = warp_sums(sums[segment], lane);
      if (lane % (kWarpSize / kSums) == 0 && number / 2 < count) {
        Pair<Compute>& partial = partials[(first_segment() + segment) * args.num_sources + source];
        Compute& total = number % 2 == 0 ? partial.first : partial.second;
        total = span == 0 ? sum : total + sum;
      }
    }
  }

  // The same for all sources before `last`, whose steps are the next ones.
  __device__ __forceinline__ static void add_partials(const Args& args, Loader& loader,
                                                      RingPosition& at, int64_t row, int span,
                                                      int last, const Share& query,
                                                      Pair<Compute>* partials) {
    const DepthAttentionTile& tile = args.tile;
    // Half of the slots at most: a row that streams through them must not wait for itself.
    const int half = (tile.num_slots + 1) / 2;
    const int at_once = half < kSourcesAtOnce ? half : kSourcesAtOnce;
    for (int first = 0; first < last; first += at_once) {
      const int count = last - first < at_once ? last - first : at_once;
      loader.wait(at, count);
      RingPosition read = at;
      decltype(loader.view(at, row, span, first)) views[kSourcesAtOnce];
#pragma unroll
      for (int i = 0; i < kSourcesAtOnce; ++i) {
        views[i] = loader.view(at, row, span, first + i);
        if (kSourcesAtOnce == 1 || i < count) at.advance(tile.num_slots);
      }
      const auto load = [&](int i, bool present, int, int chunk, Compute(&x)[kWidth]) {
        Elements::load_if(present, views[i], args.sources[first + i].dtype, chunk, x);
      };
      if (kSourcesAtOnce == 1 || count == 1) {
        add_some_partials<1>(args, span, first, 1, query, partials, load);
      } else {
        add_some_partials<kSourcesAtOnce>(args, span, first, count, query, partials, load);
      }
      if (tile.resident) continue;
      for (int i = 0; i < count; ++i) {
        loader.release(read);
        read.advance(tile.num_slots);
      }
    }
  }

  // Of this warp, in its CTA.
  __device__ __forceinline__ static int first_segment() {
    return thread_rank() / kWarpSize * kSegments;
  }

  // mix += weight * v, where load(present, chunk of the row, chunk of the span, x) gets values of
  // v, or zeros.
  template <typename Load>
  __device__ __forceinline__ static void add_weighted(const Args& args, int span, Compute weight,
                                                      Share& mix, Load&& load) {
    for_all_chunks(args, span, [&](int k, int row_chunk, int chunk, bool owned) {
      Compute x[kWidth];
      load(owned, row_chunk, chunk, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) mix[k][j] += weight * x[j];
    });
  }
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
