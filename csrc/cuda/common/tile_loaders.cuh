// How tiles of rows reach a CTA whose threads all read all of a tile. `Args` describes the tiles:
//
//   tile.num_threads, tile.num_slots, tile.slot_bytes, tile.row_pitch
//   num_tiles, and Team: who works on a tile together
//   rows_in_tile(tile), and for each of its rows tile_row(tile, r), where it starts in global
//   memory, and row_bytes(r)
//
// - DirectTiles reads global memory in place; any alignment.
// - CpAsyncTiles (8.0 and later): all threads copy a tile into a slot of shared memory.
// - BulkTiles (9.0 and later): a producer warp has the copy engine fill the slots.
//
// A team takes tiles Team::index(), Team::index() + Team::count() and so on. A body calls acquire()
// for a tile, reads rows through the view it gets, and calls release() when it has read the last of
// them.
#pragma once

#include "common/elements.cuh"
#include "common/loaders.cuh"
#include "common/teams.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

template <typename Args>
struct DirectTile {
  const Args& args;
  int64_t tile;
  __device__ __forceinline__ GlobalView row(int r) const { return {args.tile_row(tile, r)}; }
};

struct SharedTile {
  const std::byte* base;
  int row_pitch;
  __device__ __forceinline__ SharedView row(int r) const {
    return {base + static_cast<int64_t>(r) * row_pitch};
  }
};

template <typename Args>
class DirectTiles {
 public:
  static constexpr bool kUsesSlots = false;
  static constexpr int kExtraThreads = 0;

  __device__ __forceinline__ DirectTiles(const Args& args, std::byte*, Barrier*) : args_(args) {}
  __device__ __forceinline__ bool produce() { return false; }
  __device__ __forceinline__ DirectTile<Args> acquire(const RingPosition&, int64_t tile) {
    return {args_, tile};
  }
  __device__ __forceinline__ void release(const RingPosition&) {}

 private:
  const Args& args_;
};

template <typename Args>
class CpAsyncTiles {
 public:
  static constexpr bool kUsesSlots = true;
  static constexpr int kExtraThreads = 0;

  __device__ __forceinline__ CpAsyncTiles(const Args& args, std::byte* slots, Barrier*)
      : args_(args), slots_(slots), next_(Args::Team::index()) {}
  __device__ __forceinline__ bool produce() {
    for (int slot = 0; slot < args_.tile.num_slots; ++slot) issue(slot);
    return false;
  }

  // Whoever gets here has seen its own copies arrive; behind the barrier all have.
  __device__ __forceinline__ SharedTile acquire(const RingPosition& at, int64_t) {
    wait_for_copies_but(args_.tile.num_slots - 1);
    sync_first_threads(args_.tile.num_threads);
    return {slots_ + static_cast<int64_t>(at.slot) * args_.tile.slot_bytes, args_.tile.row_pitch};
  }
  __device__ __forceinline__ void release(const RingPosition& at) {
    sync_first_threads(args_.tile.num_threads);
    issue(at.slot);
  }

 private:
  // One group per tile, also past the last one, so that groups count tiles.
  __device__ __forceinline__ void issue(int slot) {
    if (next_ < args_.num_tiles) {
      std::byte* to = slots_ + static_cast<int64_t>(slot) * args_.tile.slot_bytes;
      const int num_rows = args_.rows_in_tile(next_);
      for (int r = 0; r < num_rows; ++r, to += args_.tile.row_pitch) {
        const std::byte* from = args_.tile_row(next_, r);
        for (int b = thread_rank() * 16; b < args_.row_bytes(r); b += args_.tile.num_threads * 16) {
          copy_async_16(to + b, from + b);
        }
      }
      next_ += Args::Team::count();
    }
    commit_copies();
  }

  const Args& args_;
  std::byte* slots_;
  int64_t next_;
};

template <typename Args>
class BulkTiles {
 public:
  static constexpr bool kUsesSlots = true;
  static constexpr int kExtraThreads = kProducerThreads;

  __device__ __forceinline__ BulkTiles(const Args& args, std::byte* slots, Barrier* barriers)
      : args_(args),
        slots_(slots),
        barriers_(barriers, args.tile.num_slots, args.tile.num_threads / kWarpSize) {}

  // True in the threads that load and do nothing else, when they are done.
  __device__ __forceinline__ bool produce() {
    if (thread_rank() < args_.tile.num_threads) return false;
    if (thread_rank() == args_.tile.num_threads) {
      RingPosition at;
      for (int64_t tile = Args::Team::index(); tile < args_.num_tiles;
           tile += Args::Team::count()) {
        const int num_rows = args_.rows_in_tile(tile);
        uint32_t bytes = 0;
        for (int r = 0; r < num_rows; ++r) bytes += args_.row_bytes(r);
        Barrier* const filled = barriers_.wait_until_free(at, bytes);
        std::byte* to = slots_ + static_cast<int64_t>(at.slot) * args_.tile.slot_bytes;
        for (int r = 0; r < num_rows; ++r, to += args_.tile.row_pitch) {
          copy_bulk(to, args_.tile_row(tile, r), args_.row_bytes(r), filled);
        }
        at.advance(args_.tile.num_slots);
      }
    }
    return true;
  }

  __device__ __forceinline__ SharedTile acquire(const RingPosition& at, int64_t) {
    barriers_.wait_until_filled(at);
    return {slots_ + static_cast<int64_t>(at.slot) * args_.tile.slot_bytes, args_.tile.row_pitch};
  }
  __device__ __forceinline__ void release(const RingPosition& at) { barriers_.release(at); }

 private:
  const Args& args_;
  std::byte* slots_;
  RingBarriers barriers_;
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
