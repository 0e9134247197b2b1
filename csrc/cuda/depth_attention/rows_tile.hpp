// How a CTA of depth attention cuts its work, and how many CTAs share a row: pure functions of
// sizes and of what the device has.
//
// A row's N x D values pass through a ring of slots in shared memory. A slot holds one step: a span
// of a source's row, all of it unless D is too large for the registers of one CTA. When all steps
// of a row fit, the row is read once: its logits and its mix both come from the slots. Otherwise
// each sweep over the row is a sweep over memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.hpp"

namespace attnres::cuda {

struct DepthAttentionTile {
  int cluster_size;    // CTAs that share a row
  int num_segments;    // one warp's share of the columns: of a row; without a cluster, of a span
  int least_segments;  // of a cluster's CTA, and how many CTAs, the first ones, have one more
  int num_larger_slices;
  int slice_chunks;  // of a row, in the CTA that has most
  int num_threads;   // that compute; a multiple of 32
  int num_spans;
  int num_slots;
  int slot_bytes;
  bool resident;  // all steps of a row fit into the slots
  int ctas_per_multiprocessor;
  int team_bytes;  // of shared memory, for what CTAs of a cluster tell one another
  int shared_bytes;
};

// What the plan counts on; tests/kernels compares it with the machine code. `share_bytes` is what a
// thread holds of the pseudo-query, and again of the mix; `dispatch` is the elements policy's
// kDispatchRegisters.
constexpr int depth_attention_registers(int share_bytes, int dispatch) {
  return 2 * share_bytes / 4 + 64 + dispatch;
}
static_assert(kMaxThreads * depth_attention_registers(32 * 4, 0) <= kRegistersPerMultiprocessor);
// The backward holds u, the mix or its gradient, and the gradient of u.
constexpr int depth_attention_backward_registers(int share_bytes, int dispatch) {
  return 3 * share_bytes / 4 + 64 + dispatch;
}
static_assert(kMaxThreads * depth_attention_backward_registers(16 * 4, 0) <=
              kRegistersPerMultiprocessor);
// Block summation holds two slots at a time.
constexpr int kLeastSlots = 2;
// Barriers, and two rounds of a pair of sums for every segment and source.
constexpr int64_t depth_attention_team_bytes(int cluster_size, int64_t num_segments,
                                             int num_sources) {
  return 2 * 8 + (cluster_size > 1 ? 2 * 8 * num_segments * num_sources : 0);
}

struct DepthAttentionShape {
  int64_t row_chunks;  // in a row
  int chunk_bytes;
  int chunks_per_thread;
  int segments_per_warp;
  int registers;
  int num_sources;
  int num_steps;  // source rows that a token loads
  int compute_bytes;
  // Values of the compute dtype in shared memory: for each segment beside its pair of sums for
  // every source, for each source, for each chunk of the CTA's columns.
  int values_per_segment;
  int values_per_source;
  int values_per_chunk;
  bool uses_slots;  // whether the loader stages its steps in shared memory at all
};

inline DepthAttentionTile choose_depth_attention_tile(const DepthAttentionShape& shape,
                                                      const DeviceLimits& limits,
                                                      bool is_cluster = false,
                                                      int cluster_size = 1) {
  DepthAttentionTile tile = {};
  constexpr int kBarrierBytes = 2 * 8;  // of a slot
  tile.cluster_size = cluster_size;
  const int warp_chunks = 32 * shape.chunks_per_thread;
  const auto warps = static_cast<int>((shape.row_chunks + warp_chunks - 1) / warp_chunks);
  const int most_warps = (warps + cluster_size - 1) / cluster_size;
  tile.num_threads = std::min(32 * most_warps, kMaxComputeThreads);
  tile.num_segments = (is_cluster ? warps : tile.num_threads / 32) * shape.segments_per_warp;
  tile.least_segments = warps / cluster_size;
  tile.num_larger_slices = warps % cluster_size;
  const int64_t slice_chunks =
      std::min(shape.row_chunks, static_cast<int64_t>(most_warps) * warp_chunks);
  tile.slice_chunks = static_cast<int>(slice_chunks);
  const int64_t span_chunks = static_cast<int64_t>(tile.num_threads) * shape.chunks_per_thread;
  tile.num_spans = static_cast<int>((slice_chunks + span_chunks - 1) / span_chunks);
  tile.team_bytes = is_cluster ? saturated(depth_attention_team_bytes(
                                     cluster_size, tile.num_segments, shape.num_sources))
                               : 0;
  const int cta_segments = tile.num_threads / 32 * shape.segments_per_warp;
  const int64_t values =
      static_cast<int64_t>(cta_segments) * (2 * shape.num_sources + shape.values_per_segment) +
      shape.num_sources * shape.values_per_source + slice_chunks * shape.values_per_chunk;
  const int64_t beside_slots = tile.team_bytes + values * shape.compute_bytes;

  const int threads_per_cta = tile.num_threads + kProducerThreads;
  const int most_ctas =
      std::clamp(kRegistersPerMultiprocessor / (shape.registers * threads_per_cta), 1, 8);
  if (!shape.uses_slots) {
    tile.resident = true;
    tile.num_slots = 1;
    tile.ctas_per_multiprocessor = most_ctas;
    tile.shared_bytes = saturated(kBarrierBytes + beside_slots);
    return tile;
  }

  tile.slot_bytes =
      static_cast<int>((std::min(slice_chunks, span_chunks) * shape.chunk_bytes + 127) / 128 * 128);
  const int64_t steps = static_cast<int64_t>(shape.num_steps) * tile.num_spans;
  const auto slots_that_fit = [&](int ctas) {
    const int64_t budget =
        std::min(limits.shared_bytes_per_cta,
                 limits.shared_bytes_per_multiprocessor / ctas - kReservedSharedBytes);
    return std::max<int64_t>(0, budget - beside_slots) / (tile.slot_bytes + kBarrierBytes);
  };
  // As many CTAs as possible while each keeps half a row in flight beyond the row it works on: with
  // fewer slots the copies of the next row wait for the mix of this one. (Arithmetic, not a
  // measurement: on an H100 about 32 KB in flight for each multiprocessor cover latency times
  // bandwidth, and half a row of 9 sources of 2304 bf16 values in each of 3 CTAs is 62 KB.)
  int ctas = most_ctas;
  while (ctas > 1 && 2 * slots_that_fit(ctas) < 3 * steps) --ctas;
  // A row that does not fit even alone streams; two CTAs then cover each other's reductions.
  if (slots_that_fit(ctas) < steps) {
    ctas = slots_that_fit(2) >= kLeastSlots ? std::min(2, most_ctas) : 1;
  }
  tile.resident = slots_that_fit(ctas) >= steps;
  // Two rows of slots never run dry; more would only take memory from the first-level cache.
  tile.num_slots = static_cast<int>(
      std::clamp<int64_t>(slots_that_fit(ctas), kLeastSlots, tile.resident ? 2 * steps : 64));
  tile.ctas_per_multiprocessor = ctas;
  tile.shared_bytes = saturated(
      tile.num_slots * (static_cast<int64_t>(tile.slot_bytes) + kBarrierBytes) + beside_slots);
  return tile;
}

// A multiprocessor takes about 64 bytes a cycle from the second-level cache, so a row of B bytes
// takes B / 64 cycles on one and B / 512 on a cluster of 8, which costs it an exchange of sums, a
// trip of about 250 cycles to another multiprocessor's shared memory, and another one for an output
// norm: even at 7/8 B / 64 = 500, B = 36 KB. Not yet measured.
constexpr int64_t kLeastBytesToShare = 36 << 10;

// CTAs for a row of a few tokens, of which each has a multiprocessor to itself, and could have more
// than one: as many as there are for all, while each has a segment. One segment is 512 columns:
// slices are multiples of 8, and sums do not depend on their number.
inline int few_token_cluster_size(int64_t num_tokens, int num_segments, int64_t row_bytes,
                                  const DeviceLimits& limits) {
  int size = 1;
  if (row_bytes < kLeastBytesToShare) return size;
  while (2 * size <= std::min(kMostCtasInCluster, num_segments) &&
         num_tokens * 2 * size <= limits.num_multiprocessors) {
    size *= 2;
  }
  return size;
}

// CTAs for rows that do not fit one (`alone` is the tile that it would have), or 0 to leave them to
// one nevertheless. The smallest cluster that has half a row in flight beyond the one it works on,
// else the largest one that holds a row. Where none holds a row, its second sweep should find the
// row in the second-level cache: that is so while rows in work are smaller than the cache. On an
// H100 (132 multiprocessors, 50 MB) that is 380 KB a row where each multiprocessor has its own, and
// 3 MB in clusters of 8. So a row of 54 sources of 7168 bf16 values (774 KB) is read twice from
// memory by one CTA, and once by a cluster of 8, of which each holds 97 KB; 256 such sources
// (3.7 MB) are read nearly twice in any case. Not yet measured.
inline int large_row_cluster_size(const DepthAttentionShape& shape, const DepthAttentionTile& alone,
                                  const DeviceLimits& limits) {
  if (alone.resident && alone.num_spans == 1) return 0;
  const int warp_chunks = 32 * shape.chunks_per_thread;
  const int64_t warps = (shape.row_chunks + warp_chunks - 1) / warp_chunks;
  int largest = 0, largest_resident = 0;
  for (int size = 2; size <= std::min<int64_t>(kMostCtasInCluster, warps); size *= 2) {
    const DepthAttentionTile tile = choose_depth_attention_tile(shape, limits, true, size);
    if (tile.num_spans > 1 || tile.shared_bytes > limits.shared_bytes_per_cta) continue;
    if (tile.resident && 2 * tile.num_slots >= 3 * shape.num_steps) return size;
    largest = size;
    if (tile.resident) largest_resident = size;
  }
  return largest_resident > 0 ? largest_resident : largest;
}

}  // namespace attnres::cuda
