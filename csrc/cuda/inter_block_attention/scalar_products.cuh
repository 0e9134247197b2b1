// Phase 1's products by ordinary arithmetic, for rows of any dtype and alignment. A score vector is
// in shared memory as it is; what a thread reads of a row serves several of them.
#pragma once

#include "common/reduce.cuh"
#include "inter_block_attention/rows_args.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename ElementsPolicy, int kMatrices>
struct ScalarProducts {
  using Elements = ElementsPolicy;
  using Compute = typename Elements::Compute;
  using Scratch = InterBlockScratch<Compute, kMatrices>;
  static constexpr int kWidth = Elements::kWidth;
  static constexpr int kVectorParts = 0;
  static constexpr int kVectorValueBytes = sizeof(Compute);
  // Queries that share what is read of a row.
  static constexpr int kQueries = 4;
  using Gains = Mixed<Compute, kWidth>;

  template <typename Args>
  __device__ __forceinline__ static void prepare(const Args&, std::byte*, int, const Scratch&) {}

  template <typename Args>
  __device__ __forceinline__ static void stage_vectors(const Args& args, int pass,
                                                       const Scratch& scratch) {
    const InterBlockTile& tile = args.tile;
    const int chunks = tile.pass_columns / kWidth;
    const int first = pass * chunks;
    const ColumnSlice slice = slice_of_cta(args);
    for (int i = thread_rank(); i < args.num_queries * chunks; i += tile.num_threads) {
      const int query = i / chunks, chunk = i % chunks;
      if ((first + chunk) * kWidth >= slice.count) continue;
      Compute u[kWidth];
      load_score_vector(args, query, slice.first / kWidth + first + chunk, u);
      Gains::store(scratch.vectors + static_cast<int64_t>(query) * tile.vector_pitch,
                   kDTypeOf<Compute>, chunk, u);
    }
  }

  template <typename Args>
  __device__ __forceinline__ static SharedView vector_row(const Args& args, int, int query,
                                                          const Scratch& scratch) {
    return {scratch.vectors + static_cast<int64_t>(query) * args.tile.vector_pitch};
  }

  template <typename Args, typename Tile>
  __device__ __forceinline__ static void score(const Args& args, int pass, const Tile& rows,
                                               int num_tokens, int row_stride,
                                               const Scratch& scratch) {
    const int chunks = args.tile.pass_columns / kWidth;
    const int first = pass * chunks;
    const int all = slice_of_cta(args).count / kWidth;
    const int last = all < first + chunks ? all : first + chunks;
    // The weights of the tile before may still be in use.
    sync_first_threads(args.tile.num_threads);
    for_products(
        args, num_tokens, first, last,
        [&](int token, int source) { return rows.row(token * row_stride + source); },
        [&](int, int query, int chunk, Compute(&u)[kWidth]) {
          Gains::load(vector_row(args, 0, query, scratch), kDTypeOf<Compute>, chunk - first, u);
        },
        [&](int token, int source, int query, Compute dot) {
          Compute& total = scratch.logit(args, token, source)[query];
          total = pass == 0 ? dot : total + dot;
        },
        [&](int token, int source, Compute square) {
          Compute& total = scratch.squares[token * args.num_sources + source];
          total = pass == 0 ? square : total + square;
        });
    sync_first_threads(args.tile.num_threads);
  }

  // dots = <grad_s, v_i> for the tokens of a tile whose rows are N sources and S gradients each.
  template <typename Args, typename Tile>
  __device__ __forceinline__ static void dots(const Args& args, const Tile& rows, int num_tokens,
                                              const Scratch& scratch) {
    const int row_stride = args.rows_of_token();
    sync_first_threads(args.tile.num_threads);
    for_products(
        args, num_tokens, 0, slice_of_cta(args).count / kWidth,
        [&](int token, int source) { return rows.row(token * row_stride + source); },
        [&](int token, int query, int chunk, Compute(&g)[kWidth]) {
          Elements::load(rows.row(token * row_stride + args.num_sources + query),
                         args.grad_out.dtype, chunk, g);
        },
        [&](int token, int source, int query, Compute dot) {
          scratch.dot(args, token, source)[query] = dot;
        },
        [](int, int, Compute) {});
    sync_first_threads(args.tile.num_threads);
  }

