// How a CTA of phase 1 cuts its work, and how many CTAs share a token's columns: pure functions of
// sizes and of what the device has.
//
// A slot of shared memory holds a tile: all rows of a few tokens. The score vectors (scale * query
// * key_weight, [S, D]) lie beside the slots, and so do the sums of their gradients in the
// backward: they are read from memory, and written to it, once. Where one CTA has no room for all
// that, a cluster shares out the columns: of rows, score vectors and sums alike. Its CTAs tell one
// another nothing but products summed over columns, N (S + 1) numbers a token.
//
// Where there are no clusters, or none is large enough, each tile is scored in passes over the
// columns, and every pass brings its columns of the score vectors from the second-level cache
// again; and sums stay in the second-level cache. The sources are read once in either case.
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
// so tensor cores have time to spare, and what decides is how often the score vectors come again:
// for every token they would be more than twice its own bytes. In the first case one CTA keeps
// them. In the second a cluster of 8 does, 130 KB each, beside three tiles of one token; the
// backward's tiles hold S gradients a token too, and there a cluster of 16 keeps 65 KB of score
// vectors, 43 KB of sums and two tiles of one token. Each CTA gives each other one 0.8 KB a token.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.hpp"

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

struct InterBlockTile {
  int cluster_size;  // CTAs that share a token
  int least_panels;  // of a CTA, and how many CTAs, the first ones, have one more
  int num_larger_slices;
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
  int sum_pitch;      // values from the sums for a score vector to those for the next
  int sum_values;     // of the score vectors' gradients in shared memory; 0: they are not there
  int team_capacity;  // bytes of a round of sums that the CTAs of a cluster give to one
  int team_bytes;     // of shared memory for such sums
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
  int rows_of_token;  // sources, and in the backward gradients of outputs
  int num_matrices;   // of logits, and of what the backward makes of them
  bool makes_sums;    // of the score vectors' gradients
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
  return (logits + squares + partials + shape.num_queries + tile.sum_values) * shape.compute_bytes;
}

// Barriers, and two rounds of sums.
constexpr int64_t inter_block_team_bytes(int cluster_size, int capacity) {
  return 2 * 8 + (cluster_size > 1 ? 2 * static_cast<int64_t>(capacity) : 0);
}

// The tile of a CTA, one of `cluster_size`. Where not even one token fits, `shared_bytes` is more
// than the device has.
inline InterBlockTile choose_inter_block_tile(const InterBlockShape& shape,
                                              const DeviceLimits& limits, int cluster_size = 1,
                                              bool shares_sums = false) {
  constexpr int64_t kBarrierBytes = 2 * 8;  // of a slot
  constexpr int kMostSlots = 3;             // one in use, two on their way
  const bool tensor = shape.vector_parts > 0;
  const bool backward = shape.num_matrices > 1;
  const int64_t budget = std::min(limits.shared_bytes_per_cta,
                                  limits.shared_bytes_per_multiprocessor - kReservedSharedBytes);
  const int all_panels = round_up(shape.hidden, kPanelColumns) / kPanelColumns;
  InterBlockTile tile = {};
  tile.cluster_size = cluster_size;
  tile.least_panels = all_panels / cluster_size;
  tile.num_larger_slices = all_panels % cluster_size;
  const int panels = tile.least_panels + (tile.num_larger_slices > 0 ? 1 : 0);
  const int columns = panels * kPanelColumns;

  // As few rounds over the panels as the most warps need, and no more warps than that takes.
  const int most_warps = (backward ? kInterBlockBackwardThreads : kInterBlockThreads) / 32;
  const int rounds = (panels + most_warps - 1) / most_warps;
  tile.num_threads = 32 * std::clamp((panels + rounds - 1) / rounds, 4, most_warps);
  // 16 bytes more than a multiple of 128, so that neighbouring rows start in other banks.
  const int64_t row_values = std::min<int64_t>(shape.hidden, columns);
  tile.row_pitch = tensor ? columns * 2 + 16 : round_up(row_values * shape.row_value_bytes, 16);
  const int64_t vector_parts = std::max(shape.vector_parts, 1);
  // Reads of 8 queries of every second source hit 32 banks.
  const int query_tiles = round_up(shape.num_queries, kProductQueries) / kProductQueries;
  tile.logit_pitch = query_tiles * kProductQueries + 4;
  tile.logit_sources = round_up(shape.num_sources, 8);
  tile.sum_pitch = columns;
  tile.sum_values = shares_sums ? saturated(shape.num_queries * columns) : 0;
  // One column more than the logits, for the sums of squares.
  tile.partial_pitch = tensor ? std::min(query_tiles, kQueryTiles) * kProductQueries + 8 : 0;

  const auto set_pass_columns = [&](int pass_columns) {
    tile.pass_columns = pass_columns;
    tile.num_passes = (columns + pass_columns - 1) / pass_columns;
    tile.vector_pitch =
        saturated(static_cast<int64_t>(pass_columns) * shape.vector_value_bytes + 16);
    tile.vector_bytes = saturated(vector_parts * shape.num_queries * tile.vector_pitch);
  };
  const auto fixed_bytes = [&] {
    return kBarrierBytes + tile.vector_bytes + tile.team_bytes +
           inter_block_scratch_bytes(tile, shape);
  };
  const auto slots_that_fit = [&] {
    if (!shape.uses_slots) return fixed_bytes() <= budget ? int64_t{kMostSlots} : int64_t{0};
    return (budget - fixed_bytes()) / (tile.slot_bytes + kBarrierBytes);
  };
  const auto set_tokens = [&](int tokens) {
    tile.tokens = tokens;
    const int64_t rows = static_cast<int64_t>(tokens) * shape.rows_of_token;
    tile.slot_bytes = shape.uses_slots ? saturated(rows * tile.row_pitch) : 0;
    const int64_t numbers =
        static_cast<int64_t>(tokens) * shape.num_sources * (shape.num_queries + 1);
    tile.team_capacity = round_up(cluster_size * numbers * shape.compute_bytes, 8);
    tile.team_bytes = round_up(inter_block_team_bytes(cluster_size, tile.team_capacity), 16);
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
    const int64_t a_panel =
        vector_parts * shape.num_queries * kPanelColumns * shape.vector_value_bytes;
    const int64_t row_ends = vector_parts * shape.num_queries * 16;
    const int64_t most = std::max<int64_t>((left - row_ends) / a_panel, 1);
    const int passes = static_cast<int>((panels + most - 1) / most);
    set_pass_columns((panels + passes - 1) / passes * kPanelColumns);
  }
  tile.num_slots =
      shape.uses_slots ? static_cast<int>(std::clamp<int64_t>(slots_that_fit(), 1, kMostSlots)) : 1;
  const int64_t shared_bytes = fixed_bytes() + tile.num_slots * (tile.slot_bytes + kBarrierBytes);
  tile.shared_bytes = saturated(shared_bytes);
  const int by_memory = static_cast<int>(limits.shared_bytes_per_multiprocessor /
                                         (shared_bytes + kReservedSharedBytes));
  const int registers = backward ? kInterBlockBackwardRegisters : kInterBlockRegisters;
  const int by_registers =
      kRegistersPerMultiprocessor / (registers * (tile.num_threads + kProducerThreads));
  tile.ctas_per_multiprocessor = std::clamp(std::min(by_memory, by_registers), 1, 8);
  return tile;
}

