// The files of cases and results, and what every case begins with.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attnres/params.hpp"
#include "device.hpp"
#include "executor.hpp"
#include "launch_shape.hpp"

namespace simt {

using namespace attnres;

struct File {
  std::FILE* handle;
  File(const char* path, const char* mode) : handle(std::fopen(path, mode)) {
    if (handle == nullptr) {
      std::perror(path);
      std::exit(1);
    }
  }
  ~File() { std::fclose(handle); }

  template <typename T>
  bool get(T& value) {
    return std::fread(&value, sizeof(T), 1, handle) == 1;
  }
  template <typename T>
  T take() {
    T value;
    if (!get(value)) {
      std::fprintf(stderr, "runner: the file of cases ends early\n");
      std::exit(1);
    }
    return value;
  }
  void put(const void* data, size_t bytes) { std::fwrite(data, 1, bytes, handle); }
};

// A tensor in memory of its own, so that the address sanitizer sees its ends; `offset` bytes in, so
// that it can be misaligned.
struct Buffer {
  std::unique_ptr<char[]> storage;
  int64_t bytes = 0;
  int64_t offset = 0;

  void* data() const { return storage == nullptr ? nullptr : storage.get() + offset; }
};

template <typename RowsType>
Buffer take_rows(File& file, RowsType& rows, bool is_output) {
  rows.dtype = static_cast<DType>(file.take<int64_t>());
  rows.inner = file.take<int64_t>();
  rows.outer_stride = file.take<int64_t>();
  rows.inner_stride = file.take<int64_t>();
  Buffer buffer;
  buffer.offset = file.take<int64_t>();
  buffer.bytes = file.take<int64_t>();
  if (buffer.bytes < 0) return buffer;  // absent
  buffer.storage.reset(new char[static_cast<size_t>(buffer.offset + buffer.bytes)]);
  rows.data = buffer.data();
  if (is_output) {
    std::memset(buffer.storage.get(), 0xff, static_cast<size_t>(buffer.offset + buffer.bytes));
  } else if (std::fread(buffer.data(), 1, static_cast<size_t>(buffer.bytes), file.handle) !=
             static_cast<size_t>(buffer.bytes)) {
    std::fprintf(stderr, "runner: the file of cases ends early\n");
    std::exit(1);
  }
  return buffer;
}

// What a launch was, for tests that want to know which way a case went.
struct Report {
  int64_t uses_slots = 0;
  int64_t resident = 0;
  int64_t num_spans = 0;
  int64_t num_slots = 0;
  int64_t num_threads = 0;
  int64_t num_ctas = 0;
  int64_t shared_bytes = 0;
  int64_t cluster_size = 0;
  int64_t warps = 0;  // that compute in a tile, or merge a row, and their columns
  int64_t columns = 0;
  MatrixTraffic matrices = {};
};

// Until the previous kernel has ended, every tensor holds NaN, and nobody may have written there.
class Withheld {
 public:
  explicit Withheld(const std::vector<const std::vector<Buffer>*>& tensors) {
    for (const auto* buffers : tensors) {
      for (const Buffer& buffer : *buffers) {
        if (buffer.bytes <= 0) continue;
        auto* bytes = static_cast<char*>(buffer.data());
        held_.push_back({bytes, std::vector<char>(bytes, bytes + buffer.bytes)});
        std::memset(bytes, kWithheldByte, static_cast<size_t>(buffer.bytes));
      }
    }
  }
  void release() const {
    for (const auto& [to, bytes] : held_) {
      for (size_t i = 0; i < bytes.size(); ++i) {
        if (to[i] == kWithheldByte) continue;
        std::fprintf(stderr, "runner: a tensor was written before the previous kernel had ended\n");
        std::exit(1);
      }
      std::memcpy(to, bytes.data(), bytes.size());
    }
  }

 private:
  static constexpr char kWithheldByte = -1;
  struct Held {
    char* to;
    std::vector<char> bytes;
  };
  std::vector<Held> held_;
};

// How to run a case.
struct Run {
  bool bulk_ring;
  Order order;
  uint64_t seed;
  cuda::DeviceLimits limits;
  int largest_cluster;

  static Run take(File& cases) {
    Run run;
    run.bulk_ring = cases.take<int64_t>() != 0;
    run.order = static_cast<Order>(cases.take<int64_t>());
    run.seed = static_cast<uint64_t>(cases.take<int64_t>());
    run.limits.num_multiprocessors = static_cast<int>(cases.take<int64_t>());
    run.limits.shared_bytes_per_multiprocessor = static_cast<int>(cases.take<int64_t>());
    run.limits.shared_bytes_per_cta = static_cast<int>(cases.take<int64_t>());
    run.largest_cluster = static_cast<int>(cases.take<int64_t>());
    return run;
  }
};

// The `launch` of the launch_<operator> templates: runs a kernel's body.
struct Launch {
  const Run& run_as;
  Report& report;
  std::vector<const std::vector<Buffer>*> tensors;

