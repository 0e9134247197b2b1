// The CPU kernels of one instruction set, as functions over a range of tokens. They allocate
// nothing and know no threads: cpu_backend.cpp prepares their inputs, gives each thread its range
// and its scratch memory, and picks the instruction set.
#pragma once

#include "attnres/params.hpp"

namespace attnres::cpu {

// Vectors that every token shares, converted once per call to the compute type.
struct SharedVectors {
  const void* score = nullptr;       // [D] or [S, D]: scale * key_weight * query
  const void* out_weight = nullptr;  // [D] or absent
};

struct TokenRange {
  int64_t begin;
  int64_t end;
  void* scratch;  // `*_scratch_size` bytes, aligned to 64
};

// The dtype that all rows of a call share, kNone where they differ.
ATTNRES_ALWAYS_INLINE DType shared_dtype(const DepthAttentionForward& p) {
  SharedDType types;
  types.add(p.out);
  types.add(p.sources, p.num_sources);
  types.add(p.delta);
  types.add(p.new_partial);
  return types.get();
}
ATTNRES_ALWAYS_INLINE DType shared_dtype(const InterBlockForward& p) {
  SharedDType types;
  types.add(p.out);
  types.add(p.sources, p.num_sources);
  return types.get();
}
template <typename Backward>
ATTNRES_ALWAYS_INLINE DType shared_dtype(const Backward& p) {
  SharedDType types;
  types.add(p.grad_out);
  types.add(p.sources, p.num_sources);
  types.add(p.grad_sources, p.num_sources);
  types.add(p.grad_base, p.num_sources);
  return types.get();
}
ATTNRES_ALWAYS_INLINE DType shared_dtype(const BlockCacheWrite& p) {
  SharedDType types;
  types.add(p.slot);
  types.add(p.delta);
  return types.get();
}

struct Kernels {
  const char* name;
  int64_t (*depth_attention_forward_scratch)(const DepthAttentionForward&);
  void (*depth_attention_forward)(const DepthAttentionForward&, const SharedVectors&, TokenRange);
  int64_t (*depth_attention_backward_scratch)(const DepthAttentionBackward&);
  // Adds to part [2, D]: the gradients of the score vector and of the output gain.
  void (*depth_attention_backward)(const DepthAttentionBackward&, const SharedVectors&, TokenRange,
                                   void* part);
  int64_t (*inter_block_forward_scratch)(const InterBlockForward&);
  void (*inter_block_forward)(const InterBlockForward&, const SharedVectors&, TokenRange);
  int64_t (*inter_block_backward_scratch)(const InterBlockBackward&);
  // Adds to part [S, D]: the gradients of the score vectors.
  void (*inter_block_backward)(const InterBlockBackward&, const SharedVectors&, TokenRange,
                               void* part);
  int64_t (*block_cache_write_scratch)(const BlockCacheWrite&);
  void (*block_cache_write)(const BlockCacheWrite&, TokenRange);
};

// The widest of this library that this processor has, or what ATTNRES_CPU asks for.
const Kernels& kernels();

}  // namespace attnres::cpu