inline bool fits(const InterBlockTile& tile, const DeviceLimits& limits) {
  return tile.shared_bytes <= limits.shared_bytes_per_cta;
}

// More CTAs than kMostCtasInCluster are for devices that say that they run so many.
constexpr int kMostCtasInLargeCluster = 16;

// The smallest team, of at most `most_ctas`, whose tile is complete, with the sums of the backward
// in shared memory; else without. Where there is none, the smallest one that keeps the score
// vectors, with or without the sums, else the smallest one that holds a token, else a CTA alone.
inline InterBlockTile choose_inter_block_team(const InterBlockShape& shape,
                                              const DeviceLimits& limits, int most_ctas) {
  const int64_t panels = (shape.hidden + kPanelColumns - 1) / kPanelColumns;
  most_ctas =
      static_cast<int>(std::min({static_cast<int64_t>(most_ctas), panels,
                                 static_cast<int64_t>(std::max(1, limits.num_multiprocessors))}));
  InterBlockTile tile;
  const auto find = [&](bool shares_sums, auto&& is_good) {
    if (shares_sums && !(shape.makes_sums && shape.uses_slots)) return false;
    for (int size = 1; size <= most_ctas; size *= 2) {
      tile = choose_inter_block_tile(shape, limits, size, shares_sums);
      if (fits(tile, limits) && is_good()) return true;
    }
    return false;
  };
  // Rows are on their way while others are in use.
  const auto is_complete = [&] {
    return tile.num_passes == 1 && (tile.num_slots > 1 || !shape.uses_slots);
  };
  const auto keeps_vectors = [&] { return tile.num_passes == 1; };
  if (find(true, is_complete) || find(false, is_complete) || find(true, keeps_vectors) ||
      find(false, keeps_vectors) || find(false, [] { return true; })) {
    return tile;
  }
  return choose_inter_block_tile(shape, limits);
}

// Whether queries have room for their logits, the sources being read in place; `num_matrices` is 1
// forward and 3 backward.
inline bool inter_block_queries_fit(int64_t num_queries, int64_t hidden, int num_sources,
                                    int compute_bytes, int num_matrices,
                                    const DeviceLimits& limits) {
  const InterBlockShape shape = {.hidden = hidden,
                                 .num_sources = num_sources,
                                 .num_queries = num_queries,
                                 .row_value_bytes = compute_bytes,
                                 .vector_value_bytes = compute_bytes,
                                 .vector_parts = 0,
                                 .compute_bytes = compute_bytes,
                                 .uses_slots = false,
                                 .rows_of_token = num_sources,
                                 .num_matrices = num_matrices,
                                 .makes_sums = false};
  return fits(choose_inter_block_tile(shape, limits), limits);
}

inline int64_t most_inter_block_queries(int64_t hidden, int num_sources, int compute_bytes,
                                        int num_matrices, const DeviceLimits& limits) {
  int64_t most = 0;
  for (int64_t step = int64_t{1} << 16; step > 0; step /= 2) {
    if (inter_block_queries_fit(most + step, hidden, num_sources, compute_bytes, num_matrices,
                                limits)) {
      most += step;
    }
  }
  return most;
}

}  // namespace attnres::cuda
