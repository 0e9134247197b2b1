// Depth attention, backward. With g the gradient of the mix, p_i the weights, r_i = 1 / rms(v_i),
// u = scale * query * key_weight and l_i = r_i <u, v_i>:
//
//   t_i  = <g, v_i> + grad_weights_i
//   dl_i = p_i (t_i - sum_j p_j t_j)
//   dv_i = p_i g + dl_i r_i u - dl_i l_i r_i^2 / D v_i
//   du   = sum_i dl_i r_i v_i
//
// A team takes one row at a time and sweeps over its sources up to four times: for the logits (or
// takes them from the forward), for the mix that an output norm's gradient needs (or takes it), for
// <g, v_i>, and for dv. Where a row's sources fit into the loader's slots, only the first sweep
// reads memory. du and the gradient of the output norm's gain are summed over the rows of a team by
// the threads that own their columns, and over teams by a second kernel, in order.
#pragma once

#include "depth_attention/rows_thread.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename Policy, int kCapacity>
class DepthAttentionBackwardBody {
  using Elements = typename Policy::Elements;
  using Compute = typename Elements::Compute;
  using Team = typename Policy::Team;
  using Args = DepthAttentionBackwardArgs<Compute, kCapacity, Team>;
  using Loader = typename Policy::template Loader<Args>;
  using Thread = DepthAttentionThread<Policy, Args>;
  using Share = typename Thread::Share;
  using Gains = typename Thread::Gains;
  static constexpr int kChunks = Policy::kChunks;
  static constexpr int kWidth = Elements::kWidth;

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    const DepthAttentionTile& tile = args.tile;
    static_assert(Thread::kSegments == 1);
    const int num_warps = tile.num_threads / kWarpSize;
    CtaMemory memory(tile);
    const int64_t hidden = static_cast<int64_t>(args.row_chunks) * kWidth;
    const Sums part = {args.parts + (args.parts == nullptr ? 0 : Team::index() * 2 * hidden),
                       args.row_chunks, 0};
    Sums sums = part;
    if (args.sums_are_shared) {
      sums = {memory.take<Compute>(2 * tile.slice_chunks * kWidth), tile.slice_chunks,
              first_chunk<kChunks>(args, 0)};
    }
    auto* partials = memory.take<Pair<Compute>>(num_warps * args.num_sources);
    // One sum a source takes the place of the pair that its logit was made of.
    auto* dots = reinterpret_cast<Compute*>(partials);
    auto* norm_partials = memory.take<Pair<Compute>>(num_warps);
    const Factors factors = {memory.take<Compute>(3 * args.num_sources), args.num_sources};

    const bool has_norm = args.out_weight.data != nullptr;
    // A ring serves its steps in one order, and that of several spans would be another.
    const bool one_span = Loader::kUsesSlots || tile.num_spans == 1;
    const bool makes_mix = has_norm && args.mix.data == nullptr;
    Loader loader(args, memory.slots, memory.barriers,
                  tile.resident ? 1 : 2 + (args.stats == nullptr) + (makes_mix ? 1 : 0));
    SegmentNumbers<Team> numbers(
        memory.team, static_cast<int>(sizeof(Pair<Compute>)) * tile.num_segments * args.num_sources,
        segments_of_cta(args));
    if (only_loads(loader, numbers)) return;

