// Phase 1's products on tensor cores, for rows of bfloat16 or float16.
//
// Both products take what a thread reads 16 bytes at a time: which column of a row, or which
// source, stands where in a product is free as long as both factors agree.
//
// Scores: rows [16, 64 columns] times score vectors [64 columns, 8], as four products over 16
// columns. A score vector is a float32 and goes in as the sum of several values of the storage
// type: three of bfloat16 hold all of its 24 bits, two of float16 hold 22. Each part has an
// accumulator of its own; a warp takes every num_warps-th panel of columns, so an accumulator adds
// up D / 16 / num_warps products.
//
// Mix: values [16 columns, 8 rows twice] times weights [8 rows twice, 8 outputs]. A weight goes in
// as two values of the storage type, one below the other, and meets the same value twice: 16 bits
// of bfloat16, 22 of float16, where the result keeps 8 or 11. A result in float32 takes what is
// left of the weights as such values, too.
#pragma once

#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "inter_block_attention/rows_args.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename T>
struct SplitOf;
template <>
struct SplitOf<__nv_bfloat16> {
  static constexpr int kVectorParts = 3;
  static constexpr bool kNeedsMagnitudes = false;
  static constexpr float kWeightScale = 1;
};
// float16 ends at 65504 and loses bits below 6e-5: score vectors are brought to a largest value of
// 2^14 to 2^15, weights are multiplied by 2^14.
template <>
struct SplitOf<__half> {
  static constexpr int kVectorParts = 2;
  static constexpr bool kNeedsMagnitudes = true;
  static constexpr float kWeightScale = 16384;
};

__device__ __forceinline__ uint32_t word_of(const uint4& bits, int word) {
  return word == 0 ? bits.x : word == 1 ? bits.y : word == 2 ? bits.z : bits.w;
}
__device__ __forceinline__ uint32_t lower_twice(uint32_t word) {
  return (word & 0xffffu) | (word << 16);
}
__device__ __forceinline__ uint32_t upper_twice(uint32_t word) {
  return (word & 0xffff0000u) | (word >> 16);
}

template <typename T, int kMatrices>
struct TensorProducts {
  using Elements = Uniform<T>;
  using Compute = float;
  using Split = SplitOf<T>;
  using Scratch = InterBlockScratch<float, kMatrices>;
  static constexpr int kVectorParts = Split::kVectorParts;
  static constexpr int kVectorValueBytes = sizeof(T);
  static constexpr int kWidth = 8;
  static constexpr bool kOrdersOutputs = false;
  static constexpr int kPanelBytes = kPanelColumns * sizeof(T);

  // Once: nothing but zeros may stand beside the columns and the sources that there are, since 0 *
  // NaN is NaN.
  template <typename Args>
  __device__ __forceinline__ static void prepare(const Args& args, std::byte* slots,
                                                 int rows_of_slot, const Scratch& scratch) {
    const InterBlockTile& tile = args.tile;
    const int row_bytes = slice_of_cta(args).count * static_cast<int>(sizeof(T));
    const int pad_words = (tile.row_pitch - row_bytes) / 16;
    const int num_rows = tile.num_slots * rows_of_slot;
    for (int i = thread_rank(); i < num_rows * pad_words; i += tile.num_threads) {
      const int row = i / pad_words;
      std::byte* slot = slots + row / rows_of_slot * tile.slot_bytes;
      std::byte* end = slot + row % rows_of_slot * tile.row_pitch + row_bytes;
      reinterpret_cast<uint4*>(end)[i % pad_words] = make_uint4(0, 0, 0, 0);
    }
    const int num_logits = scratch.kMatrices * scratch.matrix_size(args);
    for (int i = thread_rank(); i < num_logits; i += tile.num_threads) scratch.logits[i] = 0;
    if constexpr (Split::kNeedsMagnitudes) find_magnitudes(args, scratch);
    sync_first_threads(tile.num_threads);
  }

