// The CUDA backend: the only file that knows both torch and CUDA. Parameters in, launcher of the
// device's architecture called, failures turned into sentences.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>

#include "attnres/backend.hpp"
#include "attnres/check.hpp"
#include "inter_block_attention/rows_tile.hpp"
#include "kernel_sets.hpp"
#include "launchers.hpp"

// Lives in libtorch_cuda, which a CPU-only torch does not have: weak, so that one library loads
// under both.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace attnres {
namespace cuda {
namespace {

std::string describe(cudaError_t status) {
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

struct Device {
  std::string name;
  int capability = 0;  // 10 * major + minor
  DeviceLimits limits = {};
};

Device query_device(int index) {
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess) cudaGetLastError();
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    fail("cuda:", index, " cannot be used: ", driver_is_too_old(driver, CUDART_VERSION));
  }
  ATTNRES_CHECK(status == cudaSuccess, "attnres_ext cannot read the properties of cuda:", index,
                ": ", describe(status));
  const int capability = 10 * properties.major + properties.minor;
  return {properties.name, capability,
          DeviceLimits{properties.multiProcessorCount,
                       static_cast<int>(properties.sharedMemPerMultiprocessor),
                       static_cast<int>(properties.sharedMemPerBlockOptin), capability}};
}

// Properties take microseconds to milliseconds to read: once for each device.
const Device& device_at(int index) {
  constexpr int kMaxDevices = 128;
  ATTNRES_CHECK(index >= 0 && index < kMaxDevices,
                "attnres_ext serves cuda:0 to cuda:", kMaxDevices - 1, ", got cuda:", index);
  static std::once_flag once[kMaxDevices];
  static Device devices[kMaxDevices];
  std::call_once(once[index], [index] { devices[index] = query_device(index); });
  return devices[index];
}

// Makes a device current, and the one before it again at the end. Torch does it, which knows not to
// wake a device that nobody uses; the CUDA runtime in this library, another than torch's, is told
// where it thinks otherwise. To tell it what it knows would put the device's primary context in the
// place of one that the caller has chosen, a green context, say.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : guard_(device) {
    int current = -1;
    if (cudaGetDevice(&current) == cudaSuccess && current == device) return;
    const cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess) return;
    cudaGetLastError();
    ATTNRES_CHECK(false, "attnres_ext cannot switch to cuda:", device, ": ", describe(status));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

cudaStream_t current_stream(int device) {
  ATTNRES_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                "attnres_ext got tensors on cuda:", device,
                ", but the PyTorch in this process has no CUDA (its "
                "aoti_torch_get_current_cuda_stream is missing); install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

std::string text(const Device& device, int index) {
  return "cuda:" + std::to_string(index) + " (" + device.name + ", compute capability " +
         std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10) +
         ")";
}

template <typename Params>
void check_size(const Params& p) {
  ATTNRES_CHECK(p.num_tokens <= kMaxTokens, p.op, ": sources have ", p.num_tokens,
                " rows of values, expected at most ", kMaxTokens, " on CUDA");
  ATTNRES_CHECK(p.hidden <= kMaxHidden, p.op, ": sources have rows of ", p.hidden,
                " values, expected at most ", kMaxHidden, " on CUDA");
}

// Starts the kernels of the device's set on the current stream.
template <typename Params>
void launch_on(const Params& p, int index) {
  const Device& device = device_at(index);
  const DeviceGuard guard(index);
  const int set = kernel_set(device.capability);
  const auto launch_set = set == 90 ? launch<90, Params> : launch<80, Params>;
  ATTNRES_CHECK(set != 0 && launch_set != nullptr, p.op, ": ",
                no_kernels_for(text(device, index), device.capability, ATTNRES_CUDA_ARCHITECTURES));
  const cudaError_t status = launch_set(p, {current_stream(index), index, device.limits});
  ATTNRES_CHECK(status == cudaSuccess, p.op, ": the launch over ", p.num_sources, " sources of ",
                p.num_tokens, " x ", p.hidden, " values failed on ", text(device, index), ": ",
                describe(status));
}

void depth_attention_forward(const DepthAttentionForward& p, int index) {
  check_size(p);
  launch_on(p, index);
}

void depth_attention_backward(const DepthAttentionBackward& p, int index) {
  check_size(p);
  launch_on(p, index);
}

// Logits of all queries of a token are in shared memory at once, and their outputs are numbered
// with 32 bits.
template <typename Params>
void check_queries(const Params& p, int num_matrices, int index) {
  const int64_t rows = p.num_queries * p.num_tokens;
  ATTNRES_CHECK(rows <= kMaxTokens, p.op, ": ", p.num_queries, " queries of ", p.num_tokens,
                " tokens have ", rows, " rows of results, expected at most ", kMaxTokens,
                " on CUDA");
  const Device& device = device_at(index);
  const int size = static_cast<int>(size_of(p.compute));
  ATTNRES_CHECK(
      inter_block_queries_fit(p.num_queries, p.hidden, p.num_sources, size, num_matrices,
                              device.limits),
      p.op, ": got ", p.num_queries, " queries, expected at most ",
      most_inter_block_queries(p.hidden, p.num_sources, size, num_matrices, device.limits), " for ",
      p.num_sources, " sources on ", text(device, index));
}

void inter_block_forward(const InterBlockForward& p, int index) {
  check_size(p);
  check_queries(p, 1, index);
  launch_on(p, index);
}

void inter_block_backward(const InterBlockBackward& p, int index) {
  check_size(p);
  check_queries(p, 3, index);
  launch_on(p, index);
}

int64_t num_weight_gradient_parts(int64_t num_tokens, int index) {
  const int64_t most =
      int64_t{kPartsPerMultiprocessor} * device_at(index).limits.num_multiprocessors;
  return std::clamp<int64_t>(num_tokens, 1, most);
}

// Block summation of one source that is not attended to.
void block_cache_write(const BlockCacheWrite& write, int index) {
  ConstRows slot = {write.slot.data, write.slot.inner, write.slot.outer_stride,
                    write.slot.inner_stride, write.slot.dtype};
  if (!write.add) slot.data = nullptr;
  DepthAttentionForward p;
  p.op = write.op;
  p.num_tokens = write.num_tokens;
  p.hidden = write.hidden;
  p.num_sources = 1;
  p.sources = &slot;
  p.eps = write.eps;
  p.delta = write.delta;
  p.new_partial = write.slot;
  p.last_rstd = write.rstd;
  p.compute = write.compute;
  depth_attention_forward(p, index);
}

}  // namespace
}  // namespace cuda

const Backend& cuda_backend() {
  static constexpr Backend kBackend = [] {
    Backend backend{};
    backend.depth_attention_forward = cuda::depth_attention_forward;
    backend.depth_attention_backward = cuda::depth_attention_backward;
    backend.inter_block_forward = cuda::inter_block_forward;
    backend.inter_block_backward = cuda::inter_block_backward;
    backend.num_weight_gradient_parts = cuda::num_weight_gradient_parts;
    backend.block_cache_write = cuda::block_cache_write;
    backend.vector_alignment = 16;
    return backend;
  }();
  return kBackend;
}

}  // namespace attnres
