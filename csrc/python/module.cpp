// The pybind11 module `_C`: host-side facts and bookkeeping. It holds no tensors and no operators.
#include "module.hpp"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts, the traffic plan and cache bookkeeping of attnres_ext.";
  attnres::bind_build(module);
  attnres::bind_plan(module);
  attnres::bind_kernel_config(module);
  attnres::bind_cache_state(module);
}
