#include "check.hpp"
#include "kernel_sets.hpp"

using namespace attnres::cuda;

namespace {

static_assert(kernel_set(70) == 0 && kernel_set(75) == 0);
static_assert(kernel_set(80) == 80 && kernel_set(86) == 80 && kernel_set(89) == 80);
static_assert(kernel_set(90) == 90 && kernel_set(100) == 90 && kernel_set(120) == 90);

bool says(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void test_a_device_without_kernels_gets_advice() {
  const std::string missing = no_kernels_for("cuda:1 (NVIDIA H100)", 90, "80");
  CHECK(says(missing, "cuda:1 (NVIDIA H100) has no kernel in this build"));
  CHECK(says(missing, "holds the sets \"80\""));
  CHECK(says(missing, "build it with 90 in ATTNRES_CUDA_ARCHS"));
  const std::string old = no_kernels_for("cuda:0 (Tesla V100)", 70, "80,90");
  CHECK(says(old, "cuda:0 (Tesla V100) is older"));
  CHECK(says(old, "8.0 or later"));
  CHECK(!says(old, "ATTNRES_CUDA_ARCHS"));
}

}  // namespace

int main() {
  test_a_device_without_kernels_gets_advice();
  CHECK(
      driver_is_too_old(12040, 13000) ==
      "this build of attnres_ext holds the CUDA 13.0 runtime, and the driver is one of CUDA 12.4; "
      "install a driver of CUDA 13.0 or later, or build attnres_ext with a toolkit of CUDA 12, or "
      "move the tensors to the CPU");
  return attnres::testing::finish();
}
