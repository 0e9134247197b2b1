// Depth attention, forward: out = sum_i softmax_i(scale * <query * key_weight, v_i / rms(v_i)>)
// v_i, optionally RMS-normalised.
//
// A CTA takes one row at a time. Each thread owns the same chunks of every source's row, so between
// reading a source for its logit and reading it again for the mix nothing moves between threads but
// the two sums behind a logit.
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

template <typename Policy, int kCapacity>
class DepthAttentionForwardBody {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Args = DepthAttentionForwardArgs<Compute, kCapacity>;
  using Loader = typename Policy::template Loader<Args>;
  static constexpr int kChunks = Policy::kChunks;
  static constexpr int kWidth = Elements::kWidth;
  // A thread's share of a span: values of chunk k are x[k].
  using Share = Compute[kChunks][kWidth];

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    const DepthAttentionTile& tile = args.tile;
    const int num_warps = tile.num_threads / kWarpSize;
    // slots | barriers | partials [num_warps, N] | weights [N] | norm [num_warps]
    std::byte* slots = dynamic_shared_memory();
    auto* barriers = reinterpret_cast<Barrier*>(slots + tile.num_slots * tile.slot_bytes);
    auto* partials = reinterpret_cast<Pair<Compute>*>(barriers + 2 * tile.num_slots);
    auto* weights = reinterpret_cast<Compute*>(partials + num_warps * args.num_sources);
    Compute* norm_scratch = weights + args.num_sources;

    const bool has_norm = args.out_weight.data != nullptr;
    // A mix in several spans leaves the registers before its norm is known, and is made again for
    // the output.
    const int num_mixes = has_norm && tile.num_spans > 1 ? 2 : 1;
    Loader loader(args, slots, barriers, tile.resident ? 1 : 1 + num_mixes);
    if (loader.produce()) return;

