// What a driver says about how many clusters of a kernel run at the same time, remembered: asking
// takes longer than a launch. No torch, no CUDA.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "launch_shape.hpp"

namespace attnres::cuda {

// The answers for one kernel, by device and launch shape. For any thread at any time and without
// locks: a question and its answer are one word.
class ClusterCounts {
 public:
  // What ask() said when it was asked this before, or says now. A negative answer, an error, is not
  // remembered.
  template <typename Ask>
  int get(int device, const LaunchShape& shape, Ask&& ask) {
    const uint64_t question = encode(device, shape);
    if (question == 0) return ask();
    // Fibonacci hashing: the upper bits of a product with 2^64 over the golden ratio.
    const uint64_t first = question * 0x9e3779b97f4a7c15u >> (64 - kIndexBits);
    // Where all places of a question are taken, it takes the first one of them.
    std::atomic<uint64_t>* place = &answers_[first];
    for (int i = 0; i < kPlaces; ++i) {
      std::atomic<uint64_t>& other = answers_[(first + i) % answers_.size()];
      const uint64_t word = other.load(std::memory_order_relaxed);
      if (word >> kAnswerBits == question) return static_cast<int>(word & kMostAnswer);
      if (word != 0) continue;
      place = &other;
      break;
    }
    const int answer = ask();
    if (answer >= 0 && answer <= static_cast<int>(kMostAnswer)) {
      place->store(question << kAnswerBits | static_cast<uint64_t>(answer),
                   std::memory_order_relaxed);
    }
    return answer;
  }

 private:
  // Full AttnRes asks about a launch shape for each number of sources.
  static constexpr int kIndexBits = 7;
  static constexpr int kPlaces = 8;
  static constexpr int kAnswerBits = 20;
  static constexpr uint64_t kMostAnswer = (uint64_t{1} << kAnswerBits) - 1;

  // In 44 bits what an answer depends on, or 0 where that takes more.
  static uint64_t encode(int device, const LaunchShape& shape) {
    uint64_t word = 0;
    bool has_room = true;
    const auto append = [&](int value, int bits) {
      has_room = has_room && value >= 0 && value < 1 << bits;
      word = word << bits | static_cast<uint64_t>(value);
    };
    append(shape.cluster_size, 5);
    append(shape.num_threads, 11);
    append(device, 8);
    append(shape.shared_bytes, 20);
    static_assert(5 + 11 + 8 + 20 + kAnswerBits == 64);
    return has_room ? word : 0;
  }

  std::array<std::atomic<uint64_t>, size_t{1} << kIndexBits> answers_{};
};

}  // namespace attnres::cuda
