// One table of functions per device type: the operators check and allocate, a backend computes.
#pragma once

#include "attnres/params.hpp"

namespace attnres {

// `device` is the index of the device that holds the tensors (-1 on a CPU). A null entry means that
// the backend has no kernel for the operator. Every function throws on failure and returns without
// waiting for the device.
struct Backend {
  void (*depth_attention_forward)(const DepthAttentionForward&, int device);
  void (*depth_attention_backward)(const DepthAttentionBackward&, int device);
  void (*inter_block_forward)(const InterBlockForward&, int device);
  void (*inter_block_backward)(const InterBlockBackward&, int device);
  void (*block_cache_write)(const BlockCacheWrite&, int device);
  // How many partial sums a weight gradient over M tokens is split into. Depends on M and the
  // device alone, and the parts are added in order, so that weight gradients are the same from run
  // to run.
  int64_t (*num_weight_gradient_parts)(int64_t num_tokens, int device);
  // Bytes that addresses of queries and gains should be multiples of where rows are: else it reads
  // everything value by value.
  int64_t vector_alignment;
};

const Backend& cpu_backend();
const Backend& cuda_backend();  // all entries null in a library built without CUDA

}  // namespace attnres
