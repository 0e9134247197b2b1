// What this library holds and what it chose to run on this machine.
#include "attnres/build_info.hpp"

#include <torch/csrc/stable/library.h>

#include <string>

#include "attnres_source_hash.hpp"

namespace attnres::ops {
namespace {

std::string cpu_instruction_set() { return attnres::cpu_instruction_set(); }
std::string cuda_architectures() { return ATTNRES_CUDA_ARCHITECTURES; }
std::string source_hash() { return ATTNRES_SOURCE_HASH; }

STABLE_TORCH_LIBRARY_FRAGMENT(attnres, m) {
  // "baseline", "avx2" or "avx512".
  m.def("cpu_instruction_set() -> str");
  // Architectures with kernels inside, such as "80,90"; empty in a build without CUDA.
  m.def("cuda_architectures() -> str");
  // SHA-256 of the sources that the library was compiled from (attnres_ext/sources.py).
  m.def("source_hash() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(attnres, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("source_hash", TORCH_BOX(&source_hash));
}

}  // namespace
}  // namespace attnres::ops
