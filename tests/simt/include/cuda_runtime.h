// cuda_runtime.h, but for launches: those go to the simulated device, which must know what type a
// kernel's arguments are to call it.
#pragma once

#include_next <cuda_runtime.h>

#include "runtime/runtime.hpp"

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

#define cudaLaunchKernelEx simt::launch_kernel
