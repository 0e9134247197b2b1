#include "runtime/runtime.hpp"

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "device.hpp"
#include "kernel_sets.hpp"

namespace simt {
namespace {

// No device has less, and nobody has to ask for it.
constexpr size_t kSharedBytesForAll = 48 * 1024;
constexpr unsigned kMostThreadsOfCta = 1024;
constexpr int kMostThreadsOfMultiprocessor = 2048;
constexpr size_t kMostLaunchesKept = 1000;

struct Launch {
  Grid grid;
  Launched launched;
  std::function<void()> body;
};

struct Runtime {
  std::vector<Device> devices;
  Use use;
  int device = 0;  // the current one
  cudaError_t last_error = cudaSuccess;
  // What was asked for, for a kernel and a device.
  std::map<std::pair<const void*, int>, size_t> most_shared_bytes;
  std::set<std::pair<const void*, int>> may_run_in_large_clusters;
  std::deque<Launch> waiting;
  std::vector<Launched> launched;
};

Runtime& runtime() {
  static Runtime all;
  return all;
}

const Device& current_device() {
  return runtime().devices.at(static_cast<size_t>(runtime().device));
}

cudaError_t noted(cudaError_t status) {
  if (status != cudaSuccess) runtime().last_error = status;
  return status;
}

struct Name {
  std::string text = "a kernel without a name";
  int set = 0;  // 80 for what is in attnres::cuda::sm80
};

// Names live as long as the process.
const Name& name_of(const void* kernel) {
  static std::map<const void*, Name> names;
  const auto [found, is_new] = names.try_emplace(kernel);
  Name& name = found->second;
  Dl_info info;
  if (is_new && dladdr(kernel, &info) != 0 && info.dli_sname != nullptr) {
    int status = 0;
    char* const text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    name.text = status == 0 ? text : info.dli_sname;
    std::free(text);
    const std::string mangled = info.dli_sname, in_a_set = "_ZN7attnres4cuda4sm";
    if (mangled.rfind(in_a_set, 0) == 0) {
      name.set = std::atoi(mangled.substr(in_a_set.size(), 2).c_str());
    }
  }
  return name;
}

struct Attributes {
  int cluster_size = 0;
  bool starts_early = false;
  bool are_known = true;

  explicit Attributes(const cudaLaunchConfig_t& config) {
    for (unsigned i = 0; i < config.numAttrs; ++i) {
      const cudaLaunchAttribute& attribute = config.attrs[i];
      if (attribute.id == cudaLaunchAttributeClusterDimension) {
        cluster_size = static_cast<int>(attribute.val.clusterDim.x);
        are_known = attribute.val.clusterDim.y == 1 && attribute.val.clusterDim.z == 1;
      } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
        starts_early = attribute.val.programmaticStreamSerializationAllowed != 0;
      } else {
        are_known = false;
      }
    }
  }
};

// Whether the current device would take it.
cudaError_t check(const void* kernel, const cudaLaunchConfig_t& config,
                  const Attributes& attributes) {
  const Device& device = current_device();
  // Of two sets that give a kernel one name, a linker keeps one: the other's devices have no code.
  if (name_of(kernel).set != attnres::cuda::kernel_set(device.capability)) {
    return cudaErrorNoKernelImageForDevice;
  }
  const std::pair<const void*, int> key = {kernel, runtime().device};
  const auto asked_for = runtime().most_shared_bytes.find(key);
  const size_t most_bytes = asked_for == runtime().most_shared_bytes.end()
                                ? kSharedBytesForAll
                                : std::max(kSharedBytesForAll, asked_for->second);
  if (!attributes.are_known || config.dynamicSmemBytes > most_bytes) return cudaErrorInvalidValue;
  if (config.gridDim.x == 0 || config.gridDim.y != 1 || config.gridDim.z != 1 ||
      config.blockDim.x == 0 || config.blockDim.x > kMostThreadsOfCta || config.blockDim.y != 1 ||
      config.blockDim.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  const int size = attributes.cluster_size;
  // 9.0 and later.
  const bool is_late = attributes.starts_early || size > 0;
  if (is_late && device.capability < 90) return cudaErrorNotSupported;
  if (size == 0) return cudaSuccess;
  const int most = runtime().may_run_in_large_clusters.count(key) > 0
                       ? device.most_ctas_in_cluster
                       : std::min(device.most_ctas_in_cluster, attnres::cuda::kMostCtasInCluster);
  const bool are_whole = config.gridDim.x % static_cast<unsigned>(size) == 0;
  return size <= most && are_whole ? cudaSuccess : cudaErrorInvalidClusterSize;
}

// Runs number `index` of those that wait, and while it waits for the one before it, that one.
void run_launch(std::deque<Launch>& launches, size_t index) {
  Launch& launch = launches[index];
  if (index > 0) {
    launch.grid.end_previous_kernel = [&launches, index] { run_launch(launches, index - 1); };
  }
  try {
    run(launch.grid, [&launch] {
      // Only a launch that says so starts before the kernel before it has ended.
      if (!launch.launched.starts_early) wait_for_previous_kernel();
      launch.body();
    });
  } catch (const Failure& failure) {
    throw std::runtime_error(std::string(launch.launched.kernel) + ": " + failure.what());
  }
}

}  // namespace

int device_like(const Device& device) {
  auto& devices = runtime().devices;
  const auto is_like = [&](const Device& other) {
    return std::memcmp(&device, &other, sizeof(Device)) == 0;
  };
  const auto found = std::find_if(devices.begin(), devices.end(), is_like);
  const auto number = static_cast<int>(found - devices.begin());
  if (found == devices.end()) devices.push_back(device);
  return number;
}

Use& use() { return runtime().use; }

std::vector<Launched> take_launches() { return std::exchange(runtime().launched, {}); }

cudaError_t enqueue(const cudaLaunchConfig_t& config, const void* kernel, Launched launched,
                    std::function<void()> body) {
  const Attributes attributes(config);
  const cudaError_t status = check(kernel, config, attributes);
  if (status != cudaSuccess) return noted(status);
  launched.kernel = name_of(kernel).text.c_str();
  launched.num_ctas = config.gridDim.x;
  launched.num_threads = config.blockDim.x;
  launched.shared_bytes = static_cast<int64_t>(config.dynamicSmemBytes);
  launched.cluster_size = attributes.cluster_size;
  launched.starts_early = attributes.starts_early;
  const Use& as = runtime().use;
  const Grid grid = {static_cast<int>(launched.num_ctas),
                     static_cast<int>(launched.num_threads),
                     static_cast<int>(launched.shared_bytes),
                     as.order,
                     as.seed,
                     std::max(1, attributes.cluster_size),
                     nullptr};
  // Whoever never asks needs none of them.
  if (runtime().launched.size() < kMostLaunchesKept) runtime().launched.push_back(launched);
  runtime().waiting.push_back({grid, std::move(launched), std::move(body)});
  return cudaSuccess;
}

void synchronize() {
  std::deque<Launch> launches = std::exchange(runtime().waiting, {});
  if (!launches.empty()) run_launch(launches, launches.size() - 1);
}

void drop_launches() noexcept { runtime().waiting.clear(); }

}  // namespace simt

