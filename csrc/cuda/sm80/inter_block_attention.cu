// Phase 1 for 8.x: all threads copy tiles asynchronously into shared memory.
#define ATTNRES_CUDA_SET sm80

#include "inter_block_attention/backward_launch.cuh"
#include "inter_block_attention/forward_launch.cuh"
#include "launch.cuh"

namespace attnres::cuda {

template <>
cudaError_t launch<80>(const InterBlockForward& p, const LaunchContext& context) {
  return launch_inter_block_attention_forward<CpAsyncTiles, OneCta>(p, context.limits,
                                                                    Launcher{context});
}

template <>
cudaError_t launch<80>(const InterBlockBackward& p, const LaunchContext& context) {
  return launch_inter_block_attention_backward<CpAsyncTiles, OneCta>(p, context.limits,
                                                                     Launcher{context});
}

}  // namespace attnres::cuda
