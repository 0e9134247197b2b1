// How a CTA of the depth attention forward cuts its work: a pure function of sizes and of what the
// device has.
//
// A row's N x D values pass through a ring of slots in shared memory. A slot holds one step: a span
// of a source's row, all of it unless D is too large for the registers of one CTA. When all steps
// of a row fit, the row is read once: its logits and its mix both come from the slots. Otherwise
// each sweep over the row is a sweep over memory.
#pragma once

#include <algorithm>
#include <cstdint>

namespace attnres::cuda {

struct DeviceLimits {
  int num_multiprocessors;
  int shared_bytes_per_multiprocessor;
  int shared_bytes_per_cta;  // with opt-in
};

struct DepthAttentionTile {
  int num_threads;  // that compute; a multiple of 32
  int num_spans;
  int num_slots;
  int slot_bytes;
  bool resident;  // all steps of a row fit into the slots
  int ctas_per_multiprocessor;
  int shared_bytes;
};

// 16 warps, four for each of a multiprocessor's four register files, leave 128 registers to a
// thread; a seventeenth warp would leave 96. The largest body holds 32 values of the pseudo-query
// and 32 of the mix; the rest is addresses and loop state.
constexpr int kProducerThreads = 32;
constexpr int kMaxThreads = 512;
constexpr int kMaxComputeThreads = kMaxThreads - kProducerThreads;
constexpr int kRegistersPerMultiprocessor = 65536;

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
static_assert(kMaxThreads * depth_attention_backward_registers(16 * 4, 16) <=
              kRegistersPerMultiprocessor);
// Block summation holds two slots at a time.
constexpr int kLeastSlots = 2;
// Parts of a weight gradient that a multiprocessor makes at most: each CTA of the backward makes
// one.
constexpr int kPartsPerMultiprocessor = 2;
// What the driver takes from a CTA's shared memory.
constexpr int kReservedSharedBytes = 1024;

// Shared memory beside the slots and their barriers. Forward: partial sums of every warp, softmax
// weights, sums of the output norm.
constexpr int depth_attention_scratch_bytes(int num_sources, int num_warps, int compute_bytes) {
  return (num_warps * num_sources * 2 + num_sources + num_warps) * compute_bytes;
}
// Backward: partial sums, three factors of every source, sums of the output norm.
constexpr int depth_attention_backward_scratch_bytes(int num_sources, int num_warps,
                                                     int compute_bytes) {
  return (num_warps * num_sources * 2 + 3 * num_sources + 2 * num_warps) * compute_bytes;
}

// Threads that compute, for rows of `row_chunks` chunks of which a thread holds at most
// `chunks_per_thread`.
constexpr int depth_attention_threads(int64_t row_chunks, int chunks_per_thread) {
  const int64_t threads = (row_chunks + chunks_per_thread - 1) / chunks_per_thread;
  return static_cast<int>(std::clamp<int64_t>((threads + 31) / 32 * 32, 32, kMaxComputeThreads));
}

struct DepthAttentionShape {
  int64_t row_chunks;  // in a row
  int chunk_bytes;
  int chunks_per_thread;
  int registers;
  int num_steps;      // source rows that a token loads
  int scratch_bytes;  // of shared memory beside slots and barriers
  bool uses_slots;    // whether the loader stages its steps in shared memory at all
};

inline DepthAttentionTile choose_depth_attention_tile(const DepthAttentionShape& shape,
                                                      const DeviceLimits& limits) {
  DepthAttentionTile tile = {};
  constexpr int kBarrierBytes = 2 * 8;  // of a slot
  tile.num_threads = depth_attention_threads(shape.row_chunks, shape.chunks_per_thread);
  const int64_t span_chunks = static_cast<int64_t>(tile.num_threads) * shape.chunks_per_thread;
  tile.num_spans = static_cast<int>((shape.row_chunks + span_chunks - 1) / span_chunks);

  const int threads_per_cta = tile.num_threads + kProducerThreads;
  const int most_ctas =
      std::clamp(kRegistersPerMultiprocessor / (shape.registers * threads_per_cta), 1, 8);
  if (!shape.uses_slots) {
    tile.resident = true;
    tile.num_slots = 1;
    tile.ctas_per_multiprocessor = most_ctas;
    tile.shared_bytes = kBarrierBytes + shape.scratch_bytes;
    return tile;
  }

  tile.slot_bytes = static_cast<int>(
      (std::min(shape.row_chunks, span_chunks) * shape.chunk_bytes + 127) / 128 * 128);
  const int64_t steps = static_cast<int64_t>(shape.num_steps) * tile.num_spans;
  const auto slots_that_fit = [&](int ctas) {
    const int budget =
        std::min(limits.shared_bytes_per_cta,
                 limits.shared_bytes_per_multiprocessor / ctas - kReservedSharedBytes);
    return static_cast<int64_t>(std::max(0, budget - shape.scratch_bytes) /
                                (tile.slot_bytes + kBarrierBytes));
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
  tile.shared_bytes = tile.num_slots * (tile.slot_bytes + kBarrierBytes) + shape.scratch_bytes;
  return tile;
}

}  // namespace attnres::cuda
