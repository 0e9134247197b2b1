#include "executor.hpp"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kNaNByte = 0xff;

[[noreturn]] void fail(const char* what);
void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  void* barrier;
};

void require_aligned(const void* to, const void* from, uint32_t bytes) {
  require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a copy's destination is not aligned");
  require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy's source is not aligned");
  require(bytes > 0 && bytes % 16 == 0, "a copy's size is not a multiple of 16");
}
void issue(const Copy& copy) {
  require_aligned(copy.to, copy.from, copy.bytes);
  std::memset(copy.to, kNaNByte, copy.bytes);
}
void deliver(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

// What the copy engine takes from shared memory: it may read it when it is told to, or any time
// later until somebody knows that it has, so it must be the same all the while.
struct Taken {
  const void* from = nullptr;
  std::vector<std::byte> bytes;

  Taken() = default;
  Taken(const void* source, uint32_t count)
      : from(source),
        bytes(static_cast<const std::byte*>(source),
              static_cast<const std::byte*>(source) + count) {}
  void require_unchanged() const {
    require(std::memcmp(bytes.data(), from, bytes.size()) == 0,
            "what a bulk copy takes from shared memory was written while it was under way");
  }
};

struct BulkStore {
  void* to;
  Taken taken;
  bool read = false;

  void deliver() const { std::memcpy(to, taken.bytes.data(), taken.bytes.size()); }
};

// Memory for a fiber's stack, used again by others after it.
class Stack {
 public:
  Stack() {
    if (free_stacks().empty()) {
      memory_.reset(new char[kStackBytes]);
    } else {
      memory_ = std::move(free_stacks().back());
      free_stacks().pop_back();
    }
  }
  ~Stack() {
    if (memory_ != nullptr) free_stacks().push_back(std::move(memory_));
  }
  Stack(Stack&&) = default;
  Stack& operator=(Stack&&) = delete;
  char* get() const { return memory_.get(); }

 private:
  using Memory = std::unique_ptr<char[]>;
  static std::vector<Memory>& free_stacks() {
    static std::vector<Memory> stacks;
    return stacks;
  }
  Memory memory_;
};

struct Fiber {
  Stack stack;
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  bool has_begun = false;
  bool done = true;
  // Not run while *watched == seen.
  const uint64_t* watched = nullptr;
  uint64_t seen = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  std::vector<BulkStore> open_stores;
  std::deque<std::vector<BulkStore>> store_groups;
  uint64_t exchanges = 0;
  bool waited_for_previous_kernel = false;
  bool is_at_cluster_barrier = false;
  uint64_t cluster_generation = 0;
  void* fake_stack = nullptr;
};

struct Rendezvous {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;
};

constexpr size_t kMostLaneBytes = 32;

struct Warp {
  Rendezvous rendezvous;
  alignas(8) std::byte bytes[2][kWarpSize * kMostLaneBytes];
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
  int rank = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<int, Rendezvous> barriers;
  std::map<void*, MemoryBarrier> memory_barriers;
  std::byte* shared = nullptr;
  int running = 0;
};

// On its way to another CTA.
struct RemoteStore {
  Cta* cta;
  void* to;
  std::vector<std::byte> bytes;
  void* barrier;
  Taken taken = {};  // by the copy engine, if it is a bulk copy
};

// The CTAs that run at the same time, and who of them runs now.
struct Executor {
  const Grid* grid = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<Cta> ctas;
  Cta* cta = nullptr;
  int thread = 0;
  bool runs_a_fiber = false;
  const char* failure = nullptr;  // of a fiber, for the scheduler to throw
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  std::deque<std::pair<Cta*, Copy>> bulk_copies;
  std::deque<RemoteStore> remote_stores;
  // Read, and not yet in global memory.
  std::vector<BulkStore> late_stores;
  MatrixTraffic matrix_traffic;
  // Threads that have neither arrived at the cluster's barrier nor ended.
  int missing_at_cluster_barrier = 0;
  uint64_t cluster_generation = 0;
  // One when the previous kernel has ended.
  uint64_t previous_kernel_ended = 0;

  Fiber& self() { return cta->fibers[static_cast<size_t>(thread)]; }
};

Executor executor;

// From a thread to the scheduler and back. Jumps, because swapcontext() calls the system each time;
// the address sanitizer knows the latter.
#if defined(__SANITIZE_ADDRESS__)

void enter_scheduler(bool finished) {
  Fiber& fiber = executor.self();
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.fake_stack, executor.scheduler_stack,
                                 executor.scheduler_stack_bytes);
  if (finished) {
    setcontext(&executor.scheduler);
  } else {
    swapcontext(&fiber.context, &executor.scheduler);
  }
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void enter_fiber(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&executor.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&executor.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(executor.scheduler_fake_stack, nullptr, nullptr);
}

#else

void enter_scheduler(bool finished) {
  if (finished || _setjmp(executor.self().place) == 0) _longjmp(executor.scheduler_place, 1);
}

void enter_fiber(Fiber& fiber) {
  if (_setjmp(executor.scheduler_place) != 0) return;
  if (fiber.has_begun) _longjmp(fiber.place, 1);
  fiber.has_begun = true;
  setcontext(&fiber.context);
}

#endif

void fail(const char* what) {
  if (!executor.runs_a_fiber) throw Failure(what);
  // No exception leaves a fiber: the scheduler throws this one, and nobody comes back.
  executor.failure = what;
  enter_scheduler(true);
  std::abort();
}

// One thread fewer that the others wait for.
void leave_cluster_barrier_behind() {
  if (--executor.missing_at_cluster_barrier > 0) return;
  ++executor.cluster_generation;
  for (const Cta& cta : executor.ctas) executor.missing_at_cluster_barrier += cta.running;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &executor.scheduler_stack,
                                  &executor.scheduler_stack_bytes);
#endif
  (*executor.body)();
  Fiber& fiber = executor.self();
  require(fiber.open_group.empty(), "a thread ended with copies that it never committed");
  for (const auto& group : fiber.groups) {
    require(group.empty(), "a thread ended while its copies were under way");
  }
  fiber.groups.clear();
  require(fiber.open_stores.empty(), "a thread ended with bulk stores that it never committed");
  for (const auto& group : fiber.store_groups) {
    for (const BulkStore& store : group) {
      require(store.read, "a thread ended while its bulk stores were being read");
      executor.late_stores.push_back(store);
    }
  }
  fiber.store_groups.clear();
  fiber.done = true;
  --executor.cta->running;
  require(!fiber.is_at_cluster_barrier,
          "a thread ended between arriving and waiting for a cluster");
  leave_cluster_barrier_behind();
  enter_scheduler(true);
}