  // Adds sum_s w_s u_s to a combination over columns from chunk `begin` on, where the staged score
  // vectors begin. weights[s + n * n_step].
  template <typename Args, typename Add>
  __device__ __forceinline__ static void add_vectors(const Args& args, int begin,
                                                     const Scratch& scratch, const Compute* weights,
                                                     int n_step, Add&& add) {
    const int64_t skipped = static_cast<int64_t>(begin) * kWidth * sizeof(Compute);
    add(
        args.num_queries,
        [&](int s) { return SharedView{vector_row(args, 0, s, scratch).base - skipped}; },
        [](int) { return kDTypeOf<Compute>; }, weights, 1, n_step);
  }

  __device__ __forceinline__ static Compute encode_weight(Compute weight) { return weight; }
  __device__ __forceinline__ static Compute decode_weight(Compute weight) { return weight; }

  // See TensorProducts. A thread takes a chunk of columns of a token and four outputs at a time, in
  // order: an output may be added to what the one before has stored.
  template <typename Args, typename Fill, typename Store>
  __device__ __forceinline__ static void combine(const Args& args, int begin, int end,
                                                 int num_tokens, int num_outputs, Fill&& fill,
                                                 Store&& store) {
    for (int token = 0; token < num_tokens; ++token) {
      for (int chunk = begin + thread_rank(); chunk < end; chunk += args.tile.num_threads) {
        for (int n = 0; n < num_outputs; n += kQueries) {
          const int left = num_outputs - n;
          Compute sums[kQueries][kWidth] = {};
          fill(token, [&](int count, auto&& row_of, auto&& dtype_of, const Compute* weights,
                          int k_step, int n_step, auto...) {
            for (int k = 0; k < count; ++k) {
              Compute x[kWidth];
              Elements::load(row_of(k), dtype_of(k), chunk, x);
#pragma unroll
              for (int q = 0; q < kQueries; ++q) {
                if (q >= left) break;
                const Compute weight = weights[k * k_step + (n + q) * n_step];
#pragma unroll
                for (int j = 0; j < kWidth; ++j) sums[q][j] += weight * x[j];
              }
            }
          });
#pragma unroll
          for (int q = 0; q < kQueries; ++q) {
            if (q < left) store(token, n + q, chunk, sums[q]);
          }
        }
      }
    }
  }

 private:
  // Products of each source of each token with S vectors, over chunks `first` to `last`: a warp
  // takes a row and four vectors at a time.
  template <typename Args, typename RowOf, typename LoadVector, typename PutDot, typename PutSquare>
  __device__ __forceinline__ static void for_products(const Args& args, int num_tokens, int first,
                                                      int last, RowOf&& row_of,
                                                      LoadVector&& load_vector, PutDot&& put_dot,
                                                      PutSquare&& put_square) {
    const int lane = thread_rank() % kWarpSize;
    const int num_groups = (args.num_queries + kQueries - 1) / kQueries;
    for (int i = thread_rank() / kWarpSize; i < num_tokens * args.num_sources * num_groups;
         i += args.tile.num_threads / kWarpSize) {
      const int r = i / num_groups, query = i % num_groups * kQueries;
      const int token = r / args.num_sources, source = r % args.num_sources;
      const auto row = row_of(token, source);
      Compute dots[kQueries] = {};
      Compute squares = 0;
      for (int chunk = first + lane; chunk < last; chunk += kWarpSize) {
        Compute x[kWidth];
        Elements::load(row, args.sources[source].dtype, chunk, x);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) squares += x[j] * x[j];
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          if (query + q >= args.num_queries) break;
          Compute y[kWidth];
          load_vector(token, query + q, chunk, y);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) dots[q] += x[j] * y[j];
        }
      }
      squares = warp_sum(squares);
      if (query == 0 && lane == 0) put_square(token, source, squares);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const Compute dot = warp_sum(dots[q]);
        if (lane == 0 && query + q < args.num_queries) put_dot(token, source, query + q, dot);
      }
    }
  }
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
