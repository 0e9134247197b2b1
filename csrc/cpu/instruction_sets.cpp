// Which set of kernels runs: chosen once, by what this build and this processor have.
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <string>

#include "attnres/check.hpp"
#include "kernels.hpp"

namespace attnres::cpu {

// Each is csrc/cpu/kernels.cpp, compiled for that set; cmake/CpuKernels.cmake says with which
// flags.
extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels, armv86_kernels;

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports knows the name in GCC, but not in every Clang.
[[maybe_unused]] bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}
#elif defined(__aarch64__)
[[maybe_unused]] bool has_bfloat16() {
  constexpr unsigned long kBfloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not know
  return (getauxval(AT_HWCAP2) & kBfloat16) != 0;
}
#endif
[[maybe_unused]] bool always() { return true; }

struct InstructionSet {
  const Kernels* kernels;
  bool (*supported)();
};

// From the widest on.
constexpr InstructionSet kSets[] = {
#if defined(ATTNRES_HAS_AVX512_KERNELS)
    {&avx512_kernels, has_avx512},
#endif
#if defined(ATTNRES_HAS_AVX2_KERNELS)
    {&avx2_kernels, has_avx2},
#endif
#if defined(ATTNRES_HAS_ARMV86_KERNELS)
    {&armv86_kernels, has_bfloat16},
#endif
#if defined(ATTNRES_HAS_BASELINE_KERNELS)
    {&baseline_kernels, always},
#endif
};

const Kernels* choose_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* variable = std::getenv("ATTNRES_CPU");
  const std::string asked = variable == nullptr ? "" : variable;
  std::string built, usable;
  for (const InstructionSet& set : kSets) {
    const std::string name = set.kernels->name;
    built += (built.empty() ? "" : ", ") + name;
    if (!set.supported()) continue;
    if (asked.empty() || asked == name) return set.kernels;
    usable += (usable.empty() ? "" : ", ") + name;
  }
  ATTNRES_CHECK(!usable.empty(), "attnres: this build has CPU kernels for ", built,
                ", which this processor has not; build it here, or with ATTNRES_CPU_SETS=all");
  ATTNRES_CHECK(false, "attnres: the environment variable ATTNRES_CPU is '", asked,
                "', expected an instruction set that this machine and this build have: ", usable);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose_kernels();
  return *chosen;
}

}  // namespace attnres::cpu
