// What the operators' library takes from elsewhere, given to it for a simulated GPU: tensors in
// host memory go to the CUDA backend, which finds a stream and a device without a CUDA build of
// torch. And, as C functions, what tests choose and want to know.
#include <torch/csrc/stable/c/shim.h>

#include <mutex>
#include <sstream>
#include <string>

#include "attnres/backend.hpp"
#include "attnres/build_info.hpp"
#include "runtime/runtime.hpp"

namespace {

std::mutex mutex;

// One operator at a time, and all that it launched before it returns: nothing else waits for the
// device.
template <auto kEntry, typename Params>
void call(const Params& p, int) {
  const std::lock_guard lock(mutex);
  try {
    (attnres::cuda_backend().*kEntry)(p, simt::use().device);
  } catch (...) {
    simt::drop_launches();
    throw;
  }
  simt::synchronize();
}

}  // namespace

namespace attnres {

const Backend& cpu_backend() {
  static const Backend kBackend = {
      call<&Backend::depth_attention_forward, DepthAttentionForward>,
      call<&Backend::depth_attention_backward, DepthAttentionBackward>,
      call<&Backend::inter_block_forward, InterBlockForward>,
      call<&Backend::inter_block_backward, InterBlockBackward>,
      call<&Backend::block_cache_write, BlockCacheWrite>,
      [](int64_t num_tokens, int) {
        return cuda_backend().num_weight_gradient_parts(num_tokens, simt::use().device);
      },
      cuda_backend().vector_alignment,
  };
  return kBackend;
}

const char* cpu_instruction_set() { return "simulated GPU"; }

}  // namespace attnres

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

// Operators run on a device like this one from now on, its threads in that order.
void simt_use(const simt::Device* device, int64_t order, uint64_t seed) {
  simt::use() = {simt::device_like(*device), static_cast<simt::Order>(order), seed};
}

// What was launched since it was asked last: a line each, numbers in the order of simt::Launched
// and then the kernel. Valid until it is asked again.
const char* simt_launches() {
  static std::string text;
  std::ostringstream lines;
  for (const simt::Launched& one : simt::take_launches()) {
    for (const int64_t value : {one.num_ctas, one.num_threads, one.shared_bytes, one.cluster_size,
                                int64_t{one.starts_early}, int64_t{one.uses_slots}, one.num_slots,
                                one.num_spans, int64_t{one.resident}, one.warps, one.columns}) {
      lines << value << ' ';
    }
    lines << one.kernel << '\n';
  }
  text = lines.str();
  return text.c_str();
}

}  // extern "C"