    Share query;
    if (tile.num_spans == 1) load_query(args, 0, query);
    RingPosition at;
    for (int64_t row = cta_rank(); row < args.num_tokens; row += num_ctas()) {
      RingPosition row_start = at;
      for (int span = 0; span < tile.num_spans; ++span) {
        if (tile.num_spans > 1) load_query(args, span, query);
        for (int source = 0; source < args.num_sources; ++source) {
          const auto values = loader.acquire(at, true, row, span, source);
          add_partial(args, values, span, source, query, partials);
          if (!tile.resident) loader.release(at);
          at.advance(tile.num_slots);
        }
      }
      sync_first_threads(tile.num_threads);
      if (thread_rank() < kWarpSize) softmax(args, row, partials, weights);
      sync_first_threads(tile.num_threads);

      Compute sum_of_squares = 0;
      for (int pass = 0; pass < num_mixes; ++pass) {
        const bool last_pass = pass == num_mixes - 1;
        if (tile.resident) at = row_start;
        // What the second of two mixes is multiplied by.
        const Compute out_scale = pass == 0 ? Compute(1) : inverse_rms(args, sum_of_squares);
        for (int span = 0; span < tile.num_spans; ++span) {
          Share mix = {};
          for (int source = 0; source < args.num_sources; ++source) {
            const auto values = loader.acquire(at, !tile.resident, row, span, source);
            add_weighted(args, values, span, source, weights[source], mix);
            if (last_pass || !tile.resident) loader.release(at);
            at.advance(tile.num_slots);
          }
          if (pass == 0 && args.mix.data != nullptr) store_mix(args, row, span, mix);
          if (!has_norm) {
            store_out(args, row, span, mix, Compute(1));
          } else if (num_mixes == 1) {
            sum_of_squares = cta_sum(warp_sum(squares(mix)), norm_scratch, num_warps);
            store_out(args, row, span, mix, inverse_rms(args, sum_of_squares));
          } else if (pass == 0) {
            sum_of_squares += squares(mix);
          } else {
            store_out(args, row, span, mix, out_scale);
          }
        }
        if (num_mixes > 1 && pass == 0) {
          sum_of_squares = cta_sum(warp_sum(sum_of_squares), norm_scratch, num_warps);
        }
      }
    }
  }

 private:
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

  using Gains = Mixed<Compute, kWidth>;

  __device__ __forceinline__ static void load_query(const Args& args, int span, Share& query) {
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

  // partials[warp, source] += this warp's share of (sum v^2, <query, v>).
  template <typename View>
  __device__ __forceinline__ static void add_partial(const Args& args, View values, int span,
                                                     int source, const Share& query,
                                                     Pair<Compute>* partials) {
    Compute squares[kChunks] = {};
    Compute dots[kChunks] = {};
    for_chunks(args, span, [&](int k, int, int chunk) {
      Compute x[kWidth];
      Elements::load(values, args.sources[source].dtype, chunk, x);
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

  // One warp: logits of all sources, their softmax into `weights`, and what the caller wants to
  // keep.
  __device__ __forceinline__ static void softmax(const Args& args, int64_t row,
                                                 const Pair<Compute>* partials, Compute* weights) {
    const int lane = thread_rank();
    const int num_warps = args.tile.num_threads / kWarpSize;
    Compute* stats = args.stats;
    Compute largest = -INFINITY;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      Pair<Compute> sums = partials[source];
      for (int warp = 1; warp < num_warps; ++warp) {
        const Pair<Compute> more = partials[warp * args.num_sources + source];
        sums.first += more.first;
        sums.second += more.second;
      }
      const Compute rstd = inverse_square_root(sums.first * args.inverse_hidden + args.eps);
      const Compute logit = args.scale * rstd * sums.second;
      weights[source] = logit;
      largest = logit > largest ? logit : largest;
      if (stats != nullptr) {
        stats[source * args.num_tokens + row] = rstd;
        stats[(args.num_sources + source) * args.num_tokens + row] = logit;
      }
    }
    largest = warp_max(largest);
    Compute sum = 0;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      const Compute e = exponential(weights[source] - largest);
      weights[source] = e;
      sum += e;
    }
    sum = warp_sum(sum);
    const Compute inverse_sum = Compute(1) / sum;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      const Compute weight = weights[source] * inverse_sum;
      weights[source] = weight;
      if (args.weights != nullptr) args.weights[source * args.num_tokens + row] = weight;
    }
    if (stats != nullptr && lane == 0) {
      stats[2 * args.num_sources * args.num_tokens + row] = largest + logarithm(sum);
    }
  }

  // mix += weight * v.
  template <typename View>
  __device__ __forceinline__ static void add_weighted(const Args& args, View values, int span,
                                                      int source, Compute weight, Share& mix) {
    for_chunks(args, span, [&](int k, int, int chunk) {
      Compute x[kWidth];
      Elements::load(values, args.sources[source].dtype, chunk, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) mix[k][j] += weight * x[j];
    });
  }

  __device__ __forceinline__ static Compute squares(const Share& mix) {
    Compute sum = 0;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += mix[k][j] * mix[k][j];
    }
    return sum;
  }

  __device__ __forceinline__ static Compute inverse_rms(const Args& args, Compute sum_of_squares) {
    return inverse_square_root(sum_of_squares * args.inverse_hidden + args.out_eps);
  }

  __device__ __forceinline__ static void store_mix(const Args& args, int64_t row, int span,
                                                   const Share& mix) {
    std::byte* to = row_at(args.mix, row);
    for_chunks(args, span,
               [&](int k, int chunk, int) { Gains::store(to, kDTypeOf<Compute>, chunk, mix[k]); });
  }

  // out = mix * factor * out_weight.
  __device__ __forceinline__ static void store_out(const Args& args, int64_t row, int span,
                                                   const Share& mix, Compute factor) {
    std::byte* to = row_at(args.out, row);
    for_chunks(args, span, [&](int k, int chunk, int) {
      Compute x[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] = mix[k][j] * factor;
      if (args.out_weight.data != nullptr) {
        Compute gain[kWidth];
        Gains::load(GlobalView{args.out_weight.data}, args.out_weight.dtype, chunk, gain);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) x[j] *= gain[j];
      }
      Elements::store(to, args.out.dtype, chunk, x);
    });
  }
};

template <typename Policy, int kCapacity>
__global__ void __launch_bounds__(kMaxThreads, 1) depth_attention_fwd_kernel(
    const __grid_constant__ DepthAttentionForwardArgs<typename Policy::Elements::Compute, kCapacity>
        args) {
  DepthAttentionForwardBody<Policy, kCapacity>::run(args);
}

}  // namespace attnres::cuda
