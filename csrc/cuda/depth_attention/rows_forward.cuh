// Depth attention, forward: out = sum_i softmax_i(scale * <query * key_weight, v_i / rms(v_i)>)
// v_i, optionally RMS-normalised.
//
// A team - a CTA, or a cluster of them - takes one row at a time. Each thread owns the same chunks
// of every source's row, so between reading a source for its logit and reading it again for the mix
// nothing moves between threads but the two sums behind a logit.
//
// Block summation makes the last source from two rows as it reads them, stores it, and scores and
// mixes what it stored. Merging a state takes source 0's logit as given. See attnres/params.hpp.
#pragma once

#include "depth_attention/rows_thread.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename Policy, int kCapacity>
class DepthAttentionForwardBody {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Team = typename Policy::Team;
  using Args = DepthAttentionForwardArgs<Compute, kCapacity, Team>;
  using Loader = typename Policy::template Loader<Args>;
  using Thread = DepthAttentionThread<Policy, Args>;
  using Share = typename Thread::Share;
  using Gains = typename Thread::Gains;
  static constexpr int kChunks = Policy::kChunks;
  static constexpr int kWidth = Elements::kWidth;

 public:
  // The plan counts a producer warp for every loader; a CTA of its own that has none may use its
  // registers.
  static constexpr int kLaunchBound = Loader::kExtraThreads == 0 && !Team::kIsCluster
                                          ? kMaxThreads
                                          : most_threads_with(depth_attention_registers(
                                                Policy::kShareBytes, Elements::kDispatchRegisters));
  static_assert(kLaunchBound >= kMaxThreads);

  __device__ __forceinline__ static void run(const Args& args) {
    const DepthAttentionTile& tile = args.tile;
    // Segments of this CTA: one or more a warp.
    const int num_segments = tile.num_threads / kWarpSize * Thread::kSegments;
    CtaMemory memory(tile);
    auto* partials = memory.take<Pair<Compute>>(num_segments * args.num_sources);
    auto* norm_partials = memory.take<Compute>(num_segments);
    auto* weights = memory.take<Compute>(args.num_sources);

    const bool has_norm = args.out_weight.data != nullptr;
    const bool sums = args.new_partial.data != nullptr;
    const int num_plain = sums ? args.num_sources - 1 : args.num_sources;
    // A mix in several spans leaves the registers before its norm is known, and is made again for
    // the output.
    const int num_mixes = args.out.data == nullptr ? 0 : has_norm && tile.num_spans > 1 ? 2 : 1;
    Loader loader(args, memory.slots, memory.barriers,
                  tile.resident || args.num_later_steps == 0 ? 1 : 1 + num_mixes);
    SegmentNumbers<Team> numbers(
        memory.team, static_cast<int>(sizeof(Pair<Compute>)) * tile.num_segments * args.num_sources,
        segments_of_cta(args));
    if (only_loads(loader, numbers)) return;

    Share query = {};
    if (tile.num_spans == 1) Thread::load_query(args, 0, query);
    numbers.start();
    RingPosition at;
    for (int64_t row = Team::index(); row < args.num_tokens; row += Team::count()) {
      RingPosition row_start = at;
      for (int span = 0; span < tile.num_spans; ++span) {
        if (tile.num_spans > 1) Thread::load_query(args, span, query);
        Thread::add_partials(args, loader, at, row, span, num_plain, query, partials);
        if (sums) {
          if constexpr (Loader::kUsesSlots) loader.wait(at, num_summands(args));
          const Summands summands = view_summands(loader, args, at, row, span);
          std::byte* to = row_at(args.new_partial, row);
          Thread::template add_some_partials<1>(
              args, span, num_plain, 1, query, partials,
              [&](int, bool present, int row_chunk, int chunk, Compute(&x)[kWidth]) {
                clear(x);
                if (!present) return;
                add_summands(args, summands, chunk, x);
                Elements::store(to, args.new_partial.dtype, row_chunk, x);
              });
          finish_summands(loader, args, at, !tile.resident);
        }
      }
      numbers.share(partials, args.num_sources);
      sync_first_threads(tile.num_threads);
      if (thread_rank() < kWarpSize) softmax(args, row, numbers.all(partials), weights);
      sync_first_threads(tile.num_threads);
      numbers.next();

      // A merged state that is empty may hold anything, NaN too.
      const bool skips_first = args.first_logit != nullptr && weights[0] == 0;
      Compute sum_of_squares[Thread::kSegments] = {};
      for (int pass = 0; pass < num_mixes; ++pass) {
        const bool releases = pass == num_mixes - 1 || !tile.resident;
        if (tile.resident) at = row_start;
        // What the second of two mixes is multiplied by.
        const Compute out_scale = pass == 0 ? Compute(1) : inverse_rms(args, sum_of_squares[0]);
        for (int span = 0; span < tile.num_spans; ++span) {
          Share mix = {};
          for (int source = 0; source < num_plain; ++source) {
            if (!tile.resident) loader.wait(at, 1);
            const auto values = loader.view(at, row, span, source);
            if (source > 0 || !skips_first) {
              Thread::add_weighted(args, span, weights[source], mix,
                                   [&](bool present, int, int chunk, Compute(&x)[kWidth]) {
                                     Elements::load_if(present, values, args.sources[source].dtype,
                                                       chunk, x);
                                   });
            }
            if (releases) loader.release(at);
            at.advance(tile.num_slots);
          }
          if (sums && kKeepsSummands && tile.resident) {
            const Summands summands = view_summands(loader, args, at, row, span);
            Thread::add_weighted(args, span, weights[num_plain], mix,
                                 [&](bool present, int, int chunk, Compute(&x)[kWidth]) {
                                   clear(x);
                                   if (present) add_summands(args, summands, chunk, x);
                                 });
            finish_summands(loader, args, at, releases);
          } else if (sums) {
            // Each thread reads back what it wrote itself.
            const SharedView values{row_at(args.new_partial, row)};
            Thread::add_weighted(args, span, weights[num_plain], mix,
                                 [&](bool present, int row_chunk, int, Compute(&x)[kWidth]) {
                                   Elements::load_if(present, values, args.new_partial.dtype,
                                                     row_chunk, x);
                                 });
          }
          if (pass == 0 && args.mix.data != nullptr) store_mix(args, row, span, mix);
          if (!has_norm) {
            store_out(args, row, span, mix, Compute(1));
          } else if (pass == 0) {
            add_squares(mix, sum_of_squares);
            if (num_mixes == 1) {
              const Compute sum = row_sum(args, sum_of_squares, norm_partials, numbers);
              store_out(args, row, span, mix, inverse_rms(args, sum));
            }
          } else {
            store_out(args, row, span, mix, out_scale);
          }
        }
        if (num_mixes > 1 && pass == 0) {
          sum_of_squares[0] = row_sum(args, sum_of_squares, norm_partials, numbers);
        }
      }
    }
  }

