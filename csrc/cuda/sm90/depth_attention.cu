// Depth attention for 9.0 and later: the copy engine fills a ring in shared memory, clusters share
// rows, and kernels start before the one before them has ended.
#define ATTNRES_CUDA_SET sm90

#include "depth_attention/backward_launch.cuh"
#include "depth_attention/forward_launch.cuh"
#include "launch.cuh"

namespace attnres::cuda {

template <>
cudaError_t launch<90>(const DepthAttentionForward& p, const LaunchContext& context) {
  return launch_depth_attention_forward<BulkRing, CtaCluster>(p, context.limits,
                                                              Launcher{context, true});
}

template <>
cudaError_t launch<90>(const DepthAttentionBackward& p, const LaunchContext& context) {
  return launch_depth_attention_backward<BulkRing, CtaCluster>(p, context.limits,
                                                               Launcher{context, true});
}

}  // namespace attnres::cuda