    if (args.parts != nullptr) clear(args, sums);
    Share score = {};
    if (one_span) load_score(args, 0, score);
    numbers.start();
    RingPosition at;
    for (int64_t row = Team::index(); row < args.num_tokens; row += Team::count()) {
      const RingPosition row_start = at;
      bool arriving = true;
      // f(source, view) for every source of a span. In several spans rows are read in place, in any
      // order.
      const auto sweep = [&](int span, bool last, auto&& f) {
        if (tile.resident) at = row_start;
        const bool waits = arriving || !tile.resident, releases = last || !tile.resident;
        for (int source = 0; source < args.num_sources; ++source) {
          if (waits) loader.wait(at, 1);
          f(source, loader.view(at, row, span, source));
          if (releases) loader.release(at);
          at.advance(tile.num_slots);
        }
        arriving = false;
      };

      if (args.stats == nullptr) {
        for (int span = 0; span < tile.num_spans; ++span) {
          if (!one_span) load_score(args, span, score);
          Thread::add_partials(args, loader, at, row, span, args.num_sources, score, partials);
        }
        arriving = false;
        numbers.share(partials, args.num_sources);
      }
      sync_first_threads(tile.num_threads);
      if (thread_rank() < kWarpSize) {
        softmax(args, row, args.stats == nullptr ? numbers.all(partials) : nullptr, factors);
      }
      sync_first_threads(tile.num_threads);
      if (args.stats == nullptr) numbers.next();

      // g = the gradient of the mix; made again for each span where there are several.
      Share g = {};
      const auto load_mix = [&](int span) {
        if (!makes_mix) {
          const GlobalView mix{row_at(args.mix, row)};
          Thread::for_chunks(args, span, [&](int k, int chunk, int) {
            Gains::load(mix, kDTypeOf<Compute>, chunk, g[k]);
          });
          return;
        }
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) g[k][j] = 0;
        }
        sweep(span, false, [&](int source, auto values) {
          if (is_empty(args, source, factors)) return;
          Thread::add_weighted(args, span, factors.weight(source), g,
                               [&](bool present, int, int chunk, Compute(&x)[kWidth]) {
                                 Elements::load_if(present, values, args.sources[source].dtype,
                                                   chunk, x);
                               });
        });
      };
      OutputNorm norm = {1, 0};
      if (has_norm) {
        Pair<Compute> products = {0, 0};
        for (int span = 0; span < tile.num_spans; ++span) {
          load_mix(span);
          add_norm_products(args, row, span, g, products);
        }
        norm = output_norm(args, products, norm_partials, numbers);
      }
      const auto load_gradient = [&](int span, bool add_to_sums) {
        if (has_norm && !one_span) load_mix(span);
        mix_gradient(args, row, span, norm, g, sums, add_to_sums);
      };

      for (int span = 0; span < tile.num_spans; ++span) {
        load_gradient(span, args.parts != nullptr);
        sweep(span, false, [&](int source, auto values) {
          Compute dot = 0;
          if (!is_empty(args, source, factors)) {
            Thread::for_all_chunks(args, span, [&](int k, int, int chunk, bool present) {
              Compute x[kWidth];
              Elements::load_if(present, values, args.sources[source].dtype, chunk, x);
#pragma unroll
              for (int j = 0; j < kWidth; ++j) dot += g[k][j] * x[j];
            });
          }
          dot = warp_sum(dot);
          if (thread_rank() % kWarpSize == 0) {
            Compute& total = dots[thread_rank() / kWarpSize * args.num_sources + source];
            total = span == 0 ? dot : total + dot;
          }
        });
      }
      numbers.share(dots, args.num_sources);
      sync_first_threads(tile.num_threads);
      if (thread_rank() < kWarpSize) {
        logit_gradients(args, row, numbers.all(dots), dots, factors);
      }
      sync_first_threads(tile.num_threads);
      numbers.next();

      for (int span = 0; span < tile.num_spans; ++span) {
        if (!one_span) {
          load_gradient(span, false);
          load_score(args, span, score);
        }
        Share grad_score = {};
        sweep(span, true, [&](int source, auto values) {
          source_gradient(args, row, span, source, values, factors, g, score, grad_score);
        });
        if (args.parts != nullptr) add_to_sums(args, span, sums, grad_score);
      }
    }
    if (args.sums_are_shared) copy_sums(args, sums, part);
  }

 private:
  // What warp 0 finds out about every source of a row, in shared memory: its weight, and the
  // factors of u and of v in dv. Before those are known, 1/rms and the logit stand in their place.
  struct Factors {
    Compute* data;  // [3, N]
    int num_sources;

    __device__ __forceinline__ Compute& weight(int source) const { return data[source]; }
    __device__ __forceinline__ Compute& score(int source) const {
      return data[num_sources + source];
    }
    __device__ __forceinline__ Compute& value(int source) const {
      return data[2 * num_sources + source];
    }
  };

  // The sums over the rows of this team, of the gradients of the score vector and of out_weight:
  // each thread reads and writes its own columns only.
  enum WhichSum { kScore, kOutWeight };
  struct Sums {
    Compute* data;
    int chunks;  // from one sum to the other
    int first;   // chunk of the row

    __device__ __forceinline__ void load(WhichSum which, int chunk, Compute (&x)[kWidth]) const {
      Gains::load(SharedView{reinterpret_cast<const std::byte*>(data)}, kDTypeOf<Compute>,
                  which * chunks + chunk - first, x);
    }
    __device__ __forceinline__ void store(WhichSum which, int chunk,
                                          const Compute (&x)[kWidth]) const {
      Gains::store(reinterpret_cast<std::byte*>(data), kDTypeOf<Compute>,
                   which * chunks + chunk - first, x);
    }
  };

  // g = rstd * (grad_out * gain - normed * mean), where normed = mix * rstd.
  struct OutputNorm {
    Compute rstd;
    Compute mean;
  };

  // Source 0 is a merged state: its logit is given, not scored.
  __device__ __forceinline__ static bool is_state(const Args& args, int source) {
    return source == 0 && args.first_logit != nullptr;
  }
  // An empty state may hold anything, NaN too.
  __device__ __forceinline__ static bool is_empty(const Args& args, int source,
                                                  const Factors& factors) {
    return is_state(args, source) && factors.weight(0) == 0;
  }

  __device__ __forceinline__ static void load_score(const Args& args, int span, Share& score) {
    Thread::load_query(args, span, score);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) score[k][j] *= args.scale;
    }
  }

  // One warp: the weights of all sources, and their logits and 1/rms in the factors' places.
  __device__ __forceinline__ static void softmax(const Args& args, int64_t row,
                                                 const Pair<Compute>* partials,
                                                 const Factors& factors) {
    const int lane = thread_rank();
    Compute largest = -INFINITY;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      Compute rstd, logit;
      if (is_state(args, source)) {
        rstd = 0;
        logit = args.first_logit[row];
      } else if (args.stats != nullptr) {
        rstd = args.stats[source * args.num_tokens + row];
        logit = args.stats[(args.num_sources + source) * args.num_tokens + row];
      } else {
        Pair<Compute> sums = partials[source];
        for (int segment = 1; segment < args.tile.num_segments; ++segment) {
          const Pair<Compute> more = partials[segment * args.num_sources + source];
          sums.first += more.first;
          sums.second += more.second;
        }
        rstd = inverse_square_root(sums.first * args.inverse_hidden + args.eps);
        logit = rstd * sums.second;
      }
      factors.score(source) = rstd;
      factors.value(source) = logit;
      largest = logit > largest ? logit : largest;
    }
    largest = warp_max(largest);
    Compute sum = 0;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      // A single source has weight 1 whatever its logit, minus infinity too.
      const Compute e =
          args.num_sources == 1 ? Compute(1) : exponential(factors.value(source) - largest);
      factors.weight(source) = e;
      sum += e;
    }
    const Compute inverse_sum = Compute(1) / warp_sum(sum);
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      factors.weight(source) *= inverse_sum;
    }
  }

  // One warp: from t_i, of every segment, to the factors of u and v_i in dv_i. `dots` has room for
  // what it finds in between.
  __device__ __forceinline__ static void logit_gradients(const Args& args, int64_t row,
                                                         const Compute* of_segments, Compute* dots,
                                                         const Factors& factors) {
    const int lane = thread_rank();
    Compute mean = 0;
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      Compute dot = of_segments[source];
      for (int segment = 1; segment < args.tile.num_segments; ++segment) {
        dot += of_segments[segment * args.num_sources + source];
      }
      if (args.grad_weights != nullptr) dot += args.grad_weights[source * args.num_tokens + row];
      dots[source] = dot;
      mean += factors.weight(source) * dot;
    }
    mean = warp_sum(mean);
    for (int source = lane; source < args.num_sources; source += kWarpSize) {
      // A single source has weight 1 whatever its logit, so its logit's gradient is 0 and not a
      // rounding error.
      const Compute grad_logit = args.num_sources == 1
                                     ? Compute(0) * mean
                                     : factors.weight(source) * (dots[source] - mean);
      if (is_state(args, source)) {
        if (args.grad_first_logit != nullptr && Team::rank() == 0)
          args.grad_first_logit[row] = grad_logit;
        factors.score(source) = factors.value(source) = 0;
        continue;
      }
      const Compute rstd = factors.score(source);
      factors.score(source) = grad_logit * rstd;
      factors.value(source) =
          grad_logit * factors.value(source) * rstd * rstd * args.inverse_hidden;
    }
  }

  __device__ __forceinline__ static void load_grad_out(const Args& args, int64_t row, int chunk,
                                                       Compute (&x)[kWidth]) {
    Elements::load(GlobalView{row_at(args.grad_out, row)}, args.grad_out.dtype, chunk, x);
  }
  __device__ __forceinline__ static void load_out_weight(const Args& args, int chunk,
                                                         Compute (&x)[kWidth]) {
    Gains::load(GlobalView{args.out_weight.data}, args.out_weight.dtype, chunk, x);
  }

  // += (sum mix^2, sum mix * grad_out * gain).
  __device__ __forceinline__ static void add_norm_products(const Args& args, int64_t row, int span,
                                                           const Share& mix,
                                                           Pair<Compute>& products) {
    Thread::for_chunks(args, span, [&](int k, int chunk, int) {
      Compute grad[kWidth], gain[kWidth];
      load_grad_out(args, row, chunk, grad);
      load_out_weight(args, chunk, gain);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        products.first += mix[k][j] * mix[k][j];
        products.second += mix[k][j] * (grad[j] * gain[j]);
      }
    });
  }

  __device__ __forceinline__ static OutputNorm output_norm(const Args& args, Pair<Compute> products,
                                                           Pair<Compute>* partials,
                                                           SegmentNumbers<Team>& numbers) {
    const int lane = thread_rank() % kWarpSize;
    products = {warp_sum(products.first), warp_sum(products.second)};
    if (lane == 0) partials[Thread::first_segment()] = products;
    numbers.share(partials, 1);
    sync_first_threads(args.tile.num_threads);
    products = {0, 0};
    if (numbers.takes_part()) {
      const Pair<Compute>* of_segments = numbers.all(partials);
      for (int i = lane; i < args.tile.num_segments; i += kWarpSize) {
        products.first += of_segments[i].first;
        products.second += of_segments[i].second;
      }
    }
    numbers.next();
    const Compute rstd =
        inverse_square_root(warp_sum(products.first) * args.inverse_hidden + args.out_eps);
    return {rstd, warp_sum(products.second) * rstd * args.inverse_hidden};
  }

  // From the mix to its gradient, in place, and to the sums grad_out * normed mix. Without an
  // output norm the mix does not matter.
  __device__ __forceinline__ static void mix_gradient(const Args& args, int64_t row, int span,
                                                      const OutputNorm& norm, Share& g,
                                                      const Sums& sums, bool add_to_sums) {
    Thread::for_chunks(args, span, [&](int k, int chunk, int) {
      if (args.out_weight.data == nullptr) {
        load_grad_out(args, row, chunk, g[k]);
        return;
      }
      Compute grad[kWidth], gain[kWidth], normed[kWidth];
      load_grad_out(args, row, chunk, grad);
      load_out_weight(args, chunk, gain);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        normed[j] = g[k][j] * norm.rstd;
        g[k][j] = (grad[j] * gain[j] - normed[j] * norm.mean) * norm.rstd;
      }
      if (!add_to_sums) return;
      Compute total[kWidth];
      sums.load(kOutWeight, chunk, total);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total[j] += grad[j] * normed[j];
      sums.store(kOutWeight, chunk, total);
    });
  }

  // dv of one source, stored or added, and grad_score += a v.
  template <typename View>
  __device__ __forceinline__ static void source_gradient(const Args& args, int64_t row, int span,
                                                         int source, View values,
                                                         const Factors& factors, const Share& g,
                                                         const Share& score, Share& grad_score) {
    const Compute weight = factors.weight(source);
    const Compute a = factors.score(source);
    const Compute b = factors.value(source);
    const bool is_scored = !is_state(args, source);
    const ByteRows& grads = args.grads[source];
    const ConstByteRows& bases = args.bases[source];
    std::byte* to = grads.data == nullptr ? nullptr : row_at(grads, row);
    // Plain reads: the base may be what this thread has just written for the same source given
    // twice.
    const SharedView base{bases.data == nullptr ? nullptr : row_at(bases, row)};
    Thread::for_chunks(args, span, [&](int k, int row_chunk, int chunk) {
      Compute x[kWidth] = {};
      if (is_scored) {
        Elements::load(values, args.sources[source].dtype, chunk, x);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) grad_score[k][j] += a * x[j];
      }
      if (to == nullptr) return;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] = weight * g[k][j] + (a * score[k][j] - b * x[j]);
      if (base.base != nullptr) {
        Compute before[kWidth];
        Elements::load(base, bases.dtype, row_chunk, before);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) x[j] += before[j];
      }
      Elements::store(to, grads.dtype, row_chunk, x);
    });
  }

  __device__ __forceinline__ static void add_to_sums(const Args& args, int span, const Sums& sums,
                                                     const Share& more) {
    Thread::for_chunks(args, span, [&](int k, int chunk, int) {
      Compute total[kWidth];
      sums.load(kScore, chunk, total);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total[j] += more[k][j];
      sums.store(kScore, chunk, total);
    });
  }
  // f(which, chunk) for this thread's columns of both sums.
  template <typename F>
  __device__ __forceinline__ static void for_sums(const Args& args, F&& f) {
    for (int span = 0; span < args.tile.num_spans; ++span) {
      Thread::for_chunks(args, span, [&](int, int chunk, int) {
        f(kScore, chunk);
        f(kOutWeight, chunk);
      });
    }
  }
  __device__ __forceinline__ static void clear(const Args& args, const Sums& sums) {
    for_sums(args, [&](WhichSum which, int chunk) {
      const Compute zero[kWidth] = {};
      sums.store(which, chunk, zero);
    });
  }
  __device__ __forceinline__ static void copy_sums(const Args& args, const Sums& sums,
                                                   const Sums& part) {
    for_sums(args, [&](WhichSum which, int chunk) {
      Compute x[kWidth];
      sums.load(which, chunk, x);
      part.store(which, chunk, x);
    });
  }
};

