#include "attnres/no_kernel.hpp"
#include "check.hpp"

using attnres::no_cuda_kernel_for;

int main() {
  CHECK(no_cuda_kernel_for("merge_partial", "") ==
        "merge_partial: this build of attnres_ext, made without a CUDA compiler, has no CUDA "
        "kernel for it; move the tensors to the CPU, or install a build with CUDA kernels "
        "(`attnres info` lists what is inside)");
  CHECK(no_cuda_kernel_for("merge_partial", "80,90") ==
        "merge_partial: this build of attnres_ext, though it holds CUDA kernels of other "
        "operators, has no CUDA kernel for it; move the tensors to the CPU (`attnres info` lists "
        "what is inside)");
  return attnres::testing::finish();
}
