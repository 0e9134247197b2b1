// How a CTA of phase 1 cuts its work: a pure function of sizes and of what the device has.
//
// A slot of shared memory holds a tile: all rows of a few tokens. The score vectors (scale * query
// * key_weight, [S, D]) lie beside the slots, all of them if they fit, and are then read from
// memory once per CTA. Otherwise each tile is scored in passes over the columns, and every pass
// brings its columns of the score vectors from the second-level cache again. The sources are read
// once in either case.
//
// What that is on an H100, with X the bytes of one [M, D] tensor in bfloat16 and a multiprocessor's
// share of the memory's bandwidth 15 bytes a cycle (arithmetic, not measurements):
//
//                                     N9 S6 D2304    N8 S24 D7168
//   bytes of a token, (N + S) X / M     69 120         458 752
//   cycles they take                     4 600          30 600
//   products of the scores                 432           4 032    16 x 8 x 16, 16 rows a token
//   products of the mix                    288           1 344
//   cycles of four tensor cores          1 440          10 750    at 8 cycles each, as mma.sync
//   score vectors, three parts          82 944       1 032 192    bytes
//
// so tensor cores have time to spare, and what decides is how often the score vectors come again.
// In the first case that is never. In the second it is for every token, and what they are made of
// is three times a token's own bytes, from the second-level cache: that, and not memory, is then
// the limit. A backward tile also holds S gradients a token; where not one token fits, rows are
// read in place, by every step that wants them. CTAs that share a token's columns would lift both.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/depth_attention_tile.hpp"