  // The columns of a pass of all score vectors, split.
  template <typename Args>
  __device__ __forceinline__ static void stage_vectors(const Args& args, int pass,
                                                       const Scratch& scratch) {
    const InterBlockTile& tile = args.tile;
    const int chunks = tile.pass_columns / kWidth;
    const int first = pass * chunks;
    const ColumnSlice slice = slice_of_cta(args);
    for (int i = thread_rank(); i < args.num_queries * chunks; i += tile.num_threads) {
      const int query = i / chunks, chunk = i % chunks;
      float u[kWidth] = {};
      if ((first + chunk) * kWidth < slice.count) {
        load_score_vector(args, query, slice.first / kWidth + first + chunk, u);
      }
      if constexpr (Split::kNeedsMagnitudes) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) u[j] *= 1 / scratch.magnitudes[query];
      }
#pragma unroll
      for (int part = 0; part < kVectorParts; ++part) {
        const uint4 bits = pack(T{}, u);
        std::byte* row = scratch.vectors +
                         static_cast<int64_t>(part * args.num_queries + query) * tile.vector_pitch;
        reinterpret_cast<uint4*>(row)[chunk] = bits;
        float stored[kWidth];
        unpack(bits, T{}, stored);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) u[j] -= stored[j];
      }
    }
  }

  // logits += <u_s, v> and squares += <v, v> over the columns of a pass, for the rows of
  // `num_tokens` tokens, each `row_stride` rows of the tile after the one before.
  template <typename Args, typename Tile>
  __device__ __forceinline__ static void score(const Args& args, int pass, const Tile& rows,
                                               int num_tokens, int row_stride,
                                               const Scratch& scratch) {
    const InterBlockTile& tile = args.tile;
    const int num_rows = num_tokens * args.num_sources;
    const int columns =
        (slice_of_cta(args).count + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
    const int begin = pass * tile.pass_columns;
    const int end = begin + tile.pass_columns < columns ? begin + tile.pass_columns : columns;
    for (int first_row = 0; first_row < num_rows; first_row += kProductRows) {
      // Rows beyond the last one repeat it; their products go nowhere.
      const auto source_row = [&](int r) {
        r = first_row + r < num_rows ? first_row + r : num_rows - 1;
        return rows.row(r / args.num_sources * row_stride + r % args.num_sources);
      };
      for (int query = 0; query < args.num_queries; query += kQueryTiles * kProductQueries) {
        multiply<kVectorParts, true>(
            args, (end - begin) / kPanelColumns, begin * static_cast<int>(sizeof(T)), source_row,
            args.num_queries - query, scratch, [&](int part, int q) {
              q = query + q < args.num_queries ? query + q : args.num_queries - 1;
              return vector_row(args, part, q, scratch);
            });
        sync_first_threads(tile.num_threads);
        add_partials(
            args,
            [&](int row, int column, bool is_square, float sum) {
              const int r = first_row + row, q = query + column;
              if (r >= num_rows || (is_square ? query > 0 : q >= args.num_queries)) return;
              if constexpr (Split::kNeedsMagnitudes) {
                if (!is_square) sum *= scratch.magnitudes[q];
              }
              float& total =
                  is_square ? scratch.squares[r]
                            : scratch.logit(args, r / args.num_sources, r % args.num_sources)[q];
              total = pass == 0 ? sum : total + sum;
            },
            scratch);
        sync_first_threads(tile.num_threads);
      }
    }
  }

  // A part of a score vector, from its first column in shared memory on.
  template <typename Args>
  __device__ __forceinline__ static SharedView vector_row(const Args& args, int part, int query,
                                                          const Scratch& scratch) {
    return {scratch.vectors +
            static_cast<int64_t>(part * args.num_queries + query) * args.tile.vector_pitch};
  }

  // Adds sum_s w_s u_s to a combination over columns from chunk `begin` on, where the staged score
  // vectors begin: their parts one by one. weights[s + n * n_step].
  template <typename Args, typename Add>
  __device__ __forceinline__ static void add_vectors(const Args& args, int begin,
                                                     const Scratch& scratch, const float* weights,
                                                     int n_step, Add&& add) {
    for (int part = 0; part < kVectorParts; ++part) {
      add(
          args.num_queries,
          [&](int s) { return SharedView{vector_row(args, part, s, scratch).base - begin * 16}; },
          [](int) { return kDTypeOf<T>; }, weights, 1, n_step);
    }
  }

  // A weight as the mix takes it.
  __device__ __forceinline__ static float encode_weight(float weight) {
    weight *= Split::kWeightScale;
    const T upper = narrow<T>(weight);
    const T lower = narrow<T>(weight - widen<float>(upper));
    return bits_as<float>(static_cast<uint32_t>(bits_as<uint16_t>(upper)) |
                          static_cast<uint32_t>(bits_as<uint16_t>(lower)) << 16);
  }

  __device__ __forceinline__ static float decode_weight(float encoded) {
    const auto bits = bits_as<uint32_t>(encoded);
    const T upper = bits_as<T>(static_cast<uint16_t>(bits));
    const T lower = bits_as<T>(static_cast<uint16_t>(bits >> 16));
    return (widen<float>(upper) + widen<float>(lower)) * (1 / Split::kWeightScale);
  }

  // For each of `num_tokens` tokens and `num_outputs` outputs n, over chunks `begin` to `end` of
  // the columns (whole panels, but for the last): x = sum_k w_kn x_k, given to store(token, n,
  // chunk, x). fill(token, add) names the terms: add(count, k -> row, k -> dtype, weights, k_step,
  // n_step, rest), with zeros among the weights up to the next multiple of 8 of k. `rest`, which
  // may be left out: what is to be added to the weights, likewise. A warp takes 64 columns of a
  // token.
  template <typename Args, typename Fill, typename Store>
  __device__ __forceinline__ static void combine(const Args& args, int begin, int end,
                                                 int num_tokens, int num_outputs, Fill&& fill,
                                                 Store&& store) {
    constexpr int kPanelChunks = kPanelColumns / kWidth;
    const int panels = (end - begin + kPanelChunks - 1) / kPanelChunks;
    const int lane = thread_rank() % kWarpSize, g = lane / 4, t = lane % 4;
    for (int unit = thread_rank() / kWarpSize; unit < num_tokens * panels;
         unit += args.tile.num_threads / kWarpSize) {
      const int token = unit / panels;
      const int chunk = begin + unit % panels * kPanelChunks + g;
      for (int first = 0; first < num_outputs; first += kQueryTiles * kProductQueries) {
        const int left = num_outputs - first;
        float sums[kQueryTiles][4][4] = {};
        fill(token, [&](int count, auto&& row_of, auto&&, const float* weights, int k_step,
                        int n_step, auto... rest) {
          const float* const factors[] = {weights + (first + g) * n_step,
                                          rest + (first + g) * n_step...};
          for (int k = 0; k < count; k += 8) {
            // Of the eight rows this thread has numbers 2t and 2t + 1, in columns 8 g to 8 g + 7.
            uint4 values[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int mine = k + 2 * t + i;
              values[i] = mine < count ? row_of(mine).template read<uint4>(chunk * 16)
                                       : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (const float* factor : factors) {
              uint32_t b[kQueryTiles][2];
#pragma unroll
              for (int q = 0; q < kQueryTiles; ++q) {
                if (q * kProductQueries >= left) break;
                const float* mine = factor + (k + 2 * t) * k_step + q * kProductQueries * n_step;
                const float early = mine[0], late = mine[k_step];
                b[q][0] = bits_as<uint32_t>(early);
                b[q][1] = bits_as<uint32_t>(late);
              }
#pragma unroll
              for (int word = 0; word < 4; ++word) {
                const uint32_t early = word_of(values[0], word), late = word_of(values[1], word);
                const uint32_t a[4] = {lower_twice(early), upper_twice(early), lower_twice(late),
                                       upper_twice(late)};
#pragma unroll
                for (int q = 0; q < kQueryTiles; ++q) {
                  if (q * kProductQueries >= left) break;
                  multiply_add_16x8x16(T{}, sums[q][word], a, b[q]);
                }
              }
            }
          }
        });
        if (chunk >= end) continue;
#pragma unroll
        for (int q = 0; q < kQueryTiles; ++q) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int n = first + q * kProductQueries + 2 * t + k;
            if (n >= num_outputs) continue;
            float x[kWidth];
#pragma unroll
            for (int word = 0; word < 4; ++word) {
              x[2 * word] = sums[q][word][k] * (1 / Split::kWeightScale);
              x[2 * word + 1] = sums[q][word][2 + k] * (1 / Split::kWeightScale);
            }
            store(token, n, chunk, x);
          }
        }
      }
    }
  }

  // dots = <grad_s, v_i> for the tokens of a tile whose rows are N sources and S gradients each.
  template <typename Args, typename Tile>
  __device__ __forceinline__ static void dots(const Args& args, const Tile& rows, int num_tokens,
                                              const Scratch& scratch) {
    const int panels = (slice_of_cta(args).count + kPanelColumns - 1) / kPanelColumns;
    for (int token = 0; token < num_tokens; ++token) {
      const int first = token * args.rows_of_token();
      for (int source = 0; source < args.num_sources; source += kProductRows) {
        const auto source_row = [&](int r) {
          r += source;
          return rows.row(first + (r < args.num_sources ? r : args.num_sources - 1));
        };
        for (int query = 0; query < args.num_queries; query += kQueryTiles * kProductQueries) {
          multiply<1, false>(args, panels, 0, source_row, args.num_queries - query, scratch,
                             [&](int, int q) {
                               q += query;
                               return rows.row(first + args.num_sources +
                                               (q < args.num_queries ? q : args.num_queries - 1));
                             });
          sync_first_threads(args.tile.num_threads);
          add_partials(
              args,
              [&](int r, int column, bool is_square, float sum) {
                if (is_square || source + r >= args.num_sources ||
                    query + column >= args.num_queries) {
                  return;
                }
                scratch.dot(args, token, source + r)[query + column] = sum;
              },
              scratch);
          sync_first_threads(args.tile.num_threads);
        }
      }
    }
  }

 private:
  // The power of two that brings the largest value of a score vector to 2^14 to 2^15.
  template <typename Args>
  __device__ __forceinline__ static void find_magnitudes(const Args& args, const Scratch& scratch) {
    constexpr int kBias = 127, kMantissaBits = 23, kTop = 14;
    const int lane = thread_rank() % kWarpSize;
    for (int query = thread_rank() / kWarpSize; query < args.num_queries;
         query += args.tile.num_threads / kWarpSize) {
      uint32_t largest = 0;  // of the bits of |u|, which order as the numbers do
      for (int chunk = lane; chunk * kWidth < args.hidden; chunk += kWarpSize) {
        float u[kWidth];
        load_score_vector(args, query, chunk, u);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const uint32_t bits = bits_as<uint32_t>(u[j]) & 0x7fffffffu;
          largest = bits > largest ? bits : largest;
        }
      }
      const int exponent = static_cast<int>(warp_max(largest) >> kMantissaBits);
      // Not so small that its inverse would be infinite.
      const int magnitude = exponent - kTop > 1 ? exponent - kTop : 1;
      if (lane == 0) {
        scratch.magnitudes[query] =
            bits_as<float>(static_cast<uint32_t>(magnitude) << kMantissaBits);
      }
      static_assert(kTop < kBias);
    }
  }

  // 16 rows times up to 32 vectors, over this warp's panels, into its partials: row_of(0 .. 15),
  // from `row_offset` bytes on, and vector_of(part, 0 .. 31). With the rows' squares if asked for.
  template <int kParts, bool kSquares, typename Args, typename RowOf, typename VectorOf>
  __device__ __forceinline__ static void multiply(const Args& args, int panels, int row_offset,
                                                  RowOf&& row_of, int num_vectors,
                                                  const Scratch& scratch, VectorOf&& vector_of) {
    const InterBlockTile& tile = args.tile;
    const int warp = thread_rank() / kWarpSize, num_warps = tile.num_threads / kWarpSize;
    const int lane = thread_rank() % kWarpSize, g = lane / 4, t = lane % 4;
    const auto upper = row_of(g), lower = row_of(g + 8);
    float sums[kQueryTiles][kParts][4] = {};
    float squares[2] = {};
    for (int panel = warp; panel < panels; panel += num_warps) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Of the 64 columns this thread has the eights number 2t and 2t + 1, one after the other.
        const int offset = panel * kPanelBytes + t * 32 + half * 16;
        const uint4 x[2] = {upper.template read<uint4>(row_offset + offset),
                            lower.template read<uint4>(row_offset + offset)};
        if constexpr (kSquares) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float v[kWidth];
            unpack(x[k], T{}, v);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) squares[k] += v[j] * v[j];
          }
        }
        const uint32_t a[2][4] = {{x[0].x, x[1].x, x[0].y, x[1].y},
                                  {x[0].z, x[1].z, x[0].w, x[1].w}};
