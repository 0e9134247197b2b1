// Starts kernels. Every launch goes through here, so every launch is checked.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "kernels/launch_shape.hpp"
#include "launchers.hpp"

namespace attnres::cuda {

// The `launch` of the launch_<operator> templates.
struct Launcher {
  const LaunchContext& context;
  // Whether a kernel may start before the one before it in the stream has ended: 9.0 and later.
  // Every kernel waits for it itself, see wait_for_previous_kernel().
  bool starts_early = false;

  // Returns without waiting. The error of a failed launch is handed back and not left for the next
  // caller to find.
  template <auto kKernel, typename Args>
  cudaError_t operator()(const Args& args, const LaunchShape& shape) const {
    cudaError_t status = allow_shared_memory<kKernel>(shape.fills_shared_memory);
    if (status == cudaSuccess) {
      Config config(shape, context.stream);
      if (starts_early) {
        cudaLaunchAttribute& attribute =
            config.add(cudaLaunchAttributeProgrammaticStreamSerialization);
        attribute.val.programmaticStreamSerializationAllowed = 1;
      }
      status = cudaLaunchKernelEx(&config.launch, kKernel, args);
    }
    if (status != cudaSuccess) cudaGetLastError();
    return status;
  }

  // Clusters for `num_tokens` rows. No more than run at the same time: one that had to wait would
  // do all its share of the rows when the others are done. Asked of the driver, because clusters
  // leave multiprocessors over where the chip's groups of them are not multiples of their size;
  // unless so few are wanted that those that wait have one row each.
  template <auto kKernel>
  int64_t num_clusters(const LaunchShape& shape, int64_t num_tokens) const {
    if (num_tokens * shape.cluster_size <= context.limits.num_multiprocessors) return num_tokens;
    int count = 0;
    if (allow_shared_memory<kKernel>(shape.fills_shared_memory) == cudaSuccess) {
      LaunchShape one = shape;
      one.num_ctas = shape.cluster_size;
      const Config config(one, nullptr);
      if (cudaOccupancyMaxActiveClusters(&count, kKernel, &config.launch) != cudaSuccess) count = 0;
    }
    // An error comes back from the launch.
    if (count == 0) cudaGetLastError();
    return std::clamp(count, 1, std::max(1, shape.num_ctas / shape.cluster_size));
  }

 private:
  struct Config {
    cudaLaunchConfig_t launch = {};
    cudaLaunchAttribute attributes[2] = {};

    Config(const LaunchShape& shape, cudaStream_t stream) {
      launch.gridDim = dim3(static_cast<unsigned>(shape.num_ctas));
      launch.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
      launch.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
      launch.stream = stream;
      launch.attrs = attributes;
      if (shape.cluster_size > 0) {
        cudaLaunchAttribute& attribute = add(cudaLaunchAttributeClusterDimension);
        attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster_size);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      }
    }
    Config(const Config&) = delete;
    Config& operator=(const Config&) = delete;

    cudaLaunchAttribute& add(cudaLaunchAttributeID id) {
      cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
      attribute.id = id;
      return attribute;
    }
  };

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
