// Runs depth attention's kernel bodies on cases that test_depth_attention.py writes, and writes
// what they computed.
//
//   runner CASES RESULTS
//
// A case: 64-bit integers and doubles in the order in which `Case::read` takes them, then the
// tensors. A result: what was launched, then the storage of every output.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "executor.hpp"
#include "kernels/depth_attention_launch.cuh"

namespace {

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

void copy_rows(const ConstRows& from, const Rows& to, const DepthAttentionForward& p) {
  const int64_t size = size_of(from.dtype);
  for (int64_t m = 0; m < p.num_tokens; ++m) {
    std::memcpy(static_cast<char*>(to.data) + to.offset(m) * size,
                static_cast<const char*>(from.data) + from.offset(m) * size,
                static_cast<size_t>(p.hidden * size));
  }
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
};

struct Launch {
  simt::Order order;
  uint64_t seed;
  Report& report;

  template <auto kKernel, typename Args>
  int operator()(const Args& args, const cuda::LaunchShape& shape) const {
    report = {args.tile.slot_bytes > 0, args.tile.resident, args.tile.num_spans,
              args.tile.num_slots,      shape.num_threads,  shape.num_ctas,
              shape.shared_bytes};
    simt::run({shape.num_ctas, shape.num_threads, shape.shared_bytes, order, seed},
              [&] { kKernel(args); });
    return 0;
  }
};

bool run_case(File& cases, File& results) {
  int64_t ring = 0;
  if (!cases.get(ring)) return false;
  Report report;
  const auto order = static_cast<simt::Order>(cases.take<int64_t>());
  const Launch launch = {order, static_cast<uint64_t>(cases.take<int64_t>()), report};
  cuda::DeviceLimits limits;
  limits.num_multiprocessors = static_cast<int>(cases.take<int64_t>());
  limits.shared_bytes_per_multiprocessor = static_cast<int>(cases.take<int64_t>());
  limits.shared_bytes_per_cta = static_cast<int>(cases.take<int64_t>());

  DepthAttentionForward p;
  p.num_tokens = cases.take<int64_t>();
  p.hidden = cases.take<int64_t>();
  p.num_sources = static_cast<int>(cases.take<int64_t>());
  p.compute = static_cast<DType>(cases.take<int64_t>());
  p.eps = cases.take<double>();
  p.out_eps = cases.take<double>();
  p.scale = cases.take<double>();
  p.num_known_rstd = static_cast<int>(cases.take<int64_t>());
  const auto partial_is_source = cases.take<int64_t>() != 0;
  const auto wants_out = cases.take<int64_t>() != 0;

  std::vector<Buffer> inputs;
  std::vector<ConstRows> sources(static_cast<size_t>(p.num_sources));
  for (ConstRows& source : sources) inputs.push_back(take_rows(cases, source, false));
  p.sources = sources.data();
  for (ConstVector* gain : {&p.query, &p.key_weight, &p.out_weight}) {
    ConstRows rows;
    inputs.push_back(take_rows(cases, rows, false));
    *gain = {rows.data, rows.dtype};
  }
  ConstRows first_logit, known_rstd;
  for (ConstRows* rows : {&p.delta, &first_logit, &known_rstd}) {
    inputs.push_back(take_rows(cases, *rows, false));
  }
  p.first_logit = first_logit.data;
  p.known_rstd = static_cast<const float*>(known_rstd.data);
  Rows weights, stats, last_rstd;
  std::vector<Buffer> outputs;
  for (Rows* rows : {&p.out, &p.mix, &weights, &stats, &p.new_partial, &last_rstd}) {
    outputs.push_back(take_rows(cases, *rows, true));
  }
  p.weights = weights.data;
  p.stats = stats.data;
  p.last_rstd = static_cast<float*>(last_rstd.data);
  if (partial_is_source) {
    // In place: what the sum is given is where it goes.
    const ConstRows& last = sources.back();
    copy_rows(last, p.new_partial, p);
    sources.back() = {p.new_partial.data, p.new_partial.inner, p.new_partial.outer_stride,
                      p.new_partial.inner_stride, p.new_partial.dtype};
  }
  if (!wants_out) p.out.data = nullptr;

  if (ring == 0) {
    cuda::launch_depth_attention_forward<cuda::CpAsyncRing>(p, limits, launch);
  } else {
    cuda::launch_depth_attention_forward<cuda::BulkRing>(p, limits, launch);
  }
  results.put(&report, sizeof(report));
  for (const Buffer& buffer : outputs) {
    if (buffer.bytes > 0) results.put(buffer.data(), static_cast<size_t>(buffer.bytes));
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: runner CASES RESULTS\n");
    return 2;
  }
  File cases(argv[1], "rb");
  File results(argv[2], "wb");
  while (run_case(cases, results)) {
  }
  return 0;
}
