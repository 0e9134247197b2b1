// The CPU kernels of one instruction set, as functions over a range of tokens. They allocate
// nothing and know no threads: cpu_backend.cpp prepares their inputs, gives each thread its range
// and its scratch memory, and picks the instruction set.
#pragma once

#include "attnres/params.hpp"

namespace attnres::cpu {

// Vectors that every token shares, converted once per call to the compute type. Where
// `splits_columns` their columns are in the order in which the kernels load rows, and so are the
// kernels' `part`s.
struct SharedVectors {
  const void* score = nullptr;       // [D] or [S, D]: scale * key_weight * query
  const void* out_weight = nullptr;  // [D] or absent
  const void* in_order = nullptr;    // [S, D], phase 1: `score` with its columns in their own order
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
// Whether the kernels load rows as even and odd columns (see simd.hpp).
template <typename Params>
ATTNRES_ALWAYS_INLINE bool splits_columns(const Params& p) {
  return shared_dtype(p) == DType::kBFloat16 && !is_double(p.compute);
}

struct Kernels {
  const char* name;
  // From columns in their own order to the kernels', and back, in each of `rows` rows.
  void (*split_columns)(float* values, int64_t rows, int64_t hidden);
  void (*join_columns)(float* values, int64_t rows, int64_t hidden);
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
  void (*block_cache_write)(const BlockCacheWrite&, int64_t begin, int64_t end);
};

// The widest of this library that this processor has, or what ATTNRES_CPU asks for.
const Kernels& kernels();

}  // namespace attnres::cpu
