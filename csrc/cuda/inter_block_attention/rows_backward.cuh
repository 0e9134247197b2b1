// Phase 1, backward. With g_s the gradient of out_s, e_s that of lse_s, p_si the weights, r_i =
// 1 / rms(v_i), u_s = scale * query_s * key_weight_s and l_si = r_i <u_s, v_i>:
//
//   t_si  = <g_s, v_i>,  dl_si = p_si (t_si - sum_j p_sj t_sj + e_s),  a_si = dl_si r_i
//   dv_i  = sum_s (p_si g_s + a_si u_s) - v_i r_i^2 / D sum_s dl_si l_si
//   du_s  = sum_i a_si v_i, summed over tokens
//
// A team - a CTA, or a cluster of them, each with columns of its own - takes a tile of tokens at a
// time, their sources and the gradients of their outputs, and every step reads the tile where the
// loader put it. du is summed over the tokens of a team by the threads that own its columns, and
// over teams by a second kernel, in order.
#pragma once

#include "common/tile_loaders.cuh"
#include "inter_block_attention/rows_forward.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename Policy, int kCapacity>
class InterBlockBackwardBody {
  using Products = typename Policy::Products;
  using Elements = typename Products::Elements;
  using Compute = typename Products::Compute;
  using Team = typename Policy::Team;
  using Args = InterBlockBackwardArgs<Compute, kCapacity, Team>;
  using Scratch = typename Products::Scratch;
  using Loader = typename Policy::template Loader<Args>;
  static constexpr int kWidth = Products::kWidth;

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    const InterBlockTile& tile = args.tile;
    CtaMemory memory(tile);
    const Scratch scratch(args, memory);
    const ScoreVectorSums sums = sums_of(args, scratch);
    Loader loader(args, memory.slots, memory.barriers);
    TeamSums<Team> team(memory.team, tile.team_capacity);
    if (only_loads(loader, team)) return;

