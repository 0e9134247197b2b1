// How a CTA's shared memory is shared out.
#pragma once

#include "common/instructions.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// What loader and team have of it, by the sizes of a tile, and behind that whatever a body takes,
// one thing after the other: what chose the tile has counted the same bytes. Slots are multiples of
// 16 bytes, and so is what the team has.
class CtaMemory {
 public:
  template <typename Tile>
  __device__ __forceinline__ explicit CtaMemory(const Tile& tile)
      : slots(dynamic_shared_memory()),
        barriers(reinterpret_cast<Barrier*>(slots + tile.num_slots * tile.slot_bytes)),
        team(reinterpret_cast<std::byte*>(barriers + 2 * tile.num_slots)),
        rest_(team + tile.team_bytes) {}

  template <typename T>
  __device__ __forceinline__ T* take(int count) {
    std::byte* const taken = rest_;
    rest_ += count * static_cast<int>(sizeof(T));
    return reinterpret_cast<T*>(taken);
  }

  std::byte* const slots;
  Barrier* const barriers;  // two of every slot
  std::byte* const team;

 private:
  std::byte* rest_;
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
