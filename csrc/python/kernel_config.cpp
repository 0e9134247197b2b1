// How the CUDA kernels of 16-bit rows cut their work, as Python sees it: the functions that their
// launchers ask.
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "depth_attention/backward_config.hpp"
#include "inter_block_attention/config.hpp"
#include "kernel_sets.hpp"
#include "merge_partial/config.hpp"
#include "module.hpp"

namespace py = pybind11;

namespace attnres {
namespace {

using namespace cuda;

// As the launchers get it, but for the number of multiprocessors, which no choice depends on.
DeviceLimits limits_of(int capability, int64_t shared_bytes) {
  const auto bytes = static_cast<int>(shared_bytes);
  return {1, bytes + kReservedSharedBytes, bytes, capability};
}

std::string text_of(const MergeConfig& config) {
  return "warps=" + std::to_string(config.warps) + ",chunks=" + std::to_string(config.chunks) +
         ",teams=" + std::to_string(config.teams);
}

// What the launcher of depth attention is asked for by an operator.
std::optional<std::string> kernel_config(const std::string& op, const std::string& direction,
                                         int num_sources, int64_t hidden, const std::string& dtype,
                                         bool norm, bool accumulate, int64_t num_queries,
                                         int capability, int64_t shared_bytes) {
  const bool is_forward = direction == "forward";
  if (!is_forward && direction != "backward") {
    throw std::invalid_argument("kernel_config: direction is '" + direction +
                                "', expected 'forward' or 'backward'");
  }
  const bool sums = op == "accumulate_depth_attention", merges = op == "merge_partial";
  const bool is_phase_one = op == "inter_block_attention";
  if (!sums && !merges && !is_phase_one && op != "depth_attention") {
    throw std::invalid_argument("kernel_config: operator is '" + op +
                                "', expected 'depth_attention', 'accumulate_depth_attention', "
                                "'inter_block_attention' or 'merge_partial'");
  }
  if (num_sources < 1 || hidden < 1) {
    throw std::invalid_argument("kernel_config: got " + std::to_string(num_sources) +
                                " sources of " + std::to_string(hidden) +
                                " values, expected at least 1 of each");
  }
  if (is_phase_one && num_queries < 1) {
    throw std::invalid_argument("kernel_config: got " + std::to_string(num_queries) +
                                " queries, expected at least 1 for inter_block_attention");
  }
  const bool is_float16 = dtype == "float16";
  if ((!is_float16 && dtype != "bfloat16") || hidden % 8 != 0) return std::nullopt;
  const DeviceLimits limits = limits_of(capability, shared_bytes);
  const DepthAttentionWishes wishes = depth_attention_wishes();
  if (merges) {
    if (is_forward ? wishes.rows : wishes.backward_rows) return std::nullopt;
    // Of a multiprocessor that has rows enough.
    const MergeConfig config = is_forward
                                   ? merge_config(kMostMergeTeams * 32, hidden, limits)
                                   : merge_backward_config(kMostMergeTeams * 32, hidden, limits);
    return config.warps > 0 ? std::optional(text_of(config)) : std::nullopt;
  }
  if (kernel_set(capability) < 90) return std::nullopt;
  if (is_phase_one) {
    if (!is_forward) return std::nullopt;
    const InterBlockConfig config =
        choose_inter_block_config({hidden, num_sources, num_queries}, limits, inter_block_wishes());
    return config.warps > 0 ? std::optional(config.text()) : std::nullopt;
  }
  const int rows = num_sources + (sums ? 1 : 0);
  const DepthAttentionConfig config =
      is_forward
          ? choose_depth_attention_config({hidden, rows, sums, sums, norm}, limits, wishes)
          : choose_depth_attention_backward_config(
                {hidden, rows, (sums ? 1 : 0) + (accumulate ? num_sources : 0), norm, is_float16},
                limits, wishes);
  return config.warps > 0 ? std::optional(config.text()) : std::nullopt;
}

}  // namespace

void bind_kernel_config(py::module_& module) {
  module.def("kernel_config", &kernel_config, py::arg("operator"), py::arg("direction"),
             py::arg("num_sources"), py::arg("hidden"), py::arg("dtype") = "bfloat16",
             py::arg("norm") = false, py::arg("accumulate") = false, py::arg("num_queries") = 0,
             py::arg("capability") = 90, py::arg("shared_bytes") = 227 << 10,
             "How the CUDA kernel of an operator over aligned rows cuts its work, in the words of "
             "ATTNRES_CUDA_CONFIG, or None where the general body serves. num_sources and "
             "accumulate as in bytes_moved; norm: with an output norm; num_queries of phase 1; "
             "capability and shared_bytes as in plan.");
}

}  // namespace attnres
