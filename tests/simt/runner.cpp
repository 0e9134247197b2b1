// Runs depth attention's kernel bodies on cases that Python writes, and writes what they computed.
//
//   runner CASES RESULTS
//
// A case: 64-bit integers and doubles, then the tensors, in the order in which forward.cpp and
// backward.cpp take them. A result: what was launched, then the storage of every output.
#include "cases.hpp"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: runner CASES RESULTS\n");
    return 2;
  }
  simt::File cases(argv[1], "rb");
  simt::File results(argv[2], "wb");
  for (int64_t is_backward = 0; cases.get(is_backward);) {
    if (is_backward != 0) {
      simt::run_backward(cases, results);
    } else {
      simt::run_forward(cases, results);
    }
  }
  return 0;
}