template <typename Policy, int kCapacity>
__global__ void __launch_bounds__(kMaxThreads, 1)
    depth_attention_bwd_kernel(const __grid_constant__ DepthAttentionBackwardArgs<
                               typename Policy::Elements::Compute, kCapacity, typename Policy::Team>
                                   args) {
  DepthAttentionBackwardBody<Policy, kCapacity>::run(args);
}

// The parts' sums, in order, and from them the gradients of query, key_weight and out_weight. A CTA
// takes 32 columns of one of the two sums: its warps add every kWeightGradientWarps-th part, and
// the first warp adds what they have.
template <typename Compute>
__global__ void __launch_bounds__(kWeightGradientWarps* kWarpSize)
    depth_attention_weight_gradient_kernel(
        const __grid_constant__ WeightGradientArgs<Compute> args) {
  using One = Mixed<Compute, 1>;
  const bool is_score = cta_rank() % 2 == 0;
  const int lane = thread_rank() % kWarpSize;
  const int warp = thread_rank() / kWarpSize;
  const int column = cta_rank() / 2 * kWarpSize + lane;
  auto* totals = reinterpret_cast<Compute*>(dynamic_shared_memory());  // [warps, 32]
  wait_for_previous_kernel();
  let_next_kernel_start();
  Compute sum = 0;
  if (column < args.hidden) {
#pragma unroll 4
    for (int part = warp; part < args.num_parts; part += kWeightGradientWarps) {
      const int64_t row = 2 * part + (is_score ? 0 : 1);
      sum += load_global<Compute>(args.parts + row * args.hidden + column);
    }
  }
  totals[thread_rank()] = sum;
  sync_cta();
  if (warp != 0 || column >= args.hidden) return;
  for (int other = 1; other < kWeightGradientWarps; ++other) {
    sum += totals[other * kWarpSize + lane];
  }
  const auto load = [&](const GainVector& gain) {
    Compute x[1] = {1};
    if (gain.data != nullptr) One::load(GlobalView{gain.data}, gain.dtype, column, x);
    return x[0];
  };
  const auto store = [&](const GainGradient& gradient, Compute value) {
    const Compute x[1] = {value};
    if (gradient.data != nullptr) One::store(gradient.data, gradient.dtype, column, x);
  };
  if (is_score) {
    store(args.grad_query, sum * load(args.key_weight) * args.scale);
    store(args.grad_key_weight, sum * load(args.query) * args.scale);
  } else {
    store(args.grad_out_weight, sum);
  }
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
