#include "executor.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kNaNByte = 0xff;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}
void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  void* barrier;
};

void issue(const Copy& copy) {
  require(reinterpret_cast<uintptr_t>(copy.to) % 16 == 0, "a copy's destination is not aligned");
  require(reinterpret_cast<uintptr_t>(copy.from) % 16 == 0, "a copy's source is not aligned");
  require(copy.bytes > 0 && copy.bytes % 16 == 0, "a copy's size is not a multiple of 16");
  std::memset(copy.to, kNaNByte, copy.bytes);
}
void deliver(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = true;
  // Not run while *watched == seen.
  const uint64_t* watched = nullptr;
  uint64_t seen = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  uint64_t exchanges = 0;
  void* fake_stack = nullptr;
};

struct Rendezvous {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Rendezvous rendezvous;
  uint64_t bits[2][kWarpSize];
};

struct MemoryBarrier {
  uint32_t num_arrivals = 0;
  uint32_t missing = 0;
  int64_t bytes = 0;
  uint64_t completed = 0;

  void complete_if_due() {
    if (missing == 0 && bytes == 0) {
      missing = num_arrivals;
      ++completed;
    }
  }
};

struct Cta {
  const Grid* grid = nullptr;
  const std::function<void()>* body = nullptr;
  int rank = 0;
  int current = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<int, Rendezvous> barriers;
  std::map<void*, MemoryBarrier> memory_barriers;
  std::deque<Copy> bulk_copies;
  std::byte* shared = nullptr;

  Fiber& self() { return fibers[current]; }
};

Cta cta;

void enter_scheduler(bool finished) {
  Fiber& fiber = cta.self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.fake_stack, cta.scheduler_stack,
                                 cta.scheduler_stack_bytes);
#endif
  if (finished) {
    setcontext(&cta.scheduler);
  } else {
    swapcontext(&fiber.context, &cta.scheduler);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &cta.scheduler_stack, &cta.scheduler_stack_bytes);
#endif
  (*cta.body)();
  Fiber& fiber = cta.self();
  require(fiber.open_group.empty(), "a thread ended with copies that it never committed");
  for (const auto& group : fiber.groups) {
    require(group.empty(), "a thread ended while its copies were under way");
  }
  fiber.groups.clear();
  fiber.done = true;
  enter_scheduler(true);
}

