// Runs a CUDA grid on the CPU, one CTA after the other, each of its threads a fiber.
//
// It is hostile where hardware may be: threads run in a chosen order until they must wait, shared
// memory starts as NaN, an asynchronous copy turns its destination into NaN when it is issued and
// delivers as late as it may. A body that reads too early, forgets a barrier, or lets its last copy
// run past its end does not get away with it.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace simt {

constexpr int kWarpSize = 32;

enum class Order : int64_t { kForward, kBackward, kRandom };

struct Grid {
  int num_ctas;
  int num_threads;
  int shared_bytes;
  Order order;
  uint64_t seed;
};

// Calls body() once for every thread of the grid. Ends the process with a sentence if threads wait
// for ever.
void run(const Grid& grid, const std::function<void()>& body);

// Inside a body.
int thread_rank();
int cta_rank();
int num_ctas();
std::byte* shared_memory();

// Waits until `count` threads of the CTA are at barrier number `barrier`.
void sync_threads(int barrier, int count);
void sync_warp();
// Every lane gives 8 bytes and gets those of lane ^ mask.
uint64_t exchange(uint64_t bits, int mask);

void copy_async(void* shared, const void* global);
void commit_copies();
void wait_for_copies(int pending);

void init_barrier(void* barrier, uint32_t num_arrivals);
void arrive(void* barrier, uint32_t expected_bytes);
void wait(void* barrier, uint32_t parity);
void copy_bulk(void* shared, const void* global, uint32_t bytes, void* barrier);

}  // namespace simt
