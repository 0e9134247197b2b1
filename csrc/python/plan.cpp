// The traffic plan as Python sees it.
#include "attnres/plan.hpp"

#include <sstream>
#include <string>

#include "module.hpp"

namespace py = pybind11;

namespace attnres {
namespace {

Device parse_device(const std::string& device, int capability, int64_t shared_bytes) {
  if (device == "cpu") return DeviceKind::kCpu;
  if (device == "cuda") return {DeviceKind::kCuda, capability, shared_bytes};
  throw std::invalid_argument("plan: device is '" + device + "', expected 'cpu' or 'cuda'");
}

Direction parse_direction(const std::string& direction) {
  if (direction == "forward") return Direction::kForward;
  if (direction == "backward") return Direction::kBackward;
  throw std::invalid_argument("bytes_moved: direction is '" + direction +
                              "', expected 'forward' or 'backward'");
}

std::string describe(const Plan& plan) {
  std::ostringstream text;
  text << "Plan(two_phase=" << (plan.two_phase ? "True" : "False")
       << ", bytes_single_pass=" << plan.bytes_single_pass
       << ", bytes_two_phase=" << plan.bytes_two_phase
       << ", two_phase_from_tokens=" << plan.two_phase_from_tokens
       << ", tile_tokens=" << plan.tile_tokens
       << ", row_resident=" << (plan.row_resident ? "True" : "False")
       << ", phase_one_resident=" << (plan.phase_one_resident ? "True" : "False") << ", reason='"
       << plan.reason << "')";
  return text.str();
}

}  // namespace

void bind_plan(py::module_& module) {
  py::class_<Plan>(module, "Plan", "What the traffic plan says about one block of sites.")
      .def_readonly("two_phase", &Plan::two_phase)
      .def_readonly("bytes_single_pass", &Plan::bytes_single_pass)
      .def_readonly("bytes_two_phase", &Plan::bytes_two_phase)
      .def_readonly("two_phase_from_tokens", &Plan::two_phase_from_tokens)
      .def_readonly("tile_tokens", &Plan::tile_tokens)
      .def_readonly("row_resident", &Plan::row_resident)
      .def_readonly("phase_one_resident", &Plan::phase_one_resident)
      .def_readonly("reason", &Plan::reason)
      .def("__repr__", &describe);

  module.def(
      "plan",
      [](int64_t num_sources, int64_t num_queries, int64_t num_tokens, int64_t hidden,
         int64_t itemsize, const std::string& device, bool training, int capability,
         int64_t shared_bytes) {
        return make_plan({num_sources, num_queries, num_tokens, hidden, itemsize},
                         parse_device(device, capability, shared_bytes), training);
      },
      py::arg("num_sources"), py::arg("num_queries"), py::arg("num_tokens"), py::arg("hidden"),
      py::arg("itemsize") = 2, py::arg("device") = "cuda", py::arg("training") = false,
      py::arg("capability") = Device(DeviceKind::kCuda).capability,
      py::arg("shared_bytes") = Device(DeviceKind::kCuda).shared_bytes,
      "Single pass or two phases for a block of num_queries sites over num_sources finished "
      "blocks. A CUDA device is an H100 unless capability (10 * major + minor) and shared_bytes "
      "(that a CTA may use) say what it is.");

  module.def(
      "bytes_moved",
      [](const std::string& op, const std::string& direction, int64_t num_sources,
         int64_t num_queries, int64_t num_tokens, int64_t hidden, int64_t itemsize,
         bool accumulate) {
        return bytes_moved(op, parse_direction(direction),
                           {num_sources, num_queries, num_tokens, hidden, itemsize}, accumulate);
      },
      py::arg("operator"), py::arg("direction"), py::arg("num_sources"), py::arg("num_queries"),
      py::arg("num_tokens"), py::arg("hidden"), py::arg("itemsize") = 2,
      py::arg("accumulate") = false,
      "Bytes that one call of an operator must move. For accumulate_depth_attention, num_sources "
      "counts the blocks; for cache operators, the sealed slots.");
}

}  // namespace attnres