void resume(int thread) {
  cta.current = thread;
  Fiber& fiber = cta.self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&cta.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&cta.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(cta.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void wait_while(const uint64_t& value, uint64_t seen) {
  Fiber& fiber = cta.self();
  while (value == seen) {
    fiber.watched = &value;
    fiber.seen = seen;
    enter_scheduler(false);
  }
  fiber.watched = nullptr;
}

void meet(Rendezvous& rendezvous, int count) {
  require(rendezvous.arrived == 0 || rendezvous.expected == count,
          "threads disagree about how many meet at a barrier");
  rendezvous.expected = count;
  if (++rendezvous.arrived == count) {
    rendezvous.arrived = 0;
    ++rendezvous.generation;
  } else {
    wait_while(rendezvous.generation, rendezvous.generation);
  }
}

void deliver_bulk_copy(size_t index) {
  const Copy copy = cta.bulk_copies[index];
  cta.bulk_copies.erase(cta.bulk_copies.begin() + static_cast<std::ptrdiff_t>(index));
  deliver(copy);
  MemoryBarrier& barrier = cta.memory_barriers.at(copy.barrier);
  barrier.bytes -= copy.bytes;
  barrier.complete_if_due();
}

void prepare(Fiber& fiber) {
  fiber.done = false;
  fiber.watched = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void run_cta(std::mt19937_64& random) {
  const int count = cta.grid->num_threads;
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (cta.grid->order == Order::kBackward) std::reverse(order.begin(), order.end());
  for (int i = 0; i < count; ++i) prepare(cta.fibers[static_cast<size_t>(i)]);
  for (bool all_done = false; !all_done;) {
    if (cta.grid->order == Order::kRandom) {
      std::shuffle(order.begin(), order.end(), random);
      // Now and then the copy engine is quick, and not in the order of the requests.
      if (!cta.bulk_copies.empty() && random() % 4 == 0) {
        deliver_bulk_copy(random() % cta.bulk_copies.size());
      }
    }
    all_done = true;
    bool progress = false;
    for (const int thread : order) {
      Fiber& fiber = cta.fibers[static_cast<size_t>(thread)];
      if (fiber.done) continue;
      all_done = false;
      if (fiber.watched != nullptr && *fiber.watched == fiber.seen) continue;
      progress = true;
      resume(thread);
    }
    if (!all_done && !progress) {
      require(!cta.bulk_copies.empty(), "all threads of a CTA wait for one another");
      deliver_bulk_copy(0);
    }
  }
  require(cta.bulk_copies.empty(), "a CTA ended while bulk copies were under way");
  for (const auto& [id, barrier] : cta.barriers) {
    require(barrier.arrived == 0, "a CTA ended with threads missing at a barrier");
  }
}

}  // namespace

void run(const Grid& grid, const std::function<void()>& body) {
  require(grid.num_threads % kWarpSize == 0, "a CTA is not made of whole warps");
  std::mt19937_64 random(grid.seed);
  while (cta.fibers.size() < static_cast<size_t>(grid.num_threads)) cta.fibers.emplace_back();
  cta.grid = &grid;
  cta.body = &body;
  // Exactly as large as asked for, so that the address sanitizer sees the first byte beyond.
  void* shared = nullptr;
  require(posix_memalign(&shared, 128, static_cast<size_t>(grid.shared_bytes)) == 0, "no memory");
  cta.shared = static_cast<std::byte*>(shared);
  for (cta.rank = 0; cta.rank < grid.num_ctas; ++cta.rank) {
    std::memset(shared, kNaNByte, static_cast<size_t>(grid.shared_bytes));
    cta.warps.assign(static_cast<size_t>(grid.num_threads / kWarpSize), Warp{});
    cta.barriers.clear();
    cta.memory_barriers.clear();
    run_cta(random);
  }
  std::free(shared);
}

int thread_rank() { return cta.current; }
int cta_rank() { return cta.rank; }
int num_ctas() { return cta.grid->num_ctas; }
std::byte* shared_memory() { return cta.shared; }

void sync_threads(int barrier, int count) {
  meet(cta.barriers[barrier], count == 0 ? cta.grid->num_threads : count);
}
void sync_warp() {
  meet(cta.warps[static_cast<size_t>(cta.current / kWarpSize)].rendezvous, kWarpSize);
}

uint64_t exchange(uint64_t bits, int mask) {
  Warp& warp = cta.warps[static_cast<size_t>(cta.current / kWarpSize)];
  const int lane = cta.current % kWarpSize;
  // Two buffers: a lane may already give its next value while another still reads this one.
  uint64_t* buffer = warp.bits[cta.self().exchanges++ % 2];
  buffer[lane] = bits;
  sync_warp();
  return buffer[lane ^ mask];
}

void copy_async(void* shared, const void* global) {
  const Copy copy = {shared, global, 16, nullptr};
  issue(copy);
  cta.self().open_group.push_back(copy);
}
void commit_copies() {
  Fiber& fiber = cta.self();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}
void wait_for_copies(int pending) {
  auto& groups = cta.self().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) deliver(copy);
    groups.pop_front();
  }
}

void init_barrier(void* barrier, uint32_t num_arrivals) {
  require(reinterpret_cast<uintptr_t>(barrier) % 8 == 0, "a memory barrier is not aligned");
  std::memset(barrier, 0, 8);
  cta.memory_barriers[barrier] = {num_arrivals, num_arrivals, 0, 0};
}
void arrive(void* barrier, uint32_t expected_bytes) {
  require(cta.memory_barriers.count(barrier) == 1, "an arrival at a barrier never initialised");
  MemoryBarrier& state = cta.memory_barriers.at(barrier);
  require(state.missing > 0, "too many arrivals at a memory barrier");
  state.bytes += expected_bytes;
  --state.missing;
  state.complete_if_due();
}
void wait(void* barrier, uint32_t parity) {
  require(cta.memory_barriers.count(barrier) == 1, "waiting at a barrier never initialised");
  const MemoryBarrier& state = cta.memory_barriers.at(barrier);
  if ((state.completed & 1) == parity) wait_while(state.completed, state.completed);
}
void copy_bulk(void* shared, const void* global, uint32_t bytes, void* barrier) {
  const Copy copy = {shared, global, bytes, barrier};
  issue(copy);
  cta.bulk_copies.push_back(copy);
}

}  // namespace simt