#pragma unroll
        for (int q = 0; q < kQueryTiles; ++q) {
          if (q * kProductQueries >= num_vectors) break;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const auto u = vector_of(part, q * kProductQueries + g).template read<uint4>(offset);
            multiply_add_16x8x16(T{}, sums[q][part], a[0], {u.x, u.y});
            multiply_add_16x8x16(T{}, sums[q][part], a[1], {u.z, u.w});
          }
        }
      }
    }

    const auto partial = [&](int row) {
      return scratch.partials + (warp * kProductRows + row) * tile.partial_pitch;
    };
#pragma unroll
    for (int q = 0; q < kQueryTiles; ++q) {
      if (q * kProductQueries >= num_vectors) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // The smallest part first.
        float sum = sums[q][kParts - 1][i];
#pragma unroll
        for (int part = kParts - 2; part >= 0; --part) sum += sums[q][part][i];
        partial(g + i / 2 * 8)[q * kProductQueries + 2 * t + i % 2] = sum;
      }
    }
    if constexpr (kSquares) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        squares[k] += shuffle_xor(squares[k], 1);
        squares[k] += shuffle_xor(squares[k], 2);
        if (t == 0) partial(g + 8 * k)[tile.partial_pitch - 1] = squares[k];
      }
    }
  }

  // The sums of the warps' partials, in order: put(row, vector, is_square, sum).
  template <typename Args, typename Put>
  __device__ __forceinline__ static void add_partials(const Args& args, Put&& put,
                                                      const Scratch& scratch) {
    const InterBlockTile& tile = args.tile;
    const int num_warps = tile.num_threads / kWarpSize;
    for (int i = thread_rank(); i < kProductRows * tile.partial_pitch; i += tile.num_threads) {
      const int column = i % tile.partial_pitch;
      const bool is_square = column == tile.partial_pitch - 1;
      if (!is_square && column >= tile.partial_pitch - 8) continue;
      float sum = 0;
      for (int warp = 0; warp < num_warps; ++warp) {
        sum += scratch.partials[warp * kProductRows * tile.partial_pitch + i];
      }
      put(i / tile.partial_pitch, column, is_square, sum);
    }
  }
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
