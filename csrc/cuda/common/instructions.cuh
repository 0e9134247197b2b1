// Every instruction that C++ has no word for, each behind a name. Kernel bodies use these names
// only; tests/simt gives the same names to a CPU, and that is how a body is checked where there is
// no GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/set.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// Where nothing comes that the host has let pass. The simulator stops here; a trap would cost some
// 20 registers.
[[noreturn]] __device__ __forceinline__ void never() { __builtin_unreachable(); }

// Where am I.
__device__ __forceinline__ int thread_rank() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int cta_rank() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int num_ctas() { return static_cast<int>(gridDim.x); }

extern __shared__ __align__(128) std::byte dynamic_shared_bytes[];
__device__ __forceinline__ std::byte* dynamic_shared_memory() { return dynamic_shared_bytes; }

// A place in this CTA's shared memory, as a number of 32 bits: one register where a pointer takes
// two.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 4, 8 or 16 bytes there.
template <typename V>
__device__ __forceinline__ V load_shared(SharedAddress at) {
  uint32_t words[sizeof(V) / 4];
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(at) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
  }
  V value;
  __builtin_memcpy(static_cast<void*>(&value), words, sizeof(V));
  return value;
}
template <typename V>
__device__ __forceinline__ void store_shared(SharedAddress at, const V& value) {
  uint32_t words[sizeof(V) / 4];
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  __builtin_memcpy(words, &value, sizeof(V));
  if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(words[0]) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// A 32-bit number that stays in a register: the compiler does not make it anew, wherever it is
// used, of what it was made of.
template <typename V>
__device__ __forceinline__ V keep_in_register(V x) {
  static_assert(sizeof(V) == 4);
  asm volatile("" : "+r"(x));
  return x;
}

// Waiting for one another.
__device__ __forceinline__ void sync_cta() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// The first `count` threads of the CTA, a multiple of 32; the others do not take part.
__device__ __forceinline__ void sync_first_threads(int count) {
  asm volatile("bar.sync 1, %0;" ::"r"(count) : "memory");
}

// The `count` threads, a multiple of 32, that come to this one of the CTA's barriers 1 to 15.
__device__ __forceinline__ void sync_threads_at(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// What that lane of the warp has.
template <typename T>
__device__ __forceinline__ T shuffle_from(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Clusters (9.0 and later): neighbouring CTAs that run at the same time and reach one another's
// shared memory, the CTA of rank r after all have arrived once and for as long as it runs.
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int num_clusters() {
  uint32_t count;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return static_cast<int>(count);
}
// Every thread of the cluster arrives, and may do something else before it waits for the others.
// Threads that have ended count as arrived. After the wait all see the barriers that any of them
// had published before it arrived; nothing else is shown: that would be a fence for all memory.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Both at once, and everything that a thread of the cluster did before it is seen by all behind it.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Where the CTA of that rank has what this CTA has at `mine`, for the instructions below.
__device__ __forceinline__ uint32_t remote_address(const void* mine, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(mine)), "r"(static_cast<uint32_t>(rank)));
  return address;
}

// The kernel before this one in the stream may still be running when this one starts, if the launch
// said so (9.0 and later): nothing that it may have written is read, and nothing at all written to
// global memory, before this wait. It returns when that kernel is done, whether or not that kernel
// knows of such things. Every thread waits.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start when all CTAs have said so. After the wait: the next kernel may then
// count on everything before this one.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Functions of one number. Bodies use them once per row or source, so they are as exact as the
// library has them.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float inverse_square_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_square_root(double x) { return rsqrt(x); }

// Global memory that no thread writes after wait_for_previous_kernel(). An ordinary load: one
// through the read-only cache could be moved ahead of the wait.
template <typename T>
__device__ __forceinline__ T load_global(const void* p) {
  return *static_cast<const T*>(p);
}

// 16 bytes of the same that are read once, by one thread: the first-level cache has no use for
// them.
template <typename T>
__device__ __forceinline__ T load_global_once(const void* p) {
  static_assert(sizeof(T) == 16);
  uint32_t words[4];
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(p)
               : "memory");
  T value;
  __builtin_memcpy(static_cast<void*>(&value), words, sizeof(T));
  return value;
}

// cp.async (8.0 and later): 16 bytes from global to shared memory. Both addresses are multiples
// of 16. A thread's copies are seen by that thread after it has waited for the group that it
// committed them to.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Memory barriers in shared memory (9.0 and later in the forms used here).
using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(num_arrivals)
               : "memory");
}
// Shows initialised barriers to the copy engine, and to the other CTAs of a cluster behind its
// barrier; that, or a sync_cta(), must follow to show them to the other threads.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive(Barrier* barrier) { arrive(shared_address(barrier)); }
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits until the barrier's phase of this parity is complete. A fresh barrier counts as having
// completed parity 1.
__device__ __forceinline__ void wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void wait(Barrier* barrier, uint32_t parity) {
  wait(shared_address(barrier), parity);
}
// The same for a barrier on which another CTA's store_remote() or copy_bulk_to() counts.
__device__ __forceinline__ void wait_for_remote(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Writes 4 or 8 bytes where the CTA of that rank has what this CTA has at `mine`, and counts them
// on the barrier that it has at `barrier`. Returns at once.
template <typename T>
__device__ __forceinline__ void store_remote(T* mine, T value, int rank, Barrier* barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const uint32_t to = remote_address(mine, rank), on = remote_address(barrier, rank);
  if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    __builtin_memcpy(&bits, &value, sizeof(T));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
        "l"(bits), "r"(on)
        : "memory");
  } else {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(T));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(bits), "r"(on)
        : "memory");
  }
}

// Bulk copy (9.0 and later): `bytes` from global to shared memory by the copy engine, counted on
// `barrier`. Addresses and size are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Shows what this thread has written to this CTA's shared memory to the copy engine. A thread that
// issues a copy out of it does so after all that wrote there have called this and have met it.
__device__ __forceinline__ void show_to_copy_engine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Bulk store (9.0 and later): `bytes` from shared to global memory by the copy engine. Addresses
// and size are multiples of 16. It belongs to the next group that this thread commits.
__device__ __forceinline__ void store_bulk(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_bulk_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's committed groups have not been read from shared
// memory, which may then be written again; a CTA does not end before.
template <int kPending>
__device__ __forceinline__ void wait_until_bulk_stores_are_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// The same, until they are in global memory.
template <int kPending>
__device__ __forceinline__ void wait_for_bulk_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Copies `bytes` from `from` in this CTA's shared memory to where the CTA of that rank, which may
// be this one, has what this one has at `to`, and counts them on the barrier that it has at
// `barrier`. By the copy engine: see show_to_copy_engine(). Addresses and size are multiples of 16.
// Returns at once; `from` has been read when the other CTA says that it came.
__device__ __forceinline__ void copy_bulk_to(int rank, void* to, const void* from, uint32_t bytes,
                                             Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(remote_address(to, rank)),
      "r"(shared_address(from)), "r"(bytes), "r"(remote_address(barrier, rank))
      : "memory");
}

// Zero, in a register that the compiler does not know to hold zero: where an instruction wants two
// neighbouring registers of which one is zero, it keeps such a pair instead of making it anew.
__device__ __forceinline__ uint32_t opaque_zero() {
  uint32_t zero;
  asm volatile("mov.b32 %0, 0;" : "=r"(zero));
  return zero;
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
