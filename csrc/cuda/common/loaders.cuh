// How the rows of the sources reach the threads. A loader serves the steps of a CTA in the order in
// which the body takes them: for each row of the CTA, for each sweep, for each span of the row, for
// each source. Later sweeps may have fewer sources than the first.
//
// - Direct reads global memory in place; any alignment; every sweep reads again.
// - CpAsyncRing (8.0 and later): each thread copies the chunks that it will read itself into a ring
//   of slots.
// - BulkRing (9.0 and later): a producer warp has the copy engine fill the slots, barriers
//   hand them over.
//
// A body makes the loader, which touches no global memory yet, and calls only_loads(). Then it
// calls wait() when it comes to some steps for the first time in a sweep over memory, reads its
// chunks of each through its view(), and calls release() when no thread of its warp will read that
// slot again. Only the threads below tile.num_threads run the body.
#pragma once

#include "common/elements.cuh"
#include "common/reduce.cuh"
#include "common/ring.cuh"
#include "common/rows.cuh"
#include "common/teams.cuh"
#include "device.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// What every body begins with when it has made its loader and its team. produce() loads everything
// in threads that have nothing else to do, and returns true; in the others it starts what there is
// to start. Whoever gets true here is done.
template <typename Loader, typename Team>
__device__ __forceinline__ bool only_loads(Loader& loader, Team& team) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!loader.produce()) return false;
  team.start();
  return true;
}

// Waits until at most so many of this thread's groups of copies are under way. The number is part
// of the instruction: rounded down to one there is.
__device__ __forceinline__ void wait_for_copies_but(int groups) {
  if (groups >= 16) {
    wait_for_copies<16>();
  } else if (groups >= 8) {
    wait_for_copies<8>();
  } else {
    switch (groups) {
      case 7:
        return wait_for_copies<7>();
      case 6:
        return wait_for_copies<6>();
      case 5:
        return wait_for_copies<5>();
      case 4:
        return wait_for_copies<4>();
      case 3:
        return wait_for_copies<3>();
      case 2:
        return wait_for_copies<2>();
      case 1:
        return wait_for_copies<1>();
      default:
        return wait_for_copies<0>();
    }
  }
}

// Walks over the steps of a team in the order of the body, ahead of it.
template <typename Args>
struct StepCursor {
  uint32_t row = static_cast<uint32_t>(Args::Team::index());
  int sweep = 0;
  int span = 0;
  int source = 0;

  __device__ __forceinline__ bool done(const Args& args) const {
    return row >= static_cast<uint32_t>(args.num_tokens);
  }
  // Whether the next step is in another span, sweep or row.
  __device__ __forceinline__ bool advance(const Args& args, int num_sweeps) {
    if (++source < (sweep == 0 ? args.num_steps : args.num_later_steps)) return false;
    source = 0;
    if (++span < args.tile.num_spans) return true;
    span = 0;
    if (++sweep < num_sweeps) return true;
    sweep = 0;
    row += static_cast<uint32_t>(Args::Team::count());
    return true;
  }
};

// The segments of a row that are this CTA's: a cluster shares them out evenly, in order.
template <typename Args>
__device__ __forceinline__ SegmentRange segments_of_cta(const Args& args) {
  if constexpr (!Args::Team::kIsCluster) {
    return {0, args.tile.num_segments, args.tile.num_segments};
  } else {
    const int rank = Args::Team::rank();
    const int fewest = args.tile.least_segments, larger = args.tile.num_larger_slices;
    return {rank * fewest + (rank < larger ? rank : larger), fewest + (rank < larger ? 1 : 0),
            args.tile.num_segments};
  }
}

// How many chunks of a row lie in this CTA's span number `span`, and where they start. A cluster's
// CTA has one span, and in it a segment for every warp.
template <int kChunks, typename Args>
__device__ __forceinline__ int first_chunk(const Args& args, int span) {
  if constexpr (Args::Team::kIsCluster) {
    return segments_of_cta(args).first * (kWarpSize * kChunks);
  } else {
    return span * args.tile.num_threads * kChunks;
  }
}
template <int kChunks, typename Args>
__device__ __forceinline__ int chunks_in_span(const Args& args, int span) {
  const int left = args.row_chunks - first_chunk<kChunks>(args, span);
  int most = args.tile.num_threads * kChunks;
  if constexpr (Args::Team::kIsCluster) {
    most = segments_of_cta(args).count * (kWarpSize * kChunks);
  }
  return left < most ? left : most;
}

// Chunk number k of a thread, in its span: a warp's chunks lie side by side.
template <int kChunks>
__device__ __forceinline__ int chunk_in_span(int k) {
  const int warp = thread_rank() / kWarpSize;
  return thread_rank() + (warp * (kChunks - 1) + k) * kWarpSize;
}

template <typename Elements, int kChunks, typename Args>
__device__ __forceinline__ const std::byte* step_data(const Args& args, int64_t row, int span,
                                                      int source) {
  const ConstByteRows& rows = args.sources[source];
  return row_at(rows, row) + static_cast<int64_t>(first_chunk<kChunks>(args, span)) *
                                 (Elements::kWidth * Elements::bytes(rows.dtype));
}

template <typename Elements, int kChunks, typename Args>
class Direct {
 public:
  static constexpr bool kUsesSlots = false;
  static constexpr int kExtraThreads = 0;