    Products::prepare(args, memory.slots, tile.tokens * args.rows_of_token(), scratch);
    if (args.parts != nullptr) {
      for_columns(args, [&](int query, int column) { sums.row(query)[column] = 0; });
    }
    team.start();
    bool staged = false;
    const auto stage = [&](int pass) {
      if (staged) return;
      // Others may still read the pass before.
      sync_first_threads(tile.num_threads);
      Products::stage_vectors(args, pass, scratch);
      sync_first_threads(tile.num_threads);
      staged = tile.num_passes == 1;
    };
    RingPosition at;
    for (int64_t index = Team::index(); index < args.num_tiles; index += Team::count()) {
      const int num_tokens = args.tokens_in_tile(index);
      const auto rows = loader.acquire(at, index);
      if (args.stats == nullptr) {
        for (int pass = 0; pass < tile.num_passes; ++pass) {
          stage(pass);
          Products::score(args, pass, rows, num_tokens, args.rows_of_token(), scratch);
        }
        add_up_scores(args, num_tokens, scratch, team);
      }
      if (args.grad_out.data != nullptr) {
        Products::dots(args, rows, num_tokens, scratch);
        add_up_dots(args, num_tokens, scratch, team);
      } else {
        // The factors of the tile before may still be in use.
        sync_first_threads(tile.num_threads);
      }
      for (int i = thread_rank(); i < num_tokens * args.num_queries; i += tile.num_threads) {
        logit_gradients(args, index, i / args.num_queries, i % args.num_queries, scratch);
      }
      sync_first_threads(tile.num_threads);
      for (int i = thread_rank(); i < num_tokens * args.num_sources; i += tile.num_threads) {
        value_factor(args, index, i / args.num_sources, i % args.num_sources, scratch);
      }
      sync_first_threads(tile.num_threads);
      if (args.wants_sources) {
        for (int pass = 0; pass < tile.num_passes; ++pass) {
          stage(pass);
          source_gradients(args, index, pass, num_tokens, rows, scratch);
        }
      }
      if (args.parts != nullptr) add_to_sums(args, num_tokens, rows, scratch, sums);
      loader.release(at);
      at.advance(tile.num_slots);
    }
    if (args.parts != nullptr && tile.sum_values > 0) {
      sync_first_threads(tile.num_threads);
      const ScoreVectorSums part = part_of(args);
      for_columns(
          args, [&](int query, int column) { part.row(query)[column] = sums.row(query)[column]; });
    }
  }

 private:
  // du of this CTA's columns.
  struct ScoreVectorSums {
    Compute* base;
    int pitch;  // from a query's to the next one's
    __device__ __forceinline__ Compute* row(int query) const {
      return base + static_cast<int64_t>(query) * pitch;
    }
  };
  __device__ __forceinline__ static ScoreVectorSums part_of(const Args& args) {
    if (args.parts == nullptr) return {nullptr, 0};
    const int64_t first_row = static_cast<int64_t>(Team::index()) * args.num_queries;
    return {args.parts + first_row * args.hidden + slice_of_cta(args).first, args.hidden};
  }
  // Made in shared memory first, where there is room.
  __device__ __forceinline__ static ScoreVectorSums sums_of(const Args& args,
                                                            const Scratch& scratch) {
    if (args.tile.sum_values > 0) return {scratch.sums, args.tile.sum_pitch};
    return part_of(args);
  }
  // f(query, column) for every query and every column of this CTA, each by one thread.
  template <typename F>
  __device__ __forceinline__ static void for_columns(const Args& args, F&& f) {
    const int count = slice_of_cta(args).count;
    for (int query = 0; query < args.num_queries; ++query) {
      for (int column = thread_rank(); column < count; column += args.tile.num_threads) {
        f(query, column);
      }
    }
  }

  __device__ __forceinline__ static Compute rstd_of(const Args& args, int64_t index, int token,
                                                    int source, const Scratch& scratch) {
    if (args.stats != nullptr) {
      return args.stats[source * args.num_tokens + args.first_token(index) + token];
    }
    return inverse_square_root(
        scratch.squares[token * args.num_sources + source] * args.inverse_hidden + args.eps);
  }

  // One thread: of a token's sources and one query, the weights as products take them, the factors
  // a and what adds up to the values' factors.
  __device__ __forceinline__ static void logit_gradients(const Args& args, int64_t index, int token,
                                                         int query, const Scratch& scratch) {
    const int64_t m = args.first_token(index) + token;
    Compute largest = -INFINITY;
    for (int source = 0; source < args.num_sources; ++source) {
      Compute& logit = scratch.logit(args, token, source)[query];
      if (args.stats != nullptr) {
        const int64_t row =
            args.num_sources + static_cast<int64_t>(query) * args.num_sources + source;
        logit = args.stats[row * args.num_tokens + m];
      } else {
        logit *= rstd_of(args, index, token, source, scratch);
      }
      scratch.summand(args, token, source)[query] = logit;
      largest = logit > largest ? logit : largest;
    }
    Compute sum = 0;
    for (int source = 0; source < args.num_sources; ++source) {
      Compute& weight = scratch.logit(args, token, source)[query];
      // A single source has weight 1 whatever its logit.
      weight = args.num_sources == 1 ? Compute(1) : exponential(weight - largest);
      sum += weight;
    }
    const Compute inverse_sum = Compute(1) / sum;
    Compute mean = 0;
    for (int source = 0; source < args.num_sources; ++source) {
      Compute& weight = scratch.logit(args, token, source)[query];
      weight *= inverse_sum;
      if (args.grad_out.data != nullptr) mean += weight * scratch.dot(args, token, source)[query];
    }
    const Compute grad_lse =
        args.grad_lse == nullptr ? Compute(0) : args.grad_lse[query * args.num_tokens + m];
    for (int source = 0; source < args.num_sources; ++source) {
      Compute& weight = scratch.logit(args, token, source)[query];
      Compute& factor = scratch.dot(args, token, source)[query];
      const Compute dot = args.grad_out.data == nullptr ? Compute(0) : factor;
      // And so the gradient through a single source's weight is 0, not a rounding error.
      const Compute centred = args.num_sources == 1 ? Compute(0) * mean : dot - mean;
      const Compute grad_logit = weight * (centred + grad_lse);
      factor = grad_logit * rstd_of(args, index, token, source, scratch);
      weight = Products::encode_weight(weight);
      scratch.summand(args, token, source)[query] *= grad_logit;
    }
  }

  // One thread: the factor of v_i in dv_i; and a as products take it, with what that leaves of it
  // in the place of what has been added up.
  __device__ __forceinline__ static void value_factor(const Args& args, int64_t index, int token,
                                                      int source, const Scratch& scratch) {
    const Compute rstd = rstd_of(args, index, token, source, scratch);
    Compute sum = 0;
    for (int query = 0; query < args.num_queries; ++query) {
      Compute& factor = scratch.dot(args, token, source)[query];
      Compute& summand = scratch.summand(args, token, source)[query];
      sum += summand;
      const Compute encoded = Products::encode_weight(factor);
      summand = Products::encode_weight(factor - Products::decode_weight(encoded));
      factor = encoded;
    }
    scratch.factors[token * args.num_sources + source] = sum * rstd * rstd * args.inverse_hidden;
  }

  // dv over the columns of a pass, stored or added.
  template <typename Tile>
  __device__ __forceinline__ static void source_gradients(const Args& args, int64_t index, int pass,
                                                          int num_tokens, const Tile& rows,
                                                          const Scratch& scratch) {
    const int chunks = args.tile.pass_columns / kWidth;
    const ColumnSlice slice = slice_of_cta(args);
    const int begin = pass * chunks, all = slice.count / kWidth;
    const int end = begin + chunks < all ? begin + chunks : all;
    const int pitch = args.tile.logit_pitch;
    Products::combine(
        args, begin, end, num_tokens, args.num_sources,
        [&](int token, auto&& add) {
          if (args.grad_out.data != nullptr) {
            const int first = token * args.rows_of_token() + args.num_sources;
            add(
                args.num_queries, [&](int s) { return rows.row(first + s); },
                [&](int) { return args.grad_out.dtype; }, scratch.logit(args, token, 0), 1, pitch);
          }
          Products::add_vectors(args, begin, scratch, scratch.dot(args, token, 0), pitch, add);
        },
        [&](int token, int source, int chunk, Compute(&x)[kWidth]) {
          const ByteRows& grads = args.grads[source];
          if (grads.data == nullptr) return;
          const int64_t m = args.first_token(index) + token;
          const Compute factor = scratch.factors[token * args.num_sources + source];
          Compute v[kWidth];
          Elements::load(rows.row(token * args.rows_of_token() + source),
                         args.sources[source].dtype, chunk, v);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) x[j] -= factor * v[j];
          const ConstByteRows& bases = args.bases[source];
          if (bases.data != nullptr) {
            // A plain read: it may be what this thread has just written for the same source given
            // twice.
            Compute before[kWidth];
            Elements::load(SharedView{row_at(bases, m)}, bases.dtype, slice.first / kWidth + chunk,
                           before);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) x[j] += before[j];
          }
          Elements::store(row_at(grads, m), grads.dtype, slice.first / kWidth + chunk, x);
        });
  }

  // du of the tile's tokens, with all of a: nothing rounds it to fewer bits than float32 has. Each
  // thread reads and writes its own columns only.
  template <typename Tile>
  __device__ __forceinline__ static void add_to_sums(const Args& args, int num_tokens,
                                                     const Tile& rows, const Scratch& scratch,
                                                     const ScoreVectorSums& all) {
    using Sums = Mixed<Compute, kWidth>;
    Products::combine(
        args, 0, slice_of_cta(args).count / kWidth, 1, args.num_queries,
        [&](int, auto&& add) {
          for (int token = 0; token < num_tokens; ++token) {
            const int first = token * args.rows_of_token();
            add(
                args.num_sources, [&](int i) { return rows.row(first + i); },
                [&](int i) { return args.sources[i].dtype; }, scratch.dot(args, token, 0),
                args.tile.logit_pitch, 1, scratch.summand(args, token, 0));
          }
        },
        [&](int, int query, int chunk, Compute(&x)[kWidth]) {
          auto* row = reinterpret_cast<std::byte*>(all.row(query));
          Compute total[kWidth];
          Sums::load(SharedView{row}, kDTypeOf<Compute>, chunk, total);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) total[j] += x[j];
          Sums::store(row, kDTypeOf<Compute>, chunk, total);
        });
  }
};

