// Who works on a row: one CTA, or the CTAs of a cluster, which split its columns and tell one
// another the sums that they find.
#pragma once

#include "common/instructions.cuh"
#include "common/reduce.cuh"

namespace attnres::cuda {

struct OneCta {
  static constexpr bool kIsCluster = false;

  __device__ __forceinline__ static int rank() { return 0; }
  __device__ __forceinline__ static int index() { return cta_rank(); }
  __device__ __forceinline__ static int count() { return num_ctas(); }
};

struct CtaCluster {
  static constexpr bool kIsCluster = true;

  // Of this CTA in its team.
  __device__ __forceinline__ static int rank() { return rank_in_cluster(); }
  // Of this team among all, and how many there are.
  __device__ __forceinline__ static int index() { return cta_rank() / cluster_size(); }
  __device__ __forceinline__ static int count() { return num_ctas() / cluster_size(); }
};

// Numbers that every CTA of a cluster gives to every other, in rounds:
//
//   begin(count)     by one thread
//   give(i, value)   number i < count of this CTA; by as many threads as one likes
//   wait()           by every thread that then wants get() or sum()
//   next()           by every thread, when it has got what it wants
//
// A store that its receiver's barrier counts arrives in one trip, where storing and then meeting at
// the cluster's barrier takes two. Numbers of a round lie in one of two halves of a buffer: a CTA
// gives numbers of the round after next only when it has those of the next from everybody, who gave
// them after they were done with this round. That holds if the threads of a CTA meet (sync_...)
// between the last get() of a round and the first give() of the next.
template <typename T>
class Exchange {
 public:
  // Of shared memory, aligned to 16 bytes.
  static constexpr int bytes(int capacity, int cluster_size) {
    return 2 * static_cast<int>(sizeof(Barrier)) +
           2 * capacity * cluster_size * static_cast<int>(sizeof(T));
  }

  // By every thread of the cluster, and start() before the first round.
  __device__ __forceinline__ Exchange(std::byte* shared, int capacity)
      : barriers_(reinterpret_cast<Barrier*>(shared)),
        buffer_(reinterpret_cast<T*>(barriers_ + 2)),
        capacity_(capacity) {
    if (thread_rank() == 0) {
      init_barrier(barriers_, 1);
      init_barrier(barriers_ + 1, 1);
      publish_barriers();
    }
    arrive_at_cluster();
  }
  // When it returns the others' barriers can be stored to.
  __device__ __forceinline__ void start() { wait_for_cluster(); }

  __device__ __forceinline__ void begin(int count) {
    arrive_and_expect(barrier(), static_cast<uint32_t>(cluster_size() * count) * sizeof(T));
  }
  __device__ __forceinline__ void give(int i, T value) {
    for (int rank = 0; rank < cluster_size(); ++rank) give_to(rank, i, value);
  }
  // What all ranks together are given is what give() gives.
  __device__ __forceinline__ void give_to(int rank, int i, T value) {
    store_remote(half() + rank_in_cluster() * capacity_ + i, value, rank, barrier());
  }
  __device__ __forceinline__ void wait() { wait_for_remote(barrier(), round_ / 2 % 2); }
  __device__ __forceinline__ T get(int rank, int i) const { return half()[rank * capacity_ + i]; }
  __device__ __forceinline__ void next() { ++round_; }

 private:
  __device__ __forceinline__ Barrier* barrier() const { return barriers_ + round_ % 2; }
  __device__ __forceinline__ T* half() const {
    return buffer_ + round_ % 2 * (cluster_size() * capacity_);
  }

  Barrier* barriers_;
  T* buffer_;
  int capacity_;
  uint32_t round_ = 0;
};

}  // namespace attnres::cuda
