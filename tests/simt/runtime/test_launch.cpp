// csrc/cuda/launch.cuh over the stand-in of the CUDA runtime: what it asks for before a launch, how
// a launch says what it is, and what becomes of an error.
#define ATTNRES_CUDA_SET sm90

#include "../../cpp/check.hpp"
#include "launch.cuh"

namespace attnres::cuda {
inline namespace ATTNRES_CUDA_SET {

struct Args {
  int* sum;
};

// A kernel for each test: what was asked for once for a kernel is remembered.
template <int kNumber>
void kernel(Args args) {
  simt::wait_for_previous_kernel();
  if (simt::thread_rank() == 0) *args.sum += 1;
}

}  // namespace ATTNRES_CUDA_SET

namespace sm80 {

void kernel(Args) {}

}  // namespace sm80

void kernel_of_no_set(Args) {}

}  // namespace attnres::cuda

namespace {

using namespace attnres::cuda;

constexpr simt::Device kHopper = {90, 132, 228 << 10, 227 << 10, 16};
constexpr simt::Device kWithoutLargeClusters = {90, 132, 228 << 10, 227 << 10, 8};
constexpr simt::Device kAmpere = {80, 108, 164 << 10, 163 << 10, 0};

LaunchShape shape(int shared_bytes, int cluster_size = 0, int num_ctas = 16) {
  return {num_ctas, 32, shared_bytes, true, cluster_size};
}

// What operators know of a device that is now the current one.
LaunchContext context_of(const simt::Device& device) {
  const int number = simt::device_like(device);
  cudaSetDevice(number);
  return {nullptr,
          number,
          {device.num_multiprocessors, device.shared_bytes_per_multiprocessor,
           device.shared_bytes_per_cta}};
}

// Launches, runs, and says how it went and what it left for the next caller to find.
template <auto kKernel>
cudaError_t launch_on(const simt::Device& device, const LaunchShape& shape,
                      bool starts_early = false) {
  const LaunchContext context = context_of(device);
  int runs = 0;
  const cudaError_t status =
      Launcher{context, starts_early}.operator()<kKernel>(Args{&runs}, shape);
  simt::synchronize();
  CHECK(runs == (status == cudaSuccess ? shape.num_ctas : 0));
  CHECK(cudaGetLastError() == cudaSuccess);
  return status;
}

simt::Launched last_launch() { return simt::take_launches().back(); }

void test_a_launch_says_what_it_is() {
  constexpr auto kKernel = kernel<0>;
  CHECK(launch_on<kKernel>(kHopper, shape(1024)) == cudaSuccess);
  simt::Launched launched = last_launch();
  CHECK(launched.cluster_size == 0 && !launched.starts_early);
  CHECK(launch_on<kKernel>(kHopper, shape(1024, 4), true) == cudaSuccess);
  launched = last_launch();
  CHECK(launched.num_ctas == 16 && launched.num_threads == 32 && launched.shared_bytes == 1024);
  CHECK(launched.cluster_size == 4 && launched.starts_early);
  CHECK(launch_on<kKernel>(kAmpere, shape(1024)) == cudaErrorNoKernelImageForDevice);
}

void test_shared_memory_is_asked_for_on_each_device() {
  constexpr auto kKernel = kernel<1>;
  for (int i = 0; i < 2; ++i) {
    CHECK(launch_on<kKernel>(kHopper, shape(227 << 10)) == cudaSuccess);
    CHECK(launch_on<kKernel>(kWithoutLargeClusters, shape(227 << 10)) == cudaSuccess);
  }
  CHECK(launch_on<kKernel>(kHopper, shape((227 << 10) + 1)) == cudaErrorInvalidValue);
}

void test_large_clusters_are_asked_for() {
  constexpr auto kKernel = kernel<2>;
  CHECK(launch_on<kKernel>(kHopper, shape(1024, 8)) == cudaSuccess);
  CHECK(launch_on<kKernel>(kHopper, shape(1024, 16)) == cudaSuccess);
  CHECK(launch_on<kKernel>(kWithoutLargeClusters, shape(1024, 8)) == cudaSuccess);
  CHECK(launch_on<kKernel>(kWithoutLargeClusters, shape(1024, 16)) == cudaErrorInvalidClusterSize);
}

template <auto kKernel>
int64_t num_clusters(const simt::Device& device, const LaunchShape& shape, int64_t wanted) {
  const LaunchContext context = context_of(device);
  const int64_t count = Launcher{context}.num_clusters<kKernel>(shape, wanted);
  CHECK(cudaGetLastError() == cudaSuccess);
  return count;
}

void test_clusters_are_no_more_than_run_at_a_time() {
  constexpr auto kKernel = kernel<3>;
  // Two CTAs to a multiprocessor, and one.
  const LaunchShape two = shape(100 << 10, 8, 264), one = shape(200 << 10, 8, 132);
  CHECK(num_clusters<kKernel>(kHopper, two, 1000) == 33);
  CHECK(num_clusters<kKernel>(kHopper, one, 1000) == 16);
  // So few that they run whatever the device says, and all that there are.
  CHECK(num_clusters<kKernel>(kHopper, one, 5) == 5);
  const LaunchShape large = shape(200 << 10, 16, 132);
  CHECK(num_clusters<kKernel>(kHopper, large, 1000) == 8);
  CHECK(num_clusters<kKernel>(kWithoutLargeClusters, large, 1000) == 0);
}

void test_errors_are_handed_back_and_not_left() {
  constexpr auto kKernel = kernel<4>;
  LaunchShape none = shape(1024);
  none.num_ctas = 0;
  CHECK(launch_on<kKernel>(kHopper, none) == cudaErrorInvalidConfiguration);
  LaunchShape many = shape(1024);
  many.num_threads = 2048;
  CHECK(launch_on<kKernel>(kHopper, many) == cudaErrorInvalidConfiguration);
  CHECK(launch_on<kKernel>(kHopper, shape(1024, 3)) == cudaErrorInvalidClusterSize);
}

// As where two sets gave a kernel one name, and a linker kept the other set's.
void test_a_kernel_of_another_set_is_refused() {
  CHECK(launch_on<sm80::kernel>(kHopper, shape(1024)) == cudaErrorNoKernelImageForDevice);
  CHECK(launch_on<kernel_of_no_set>(kHopper, shape(1024)) == cudaErrorNoKernelImageForDevice);
}

}  // namespace

int main() {
  test_a_launch_says_what_it_is();
  test_shared_memory_is_asked_for_on_each_device();
  test_large_clusters_are_asked_for();
  test_clusters_are_no_more_than_run_at_a_time();
  test_errors_are_handed_back_and_not_left();
  test_a_kernel_of_another_set_is_refused();
  return attnres::testing::finish();
}
