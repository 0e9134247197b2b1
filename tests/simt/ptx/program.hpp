// A kernel in PTX, the form in which nvcc leaves it for every later step: parsed once, run by many
// threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace simt::ptx {

// Ends the process with a sentence.
[[noreturn]] void fail(std::string_view what, std::string_view about = {});

struct Thread;
struct Instruction;
using Operation = void (*)(Thread& thread, const Instruction& instruction);

// A register, or a constant, which is a register that nobody writes; and what is added to it where
// it is an address.
struct Operand {
  uint32_t slot = 0;
  int64_t offset = 0;
};

struct Instruction {
  Operation operation = nullptr;
  // Operands in the order in which they are written, those in braces one by one. Of a branch: none.
  std::vector<Operand> operands;
  // How many operands stand in the first braces, 1 if there are none; and where those start.
  uint32_t count = 1;
  uint32_t first_in_braces = 0;
  uint32_t target = 0;  // of a branch
  int32_t guard = -1;   // the predicate that decides whether it is carried out; -1: always
  bool guard_is_negated = false;
  std::string text;
};

// Registers that every thread finds filled in, in this order from slot 0 on.
enum class Special : uint32_t {
  kThread,
  kCta,
  kNumCtas,
  kRankInCluster,
  kClusterSize,
  kCluster,
  kNumClusters,
  kParameters,  // where they start
  kShared,      // where dynamic shared memory starts
  kSink,        // "_", written and never read
  kCount,
};

struct Program {
  std::string name;
  size_t parameter_bytes = 0;
  int most_threads = 0;  // of a CTA
  std::vector<Instruction> instructions;
  // Constants in their places, all bits set elsewhere, so that what reads a register that nobody
  // has written finds NaN.
  std::vector<uint64_t> registers;
};

// The kernel whose text, from ".entry" to its closing brace, this is.
Program parse(std::string_view text);

// What an instruction does, by its name with all modifiers, as in "add.s32".
Operation operation_of(std::string_view name);

// Bytes of global memory.
struct Extent {
  const std::byte* begin;
  const std::byte* end;
};

// All threads that the executor runs call this. Ends the process where a thread goes elsewhere than
// to its shared memory, its parameters, and the allocations.
void run_thread(const Program& program, const void* parameters,
                const std::vector<Extent>& allocations);

}  // namespace simt::ptx
