// How many CTAs, or clusters of them, a launch of a tile has: what its forward and its backward
// have in common.
#pragma once

#include <algorithm>

#include "common/set.cuh"
#include "device.hpp"
#include "launch_shape.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// CTAs, or clusters, and what is launched for them.
struct TileTeams {
  int count;  // 0 where the device runs no clusters of the configuration's size
  LaunchShape shape;
};

// No more than `most` of them. `warps` of a CTA beside those that compute.
template <auto kKernel, typename Config, typename Launch>
TileTeams tile_teams(const Config& config, int warps, int shared_bytes, int64_t most,
                     const DeviceLimits& limits, Launch&& launch) {
  LaunchShape shape = {config.ctas * limits.num_multiprocessors, 32 * (config.warps + warps),
                       shared_bytes, true, config.cluster > 1 ? config.cluster : 0};
  int64_t teams = shape.num_ctas;
  if (config.cluster > 1) teams = launch.template num_clusters<kKernel>(shape, most);
  teams = std::min(teams, most);
  shape.num_ctas = static_cast<int>(teams) * config.cluster;
  return {static_cast<int>(teams), shape};
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
