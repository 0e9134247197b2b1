// Phase 1, forward: S queries against N sources. With u_s = scale * query_s * key_weight_s and r_i
// = 1 / rms(v_i):
//
//   l_si = r_i <u_s, v_i>,  lse_s = log sum_i exp(l_si),  out_s = sum_i exp(l_si - lse_s) v_i
//
// A team - a CTA, or a cluster of them, each with columns of its own - takes a tile of tokens at a
// time: scores, softmax and mix all read the tile where the loader put it.
#pragma once

#include "common/tile_loaders.cuh"
#include "inter_block_attention/scalar_products.cuh"
#include "inter_block_attention/tensor_products.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename ProductsPolicy, template <typename> class LoaderPolicy,
          typename TeamPolicy = OneCta>
struct InterBlockPolicy {
  using Products = ProductsPolicy;
  using Team = TeamPolicy;
  template <typename Args>
  using Loader = LoaderPolicy<Args>;
};

template <typename Policy, int kCapacity>
class InterBlockForwardBody {
  using Products = typename Policy::Products;
  using Compute = typename Products::Compute;
  using Team = typename Policy::Team;
  using Args = InterBlockForwardArgs<Compute, kCapacity, Team>;
  using Scratch = typename Products::Scratch;
  using Loader = typename Policy::template Loader<Args>;

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    const InterBlockTile& tile = args.tile;
    CtaMemory memory(tile);
    const Scratch scratch(args, memory);
    Loader loader(args, memory.slots, memory.barriers);
    TeamSums<Team> team(memory.team, tile.team_capacity);
    if (only_loads(loader, team)) return;

    Products::prepare(args, memory.slots, tile.tokens * args.num_sources, scratch);
    team.start();
    bool staged = false;
    RingPosition at;
    for (int64_t index = Team::index(); index < args.num_tiles; index += Team::count()) {
      const int num_tokens = args.tokens_in_tile(index);
      const auto rows = loader.acquire(at, index);
      for (int pass = 0; pass < tile.num_passes; ++pass) {
        if (!staged) {
          Products::stage_vectors(args, pass, scratch);
          sync_first_threads(tile.num_threads);
          staged = tile.num_passes == 1;
        }
        Products::score(args, pass, rows, num_tokens, args.num_sources, scratch);
      }
      add_up_scores(args, num_tokens, scratch, team);
      for (int i = thread_rank(); i < num_tokens * args.num_queries; i += tile.num_threads) {
        softmax(args, index, i / args.num_queries, i % args.num_queries, scratch);
      }
      sync_first_threads(tile.num_threads);
      mix(args, args.first_token(index), num_tokens, rows, scratch);
      loader.release(at);
      at.advance(tile.num_slots);
    }
  }

 private:
  template <typename Tile>
  __device__ __forceinline__ static void mix(const Args& args, int64_t first_token, int num_tokens,
                                             const Tile& rows, const Scratch& scratch) {
    constexpr int kWidth = Products::kWidth;
    const ColumnSlice slice = slice_of_cta(args);
    Products::combine(
        args, 0, slice.count / kWidth, num_tokens, args.num_queries,
        [&](int token, auto&& add) {
          add(
              args.num_sources, [&](int i) { return rows.row(token * args.num_sources + i); },
              [&](int i) { return args.sources[i].dtype; }, scratch.logit(args, token, 0),
              args.tile.logit_pitch, 1);
        },
        [&](int token, int query, int chunk, Compute(&x)[kWidth]) {
          std::byte* to = row_at(args.out, query * args.num_tokens + first_token + token);
          Products::Elements::store(to, args.out.dtype, slice.first / kWidth + chunk, x);
        });
  }

  // One thread: the weights of a token's sources for one query, in the place of the products.
  __device__ __forceinline__ static void softmax(const Args& args, int64_t index, int token,
                                                 int query, const Scratch& scratch) {
    const int64_t m = args.first_token(index) + token;
    // All CTAs of a team have the same numbers.
    const bool writes = Team::rank() == 0;
    Compute largest = -INFINITY;
    for (int source = 0; source < args.num_sources; ++source) {
      const Compute rstd =
          args.known_rstd != nullptr
              ? args.known_rstd[source * args.num_tokens + m]
              : inverse_square_root(scratch.squares[token * args.num_sources + source] *
                                        args.inverse_hidden +
                                    args.eps);
      Compute& logit = scratch.logit(args, token, source)[query];
      logit *= rstd;
      largest = logit > largest ? logit : largest;
      if (args.stats != nullptr && writes) {
        if (query == 0) args.stats[source * args.num_tokens + m] = rstd;
        const int64_t row =
            args.num_sources + static_cast<int64_t>(query) * args.num_sources + source;
        args.stats[row * args.num_tokens + m] = logit;
      }
    }
    Compute sum = 0;
    for (int source = 0; source < args.num_sources; ++source) {
      Compute& weight = scratch.logit(args, token, source)[query];
      // A single source has weight 1 whatever its logit.
      weight = args.num_sources == 1 ? Compute(1) : exponential(weight - largest);
      sum += weight;
    }
    if (writes) args.lse[query * args.num_tokens + m] = largest + logarithm(sum);
    const Compute inverse_sum = Compute(1) / sum;
    for (int source = 0; source < args.num_sources; ++source) {
      Compute& weight = scratch.logit(args, token, source)[query];
      weight = Products::encode_weight(weight * inverse_sum);
    }
  }
};

template <typename Policy, int kCapacity>
__global__ void __launch_bounds__(kInterBlockThreads + kProducerThreads, 1)
    inter_block_attention_fwd_kernel(
        const __grid_constant__ InterBlockForwardArgs<typename Policy::Products::Compute, kCapacity,
                                                      typename Policy::Team>
            args) {
  InterBlockForwardBody<Policy, kCapacity>::run(args);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
