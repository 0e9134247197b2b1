// How merging cuts its work: a pure function of sizes and device. No torch, no CUDA.
//
// A row's tensors are in the registers of a team of warps, eight values of each to a chunk of 16
// bytes; each lane has a few chunks. Team and chunks follow from the row's length alone, so that
// its sums are taken in the same order whatever other rows there are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.hpp"

namespace attnres::cuda {

struct MergeConfig {
  int warps = 0;   // of a team; 0: rows do not fit
  int chunks = 0;  // of a lane
  int teams = 0;   // of a CTA
  int ctas = 0;
  // Of shared memory: for a vector that all rows share, for a team's sums over a row, and for its
  // sums over rows.
  int vector_bytes = 0;
  int sum_bytes = 0;
  int gradient_bytes = 0;
  int shared_bytes = 0;
};

// Chunks that a lane may have, and the threads of a CTA whose registers hold them: forward 12 for a
// chunk, backward 36 with the next row and the query's gradient.
struct MergeChoice {
  int chunks;
  int most_threads;
};
constexpr MergeChoice kMergeChoices[] = {{1, 1024}, {3, 512}, {4, 512}};
constexpr MergeChoice kMergeBackwardChoices[] = {{1, 640}, {2, 512}};

template <int kCount>
constexpr int most_merge_threads(const MergeChoice (&choices)[kCount], int chunks) {
  for (const MergeChoice& choice : choices) {
    if (choice.chunks == chunks) return choice.most_threads;
  }
  return 0;
}

// A team's warps meet at a barrier of their own, of which a CTA has 15 beside that of all.
constexpr int kMostMergeTeams = 15;
// Sums that a team makes at once, at most.
constexpr int kMergeSums = 8;
constexpr int kMergeVectors = 2;

// For rows of `hidden` values, a multiple of 8. Warps are 0 where a CTA has no room for a row.
template <int kCount>
MergeConfig choose_merge_config(int64_t num_tokens, int64_t hidden,
                                const MergeChoice (&choices)[kCount], bool has_gradients,
                                const DeviceLimits& limits) {
  constexpr int kChunkValues = 8, kWarp = 32;
  MergeConfig config;
  const int64_t warp_rows = (hidden / kChunkValues + kWarp - 1) / kWarp;
  int64_t least = 0;
  for (const MergeChoice& choice : choices) {
    const int64_t warps = (warp_rows + choice.chunks - 1) / choice.chunks;
    if (warps * kWarp > choice.most_threads) continue;
    // Adding up a row takes a warp about as long as four fifths of a chunk.
    const int64_t cost = warps * (5 * choice.chunks + 4);
    if (config.warps > 0 && cost >= least) continue;
    least = cost;
    config.warps = static_cast<int>(warps);
    config.chunks = choice.chunks;
  }
  if (config.warps == 0) return config;
  config.vector_bytes = config.warps * config.chunks * kWarp * kChunkValues * 4;
  // Of two rounds.
  config.sum_bytes = 2 * config.warps * kMergeSums * 4;
  config.gradient_bytes = has_gradients ? config.vector_bytes : 0;
  const int team_bytes = config.sum_bytes + config.gradient_bytes;
  const int64_t rows_of_cta =
      (num_tokens + limits.num_multiprocessors - 1) / limits.num_multiprocessors;
  const int room =
      std::max(0, limits.shared_bytes_per_cta - kMergeVectors * config.vector_bytes) / team_bytes;
  // A warp alone meets nobody.
  const int most_teams =
      config.warps == 1 ? most_merge_threads(choices, config.chunks) / kWarp : kMostMergeTeams;
  config.teams = static_cast<int>(
      std::min<int64_t>({most_merge_threads(choices, config.chunks) / (config.warps * kWarp),
                         most_teams, room, rows_of_cta}));
  if (config.teams == 0) return {};
  config.ctas = static_cast<int>(std::min<int64_t>(num_tokens, limits.num_multiprocessors));
  config.shared_bytes = kMergeVectors * config.vector_bytes + config.teams * team_bytes;
  return config;
}

inline MergeConfig merge_config(int64_t num_tokens, int64_t hidden, const DeviceLimits& limits) {
  return choose_merge_config(num_tokens, hidden, kMergeChoices, false, limits);
}
inline MergeConfig merge_backward_config(int64_t num_tokens, int64_t hidden,
                                         const DeviceLimits& limits) {
  return choose_merge_config(num_tokens, hidden, kMergeBackwardChoices, true, limits);
}

}  // namespace attnres::cuda