  // As if the device had room for all that fill its multiprocessors.
  template <auto kKernel>
  int64_t num_clusters(const cuda::LaunchShape& shape, int64_t) const {
    if (shape.cluster_size > run_as.largest_cluster) return 0;
    return std::max(1, shape.num_ctas / shape.cluster_size);
  }

  template <auto kKernel, typename Args>
  int operator()(const Args& args, const cuda::LaunchShape& shape) const {
    // Of a kernel that has no tile of rows there is nothing to tell.
    if constexpr (requires { args.tile.num_passes; }) {
      report = {args.tile.slot_bytes > 0, args.tile.num_passes == 1, args.tile.num_passes,
                args.tile.num_slots,      shape.num_threads,         shape.num_ctas,
                shape.shared_bytes,       args.tile.cluster_size};
    } else if constexpr (requires { args.config.columns; }) {
      report = {true,
                true,
                1,
                args.config.stages,
                shape.num_threads,
                shape.num_ctas,
                shape.shared_bytes,
                shape.cluster_size,
                args.config.warps,
                args.config.columns};
    } else if constexpr (requires { args.config.teams; }) {
      report = {.resident = true,
                .num_spans = 1,
                .num_threads = shape.num_threads,
                .num_ctas = shape.num_ctas,
                .shared_bytes = shape.shared_bytes,
                .warps = args.config.warps,
                .columns = 256 * args.config.chunks};
    } else if constexpr (requires { args.tile; }) {
      report = {args.tile.slot_bytes > 0, args.tile.resident, args.tile.num_spans,
                args.tile.num_slots,      shape.num_threads,  shape.num_ctas,
                shape.shared_bytes,       shape.cluster_size};
    }
    const Withheld withheld(tensors);
    const auto end_previous_kernel = [&] { withheld.release(); };
    run({shape.num_ctas, shape.num_threads, shape.shared_bytes, run_as.order, run_as.seed,
         std::max(1, shape.cluster_size), end_previous_kernel},
        [&] { kKernel(args); });
    report.matrices = matrix_traffic();
    return 0;
  }
};

// What the environment asks of the case: ATTNRES_CUDA_CONFIG.
inline void take_config(File& cases) {
  std::string config(static_cast<size_t>(cases.take<int64_t>()), ' ');
  for (char& c : config) c = cases.take<char>();
  setenv("ATTNRES_CUDA_CONFIG", config.c_str(), 1);
}

// Sizes and scalars that forward and backward share.
template <typename Params>
void take_sizes(File& cases, Params& p) {
  p.num_tokens = cases.take<int64_t>();
  p.hidden = cases.take<int64_t>();
  p.num_sources = static_cast<int>(cases.take<int64_t>());
  p.compute = static_cast<DType>(cases.take<int64_t>());
  p.eps = cases.take<double>();
  const auto out_eps = cases.take<double>();
  if constexpr (requires { p.out_eps; }) p.out_eps = out_eps;
  p.scale = cases.take<double>();
}

inline ConstRows as_const(const Rows& rows) {
  return {rows.data, rows.inner, rows.outer_stride, rows.inner_stride, rows.dtype};
}

// Of rows of the same dtype.
inline void copy_rows(const ConstRows& from, const Rows& to, int64_t num_tokens, int64_t hidden) {
  const int64_t size = size_of(from.dtype);
  for (int64_t m = 0; m < num_tokens; ++m) {
    std::memcpy(static_cast<char*>(to.data) + to.offset(m) * size,
                static_cast<const char*>(from.data) + from.offset(m) * size,
                static_cast<size_t>(hidden * size));
  }
}

// Where the bases of gradients are. 0: no base. 1: other rows. 2: the gradient's own rows. 3: those
// of the source before, whose gradient goes there too.
inline void place_bases(const std::vector<int64_t>& kinds, int64_t num_tokens, int64_t hidden,
                        std::vector<Rows>& grads, std::vector<ConstRows>& bases) {
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (kinds[i] == 2) {
      copy_rows(bases[i], grads[i], num_tokens, hidden);
    } else if (kinds[i] == 3) {
      grads[i] = grads[i - 1];
    }
    if (kinds[i] >= 2) bases[i] = as_const(grads[i]);
  }
}

inline void put_results(File& results, const Report& report, const std::vector<Buffer>& outputs) {
  results.put(&report, sizeof(report));
  for (const Buffer& buffer : outputs) {
    if (buffer.bytes > 0) results.put(buffer.data(), static_cast<size_t>(buffer.bytes));
  }
}

void run_forward(File& cases, File& results);
void run_backward(File& cases, File& results);
void run_exchange(File& cases, File& results);
void run_matrices(File& cases, File& results);
void run_inter_block_forward(File& cases, File& results);
void run_inter_block_backward(File& cases, File& results);

}  // namespace simt