using simt::current_device;
using simt::noted;
using simt::runtime;

extern "C" {

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(runtime().devices.size())) {
    return noted(cudaErrorInvalidDevice);
  }
  runtime().device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = runtime().device;
  return cudaSuccess;
}

// Its driver is of the toolkit's version.
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int number) {
  if (number < 0 || number >= static_cast<int>(runtime().devices.size())) {
    return noted(cudaErrorInvalidDevice);
  }
  const simt::Device& device = runtime().devices[static_cast<size_t>(number)];
  *properties = {};
  std::strcpy(properties->name, "a simulated GPU");
  properties->major = device.capability / 10;
  properties->minor = device.capability % 10;
  properties->multiProcessorCount = device.num_multiprocessors;
  properties->sharedMemPerMultiprocessor =
      static_cast<size_t>(device.shared_bytes_per_multiprocessor);
  properties->sharedMemPerBlockOptin = static_cast<size_t>(device.shared_bytes_per_cta);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::pair<const void*, int> key = {kernel, runtime().device};
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value > current_device().shared_bytes_per_cta) return noted(cudaErrorInvalidValue);
      runtime().most_shared_bytes[key] = static_cast<size_t>(value);
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (value != 0) runtime().may_run_in_large_clusters.insert(key);
      return cudaSuccess;
    default:
      return noted(cudaErrorInvalidValue);
  }
}

// A device that runs no clusters of this size at all has room for none.
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  *count = 0;
  const simt::Attributes attributes(*config);
  const simt::Device& device = current_device();
  const int size = attributes.cluster_size;
  if (size > attnres::cuda::kMostCtasInCluster && size > device.most_ctas_in_cluster) {
    return cudaSuccess;
  }
  const cudaError_t status = simt::check(kernel, *config, attributes);
  if (status != cudaSuccess) return noted(status);
  const int bytes =
      static_cast<int>(config->dynamicSmemBytes) + attnres::cuda::kReservedSharedBytes;
  const int ctas =
      std::min(device.shared_bytes_per_multiprocessor / bytes,
               simt::kMostThreadsOfMultiprocessor / static_cast<int>(config->blockDim.x));
  *count = device.num_multiprocessors * ctas / size;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(runtime().last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    default:
      return "an error";
  }
}

const char* cudaGetErrorString(cudaError_t) { return "the simulated device refuses it"; }

}  // extern "C"