 private:
  // Slots keep the summands until the row is done; a row read in place may be overwritten by their
  // sum.
  static constexpr bool kKeepsSummands = Loader::kUsesSlots;

  // The rows whose sum is the last source. Plain reads: the sum may go where a summand is.
  struct Summands {
    SharedView rows[2];
  };
  __device__ __forceinline__ static int num_summands(const Args& args) {
    return args.num_steps - args.num_sources + 1;
  }
  __device__ __forceinline__ static Summands view_summands(const Loader& loader, const Args& args,
                                                           RingPosition at, int64_t row, int span) {
    Summands summands = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == num_summands(args)) break;
      const int source = args.num_sources - 1 + i;
      if constexpr (Loader::kUsesSlots) {
        summands.rows[i] = loader.view(at, row, span, source);
        at.advance(args.tile.num_slots);
      } else {
        summands.rows[i].base = step_data<Elements, kChunks>(args, row, span, source);
      }
    }
    return summands;
  }
  __device__ __forceinline__ static void finish_summands(Loader& loader, const Args& args,
                                                         RingPosition& at, bool release) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == num_summands(args)) break;
      if (release) loader.release(at);
      at.advance(args.tile.num_slots);
    }
  }
  // x = the sum, rounded as it is stored.
  __device__ __forceinline__ static void add_summands(const Args& args, const Summands& summands,
                                                      int chunk, Compute (&x)[kWidth]) {
    const ConstByteRows* rows = args.sources + args.num_sources - 1;
    Elements::load(summands.rows[0], rows[0].dtype, chunk, x);
    if (num_summands(args) == 2) {
      Compute more[kWidth];
      Elements::load(summands.rows[1], rows[1].dtype, chunk, more);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] += more[j];
    }
    Elements::round(args.new_partial.dtype, x);
  }

  // One warp: logits of all sources, their softmax into `weights`, and what the caller wants to
  // keep, by one CTA of the team.
  __device__ __forceinline__ static void softmax(const Args& args, int64_t row,
                                                 const Pair<Compute>* partials, Compute* weights) {
    const int lane = thread_rank();
    const bool keeps = Team::rank() == 0;
    Compute* stats = keeps ? args.stats : nullptr;
    Compute largest = -INFINITY;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      Pair<Compute> sums = partials[source];
      for (int segment = 1; segment < args.tile.num_segments; ++segment) {
        const Pair<Compute> more = partials[segment * args.num_sources + source];
        sums.first += more.first;
        sums.second += more.second;
      }
      Compute rstd = inverse_square_root(sums.first * args.inverse_hidden + args.eps);
      if (source < args.num_known_rstd) rstd = args.known_rstd[source * args.num_tokens + row];
      Compute logit = args.scale * rstd * sums.second;
      if (source == 0 && args.first_logit != nullptr) {
        rstd = 0;
        logit = args.first_logit[row];
      }
      weights[source] = logit;
      largest = logit > largest ? logit : largest;
      if (stats != nullptr) {
        stats[source * args.num_tokens + row] = rstd;
        stats[(args.num_sources + source) * args.num_tokens + row] = logit;
      }
      if (args.last_rstd != nullptr && keeps && source == args.num_sources - 1) {
        args.last_rstd[row] = rstd;
      }
    }
    largest = warp_max(largest);
    Compute sum = 0;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      // A single source has weight 1 whatever its logit, minus infinity too.
      const Compute e = args.num_sources == 1 ? Compute(1) : exponential(weights[source] - largest);
      weights[source] = e;
      sum += e;
    }
    sum = warp_sum(sum);
    const Compute inverse_sum = Compute(1) / sum;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      const Compute weight = weights[source] * inverse_sum;
      weights[source] = weight;
      if (args.weights != nullptr && keeps) args.weights[source * args.num_tokens + row] = weight;
    }
    if (stats != nullptr && lane == 0) {
      stats[2 * args.num_sources * args.num_tokens + row] = largest + logarithm(sum);
    }
  }

  // sums[segment] += this thread's share of sum mix^2.
  __device__ __forceinline__ static void add_squares(const Share& mix,
                                                     Compute (&sums)[Thread::kSegments]) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sums[k / Thread::kSegmentChunks] += mix[k][j] * mix[k][j];
      }
    }
  }

  // From the threads' shares of a sum over a row to the sum, in every thread.
  __device__ __forceinline__ static Compute row_sum(const Args& args,
                                                    const Compute (&shares)[Thread::kSegments],
                                                    Compute* partials,
                                                    SegmentNumbers<Team>& numbers) {
    const int lane = thread_rank() % kWarpSize;
#pragma unroll
    for (int segment = 0; segment < Thread::kSegments; ++segment) {
      const Compute sum = warp_sum(shares[segment]);
      if (lane == 0) partials[Thread::first_segment() + segment] = sum;
    }
    numbers.share(partials, 1);
    sync_first_threads(args.tile.num_threads);
    Compute sum = 0;
    if (numbers.takes_part()) {
      const Compute* of_segments = numbers.all(partials);
      for (int i = lane; i < args.tile.num_segments; i += kWarpSize) sum += of_segments[i];
    }
    numbers.next();
    return warp_sum(sum);
  }

  __device__ __forceinline__ static Compute inverse_rms(const Args& args, Compute sum_of_squares) {
    return inverse_square_root(sum_of_squares * args.inverse_hidden + args.out_eps);
  }

  __device__ __forceinline__ static void store_mix(const Args& args, int64_t row, int span,
                                                   const Share& mix) {
    std::byte* to = row_at(args.mix, row);
    Thread::for_chunks(args, span, [&](int k, int chunk, int) {
      Gains::store(to, kDTypeOf<Compute>, chunk, mix[k]);
    });
  }

  // out = mix * factor * out_weight.
  __device__ __forceinline__ static void store_out(const Args& args, int64_t row, int span,
                                                   const Share& mix, Compute factor) {
    std::byte* to = row_at(args.out, row);
    Thread::for_chunks(args, span, [&](int k, int chunk, int) {
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
__global__ void __launch_bounds__(DepthAttentionForwardBody<Policy, kCapacity>::kLaunchBound, 1)
    depth_attention_fwd_kernel(const __grid_constant__ DepthAttentionForwardArgs<
                               typename Policy::Elements::Compute, kCapacity, typename Policy::Team>
                                   args) {
  DepthAttentionForwardBody<Policy, kCapacity>::run(args);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