  __device__ __forceinline__ Direct(const Args& args, std::byte*, Barrier*, int) : args_(args) {}
  __device__ __forceinline__ bool produce() { return false; }

  __device__ __forceinline__ void wait(RingPosition, int) {}
  __device__ __forceinline__ GlobalView view(const RingPosition&, int64_t row, int span,
                                             int source) const {
    return {step_data<Elements, kChunks>(args_, row, span, source)};
  }
  __device__ __forceinline__ void release(const RingPosition&) {}

 private:
  const Args& args_;
};

template <typename Elements, int kChunks, typename Args>
class CpAsyncRing {
 public:
  static constexpr bool kUsesSlots = true;
  static constexpr int kExtraThreads = 0;

  __device__ __forceinline__ CpAsyncRing(const Args& args, std::byte* slots, Barrier*,
                                         int num_sweeps)
      : args_(args), slots_(slots), num_sweeps_(num_sweeps), ahead_(args.tile.num_slots) {
    start_span();
  }
  __device__ __forceinline__ bool produce() {
    for (int slot = 0; slot < args_.tile.num_slots; ++slot) issue(slot);
    return false;
  }

  __device__ __forceinline__ void wait(RingPosition, int num_steps) {
    ahead_ -= num_steps;
    wait_for_copies_but(ahead_);
  }
  __device__ __forceinline__ SharedView view(const RingPosition& at, int64_t, int, int) const {
    return {slots_ + at.slot * args_.tile.slot_bytes};
  }
  // The slot's chunks are this thread's own, so it may refill them without asking anybody.
  __device__ __forceinline__ void release(const RingPosition& at) {
    issue(at.slot);
    ++ahead_;
  }

 private:
  // What the steps of a span have in common.
  __device__ __forceinline__ void start_span() {
    first_chunk_ = first_chunk<kChunks>(args_, next_.span) + chunk_in_span<kChunks>(0);
    chunks_left_ = chunks_in_span<kChunks>(args_, next_.span) - chunk_in_span<kChunks>(0);
  }

  // One group per step, also past the last one, so that groups count steps.
  __device__ __forceinline__ void issue(int slot) {
    if (!next_.done(args_)) {
      const ConstByteRows& rows = args_.sources[next_.source];
      const int chunk_bytes = Elements::kWidth * Elements::bytes(rows.dtype);
      // A warp's chunks lie side by side, so one address does for all of a thread's.
      const std::byte* from = row_at(rows, next_.row) + static_cast<uint32_t>(first_chunk_) *
                                                            static_cast<uint32_t>(chunk_bytes);
      std::byte* to =
          slots_ + slot * args_.tile.slot_bytes + chunk_in_span<kChunks>(0) * chunk_bytes;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        if (k * kWarpSize < chunks_left_) {
          for (int b = 0; b < chunk_bytes; b += 16) {
            copy_async_16(to + k * kWarpSize * chunk_bytes + b,
                          from + k * kWarpSize * chunk_bytes + b);
          }
        }
      }
      if (next_.advance(args_, num_sweeps_)) start_span();
    }
    commit_copies();
  }

  const Args& args_;
  std::byte* slots_;
  int num_sweeps_;
  int ahead_;  // groups committed since that of the last step waited for
  StepCursor<Args> next_;
  int first_chunk_;  // of this thread in the next step's row,
  int chunks_left_;  // and how many chunks of its span lie from there on
};

template <typename Elements, int kChunks, typename Args>
class BulkRing {
 public:
  static constexpr bool kUsesSlots = true;
  static constexpr int kExtraThreads = kProducerThreads;

  __device__ __forceinline__ BulkRing(const Args& args, std::byte* slots, Barrier* barriers,
                                      int num_sweeps)
      : args_(args),
        slots_(slots),
        barriers_(barriers, args.tile.num_slots, args.tile.num_threads / kWarpSize),
        num_sweeps_(num_sweeps) {}

  __device__ __forceinline__ bool produce() {
    if (thread_rank() < args_.tile.num_threads) return false;
    if (thread_rank() == args_.tile.num_threads) {
      RingPosition at;
      for (StepCursor<Args> next; !next.done(args_); next.advance(args_, num_sweeps_)) {
        const uint32_t bytes = chunks_in_span<kChunks>(args_, next.span) * Elements::kWidth *
                               Elements::bytes(args_.sources[next.source].dtype);
        Barrier* const filled = barriers_.wait_until_free(at, bytes);
        copy_bulk(slots_ + static_cast<int64_t>(at.slot) * args_.tile.slot_bytes,
                  step_data<Elements, kChunks>(args_, next.row, next.span, next.source), bytes,
                  filled);
        at.advance(args_.tile.num_slots);
      }
    }
    return true;
  }

  __device__ __forceinline__ void wait(RingPosition at, int num_steps) {
#pragma unroll 1
    for (; num_steps > 0; --num_steps) {
      barriers_.wait_until_filled(at);
      at.advance(args_.tile.num_slots);
    }
  }
  __device__ __forceinline__ SharedView view(const RingPosition& at, int64_t, int, int) const {
    return {slots_ + at.slot * args_.tile.slot_bytes};
  }
  __device__ __forceinline__ void release(const RingPosition& at) { barriers_.release(at); }

 private:
  const Args& args_;
  std::byte* slots_;
  RingBarriers barriers_;
  int num_sweeps_;
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