void resume(Cta& cta, int thread) {
  executor.cta = &cta;
  executor.thread = thread;
  executor.runs_a_fiber = true;
  enter_fiber(executor.self());
  executor.runs_a_fiber = false;
  if (executor.failure != nullptr) fail(executor.failure);
}

void wait_while(const uint64_t& value, uint64_t seen) {
  Fiber& fiber = executor.self();
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

void count_on(Cta& cta, void* barrier, uint32_t bytes) {
  MemoryBarrier& state = cta.memory_barriers.at(barrier);
  state.bytes -= bytes;
  state.complete_if_due();
}

void deliver_bulk_copy(size_t index) {
  const auto [cta, copy] = executor.bulk_copies[index];
  executor.bulk_copies.erase(executor.bulk_copies.begin() + static_cast<std::ptrdiff_t>(index));
  deliver(copy);
  count_on(*cta, copy.barrier, copy.bytes);
}

void deliver_remote_store(size_t index) {
  const RemoteStore store = executor.remote_stores[index];
  executor.remote_stores.erase(executor.remote_stores.begin() + static_cast<std::ptrdiff_t>(index));
  require(store.cta->running > 0, "a store reaches a CTA that has ended");
  if (store.taken.from != nullptr) store.taken.require_unchanged();
  std::memcpy(store.to, store.bytes.data(), store.bytes.size());
  count_on(*store.cta, store.barrier, static_cast<uint32_t>(store.bytes.size()));
}

void prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  // Whoever used it before may not have left it by returning.
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
#endif
  fiber.done = false;
  fiber.has_begun = false;
  fiber.watched = nullptr;
  fiber.waited_for_previous_kernel = false;
  fiber.is_at_cluster_barrier = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void run_cluster(std::mt19937_64& random) {
  const int count = executor.grid->num_threads;
  std::vector<int> order(executor.ctas.size() * static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (executor.grid->order == Order::kBackward) std::reverse(order.begin(), order.end());
  if (executor.grid->order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
  for (Cta& cta : executor.ctas) {
    for (int i = 0; i < count; ++i) prepare(cta.fibers[static_cast<size_t>(i)]);
  }
  for (bool all_done = false; !all_done;) {
    size_t place = 0;
    if (executor.grid->order == Order::kRandom) {
      // Anew now and then, which takes longer than the threads do; from another place each time.
      if (random() % 8 == 0) std::shuffle(order.begin(), order.end(), random);
      place = random() % order.size();
      // Now and then the copy engine is quick, and not in the order of the requests.
      if (!executor.bulk_copies.empty() && random() % 4 == 0) {
        deliver_bulk_copy(random() % executor.bulk_copies.size());
      }
      if (!executor.remote_stores.empty() && random() % 4 == 0) {
        deliver_remote_store(random() % executor.remote_stores.size());
      }
    }
    all_done = true;
    bool progress = false;
    for (size_t i = 0; i < order.size(); ++i) {
      const int thread = order[place];
      place = place + 1 == order.size() ? 0 : place + 1;
      Cta& cta = executor.ctas[static_cast<size_t>(thread / count)];
      Fiber& fiber = cta.fibers[static_cast<size_t>(thread % count)];
      if (fiber.done) continue;
      all_done = false;
      if (fiber.watched != nullptr && *fiber.watched == fiber.seen) continue;
      progress = true;
      resume(cta, thread % count);
    }
    if (all_done || progress) continue;
    if (executor.previous_kernel_ended == 0) {
      if (executor.grid->end_previous_kernel) executor.grid->end_previous_kernel();
      executor.previous_kernel_ended = 1;
    } else if (!executor.bulk_copies.empty()) {
      deliver_bulk_copy(0);
    } else {
      require(!executor.remote_stores.empty(), "all threads of a cluster wait for one another");
      deliver_remote_store(0);
    }
  }
  require(executor.bulk_copies.empty(), "a CTA ended while bulk copies were under way");
  require(executor.remote_stores.empty(), "a CTA ended before what was stored to it arrived");
  for (const Cta& cta : executor.ctas) {
    for (const auto& [id, barrier] : cta.barriers) {
      require(barrier.arrived == 0, "a CTA ended with threads missing at a barrier");
    }
  }
}

}  // namespace

void run(const Grid& grid, const std::function<void()>& body) {
  require(grid.num_threads % kWarpSize == 0, "a CTA is not made of whole warps");
  require(grid.cluster_size >= 1 && grid.num_ctas % grid.cluster_size == 0,
          "a grid is not made of whole clusters");
  // Another kernel may be waiting for this one.
  struct Nested {
    Executor outer = std::exchange(executor, Executor{});
    ~Nested() {
      for (Cta& cta : executor.ctas) std::free(cta.shared);
      executor = std::move(outer);
    }
  } nested;
  std::mt19937_64 random(grid.seed);
  executor.grid = &grid;
  executor.body = &body;
  executor.ctas.resize(static_cast<size_t>(grid.cluster_size));
  const auto shared_bytes = static_cast<size_t>(grid.shared_bytes);
  for (Cta& cta : executor.ctas) {
    cta.fibers = std::vector<Fiber>(static_cast<size_t>(grid.num_threads));
    // Exactly as large as asked for, so that the address sanitizer sees the first byte beyond.
    void* shared = nullptr;
    require(posix_memalign(&shared, 128, shared_bytes) == 0, "no memory");
    cta.shared = static_cast<std::byte*>(shared);
  }
  for (int first = 0; first < grid.num_ctas; first += grid.cluster_size) {
    for (int i = 0; i < grid.cluster_size; ++i) {
      Cta& cta = executor.ctas[static_cast<size_t>(i)];
      cta.rank = first + i;
      cta.running = grid.num_threads;
      std::memset(cta.shared, kNaNByte, shared_bytes);
      cta.warps.assign(static_cast<size_t>(grid.num_threads / kWarpSize), Warp{});
      cta.barriers.clear();
      cta.memory_barriers.clear();
    }
    executor.cluster_generation = 0;
    executor.missing_at_cluster_barrier = grid.cluster_size * grid.num_threads;
    run_cluster(random);
  }
  for (const BulkStore& store : executor.late_stores) store.deliver();
  nested.outer.matrix_traffic = executor.matrix_traffic;
}

int thread_rank() { return executor.thread; }
int cta_rank() { return executor.cta->rank; }
int num_ctas() { return executor.grid->num_ctas; }
std::byte* shared_memory() { return executor.cta->shared; }
int shared_bytes() { return executor.grid->shared_bytes; }
uint32_t shared_offset(const void* p) {
  const std::ptrdiff_t offset = static_cast<const std::byte*>(p) - executor.cta->shared;
  require(offset >= 0 && offset <= executor.grid->shared_bytes,
          "an address is not of shared memory");
  return static_cast<uint32_t>(offset);
}
int cluster_size() { return executor.grid->cluster_size; }
int rank_in_cluster() { return executor.cta->rank % executor.grid->cluster_size; }

void wait_for_previous_kernel() {
  wait_while(executor.previous_kernel_ended, 0);
  executor.self().waited_for_previous_kernel = true;
}
void require_waited() {
  require(executor.self().waited_for_previous_kernel,
          "a thread goes to global memory before it has waited for the previous kernel");
}

void arrive_at_cluster() {
  Fiber& fiber = executor.self();
  require(!fiber.is_at_cluster_barrier, "a thread arrives at its cluster a second time");
  fiber.is_at_cluster_barrier = true;
  fiber.cluster_generation = executor.cluster_generation;
  leave_cluster_barrier_behind();
}
void wait_for_cluster() {
  Fiber& fiber = executor.self();
  require(fiber.is_at_cluster_barrier, "a thread waits for its cluster before it has arrived");
  wait_while(executor.cluster_generation, fiber.cluster_generation);
  fiber.is_at_cluster_barrier = false;
}
namespace {

// Of `bytes` bytes for the CTA of that rank.
RemoteStore remote_store(void* mine, const void* value, uint32_t bytes, int rank, void* barrier) {
  require(rank >= 0 && rank < executor.grid->cluster_size, "a store to no CTA of the cluster");
  require(executor.cluster_generation > 0 || executor.grid->cluster_size == 1,
          "a store to a CTA that may not have started");
  Cta& cta = executor.ctas[static_cast<size_t>(rank)];
  const auto there = [&](void* p, uint32_t size) {
    const std::ptrdiff_t offset = static_cast<std::byte*>(p) - executor.cta->shared;
    require(offset >= 0 && offset + size <= executor.grid->shared_bytes,
            "a store to another CTA misses its shared memory");
    return cta.shared + offset;
  };
  void* const on = there(barrier, 8);
  require(cta.memory_barriers.count(on) == 1, "a store counts on a barrier never initialised");
  const auto* first = static_cast<const std::byte*>(value);
  return {&cta, there(mine, bytes), {first, first + bytes}, on};
}

}  // namespace

void store_remote(void* mine, const void* value, uint32_t bytes, int rank, void* barrier) {
  require(reinterpret_cast<uintptr_t>(mine) % bytes == 0, "a store to a CTA is not aligned");
  executor.remote_stores.push_back(remote_store(mine, value, bytes, rank, barrier));
}
void copy_bulk_to(int rank, void* to, const void* from, uint32_t bytes, void* barrier) {
  require_aligned(to, from, bytes);
  RemoteStore store = remote_store(to, from, bytes, rank, barrier);
  store.taken = {from, bytes};
  std::memset(store.to, kNaNByte, bytes);
  executor.remote_stores.push_back(std::move(store));
}

void sync_threads(int barrier, int count) {
  meet(executor.cta->barriers[barrier], count == 0 ? executor.grid->num_threads : count);
}
void sync_warp() {
  meet(executor.cta->warps[static_cast<size_t>(executor.thread / kWarpSize)].rendezvous, kWarpSize);
}

const void* gather(const void* mine, size_t bytes) {
  require(bytes <= kMostLaneBytes, "a lane gives too much");
  Warp& warp = executor.cta->warps[static_cast<size_t>(executor.thread / kWarpSize)];
  // Two buffers: a lane may already give its next value while another still reads this one.
  std::byte* buffer = warp.bytes[executor.self().exchanges++ % 2];
  std::memcpy(buffer + static_cast<size_t>(executor.thread % kWarpSize) * bytes, mine, bytes);
  sync_warp();
  return buffer;
}

uint64_t exchange(uint64_t bits, int mask) {
  const auto* all = static_cast<const uint64_t*>(gather(&bits, sizeof(bits)));
  return all[executor.thread % kWarpSize ^ mask];
}

void copy_async(void* shared, const void* global) {
  require_waited();
  const Copy copy = {shared, global, 16, nullptr};
  issue(copy);
  executor.self().open_group.push_back(copy);
}
void commit_copies() {
  Fiber& fiber = executor.self();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}
void wait_for_copies(int pending) {
  auto& groups = executor.self().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) deliver(copy);
    groups.pop_front();
  }
}

