// Who works on a row: one CTA, or the CTAs of a cluster, which split its columns and tell one
// another the sums that they find.
//
// A row's columns are cut into segments, one warp's work each, and a sum over a row is the sum of
// its segments' sums in their order. However many CTAs share a row, the result is the same to the
// last bit.
#pragma once

#include <type_traits>

#include "common/instructions.cuh"
#include "common/reduce.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

struct OneCta {
  static constexpr bool kIsCluster = false;

  // Of this CTA in its team; of this team among all, and how many there are.
  __device__ __forceinline__ static int rank() { return 0; }
  __device__ __forceinline__ static int index() { return cta_rank(); }
  __device__ __forceinline__ static int count() { return num_ctas(); }
};

struct CtaCluster {
  static constexpr bool kIsCluster = true;

  __device__ __forceinline__ static int rank() { return rank_in_cluster(); }
  __device__ __forceinline__ static int index() { return cluster_rank(); }
  __device__ __forceinline__ static int count() { return num_clusters(); }
};

// Numbers that the CTAs of a cluster give to one another and to themselves, in rounds:
//
//   begin(bytes)              by one thread: how many a CTA gets in all
//   give_to(rank, i, value)   by any threads: number i of the round, for the CTA of that rank
//   wait<T>()                 by every thread that wants to read them: all numbers of the round
//   next()                    by every thread, when it has read what it wants
//
// A store that its receiver's barrier counts arrives in one trip, where storing and then meeting at
// the cluster's barrier takes two. Numbers of a round lie in one of two halves of a buffer: a CTA
// gives numbers of the round after next only when it has those of the next from everybody, who gave
// them after they were done with this round. That holds if a warp that reads a round's numbers
// gives some in the next, or the threads of its CTA meet (sync_...) in between.
class Exchange {
 public:
  // Of shared memory, aligned to 16 bytes, for rounds of at most `capacity` bytes, a multiple of 8.
  static constexpr int bytes(int capacity) {
    return 2 * static_cast<int>(sizeof(Barrier)) + 2 * capacity;
  }

  // By every thread of the cluster; and start() before the first round.
  __device__ __forceinline__ Exchange(std::byte* shared, int capacity)
      : barriers_(reinterpret_cast<Barrier*>(shared)),
        numbers_(shared + 2 * sizeof(Barrier)),
        capacity_(capacity) {
    if (thread_rank() == 0) {
      init_barrier(barriers_, 1);
      init_barrier(barriers_ + 1, 1);
      publish_barriers();
    }
    arrive_at_cluster();
  }
  // When it returns, the others' barriers can be stored to.
  __device__ __forceinline__ void start() { wait_for_cluster(); }

  __device__ __forceinline__ void begin(uint32_t bytes) { arrive_and_expect(barrier(), bytes); }
  template <typename T>
  __device__ __forceinline__ void give_to(int rank, int i, T value) {
    store_remote(half<T>() + i, value, rank, barrier());
  }
  template <typename T>
  __device__ __forceinline__ const T* wait() {
    wait_for_remote(barrier(), round_ / 2 % 2);
    return half<T>();
  }
  __device__ __forceinline__ void next() { ++round_; }

 private:
  __device__ __forceinline__ Barrier* barrier() const { return barriers_ + round_ % 2; }
  template <typename T>
  __device__ __forceinline__ T* half() const {
    return reinterpret_cast<T*>(numbers_ + round_ % 2 * capacity_);
  }

  Barrier* barriers_;
  std::byte* numbers_;
  int capacity_;
  uint32_t round_ = 0;
};

// The segments of a row that are this CTA's, and of which a warp has one.
struct SegmentRange {
  int first;
  int count;
  int of;  // all segments of the row
};

// What the warps of a team found out, `count` numbers each for its segment:
//
//   share(mine, count)   when a warp has written its line of mine [segments of this CTA, count]
//   sync_first_threads   of the CTA
//   all(mine)            by every thread that wants to read them, but in warps that take_part():
//                        [segments of the row, count]
//   next()               by every thread
template <typename Team>
class SegmentNumbers;

