// What the architecture folders offer to ops_cuda.cpp. No torch, no device code.
#pragma once

#include <cuda_runtime_api.h>

#include "attnres/params.hpp"
#include "kernels/depth_attention_tile.hpp"

namespace attnres::cuda {

struct LaunchContext {
  cudaStream_t stream;
  int device;
  DeviceLimits limits;
};

// Kernels number rows and values of a row with 32 bits, and bytes of a tensor with 64.
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxHidden = int64_t{1} << 28;

// They return without waiting, with the error of the launch. Weak: null where the set was not
// built.
#define ATTNRES_LAUNCHER __attribute__((weak)) cudaError_t
ATTNRES_LAUNCHER launch_depth_attention_forward_sm80(const DepthAttentionForward& p,
                                                     const LaunchContext& context);
ATTNRES_LAUNCHER launch_depth_attention_forward_sm90(const DepthAttentionForward& p,
                                                     const LaunchContext& context);
ATTNRES_LAUNCHER launch_depth_attention_backward_sm80(const DepthAttentionBackward& p,
                                                      const LaunchContext& context);
ATTNRES_LAUNCHER launch_depth_attention_backward_sm90(const DepthAttentionBackward& p,
                                                      const LaunchContext& context);
ATTNRES_LAUNCHER launch_inter_block_attention_forward_sm80(const InterBlockForward& p,
                                                           const LaunchContext& context);
ATTNRES_LAUNCHER launch_inter_block_attention_forward_sm90(const InterBlockForward& p,
                                                           const LaunchContext& context);
ATTNRES_LAUNCHER launch_inter_block_attention_backward_sm80(const InterBlockBackward& p,
                                                            const LaunchContext& context);
ATTNRES_LAUNCHER launch_inter_block_attention_backward_sm90(const InterBlockBackward& p,
                                                            const LaunchContext& context);

}  // namespace attnres::cuda
