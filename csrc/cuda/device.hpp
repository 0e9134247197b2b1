// What kernels may count on: what a device has, as a launch asks for it, and what all of them have.
// No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace attnres::cuda {

struct DeviceLimits {
  int num_multiprocessors;
  int shared_bytes_per_multiprocessor;
  int shared_bytes_per_cta;  // with opt-in
  int capability = 90;       // 10 * major + minor
};

// 16 warps, four for each of a multiprocessor's four register files, leave 128 registers to a
// thread; a seventeenth warp would leave 96. The largest body holds 32 values of the pseudo-query
// and 32 of the mix; the rest is addresses and loop state.
constexpr int kProducerThreads = 32;
constexpr int kMaxThreads = 512;
constexpr int kMaxComputeThreads = kMaxThreads - kProducerThreads;
constexpr int kRegistersPerMultiprocessor = 65536;

// A kernel's launch bound. It holds the compiler to the registers that the plan counts on, as far
// as they fit in portions: a multiprocessor hands them out to four warps at a time.
constexpr int most_threads_with(int registers) {
  constexpr int kFourWarps = 4 * 32;
  return kRegistersPerMultiprocessor / (registers * kFourWarps) * kFourWarps;
}
static_assert(most_threads_with(128) == kMaxThreads && most_threads_with(96) == 640);
// Parts of a weight gradient that a multiprocessor makes at most: each CTA of the backward makes
// one, or each cluster.
constexpr int kPartsPerMultiprocessor = 2;
// Warps of a CTA that adds them up.
constexpr int kWeightGradientWarps = 8;
// What the driver takes from a CTA's shared memory.
constexpr int kReservedSharedBytes = 1024;

// Bytes that are more than an int holds are more than any device has, and stay so.
constexpr int saturated(int64_t value) {
  return static_cast<int>(std::min<int64_t>(value, INT32_MAX));
}
constexpr int round_up(int64_t value, int multiple) {
  return saturated((value + multiple - 1) / multiple * multiple);
}

// The largest cluster that every device with clusters runs.
constexpr int kMostCtasInCluster = 8;

}  // namespace attnres::cuda
