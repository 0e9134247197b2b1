// The part of the CUDA runtime that csrc/cuda/launch.cuh calls, for a device that runs PTX on the
// executor.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <string>
#include <vector>

#include "executor.hpp"
#include "ptx/program.hpp"

namespace simt::ptx {

// Adds the kernels of a file.
void load(const std::string& path);
// Whether any file was loaded.
bool is_loaded();
// Prints the architecture and the name of every kernel that was launched, a line each.
void print_launched();

// What the next launch runs on, and how.
struct Device {
  Order order = Order::kForward;
  uint64_t seed = 0;
  int architecture = 0;  // "sm_80" is 80: the kernels that it runs
  bool runs_large_clusters = true;
  int shared_bytes_per_cta = 0;
  std::vector<Extent> allocations;
  std::function<void()> end_previous_kernel;

  // Devices that differ in what is remembered of them have different numbers.
  int number() const;
};
Device& device();

}  // namespace simt::ptx

// Overloads that the CUDA headers show to nvcc alone.
template <typename... Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename... Args>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(Args...),
                                           const cudaLaunchConfig_t* config) {
  return cudaOccupancyMaxActiveClusters(count, reinterpret_cast<const void*>(kernel), config);
}
