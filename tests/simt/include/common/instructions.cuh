// csrc/cuda/common/instructions.cuh for the CPU: the same names over the executor. It stands
// earlier in the include path; it and mma.cuh are the only headers of the kernels that differ.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/set.cuh"
#include "executor.hpp"

// Inlining everything costs minutes of compile time under the sanitizers and finds nothing more.
#undef __forceinline__
#define __forceinline__ inline

// Words that only nvcc knows.
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace attnres::cuda {

[[noreturn]] inline void never() { std::abort(); }

inline int thread_rank() { return simt::thread_rank(); }
inline int cta_rank() { return simt::cta_rank(); }
inline int num_ctas() { return simt::num_ctas(); }
inline std::byte* dynamic_shared_memory() { return simt::shared_memory(); }

using SharedAddress = uint32_t;
inline SharedAddress shared_address(const void* p) { return simt::shared_offset(p); }
template <typename V>
V load_shared(SharedAddress at) {
  V value;
  std::memcpy(static_cast<void*>(&value), simt::shared_memory() + at, sizeof(V));
  return value;
}
template <typename V>
void store_shared(SharedAddress at, const V& value) {
  std::memcpy(simt::shared_memory() + at, &value, sizeof(V));
}
template <typename V>
V keep_in_register(V x) {
  return x;
}

inline void sync_cta() { simt::sync_threads(0, 0); }
inline void sync_warp() { simt::sync_warp(); }
inline void sync_first_threads(int count) { simt::sync_threads(1, count); }
inline void sync_threads_at(int barrier, int count) { simt::sync_threads(barrier, count); }

inline int cluster_size() { return simt::cluster_size(); }
inline int rank_in_cluster() { return simt::rank_in_cluster(); }
inline int cluster_rank() { return simt::cta_rank() / simt::cluster_size(); }
inline int num_clusters() { return simt::num_ctas() / simt::cluster_size(); }
inline void arrive_at_cluster() { simt::arrive_at_cluster(); }
inline void wait_for_cluster() { simt::wait_for_cluster(); }
inline void sync_cluster() {
  simt::arrive_at_cluster();
  simt::wait_for_cluster();
}

inline void wait_for_previous_kernel() { simt::wait_for_previous_kernel(); }
inline void let_next_kernel_start() { simt::require_waited(); }

template <typename T>
T shuffle_xor(T value, int mask) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::exchange(bits, mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
T shuffle_from(T value, int lane) {
  return static_cast<const T*>(simt::gather(&value, sizeof(T)))[lane];
}

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline double logarithm(double x) { return std::log(x); }
inline float inverse_square_root(float x) { return 1 / std::sqrt(x); }
inline double inverse_square_root(double x) { return 1 / std::sqrt(x); }

template <typename T>
T load_global(const void* p) {
  simt::require_waited();
  return *static_cast<const T*>(p);
}
template <typename T>
T load_global_once(const void* p) {
  static_assert(sizeof(T) == 16);
  return load_global<T>(p);
}

inline void copy_async_16(void* shared, const void* global) { simt::copy_async(shared, global); }
inline void commit_copies() { simt::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  simt::wait_for_copies(kPending);
}

using Barrier = uint64_t;

inline void init_barrier(Barrier* barrier, uint32_t num_arrivals) {
  simt::init_barrier(barrier, num_arrivals);
}
inline void publish_barriers() {}
inline void arrive(Barrier* barrier) { simt::arrive(barrier, 0); }
inline void arrive(SharedAddress barrier) { simt::arrive(simt::shared_memory() + barrier, 0); }
inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) { simt::arrive(barrier, bytes); }
inline void wait(Barrier* barrier, uint32_t parity) { simt::wait(barrier, parity); }
inline void wait(SharedAddress barrier, uint32_t parity) {
  simt::wait(simt::shared_memory() + barrier, parity);
}
inline void wait_for_remote(Barrier* barrier, uint32_t parity) { simt::wait(barrier, parity); }
template <typename T>
void store_remote(T* mine, T value, int rank, Barrier* barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  simt::store_remote(mine, &value, sizeof(T), rank, barrier);
}
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  simt::copy_bulk(shared, global, bytes, barrier);
}

inline void show_to_copy_engine() {}
inline void store_bulk(void* global, const void* shared, uint32_t bytes) {
  simt::store_bulk(global, shared, bytes);
}
inline void commit_bulk_stores() { simt::commit_bulk_stores(); }
template <int kPending>
void wait_until_bulk_stores_are_read() {
  simt::wait_until_bulk_stores_are_read(kPending);
}
template <int kPending>
void wait_for_bulk_stores() {
  simt::wait_for_bulk_stores(kPending);
}
inline void copy_bulk_to(int rank, void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  simt::copy_bulk_to(rank, to, from, bytes, barrier);
}

inline uint32_t opaque_zero() { return 0; }

}  // namespace attnres::cuda
