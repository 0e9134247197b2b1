// A ring of slots in shared memory, and how its slots change hands.
#pragma once

#include "common/instructions.cuh"
#include "common/reduce.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// A slot of the ring and how often the ring has come round, modulo two.
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int num_slots) {
    if (++slot == num_slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Hands slots from one thread, which has the copy engine fill them, to warps that read them, and
// back (9.0 and later). Each slot has two barriers, "filled" and "free".
class RingBarriers {
 public:
  // By every thread of the CTA. `num_warps` will read.
  __device__ __forceinline__ RingBarriers(Barrier* barriers, int num_slots, int num_warps)
      : filled_(barriers), free_(barriers + num_slots) {
    if (thread_rank() == 0) {
      for (int slot = 0; slot < num_slots; ++slot) {
        init_barrier(filled_ + slot, 1);
        init_barrier(free_ + slot, static_cast<uint32_t>(num_warps));
      }
      publish_barriers();
    }
    sync_cta();
  }

  // By the thread that fills: waits until all warps have released the slot, and has its readers
  // wait for so many bytes. The copies are to count on the barrier that it returns.
  __device__ __forceinline__ Barrier* wait_until_free(const RingPosition& at, uint32_t bytes) {
    wait(free_ + at.slot, at.parity ^ 1);
    arrive_and_expect(filled_ + at.slot, bytes);
    return filled_ + at.slot;
  }

  // By the threads that read, and by all lanes of a warp when none will read the slot again.
  __device__ __forceinline__ void wait_until_filled(const RingPosition& at) {
    wait(filled_ + at.slot, at.parity);
  }
  __device__ __forceinline__ void release(const RingPosition& at) {
    sync_warp();
    if (thread_rank() % kWarpSize == 0) arrive(free_ + at.slot);
  }

 private:
  Barrier* filled_;
  Barrier* free_;
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
