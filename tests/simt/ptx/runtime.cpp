#include "ptx/runtime.hpp"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include "kernels/depth_attention_tile.hpp"
#include "ptx/program.hpp"

namespace simt::ptx {
namespace {

// No device has less, and nobody has to ask for it.
constexpr size_t kSharedBytesForAll = 48 * 1024;

struct Kernel {
  std::string text;
  bool is_parsed = false;
  Program program;
  std::map<int, size_t> most_shared_bytes;  // of devices that were asked for more
  bool may_run_in_large_clusters = false;

  size_t most_shared_bytes_on(int device) const {
    const auto asked_for = most_shared_bytes.find(device);
    if (asked_for == most_shared_bytes.end()) return kSharedBytesForAll;
    return std::max(kSharedBytesForAll, asked_for->second);
  }
};

// By architecture and name.
std::map<std::pair<int, std::string>, Kernel>& kernels() {
  static std::map<std::pair<int, std::string>, Kernel> all;
  return all;
}

// By its name in the runner, which nvcc gives it too, among those for the device.
Kernel& kernel_at(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr) fail("a kernel without a name");
  const auto found = kernels().find({device().architecture, info.dli_sname});
  if (found == kernels().end()) fail("no PTX has the kernel", info.dli_sname);
  return found->second;
}

struct Attributes {
  int cluster_size = 0;
  bool starts_early = false;

  explicit Attributes(const cudaLaunchConfig_t& config) {
    for (unsigned i = 0; i < config.numAttrs; ++i) {
      const cudaLaunchAttribute& attribute = config.attrs[i];
      if (attribute.id == cudaLaunchAttributeClusterDimension) {
        cluster_size = static_cast<int>(attribute.val.clusterDim.x);
        if (attribute.val.clusterDim.y != 1 || attribute.val.clusterDim.z != 1) {
          fail("a cluster of more than one dimension");
        }
      } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
        starts_early = attribute.val.programmaticStreamSerializationAllowed != 0;
      } else {
        fail("a launch attribute that no launch should have");
      }
    }
  }
};

// Whether the device would take it.
cudaError_t check(const Kernel& kernel, const cudaLaunchConfig_t& config,
                  const Attributes& attributes) {
  const auto cluster_size = static_cast<unsigned>(attributes.cluster_size);
  if (config.gridDim.x == 0 || config.blockDim.x == 0) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > kernel.most_shared_bytes_on(device().number())) {
    return cudaErrorInvalidValue;
  }
  if (cluster_size == 0) return cudaSuccess;
  if (config.gridDim.x % cluster_size != 0) return cudaErrorInvalidClusterSize;
  if (attributes.cluster_size <= attnres::cuda::kMostCtasInCluster) return cudaSuccess;
  const bool runs = device().runs_large_clusters && kernel.may_run_in_large_clusters;
  return runs ? cudaSuccess : cudaErrorInvalidClusterSize;
}

cudaError_t last_error = cudaSuccess;
cudaError_t noted(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

}  // namespace

void load(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail("there is no file", path);
  std::stringstream contents;
  contents << file.rdbuf();
  const std::string text = contents.str();
  const std::string target = ".target sm_", start = ".visible .entry ";
  const int architecture = std::atoi(text.c_str() + text.find(target) + target.size());
  for (size_t at = text.find(start); at != text.npos;) {
    const size_t next = text.find(start, at + 1);
    const size_t name = at + start.size();
    Kernel& kernel = kernels()[{architecture, text.substr(name, text.find('(', name) - name)}];
    kernel.text = text.substr(at, next == text.npos ? next : next - at);
    at = next;
  }
}

void print_launched() {
  for (const auto& [key, kernel] : kernels()) {
    if (kernel.is_parsed) std::printf("%d %s\n", key.first, key.second.c_str());
  }
}

bool is_loaded() { return !kernels().empty(); }

Device& device() {
  static Device current;
  return current;
}

int Device::number() const {
  static std::vector<std::pair<int, bool>> seen;
  const std::pair<int, bool> kind = {shared_bytes_per_cta, runs_large_clusters};
  auto place = std::find(seen.begin(), seen.end(), kind);
  if (place == seen.end()) place = seen.insert(place, kind);
  return static_cast<int>(place - seen.begin());
}

}  // namespace simt::ptx

using simt::ptx::Attributes;
using simt::ptx::device;
using simt::ptx::Kernel;
using simt::ptx::noted;

extern "C" {

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Kernel& kernel = simt::ptx::kernel_at(function);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value > device().shared_bytes_per_cta) return noted(cudaErrorInvalidValue);
      kernel.most_shared_bytes[device().number()] = static_cast<size_t>(value);
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      kernel.may_run_in_large_clusters = value != 0;
      return cudaSuccess;
    default:
      return noted(cudaErrorInvalidValue);
  }
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* function,
                                           const cudaLaunchConfig_t* config) {
  const cudaError_t status =
      simt::ptx::check(simt::ptx::kernel_at(function), *config, Attributes(*config));
  // As if there were room for all that are wanted.
  *count = status == cudaSuccess ? 1 << 20 : 0;
  return noted(status);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  Kernel& kernel = simt::ptx::kernel_at(function);
  const Attributes attributes(*config);
  if (!kernel.is_parsed) {
    kernel.program = simt::ptx::parse(kernel.text);
    kernel.is_parsed = true;
  }
  const auto num_threads = static_cast<int>(config->blockDim.x);
  if (num_threads > kernel.program.most_threads) return noted(cudaErrorInvalidConfiguration);
  const cudaError_t status = simt::ptx::check(kernel, *config, attributes);
  if (status != cudaSuccess) return noted(status);
  simt::run({static_cast<int>(config->gridDim.x), num_threads,
             static_cast<int>(config->dynamicSmemBytes), device().order, device().seed,
             std::max(1, attributes.cluster_size), device().end_previous_kernel},
            [&] {
              // Only a launch that says so starts before the kernel before it has ended.
              if (!attributes.starts_early) simt::wait_for_previous_kernel();
              simt::ptx::run_thread(kernel.program, arguments[0], device().allocations);
            });
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::ptx::last_error;
  simt::ptx::last_error = cudaSuccess;
  return error;
}

}  // extern "C"
