// Facts about this build.
#include <sstream>
#include <string>

#include "attnres/params.hpp"
#include "module.hpp"

#ifndef ATTNRES_VERSION
#error "the build defines ATTNRES_VERSION, the package's version"
#endif
#ifndef ATTNRES_CUDA_ARCHS
#error "the build defines ATTNRES_CUDA_ARCHS, empty without CUDA"
#endif

namespace attnres {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// "80,90" -> ("80", "90")
pybind11::tuple cuda_archs() {
  pybind11::list archs;
  std::istringstream stream(ATTNRES_CUDA_ARCHS);
  for (std::string arch; std::getline(stream, arch, ',');) {
    if (!arch.empty()) archs.append(arch);
  }
  return pybind11::tuple(archs);
}

}  // namespace

void bind_build(pybind11::module_& module) {
  module.attr("version") = ATTNRES_VERSION;
  module.attr("compiler") = compiler();
  module.attr("cxx_standard") = static_cast<int64_t>(__cplusplus);
  module.attr("cuda_archs") = cuda_archs();
  module.attr("max_sources") = static_cast<int64_t>(kMaxSources);
}

}  // namespace attnres
