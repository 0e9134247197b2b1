// A simulated GPU behind the CUDA runtime's functions: kernels are compiled for the host and run by
// the executor, each when the operator that launched it waits for it.
//
// It takes what a device takes and refuses what that refuses: shared memory that nobody asked for,
// clusters that are too large, a kernel that was not made for it. It starts a kernel before the one
// before it has ended where the launch allows that, and then lets that one run no earlier than it
// must.
#pragma once

#include <driver_types.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "executor.hpp"

namespace simt {

// What a device is.
struct Device {
  int capability;  // 10 * major + minor
  int num_multiprocessors;
  int shared_bytes_per_multiprocessor;
  int shared_bytes_per_cta;  // with opt-in
  int most_ctas_in_cluster;  // with opt-in; 0: it knows no clusters
};

// Adds a device like this one, unless there is one already; its number, as in "cuda:0".
int device_like(const Device& device);

// Which device operators run on from now on, and how its threads are run.
struct Use {
  int device = 0;
  Order order = Order::kForward;
  uint64_t seed = 0;
};
Use& use();

// A launch, for tests that want to know which way a call went.
struct Launched {
  const char* kernel;
  int64_t num_ctas;
  int64_t num_threads;
  int64_t shared_bytes;
  int64_t cluster_size;  // 0: without clusters
  bool starts_early;
  bool uses_slots;  // of shared memory: rows are not read where they are
  int64_t num_slots;
  int64_t num_spans;  // or passes, that rows are read in; 0 for a kernel that takes no rows
  bool resident;      // rows are read once
  int64_t warps;      // that compute, and their columns, in a tile for tensor cores
  int64_t columns;
};
// Those since it was asked last.
std::vector<Launched> take_launches();

// Checks a launch and puts it behind those before it.
cudaError_t enqueue(const cudaLaunchConfig_t& config, const void* kernel, Launched launched,
                    std::function<void()> body);

// Runs what was launched. Throws a std::runtime_error that names the kernel if it did what none may
// do.
void synchronize();
// Forgets what was launched and has not run.
void drop_launches() noexcept;

// In the place of cudaLaunchKernelEx().
template <typename Args>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Args),
                          const Args& args) {
  Launched launched = {};
  // Of a kernel that has no tile of rows there is nothing to tell.
  if constexpr (requires { args.tile.num_passes; }) {
    launched.num_spans = args.tile.num_passes;
    launched.resident = args.tile.num_passes == 1;
  } else if constexpr (requires { args.tile.num_spans; }) {
    launched.num_spans = args.tile.num_spans;
    launched.resident = args.tile.resident;
  } else if constexpr (requires { args.config.columns; }) {
    launched.num_spans = 1;
    launched.resident = launched.uses_slots = true;
    launched.num_slots = args.config.stages;
    launched.warps = args.config.warps;
    launched.columns = args.config.columns;
  } else if constexpr (requires { args.config.teams; }) {
    launched.num_spans = 1;
    launched.resident = true;
    launched.warps = args.config.warps;
    launched.columns = 256 * args.config.chunks;
  }
  if constexpr (requires { args.tile.num_slots; }) {
    launched.uses_slots = args.tile.slot_bytes > 0;
    launched.num_slots = args.tile.num_slots;
  }
  return enqueue(*config, reinterpret_cast<const void*>(kernel), std::move(launched),
                 [kernel, args] { kernel(args); });
}

}  // namespace simt
