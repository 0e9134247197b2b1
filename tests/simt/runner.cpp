// Runs kernel bodies on cases that Python writes, and writes what they computed.
//
//   runner CASES RESULTS
//
// A case: its kind (the place of its function below), then 64-bit integers, doubles and tensors in
// the order in which that function takes them. A result: what was launched, then the storage of
// every output.
#include "cases.hpp"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: runner CASES RESULTS\n");
    return 2;
  }
  simt::File cases(argv[1], "rb");
  simt::File results(argv[2], "wb");
  void (*const functions[])(simt::File&, simt::File&) = {simt::run_forward,
                                                         simt::run_backward,
                                                         simt::run_exchange,
                                                         simt::run_inter_block_forward,
                                                         simt::run_inter_block_backward,
                                                         simt::run_matrices};
  try {
    for (int64_t kind = 0; cases.get(kind);) functions[kind](cases, results);
  } catch (const simt::Failure& failure) {
    std::fprintf(stderr, "simt: %s\n", failure.what());
    return 1;
  }
  return 0;
}
