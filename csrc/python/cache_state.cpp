// The block cache's bookkeeping as Python sees it.
#include "attnres/cache_state.hpp"

#include "module.hpp"

namespace py = pybind11;

namespace attnres {

void bind_cache_state(py::module_& module) {
  py::class_<CacheState>(module, "CacheState", "Which slots of a block cache are sealed or open.")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def_property_readonly("capacity", &CacheState::capacity)
      .def_property_readonly("sealed", &CacheState::sealed)
      .def_property_readonly("full", &CacheState::full)
      .def_property_readonly("open_holds_partial", &CacheState::open_holds_partial)
      .def_property_readonly("num_sources", &CacheState::num_sources)
      .def_property_readonly("open_slot", &CacheState::open_slot,
                             "Slot that takes the next write; raises when all are closed.")
      .def("begin_write", &CacheState::begin_write,
           "Notes a write into the open slot; True when it adds to what the slot holds.")
      .def("close", &CacheState::close, "Seals the open slot.")
      .def("reset", &CacheState::reset, "Forgets everything; the memory can be used again.");
}

}  // namespace attnres