template <typename Policy, int kCapacity>
__global__ void __launch_bounds__(kInterBlockBackwardThreads + kProducerThreads, 1)
    inter_block_attention_bwd_kernel(
        const __grid_constant__ InterBlockBackwardArgs<typename Policy::Products::Compute,
                                                       kCapacity, typename Policy::Team>
            args) {
  InterBlockBackwardBody<Policy, kCapacity>::run(args);
}

// The parts' sums, in order, and from them the gradients of queries and key_weights. A CTA takes 32
// columns of a query: its warps add every kWeightGradientWarps-th part, and the first warp adds
// what they have.
template <typename Compute>
__global__ void __launch_bounds__(kWeightGradientWarps* kWarpSize)
    inter_block_attention_weight_gradient_kernel(
        const __grid_constant__ InterBlockWeightGradientArgs<Compute> args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  using One = Mixed<Compute, 1>;
  const int lane = thread_rank() % kWarpSize;
  const int warp = thread_rank() / kWarpSize;
  const int column_blocks = (args.hidden + kWarpSize - 1) / kWarpSize;
  const int query = cta_rank() / column_blocks;
  const int column = cta_rank() % column_blocks * kWarpSize + lane;
  auto* totals = reinterpret_cast<Compute*>(dynamic_shared_memory());  // [warps, 32]
  Compute sum = 0;
  if (column < args.hidden) {
#pragma unroll 4
    for (int part = warp; part < args.num_parts; part += kWeightGradientWarps) {
      const int64_t row = static_cast<int64_t>(part) * args.num_queries + query;
      sum += load_global<Compute>(args.parts + row * args.hidden + column);
    }
  }
  totals[thread_rank()] = sum;
  sync_cta();
  if (warp != 0 || column >= args.hidden) return;
  for (int other = 1; other < kWeightGradientWarps; ++other) {
    sum += totals[other * kWarpSize + lane];
  }
  const auto load = [&](const ConstByteRows& rows) {
    Compute x[1] = {1};
    if (rows.data != nullptr) One::load(GlobalView{row_at(rows, query)}, rows.dtype, column, x);
    return x[0];
  };
  const auto store = [&](const GradientRows& rows, Compute value) {
    if (rows.data == nullptr) return;
    const Compute x[1] = {value};
    const int64_t first = static_cast<int64_t>(query) * args.hidden * bytes_of(rows.dtype);
    One::store(rows.data + first, rows.dtype, column, x);
  };
  store(args.grad_queries, sum * load(args.key_weights) * args.scale);
  store(args.grad_key_weights, sum * load(args.queries) * args.scale);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