void init_barrier(void* barrier, uint32_t num_arrivals) {
  require(reinterpret_cast<uintptr_t>(barrier) % 8 == 0, "a memory barrier is not aligned");
  std::memset(barrier, 0, 8);
  executor.cta->memory_barriers[barrier] = {num_arrivals, num_arrivals, 0, 0};
}
void arrive(void* barrier, uint32_t expected_bytes) {
  require(executor.cta->memory_barriers.count(barrier) == 1,
          "an arrival at a barrier never initialised");
  MemoryBarrier& state = executor.cta->memory_barriers.at(barrier);
  require(state.missing > 0, "too many arrivals at a memory barrier");
  state.bytes += expected_bytes;
  --state.missing;
  state.complete_if_due();
}
void wait(void* barrier, uint32_t parity) {
  require(executor.cta->memory_barriers.count(barrier) == 1,
          "waiting at a barrier never initialised");
  const MemoryBarrier& state = executor.cta->memory_barriers.at(barrier);
  if ((state.completed & 1) == parity) wait_while(state.completed, state.completed);
}
void copy_bulk(void* shared, const void* global, uint32_t bytes, void* barrier) {
  require_waited();
  const Copy copy = {shared, global, bytes, barrier};
  issue(copy);
  executor.bulk_copies.emplace_back(executor.cta, copy);
}

