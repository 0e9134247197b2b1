// Which set of kernels serves which device, and what to say where there is none. No torch, no CUDA.
#pragma once

#include <string>
#include <string_view>

namespace attnres::cuda {

// The set for a compute capability, 10 * major + minor, or 0.
constexpr int kernel_set(int capability) {
  return capability >= 90 ? 90 : capability >= 80 ? 80 : 0;
}

// What to do about a device without kernels; `built` names the sets of this build, "80,90".
inline std::string no_kernels_for(const std::string& device, int capability,
                                  std::string_view built) {
  const int set = kernel_set(capability);
  if (set == 0) {
    return device +
           " is older than the kernels of attnres_ext, which need compute capability 8.0 or later; "
           "move the tensors to the CPU or to a newer device";
  }
  return device + " has no kernel in this build of attnres_ext, which holds the sets \"" +
         std::string(built) + "\"; build it with " + std::to_string(set) +
         " in ATTNRES_CUDA_ARCHS (80 serves 8.x, 90 serves 9.0 and later), or move the tensors to "
         "the CPU";
}

}  // namespace attnres::cuda
