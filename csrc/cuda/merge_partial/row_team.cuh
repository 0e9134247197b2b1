// Warps that take rows together, each lane with its chunks of a row in registers: what forward and
// backward of merging have in common.
#pragma once

#include "common/elements.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "depth_attention/args.cuh"
#include "merge_partial/config.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// Of a lane of a team: chunks first, first + 32, ..., of which `count` are there.
template <int kChunks>
class RowTeam {
 public:
  static constexpr int kWidth = 8;
  // 16-bit values of each chunk.
  using Chunks = uint4[kChunks];

  // `sums`: config.sum_bytes for each team.
  __device__ __forceinline__ RowTeam(const MergeConfig& config, int row_chunks, std::byte* sums)
      : warps_(config.warps) {
    const int warp = thread_rank() / kWarpSize;
    lane_ = thread_rank() % kWarpSize;
    team_ = warp / warps_;
    warp_ = warp % warps_;
    sums_ = reinterpret_cast<float*>(sums + team_ * config.sum_bytes);
    first_ = warp_ * kChunks * kWarpSize + lane_;
    count_ = (row_chunks - first_ + kWarpSize - 1) / kWarpSize;
    first_row_ = cta_rank() + num_ctas() * team_;
    row_step_ = num_ctas() * config.teams;
  }

  __device__ __forceinline__ int team() const { return team_; }
  __device__ __forceinline__ bool leads() const { return warp_ == 0 && lane_ == 0; }
  __device__ __forceinline__ int first_row() const { return first_row_; }
  __device__ __forceinline__ int row_step() const { return row_step_; }
  __device__ __forceinline__ int chunk(int k) const { return first_ + k * kWarpSize; }
  __device__ __forceinline__ bool has(int k) const { return k < count_; }

  // A row's chunks; those that are not there stay as they are. All loads are under way at once.
  __device__ __forceinline__ void load(const ConstByteRows& rows, int row, Chunks& to) const {
    const std::byte* const from = row_at(rows, row) + first_ * kChunkBytes;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (has(k)) to[k] = load_global_once<uint4>(from + k * kWarpSize * kChunkBytes);
    }
  }
  // make(k) is chunk k.
  template <typename Make>
  __device__ __forceinline__ void store(const ByteRows& rows, int row, Make&& make) const {
    std::byte* const to = row_at(rows, row) + first_ * kChunkBytes;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const uint4 bits = make(k);
      if (has(k)) *reinterpret_cast<uint4*>(to + k * kWarpSize * kChunkBytes) = bits;
    }
  }

  // Values that are used before and behind this are unpacked again, and meanwhile take half the
  // registers.
  __device__ __forceinline__ static void keep_packed(Chunks& of) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      of[k] = {keep_in_register(of[k].x), keep_in_register(of[k].y), keep_in_register(of[k].z),
               keep_in_register(of[k].w)};
    }
  }

  // Sums over the team's lanes, in every lane, in an order that is always the same. What was
  // written two rounds ago has been read: whoever is here met all others in the round before.
  template <int kCount>
  __device__ __forceinline__ void add_up(float (&x)[kCount]) {
    static_assert(kCount <= kMergeSums);
    float sum;
    if constexpr (kCount == 1) {
      sum = warp_sum(x[0]);
    } else {
      sum = warp_sums(x, lane_);
    }
    float* const of_warps = sums_ + round_ * warps_ * kMergeSums;
    round_ ^= 1;
    constexpr int kLanes = kWarpSize / kCount;
    if (lane_ % kLanes == 0) of_warps[warp_ * kCount + lane_ / kLanes] = sum;
    if (warps_ == 1) {
      sync_warp();
    } else {
      sync_threads_at(1 + team_, warps_ * kWarpSize);
    }
    // Each lane adds up one of them, of some of the warps.
    sum = 0;
    for (int i = lane_; i < warps_ * kCount; i += kWarpSize) sum += of_warps[i];
#pragma unroll
    for (int mask = kCount; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = kCount == 1 ? sum : shuffle_from(sum, i);
  }

 private:
  static constexpr int kChunkBytes = 16;

  int warps_;
  int lane_;
  int team_;
  int warp_;
  int first_;
  int count_;
  int round_ = 0;
  float* sums_;
  int first_row_;
  int row_step_;
};

// A vector that all rows share, as float32 in shared memory: first the lower halves of all its
// chunks, then the upper ones, so that neighbouring lanes read neighbouring 16 bytes.
class SharedVector {
 public:
  // In `bytes` bytes at `data`.
  __device__ __forceinline__ SharedVector(std::byte* data, int bytes)
      : lower_(data), half_bytes_(bytes / 2) {}

  // By all threads of the CTA: value(i) for every column, which is 0 behind the row's end.
  template <typename Value>
  __device__ __forceinline__ void fill(int num_threads, Value&& value) const {
    const int count = 2 * half_bytes_ / 4;
    for (int i = thread_rank(); i < count; i += num_threads) {
      const int half = i % 8 / 4;
      reinterpret_cast<float*>(lower_ + half * half_bytes_)[i / 8 * 4 + i % 4] = value(i);
    }
  }
  __device__ __forceinline__ void load(int chunk, float (&x)[8]) const {
    const std::byte* const at = lower_ + chunk * 16;
    unpack(*reinterpret_cast<const uint4*>(at), float{}, x);
    unpack(*reinterpret_cast<const uint4*>(at + half_bytes_), float{}, x + 4);
  }
  __device__ __forceinline__ void store(int chunk, const float (&x)[8]) const {
    std::byte* const at = lower_ + chunk * 16;
    *reinterpret_cast<uint4*>(at) = pack(float{}, x);
    *reinterpret_cast<uint4*>(at + half_bytes_) = pack(float{}, x + 4);
  }

 private:
  std::byte* lower_;
  int half_bytes_;
};

// Value `i` of a vector of any dtype, or 1 where it is absent.
__device__ __forceinline__ float gain_or_one(const GainVector& gain, int i) {
  float x[1] = {1};
  if (gain.data != nullptr) Mixed<float, 1>::load(GlobalView{gain.data}, gain.dtype, i, x);
  return x[0];
}

// Weights of the state, whose logit is given, and of what is merged with it.
__device__ __forceinline__ Pair<float> merge_weights(float lse, float logit) {
  const float largest = logit > lse ? logit : lse;
  const Pair<float> e = {exponential(lse - largest), exponential(logit - largest)};
  const float inverse_sum = 1 / (e.first + e.second);
  return {e.first * inverse_sum, e.second * inverse_sum};
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
