// Starts kernels. Every launch goes through here, so every launch is checked.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "cluster_counts.hpp"
#include "common/set.cuh"
#include "launch_shape.hpp"
#include "launchers.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

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
    cudaError_t status = prepare<kKernel>(shape);
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

  // Clusters for `wanted` rows or tiles. No more than run at the same time: one that had to wait
  // would do all its share when the others are done; unless so few are wanted that those that wait
  // have one row each. Asked of the driver, once for each shape, because clusters leave
  // multiprocessors over where the chip's groups of them are not multiples of their size. 0 where
  // it runs none: larger ones than every device runs, or any in a small part of a device.
  template <auto kKernel>
  int64_t num_clusters(const LaunchShape& shape, int64_t wanted) const {
    static ClusterCounts counts;
    const int count = counts.get(context.device, shape, [&] {
      LaunchShape one = shape;
      one.num_ctas = shape.cluster_size;
      const Config config(one, nullptr);
      int most = 0;
      cudaError_t status = prepare<kKernel>(shape);
      if (status == cudaSuccess) {
        status = cudaOccupancyMaxActiveClusters(&most, kKernel, &config.launch);
      }
      if (status == cudaSuccess) return most;
      cudaGetLastError();
      return -1;
    });
    // An error comes back from the launch that does without a cluster.
    if (count <= 0) return 0;
    const bool are_few = shape.cluster_size <= kMostCtasInCluster &&
                         wanted * shape.cluster_size <= context.limits.num_multiprocessors;
    return are_few ? wanted : std::min(count, std::max(1, shape.num_ctas / shape.cluster_size));
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

  // What a kernel may do only when it has been asked for, once for each kernel and device.
  template <auto kKernel>
  cudaError_t prepare(const LaunchShape& shape) const {
    static Once shared_memory, large_clusters;
    // More than 48 KB of shared memory, and a small first-level cache that leaves room for it.
    cudaError_t status = shared_memory.call(context.device, [&] {
      cudaError_t set = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             context.limits.shared_bytes_per_cta);
      if (set == cudaSuccess && shape.fills_shared_memory) {
        set = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
      }
      return set;
    });
    if (status == cudaSuccess && shape.cluster_size > kMostCtasInCluster) {
      status = large_clusters.call(context.device, [] {
        return cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      });
    }
    return status;
  }

  // Does something until it has succeeded, for each device.
  class Once {
   public:
    template <typename F>
    cudaError_t call(int device, F&& f) {
      const uint64_t bit = uint64_t{1} << (device % 64);
      if (device < 64 && (done_.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
      const cudaError_t status = f();
      if (status == cudaSuccess && device < 64) done_.fetch_or(bit, std::memory_order_relaxed);
      return status;
    }

   private:
    std::atomic<uint64_t> done_{0};  // a bit for each device
  };
};

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