template <>
class SegmentNumbers<OneCta> {
 public:
  __device__ __forceinline__ SegmentNumbers(std::byte*, int, const SegmentRange&) {}
  __device__ __forceinline__ void start() {}
  template <typename T>
  __device__ __forceinline__ void share(const T*, int) {}
  __device__ __forceinline__ bool takes_part() const { return true; }
  template <typename T>
  __device__ __forceinline__ const T* all(const T* mine) {
    return mine;
  }
  __device__ __forceinline__ void next() {}
};

template <>
class SegmentNumbers<CtaCluster> {
 public:
  __device__ __forceinline__ SegmentNumbers(std::byte* shared, int capacity,
                                            const SegmentRange& segments)
      : exchange_(shared, capacity), segments_(segments) {}
  __device__ __forceinline__ void start() { exchange_.start(); }

  template <typename T>
  __device__ __forceinline__ void share(const T* mine, int count) {
    const int size = cluster_size();
    if (size == 1) return;
    if (thread_rank() == 0) {
      exchange_.begin(static_cast<uint32_t>(segments_.of * count) * sizeof(T));
    }
    if (!takes_part()) return;
    const int warp = thread_rank() / kWarpSize;
    sync_warp();
    for (int pair = thread_rank() % kWarpSize; pair < count * size; pair += kWarpSize) {
      const int i = pair / size, rank = pair % size;
      exchange_.give_to(rank, (segments_.first + warp) * count + i, mine[warp * count + i]);
    }
  }
  // Whether this warp has a segment: some CTAs of a cluster may have one fewer than others.
  __device__ __forceinline__ bool takes_part() const {
    return thread_rank() / kWarpSize < segments_.count;
  }
  template <typename T>
  __device__ __forceinline__ const T* all(const T* mine) {
    return cluster_size() == 1 ? mine : exchange_.template wait<T>();
  }
  __device__ __forceinline__ void next() {
    if (cluster_size() > 1) exchange_.next();
  }

 private:
  Exchange exchange_;
  SegmentRange segments_;
};

// Sums over the columns of a row, of which each CTA of a team has a part of its own:
//
//   add_up(count, num_threads, at)   by the first num_threads threads of every CTA, of which each
//                                    may have written any of at(0 .. count - 1) before they last
//                                    met: every at(i) becomes the sum of all CTAs', in the order
//                                    of their ranks. They have met again when it returns.
template <typename Team>
class TeamSums;

template <>
class TeamSums<OneCta> {
 public:
  __device__ __forceinline__ TeamSums(std::byte*, int) {}
  __device__ __forceinline__ void start() {}
  template <typename At>
  __device__ __forceinline__ void add_up(int, int, At&&) {}
};

template <>
class TeamSums<CtaCluster> {
 public:
  // `shared` and `capacity`: see Exchange; what all CTAs give to one in a round. By every thread of
  // the cluster; and start() before the first sum.
  __device__ __forceinline__ TeamSums(std::byte* shared, int capacity)
      : exchange_(shared, capacity) {}
  __device__ __forceinline__ void start() { exchange_.start(); }

  template <typename At>
  __device__ __forceinline__ void add_up(int count, int num_threads, At&& at) {
    const int size = cluster_size();
    if (size == 1) return;
    using T = std::remove_reference_t<decltype(at(0))>;
    if (thread_rank() == 0) {
      exchange_.begin(static_cast<uint32_t>(size * count) * static_cast<uint32_t>(sizeof(T)));
    }
    const int first = rank_in_cluster() * count;
    for (int i = thread_rank(); i < count; i += num_threads) {
      const T mine = at(i);
      for (int rank = 0; rank < size; ++rank) exchange_.give_to(rank, first + i, mine);
    }
    const T* all = exchange_.template wait<T>();
    for (int i = thread_rank(); i < count; i += num_threads) {
      T sum = all[i];
      for (int rank = 1; rank < size; ++rank) sum += all[rank * count + i];
      at(i) = sum;
    }
    exchange_.next();
    sync_first_threads(num_threads);
  }

 private:
  Exchange exchange_;
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