void store_bulk(void* global, const void* shared, uint32_t bytes) {
  require_waited();
  require_aligned(global, shared, bytes);
  executor.self().open_stores.push_back({global, {shared, bytes}});
}
void commit_bulk_stores() {
  Fiber& fiber = executor.self();
  fiber.store_groups.push_back(std::move(fiber.open_stores));
  fiber.open_stores.clear();
}
void wait_until_bulk_stores_are_read(int pending) {
  auto& groups = executor.self().store_groups;
  for (size_t i = 0; i + static_cast<size_t>(pending) < groups.size(); ++i) {
    for (BulkStore& store : groups[i]) {
      if (!store.read) store.taken.require_unchanged();
      store.read = true;
    }
  }
}
void wait_for_bulk_stores(int pending) {
  wait_until_bulk_stores_are_read(pending);
  auto& groups = executor.self().store_groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const BulkStore& store : groups.front()) store.deliver();
    groups.pop_front();
  }
}

const uint32_t* gather_rows(uint32_t offset) {
  require(offset % 16 == 0, "a row of a matrix is not aligned");
  require(static_cast<int>(offset) + 16 <= executor.grid->shared_bytes,
          "a row of a matrix is not in shared memory");
  const auto* rows = static_cast<const uint32_t*>(gather(&offset, sizeof(offset)));
  if (executor.thread % kWarpSize == 0) {
    constexpr int kRows = 8, kBankGroups = 8;
    for (int first = 0; first < kWarpSize; first += kRows, ++executor.matrix_traffic.matrices) {
      int most = 0;
      for (int group = 0; group < kBankGroups; ++group) {
        std::set<uint32_t> met;
        for (int i = first; i < first + kRows; ++i) {
          if (rows[i] / 16 % kBankGroups == static_cast<uint32_t>(group)) met.insert(rows[i]);
        }
        most = std::max(most, static_cast<int>(met.size()));
      }
      executor.matrix_traffic.wavefronts += most;
    }
  }
  return rows;
}
MatrixTraffic matrix_traffic() { return executor.matrix_traffic; }

}  // namespace simt
