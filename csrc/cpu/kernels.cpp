// The kernels of one instruction set: this file is compiled once for each, with ATTNRES_KERNELS
// naming the table it fills.
#include "kernels.hpp"

#include "block_cache.hpp"
#include "depth_attention.hpp"
#include "inter_block_attention.hpp"

namespace attnres::cpu {
namespace {

template <DType kDType>
using Storage = typename StorageOf<kDType>::type;

// f(Access*) for the way to read a set of rows: by a storage type known when compiled if they share
// one, else row by row.
template <typename F>
void dispatch_access(DType compute, DType shared, F&& f) {
  if (is_double(compute)) {
    if (shared == DType::kFloat64) return f(static_cast<Uniform<double, double>*>(nullptr));
    return f(static_cast<Mixed<double>*>(nullptr));
  }
  switch (shared) {
    case DType::kBFloat16:
      return f(static_cast<Uniform<float, BFloat16>*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Uniform<float, Float16>*>(nullptr));
    case DType::kFloat32:
      return f(static_cast<Uniform<float, float>*>(nullptr));
    case DType::kNone:
      return f(static_cast<Mixed<float>*>(nullptr));
    case DType::kFloat64:
      break;
  }
  no_such_dtype();
}

template <template <typename> typename Scratch, typename Params>
int64_t scratch_size(const Params& p) {
  // Counted on a made-up base address: nothing is dereferenced.
  Arena arena(nullptr);
  if (is_double(p.compute)) {
    Scratch<double> scratch(arena, p);
  } else {
    Scratch<float> scratch(arena, p);
  }
  return arena.used(nullptr);
}

void run_depth_attention_forward(const DepthAttentionForward& p, const SharedVectors& shared,
                                 TokenRange range) {
  [[maybe_unused]] const DenormalsAreZero mode;
  dispatch_access(p.compute, shared_dtype(p), [&]<typename Access>(Access*) {
    depth_attention_forward<Access>(p, shared, range);
  });
}

void run_depth_attention_backward(const DepthAttentionBackward& p, const SharedVectors& shared,
                                  TokenRange range, void* part) {
  [[maybe_unused]] const DenormalsAreZero mode;
  dispatch_access(p.compute, shared_dtype(p), [&]<typename Access>(Access*) {
    depth_attention_backward<Access>(p, shared, range, part);
  });
}

void run_inter_block_forward(const InterBlockForward& p, const SharedVectors& shared,
                             TokenRange range) {
  [[maybe_unused]] const DenormalsAreZero mode;
  dispatch_access(p.compute, shared_dtype(p),
                  [&]<typename Access>(Access*) { inter_block_forward<Access>(p, shared, range); });
}

void run_inter_block_backward(const InterBlockBackward& p, const SharedVectors& shared,
                              TokenRange range, void* part) {
  [[maybe_unused]] const DenormalsAreZero mode;
  dispatch_access(p.compute, shared_dtype(p), [&]<typename Access>(Access*) {
    inter_block_backward<Access>(p, shared, range, part);
  });
}

void run_block_cache_write(const BlockCacheWrite& p, int64_t begin, int64_t end) {
  [[maybe_unused]] const DenormalsAreZero mode;
  SharedDType types;
  types.add(p.slot);
  types.add(p.delta);
  dispatch_access(p.compute, types.get(),
                  [&]<typename Access>(Access*) { block_cache_write<Access>(p, begin, end); });
}

void split_all_columns(float* values, int64_t rows, int64_t hidden) {
  for (int64_t i = 0; i < rows; ++i) split_columns(values + i * hidden, hidden);
}
void join_all_columns(float* values, int64_t rows, int64_t hidden) {
  for (int64_t i = 0; i < rows; ++i) join_columns(values + i * hidden, hidden);
}

}  // namespace

extern const Kernels ATTNRES_KERNELS;
const Kernels ATTNRES_KERNELS = {
    ATTNRES_KERNELS_NAME,
    split_all_columns,
    join_all_columns,
    scratch_size<ForwardScratch, DepthAttentionForward>,
    run_depth_attention_forward,
    scratch_size<BackwardScratch, DepthAttentionBackward>,
    run_depth_attention_backward,
    scratch_size<InterForwardScratch, InterBlockForward>,
    run_inter_block_forward,
    scratch_size<InterBackwardScratch, InterBlockBackward>,
    run_inter_block_backward,
    run_block_cache_write,
};

}  // namespace attnres::cpu
