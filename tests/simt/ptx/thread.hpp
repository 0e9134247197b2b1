// A thread that runs a kernel in PTX, and how its instructions reach its registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <vector>

#include "ptx/program.hpp"

namespace simt::ptx {

struct Thread {
  std::vector<uint64_t> registers;
  uint32_t next = 0;
  bool done = false;
  const std::byte* parameters;
  size_t parameter_bytes;
  const std::vector<Extent>& allocations;
};

// Where shared memory starts: its addresses are small numbers, as on a device.
constexpr uint32_t kSharedBase = 1024;

template <typename T>
T get(const Thread& thread, const Instruction& instruction, size_t i) {
  static_assert(sizeof(T) <= 8);
  const uint64_t bits = thread.registers[instruction.operands[i].slot];
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// Into a register of any width: what is narrower is extended.
template <typename T>
void set(Thread& thread, const Instruction& instruction, size_t i, T value) {
  uint64_t bits = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    bits = static_cast<uint64_t>(static_cast<int64_t>(value));
  } else {
    std::memcpy(&bits, &value, sizeof(T));
  }
  thread.registers[instruction.operands[i].slot] = bits;
}

// Calls f(T{}) for the type with this name.
template <typename F>
Operation with_type(std::string_view type, F f) {
  if (type == "pred") return f(bool{});
  if (type == "u8" || type == "b8") return f(uint8_t{});
  if (type == "s8") return f(int8_t{});
  if (type == "u16" || type == "b16") return f(uint16_t{});
  if (type == "s16") return f(int16_t{});
  if (type == "u32" || type == "b32") return f(uint32_t{});
  if (type == "s32") return f(int32_t{});
  if (type == "u64" || type == "b64") return f(uint64_t{});
  if (type == "s64") return f(int64_t{});
  if (type == "f32") return f(float{});
  if (type == "f64") return f(double{});
  fail("PTX: an unknown type:", type);
}

// An instruction by its whole name.
struct Named {
  const char* name;
  Operation operation;
};
template <size_t kCount>
Operation find(const Named (&all)[kCount], std::string_view name) {
  for (const Named& named : all) {
    if (name == named.name) return named.operation;
  }
  return nullptr;
}

// Instructions of one thread alone, and those that go to memory or to other threads; null for the
// name of another.
Operation arithmetic_of(std::string_view name);
Operation access_of(std::string_view name);

}  // namespace simt::ptx
