// Phase 1 for 9.0 and later: the copy engine brings tiles into shared memory, clusters share the
// columns of what one CTA has no room for, and kernels start before the one before them has ended.
#define ATTNRES_CUDA_SET sm90

#include "inter_block_attention/backward_launch.cuh"
#include "inter_block_attention/forward_launch.cuh"
#include "launch.cuh"

namespace attnres::cuda {

template <>
cudaError_t launch<90>(const InterBlockForward& p, const LaunchContext& context) {
  return launch_inter_block_attention_forward<BulkTiles, CtaCluster>(p, context.limits,
                                                                     Launcher{context, true});
}

template <>
cudaError_t launch<90>(const InterBlockBackward& p, const LaunchContext& context) {
  return launch_inter_block_attention_backward<BulkTiles, CtaCluster>(p, context.limits,
                                                                      Launcher{context, true});
}

}  // namespace attnres::cuda