namespace attnres::cuda {

// Columns that a warp scores or mixes at a time on tensor cores: 128 bytes of a row.
constexpr int kPanelColumns = 64;
// Rows (a source of a token each) and queries of one product.
constexpr int kProductRows = 16;
constexpr int kProductQueries = 8;
// Products of a warp that share their rows: 32 queries.
constexpr int kQueryTiles = 4;
// Threads that compute, and the registers that leaves to each. A fourth of the warps shares a
// fourth of the registers: 16 with the one that loads leave 128, 12 leave 168, and the backward
// takes more than 128.
constexpr int kInterBlockThreads = kMaxComputeThreads;
constexpr int kInterBlockRegisters = 128;
constexpr int kInterBlockBackwardThreads = 11 * 32;
constexpr int kInterBlockBackwardRegisters = 168;
static_assert((kInterBlockThreads + kProducerThreads) * kInterBlockRegisters <=
              kRegistersPerMultiprocessor);
static_assert((kInterBlockBackwardThreads + kProducerThreads) * kInterBlockBackwardRegisters <=
              kRegistersPerMultiprocessor);

constexpr int round_up(int64_t value, int multiple) {
  return static_cast<int>((value + multiple - 1) / multiple * multiple);
}

struct InterBlockTile {
  int num_threads;  // that compute; a multiple of 32
  int tokens;       // of a tile
  int num_slots;
  int slot_bytes;  // 0: rows are read in place
  int row_pitch;   // bytes from a row of a slot to the next
  int num_passes;
  int pass_columns;
  int vector_pitch;   // bytes from a score vector to the next, in one part
  int vector_bytes;   // of shared memory for score vectors
  int logit_pitch;    // values from a source's logits to the next source's, in a token
  int logit_sources;  // room for so many
  int partial_pitch;  // values from a row of partial products to the next; 0: there are none
  int sum_values;     // of the score vectors' gradients in shared memory
  int ctas_per_multiprocessor;
  int shared_bytes;
};

struct InterBlockShape {
  int64_t hidden;
  int num_sources;
  int64_t num_queries;
  int row_value_bytes;  // of the widest source
  int vector_value_bytes;
  int vector_parts;  // that a score vector is split into for tensor cores; 0: no tensor cores
  int compute_bytes;
  bool uses_slots;
  int rows_of_token;   // sources, and in the backward gradients of outputs
  int num_matrices;    // of logits, and of what the backward makes of them
  int64_t sum_values;  // of the score vectors' gradients, if their sums are shared
};

// Shared memory beside slots, barriers and score vectors: logits, two numbers of each source of a
// tile, what each warp has of the products, a factor of each score vector, and sums.
constexpr int64_t inter_block_scratch_bytes(const InterBlockTile& tile,
                                            const InterBlockShape& shape) {
  const int64_t num_warps = tile.num_threads / 32;
  const int64_t logits = static_cast<int64_t>(shape.num_matrices) * tile.tokens *
                         tile.logit_sources * tile.logit_pitch;
  const int64_t squares = 2 * static_cast<int64_t>(tile.tokens) * shape.num_sources;
  const int64_t partials = num_warps * kProductRows * tile.partial_pitch;
  return (logits + squares + partials + shape.num_queries + shape.sum_values) * shape.compute_bytes;
}

// Where not even one token fits, `shared_bytes` is more than the device has.
inline InterBlockTile choose_inter_block_tile(const InterBlockShape& shape,
                                              const DeviceLimits& limits) {
  constexpr int kBarrierBytes = 2 * 8;  // of a slot
  constexpr int kMostSlots = 3;         // one in use, two on their way
  const bool tensor = shape.vector_parts > 0;
  const bool backward = shape.num_matrices > 1;
  const int64_t budget = std::min(limits.shared_bytes_per_cta,
                                  limits.shared_bytes_per_multiprocessor - kReservedSharedBytes);
  const int columns = round_up(shape.hidden, kPanelColumns);
  const int panels = columns / kPanelColumns;
  InterBlockTile tile = {};

  // As few rounds over the panels as the most warps need, and no more warps than that takes.
  const int most_warps = (backward ? kInterBlockBackwardThreads : kInterBlockThreads) / 32;
  const int rounds = (panels + most_warps - 1) / most_warps;
  tile.num_threads = 32 * std::clamp((panels + rounds - 1) / rounds, 4, most_warps);
  // 16 bytes more than a multiple of 128, so that neighbouring rows start in other banks.
  tile.row_pitch = tensor ? columns * 2 + 16 : round_up(shape.hidden * shape.row_value_bytes, 16);
  // Reads of 8 queries of every second source hit 32 banks.
  const int query_tiles = round_up(shape.num_queries, kProductQueries) / kProductQueries;
  tile.logit_pitch = query_tiles * kProductQueries + 4;
  tile.logit_sources = round_up(shape.num_sources, 8);
  tile.sum_values = static_cast<int>(std::min<int64_t>(shape.sum_values, INT32_MAX));
  // One column more than the logits, for the sums of squares.
  tile.partial_pitch = tensor ? std::min(query_tiles, kQueryTiles) * kProductQueries + 8 : 0;

  const auto set_pass_columns = [&](int pass_columns) {
    tile.pass_columns = pass_columns;
    tile.num_passes = (columns + pass_columns - 1) / pass_columns;
    tile.vector_pitch = pass_columns * shape.vector_value_bytes + 16;
    tile.vector_bytes =
        static_cast<int>(std::max(shape.vector_parts, 1) * shape.num_queries * tile.vector_pitch);
  };
  const auto fixed_bytes = [&] {
    return tile.vector_bytes + inter_block_scratch_bytes(tile, shape) + kBarrierBytes;
  };
  const auto slots_that_fit = [&] {
    if (!shape.uses_slots) return fixed_bytes() <= budget ? int64_t{kMostSlots} : int64_t{0};
    return (budget - fixed_bytes()) / (tile.slot_bytes + kBarrierBytes);
  };
  const auto set_tokens = [&](int tokens) {
    tile.tokens = tokens;
    tile.slot_bytes = shape.uses_slots ? tokens * shape.rows_of_token * tile.row_pitch : 0;
  };

  // Products take 16 rows: several tokens' where sources are few, as far as two tiles fit.
  set_pass_columns(columns);
  set_tokens(std::clamp(kProductRows / shape.num_sources, 1, 8));
  while (tile.tokens > 1 && slots_that_fit() < 2) set_tokens(tile.tokens - 1);
  // One slot is enough where two would cost the score vectors their place.
  if (slots_that_fit() < 1) {
    set_pass_columns(kPanelColumns);
    const int64_t slots = std::clamp<int64_t>(slots_that_fit(), 1, 2);
    const int64_t left =
        budget - fixed_bytes() + tile.vector_bytes - slots * (tile.slot_bytes + kBarrierBytes);
    const int64_t a_panel = std::max(shape.vector_parts, 1) * shape.num_queries * kPanelColumns *
                            shape.vector_value_bytes;
    const int64_t row_ends = std::max(shape.vector_parts, 1) * shape.num_queries * 16;
    const int64_t most = std::max<int64_t>((left - row_ends) / a_panel, 1);
    const int passes = static_cast<int>((panels + most - 1) / most);
    set_pass_columns((panels + passes - 1) / passes * kPanelColumns);
  }
  tile.num_slots =
      shape.uses_slots ? static_cast<int>(std::clamp<int64_t>(slots_that_fit(), 1, kMostSlots)) : 1;
  tile.shared_bytes = static_cast<int>(std::min<int64_t>(
      fixed_bytes() + static_cast<int64_t>(tile.num_slots) * (tile.slot_bytes + kBarrierBytes),
      INT32_MAX));
  const int by_memory =
      limits.shared_bytes_per_multiprocessor / (tile.shared_bytes + kReservedSharedBytes);
  const int registers = backward ? kInterBlockBackwardRegisters : kInterBlockRegisters;
  const int by_registers =
      kRegistersPerMultiprocessor / (registers * (tile.num_threads + kProducerThreads));
  tile.ctas_per_multiprocessor = std::clamp(std::min(by_memory, by_registers), 1, 8);
  return tile;
}

inline bool fits(const InterBlockTile& tile, const DeviceLimits& limits) {
  return tile.shared_bytes <= limits.shared_bytes_per_cta;
}

// So many queries have room for their logits beside those of `num_sources` sources; `num_matrices`
// is 1 forward and 3 backward.
inline int64_t most_inter_block_queries(int64_t hidden, int num_sources, int compute_bytes,
                                        int num_matrices, const DeviceLimits& limits) {
  int64_t most = 0;
  for (int64_t step = int64_t{1} << 16; step > 0; step /= 2) {
    const InterBlockShape shape = {hidden, num_sources,   most + step, compute_bytes, compute_bytes,
                                   0,      compute_bytes, false,       num_sources,   num_matrices,
                                   0};
    if (fits(choose_inter_block_tile(shape, limits), limits)) most += step;
  }
  return most;
}

}  // namespace attnres::cuda
