// Runs a thread, instruction by instruction.
#include "executor.hpp"
#include "ptx/thread.hpp"

namespace simt::ptx {
namespace {

const Named kNamed[] = {
    {"ret", [](Thread& t, const Instruction&) { t.done = true; }},
    {"bra", [](Thread& t, const Instruction& i) { t.next = i.target; }},
    {"bra.uni", [](Thread& t, const Instruction& i) { t.next = i.target; }},
};

}  // namespace

Operation operation_of(std::string_view name) {
  Operation operation = find(kNamed, name);
  if (operation == nullptr) operation = access_of(name);
  if (operation == nullptr) operation = arithmetic_of(name);
  if (operation == nullptr) fail("PTX: an unknown instruction:", name);
  return operation;
}

void run_thread(const Program& program, const void* parameters,
                const std::vector<Extent>& allocations) {
  Thread thread = {
      program.registers,       0,          false, static_cast<const std::byte*>(parameters),
      program.parameter_bytes, allocations};
  const auto fill = [&](Special special, auto value) {
    thread.registers[static_cast<size_t>(special)] = static_cast<uint64_t>(value);
  };
  fill(Special::kThread, thread_rank());
  fill(Special::kCta, cta_rank());
  fill(Special::kNumCtas, num_ctas());
  fill(Special::kRankInCluster, rank_in_cluster());
  fill(Special::kClusterSize, cluster_size());
  fill(Special::kCluster, cta_rank() / cluster_size());
  fill(Special::kNumClusters, num_ctas() / cluster_size());
  fill(Special::kParameters, reinterpret_cast<uintptr_t>(parameters));
  fill(Special::kShared, kSharedBase);
  while (!thread.done) {
    const Instruction& instruction = program.instructions[thread.next++];
    if (instruction.guard >= 0) {
      const bool holds = (thread.registers[static_cast<size_t>(instruction.guard)] & 1) != 0;
      if (holds == instruction.guard_is_negated) continue;
    }
    instruction.operation(thread, instruction);
  }
}

}  // namespace simt::ptx
