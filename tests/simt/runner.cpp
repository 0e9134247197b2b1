// Runs kernel bodies on cases that Python writes, and writes what they computed.
//
//   runner CASES RESULTS [PTX ...]
//
// Given the PTX of the kernels, it runs that instead, through csrc/cuda/launch.cuh, and prints
// which kernels it ran.
//
// A case: its kind (the place of its function below), then 64-bit integers, doubles and tensors in
// the order in which that function takes them. A result: what was launched, then the storage of
// every output.
#include "cases.hpp"

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: runner CASES RESULTS [PTX ...]\n");
    return 2;
  }
  simt::File cases(argv[1], "rb");
  simt::File results(argv[2], "wb");
  for (int i = 3; i < argc; ++i) simt::ptx::load(argv[i]);
  void (*const functions[])(simt::File&, simt::File&) = {simt::run_forward,
                                                         simt::run_backward,
                                                         simt::run_exchange,
                                                         simt::run_inter_block_forward,
                                                         simt::run_inter_block_backward,
                                                         simt::run_matrices};
  for (int64_t kind = 0; cases.get(kind);) functions[kind](cases, results);
  simt::ptx::print_launched();
  return 0;
}
