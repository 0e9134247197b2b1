// What each file of the `_C` module adds to it.
#pragma once

#include <pybind11/pybind11.h>

namespace attnres {

void bind_build(pybind11::module_& module);
void bind_plan(pybind11::module_& module);
void bind_kernel_config(pybind11::module_& module);
void bind_cache_state(pybind11::module_& module);

}  // namespace attnres
