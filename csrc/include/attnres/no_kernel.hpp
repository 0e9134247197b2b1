// What to say where a backend has no kernel for an operator.
#pragma once

#include <string>
#include <string_view>

namespace attnres {

// `built`: the sets of CUDA kernels of this build, "80,90"; empty in one without CUDA.
inline std::string no_cuda_kernel_for(std::string_view op, std::string_view built) {
  const std::string build = built.empty() ? ", made without a CUDA compiler,"
                                          : ", though it holds CUDA kernels of other operators,";
  return std::string(op) + ": this build of attnres_ext" + build +
         " has no CUDA kernel for it; move the tensors to the CPU" +
         (built.empty() ? ", or install a build with CUDA kernels" : "") +
         " (`attnres info` lists what is inside)";
}

}  // namespace attnres
