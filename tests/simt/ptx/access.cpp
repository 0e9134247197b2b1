// Instructions that go to memory or to other threads. Between threads the executor does it.
#include <cstring>

#include "common/mma.cuh"
#include "executor.hpp"
#include "ptx/thread.hpp"

namespace simt::ptx {
namespace {

// Above an address of shared memory, in an address of a cluster's: the rank of the CTA, from 1 on.
constexpr int kRankShift = 24;

enum class Space { kGlobal, kShared, kGeneric, kParameters };

std::byte* shared_place(uint64_t address, size_t bytes, const Instruction& i) {
  const auto small = static_cast<uint32_t>(address);
  if (small < kSharedBase || small - kSharedBase + bytes > static_cast<size_t>(shared_bytes())) {
    fail("shared memory is missed by", i.text);
  }
  return shared_memory() + (small - kSharedBase);
}
uint64_t address_in(const Thread& t, const Instruction& i, size_t operand) {
  return get<uint64_t>(t, i, operand) + static_cast<uint64_t>(i.operands[operand].offset);
}

std::byte* shared_place(const Thread& t, const Instruction& i, size_t operand, size_t bytes) {
  return shared_place(address_in(t, i, operand), bytes, i);
}

std::byte* global_place(const Thread& t, const Instruction& i, uint64_t address, size_t bytes) {
  require_waited();
  auto* const at = reinterpret_cast<std::byte*>(address);
  for (const Extent& extent : t.allocations) {
    if (at >= extent.begin && at + bytes <= extent.end) return at;
  }
  fail("every allocation is missed by", i.text);
}

template <Space kSpace>
std::byte* place(const Thread& t, const Instruction& i, size_t operand, size_t bytes) {
  if constexpr (kSpace == Space::kShared) return shared_place(t, i, operand, bytes);
  const uint64_t address = address_in(t, i, operand);
  auto* const at = reinterpret_cast<std::byte*>(address);
  const auto is_within = [&](const std::byte* begin, size_t size) {
    return at >= begin && at + bytes <= begin + size;
  };
  if constexpr (kSpace == Space::kParameters) {
    if (!is_within(t.parameters, t.parameter_bytes)) fail("parameters are missed by", i.text);
    return at;
  }
  if (kSpace == Space::kGeneric &&
      is_within(shared_memory(), static_cast<size_t>(shared_bytes()))) {
    return at;
  }
  return global_place(t, i, address, bytes);
}

// The element that the operation counts with, and how many of them.
template <Space kSpace, typename T>
struct Access {
  static std::byte* at(const Thread& t, const Instruction& i, size_t operand) {
    const size_t bytes = sizeof(T) * i.count;
    std::byte* const where = place<kSpace>(t, i, operand, bytes);
    if constexpr (kSpace == Space::kParameters) return where;
    if (reinterpret_cast<uintptr_t>(where) % bytes != 0) fail("memory is not aligned for", i.text);
    return where;
  }
  static void load(Thread& t, const Instruction& i) {
    const std::byte* const from = at(t, i, i.count);
    for (uint32_t j = 0; j < i.count; ++j) {
      T value;
      std::memcpy(&value, from + j * sizeof(T), sizeof(T));
      set(t, i, j, value);
    }
  }
  static void store(Thread& t, const Instruction& i) {
    std::byte* const to = at(t, i, 0);
    for (uint32_t j = 0; j < i.count; ++j) {
      const T value = get<T>(t, i, 1 + j);
      std::memcpy(to + j * sizeof(T), &value, sizeof(T));
    }
  }
};

// Between threads.
void meet_cta(Thread& t, const Instruction& i) {
  sync_threads(static_cast<int>(get<uint32_t>(t, i, 0)),
               i.operands.size() > 1 ? static_cast<int>(get<uint32_t>(t, i, 1)) : 0);
}
void meet_warp(Thread& t, const Instruction& i) {
  if (get<uint32_t>(t, i, 0) != ~0u) fail("only whole warps meet:", i.text);
  sync_warp();
}
void shuffle_xor(Thread& t, const Instruction& i) {
  const size_t first = i.operands.size() - 4;  // after the value, perhaps a predicate too
  if (get<uint32_t>(t, i, first + 2) != 31 || get<uint32_t>(t, i, first + 3) != ~0u) {
    fail("only whole warps shuffle:", i.text);
  }
  const uint64_t mine = get<uint32_t>(t, i, first);
  const int mask = static_cast<int>(get<uint32_t>(t, i, first + 1));
  set(t, i, 0, static_cast<uint32_t>(exchange(mine, mask)));
  if (first == 2) set(t, i, 1, true);
}
template <typename T>
void multiply_matrices(Thread& t, const Instruction& i) {
  float sums[4];
  uint32_t a[4], b[2];
  for (size_t j = 0; j < 4; ++j) sums[j] = get<float>(t, i, 10 + j);
  for (size_t j = 0; j < 4; ++j) a[j] = get<uint32_t>(t, i, 4 + j);
  for (size_t j = 0; j < 2; ++j) b[j] = get<uint32_t>(t, i, 8 + j);
  attnres::cuda::multiply_add_16x8x16(T{}, sums, a, b);
  for (size_t j = 0; j < 4; ++j) set(t, i, j, sums[j]);
}

void* barrier_at(const Thread& t, const Instruction& i, size_t operand) {
  return shared_place(t, i, operand, sizeof(uint64_t));
}
const void* global_at(const Thread& t, const Instruction& i, size_t operand, size_t bytes) {
  return global_place(t, i, address_in(t, i, operand), bytes);
}

// Where an address of another CTA's memory would be in this one's.
std::byte* remote_place(const Thread& t, const Instruction& i, size_t operand, size_t bytes,
                        int rank) {
  const auto address = static_cast<uint32_t>(address_in(t, i, operand));
  if (static_cast<int>(address >> kRankShift) != rank) fail("two CTAs are meant by", i.text);
  return shared_place(address & ((1u << kRankShift) - 1), bytes, i);
}
template <typename T>
void store_to_cta(Thread& t, const Instruction& i) {
  const int rank = static_cast<int>(get<uint32_t>(t, i, 0) >> kRankShift);
  if (rank == 0) fail("an address of no other CTA is given to", i.text);
  const T value = get<T>(t, i, 1);
  store_remote(remote_place(t, i, 0, sizeof(T), rank), &value, sizeof(T), rank - 1,
               remote_place(t, i, 2, sizeof(uint64_t), rank));
}

const Named kNamed[] = {
    {"cvta.shared.u64",
     [](Thread& t, const Instruction& i) {
       set(t, i, 0, reinterpret_cast<uint64_t>(shared_place(t, i, 1, 0)));
     }},
    {"bar.sync", meet_cta},
    {"bar.warp.sync", meet_warp},
    {"shfl.sync.bfly.b32", shuffle_xor},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply_matrices<__nv_bfloat16>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply_matrices<__half>},
    {"cp.async.cg.shared.global",
     [](Thread& t, const Instruction& i) {
       if (get<uint32_t>(t, i, 2) != 16) fail("other than 16 bytes are copied by", i.text);
       copy_async(shared_place(t, i, 0, 16), global_at(t, i, 1, 16));
     }},
    {"cp.async.commit_group", [](Thread&, const Instruction&) { commit_copies(); }},
    {"cp.async.wait_group",
     [](Thread& t, const Instruction& i) {
       wait_for_copies(static_cast<int>(get<uint32_t>(t, i, 0)));
     }},
    {"griddepcontrol.wait", [](Thread&, const Instruction&) { wait_for_previous_kernel(); }},
    {"griddepcontrol.launch_dependents", [](Thread&, const Instruction&) { require_waited(); }},
    {"barrier.cluster.arrive.relaxed", [](Thread&, const Instruction&) { arrive_at_cluster(); }},
    {"barrier.cluster.wait.acquire", [](Thread&, const Instruction&) { wait_for_cluster(); }},
    {"mapa.shared::cluster.u32",
     [](Thread& t, const Instruction& i) {
       const auto rank = get<uint32_t>(t, i, 2);
       if (rank >= static_cast<uint32_t>(cluster_size())) fail("no CTA has the rank in", i.text);
       set(t, i, 0, get<uint32_t>(t, i, 1) | (rank + 1) << kRankShift);
     }},
    {"st.async.shared::cluster.mbarrier::complete_tx::bytes.b32", store_to_cta<uint32_t>},
    {"st.async.shared::cluster.mbarrier::complete_tx::bytes.b64", store_to_cta<uint64_t>},
    {"fence.mbarrier_init.release.cluster", [](Thread&, const Instruction&) {}},
    {"mbarrier.init.shared::cta.b64",
     [](Thread& t, const Instruction& i) {
       init_barrier(barrier_at(t, i, 0), get<uint32_t>(t, i, 1));
     }},
    {"mbarrier.arrive.shared::cta.b64",
     [](Thread& t, const Instruction& i) { arrive(barrier_at(t, i, 1), 0); }},
    {"mbarrier.arrive.expect_tx.shared::cta.b64",
     [](Thread& t, const Instruction& i) { arrive(barrier_at(t, i, 1), get<uint32_t>(t, i, 2)); }},
    // They may return false before the phase is complete; these never do.
    {"mbarrier.try_wait.parity.shared::cta.b64",
     [](Thread& t, const Instruction& i) {
       wait(barrier_at(t, i, 1), get<uint32_t>(t, i, 2));
       set(t, i, 0, true);
     }},
    {"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64",
     [](Thread& t, const Instruction& i) {
       wait(barrier_at(t, i, 1), get<uint32_t>(t, i, 2));
       set(t, i, 0, true);
     }},
    {"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
     [](Thread& t, const Instruction& i) {
       const auto size = get<uint32_t>(t, i, 2);
       copy_bulk(shared_place(t, i, 0, size), global_at(t, i, 1, size), size, barrier_at(t, i, 3));
     }},
};

Operation memory_operation(std::string_view name) {
  const bool loads = name.substr(0, 3) == "ld.";
  std::string_view rest = name.substr(3);
  Space space = Space::kGeneric;
  const auto take = [&](std::string_view prefix) {
    const bool has = rest.substr(0, prefix.size()) == prefix;
    if (has) rest.remove_prefix(prefix.size());
    return has;
  };
  if (take("global.")) space = Space::kGlobal;
  if (take("shared.")) space = Space::kShared;
  if (take("param.")) space = Space::kParameters;
  // How many stand in the braces says the same.
  if (!take("v2.")) take("v4.");
  return with_type(rest, [&](auto x) -> Operation {
    using T = decltype(x);
    const auto of = [&]<Space kSpace>() -> Operation {
      return loads ? Access<kSpace, T>::load : Access<kSpace, T>::store;
    };
    if (space == Space::kGlobal) return of.template operator()<Space::kGlobal>();
    if (space == Space::kShared) return of.template operator()<Space::kShared>();
    if (space == Space::kParameters) return of.template operator()<Space::kParameters>();
    return of.template operator()<Space::kGeneric>();
  });
}

}  // namespace

Operation access_of(std::string_view name) {
  if (name.substr(0, 3) == "ld." || name.substr(0, 3) == "st.") {
    const Operation named = find(kNamed, name);
    return named != nullptr ? named : memory_operation(name);
  }
  return find(kNamed, name);
}

}  // namespace simt::ptx
