// Starts kernels. Every launch goes through here, so every launch is checked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "kernels/launch_shape.hpp"
#include "launchers.hpp"

namespace attnres::cuda {

// The `launch` of the launch_<operator> templates.
struct Launcher {
  const LaunchContext& context;

  // Returns without waiting. The error of a failed launch is handed back and not left for the next
  // caller to find.
  template <auto kKernel, typename Args>
  cudaError_t operator()(const Args& args, const LaunchShape& shape) const {
    cudaError_t status = allow_shared_memory<kKernel>(shape.fills_shared_memory);
    if (status == cudaSuccess) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(static_cast<unsigned>(shape.num_ctas));
      config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
      config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
      config.stream = context.stream;
      status = cudaLaunchKernelEx(&config, kKernel, args);
    }
    if (status != cudaSuccess) cudaGetLastError();
    return status;
  }

 private:
  // More than 48 KB of shared memory is opt-in, and so is a small first-level cache that leaves
  // room for it: once for each kernel and device.
  template <auto kKernel>
  cudaError_t allow_shared_memory(bool fill) const {
    static std::atomic<uint64_t> allowed{0};  // a bit for each device
    const uint64_t bit = uint64_t{1} << (context.device % 64);
    if (context.device < 64 && (allowed.load(std::memory_order_relaxed) & bit) != 0) {
      return cudaSuccess;
    }
    cudaError_t status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              context.limits.shared_bytes_per_cta);
    if (status == cudaSuccess && fill) {
      status = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared);
    }
    if (status == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
    return status;
  }
};

}  // namespace attnres::cuda
