// The kernels of one instruction set: this file is compiled once for each, with ATTNRES_KERNELS
// naming the table it fills.
#include "kernels.hpp"

#include "block_cache.hpp"
#include "depth_attention.hpp"
#include "inter_block_attention.hpp"

namespace attnres::cpu {
namespace {

// f(Access*) for the way to read a set of rows: as they lie if they share a storage type, else in
// the compute type, to which the others are converted.
template <typename F>
auto dispatch_access(DType compute, DType shared, F&& f) {
  if (is_double(compute)) return f(static_cast<Uniform<double, double>*>(nullptr));
  switch (shared) {
    case DType::kBFloat16:
      return f(static_cast<Uniform<float, BFloat16>*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Uniform<float, Float16>*>(nullptr));
    case DType::kFloat32:
    case DType::kNone:
      return f(static_cast<Uniform<float, float>*>(nullptr));
    case DType::kFloat64:
      break;
  }
  no_such_dtype();
}

template <template <typename> typename Scratch, typename Params>
int64_t scratch_size(const Params& p) {
  return dispatch_access(p.compute, shared_dtype(p), [&]<typename Access>(Access*) {
    // Counted on a made-up base address: nothing is dereferenced.
    Arena arena(nullptr);
    Scratch<Access> scratch(arena, p);
    return arena.used(nullptr);
  });
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

void run_block_cache_write(const BlockCacheWrite& p, TokenRange range) {
  [[maybe_unused]] const DenormalsAreZero mode;
  dispatch_access(p.compute, shared_dtype(p),
                  [&]<typename Access>(Access*) { block_cache_write<Access>(p, range); });
}

}  // namespace

extern const Kernels ATTNRES_KERNELS;
const Kernels ATTNRES_KERNELS = {
    ATTNRES_KERNELS_NAME,         scratch_size<ForwardScratch, DepthAttentionForward>,
    run_depth_attention_forward,  scratch_size<BackwardScratch, DepthAttentionBackward>,
    run_depth_attention_backward, scratch_size<InterForwardScratch, InterBlockForward>,
    run_inter_block_forward,      scratch_size<InterBackwardScratch, InterBlockBackward>,
    run_inter_block_backward,     scratch_size<WriteScratch, BlockCacheWrite>,
    run_block_cache_write,
};

}  // namespace attnres::cpu
