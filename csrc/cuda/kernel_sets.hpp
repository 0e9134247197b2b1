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

// What to do about a driver that is older than the CUDA runtime in this library, by their versions:
// 12040 is 12.4.
inline std::string driver_is_too_old(int driver, int runtime) {
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  const std::string major = std::to_string(runtime / 1000);
  return "this build of attnres_ext holds the CUDA " + text(runtime) +
         " runtime, and the driver is one of CUDA " + text(driver) + "; install a driver of CUDA " +
         major + ".0 or later, or build attnres_ext with a toolkit of CUDA " +
         std::to_string(driver / 1000) + ", or move the tensors to the CPU";
}

}  // namespace attnres::cuda
