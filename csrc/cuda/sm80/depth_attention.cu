// Depth attention for 8.x: every thread copies what it will read itself, asynchronously, into a
// ring in shared memory.
#define ATTNRES_CUDA_SET sm80

#include "depth_attention/backward_launch.cuh"
#include "depth_attention/forward_launch.cuh"
#include "launch.cuh"

namespace attnres::cuda {

template <>
cudaError_t launch<80>(const DepthAttentionForward& p, const LaunchContext& context) {
  return launch_depth_attention_forward<CpAsyncRing, OneCta>(p, context.limits, Launcher{context});
}

template <>
cudaError_t launch<80>(const DepthAttentionBackward& p, const LaunchContext& context) {
  return launch_depth_attention_backward<CpAsyncRing, OneCta>(p, context.limits, Launcher{context});
}

}  // namespace attnres::cuda
