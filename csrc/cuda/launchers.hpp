// What the architecture folders offer to ops_cuda.cpp. No torch, no device code.
#pragma once

#include <cuda_runtime_api.h>

#include "attnres/params.hpp"
#include "device.hpp"

namespace attnres::cuda {

struct LaunchContext {
  cudaStream_t stream;
  int device;
  DeviceLimits limits;
};

// Kernels number rows and values of a row with 32 bits, and bytes of a tensor with 64.
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxHidden = int64_t{1} << 28;

// Starts the kernels of a set for one operator, by the type of its parameters, and returns without
// waiting, with the error of the launch. Each set's folder specialises it; weak, so that it is null
// where the set was not built.
template <int kSet, typename Params>
__attribute__((weak)) cudaError_t launch(const Params& p, const LaunchContext& context);

}  // namespace attnres::cuda
