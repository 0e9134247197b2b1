// Runs a CUDA grid on the CPU, one cluster of CTAs after the other (without clusters: one CTA),
// each thread a fiber.
//
// It is hostile where hardware may be: threads run in a chosen order until they must wait, shared
// memory starts as NaN, an asynchronous copy turns its destination into NaN when it is issued and
// delivers as late as it may, and so does a store to another CTA; what the copy engine takes from
// shared memory must stay as it was until it has been read; the kernel before this one in the
// stream ends only when every thread waits for something. A body that reads too early, forgets a
// barrier, or lets its last copy run past its end does not get away with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace simt {

constexpr int kWarpSize = 32;

enum class Order : int64_t { kForward, kBackward, kRandom };

struct Grid {
  int num_ctas;
  int num_threads;
  int shared_bytes;
  Order order;
  uint64_t seed;
  int cluster_size = 1;
  // What the kernel before this one does at its end. A kernel that waits for it may touch global
  // memory only then.
  std::function<void()> end_previous_kernel;
};

// What a kernel did that no kernel may do, as a sentence.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls body() once for every thread of the grid. Throws a Failure if threads wait for ever. The
// end of the previous kernel may be another call of run().
void run(const Grid& grid, const std::function<void()>& body);

// Inside a body.
int thread_rank();
int cta_rank();
int num_ctas();
std::byte* shared_memory();
int shared_bytes();
// From the start of this CTA's shared memory.
uint32_t shared_offset(const void* p);

int cluster_size();
int rank_in_cluster();

void wait_for_previous_kernel();
// Ends the process unless this thread has waited for the previous kernel.
void require_waited();

// All threads of the cluster.
void arrive_at_cluster();
void wait_for_cluster();
// Copies `bytes` to where the CTA of that rank has what this one has at `mine`, and counts them on
// the barrier that it has at `barrier`.
void store_remote(void* mine, const void* value, uint32_t bytes, int rank, void* barrier);

// The same for many bytes by a bulk copy. Nobody may write `from`, and nobody reads or writes the
// other place, until it has come.
void copy_bulk_to(int rank, void* to, const void* from, uint32_t bytes, void* barrier);

// Waits until `count` threads of the CTA are at barrier number `barrier`.
void sync_threads(int barrier, int count);
void sync_warp();
// Every lane gives 8 bytes and gets those of lane ^ mask.
uint64_t exchange(uint64_t bits, int mask);
// Every lane gives `bytes` bytes, at most 32, and gets those of all 32 lanes, one after the other,
// until it gives again.
const void* gather(const void* mine, size_t bytes);

void copy_async(void* shared, const void* global);
void commit_copies();
void wait_for_copies(int pending);

void init_barrier(void* barrier, uint32_t num_arrivals);
void arrive(void* barrier, uint32_t expected_bytes);
void wait(void* barrier, uint32_t parity);
void copy_bulk(void* shared, const void* global, uint32_t bytes, void* barrier);

// Bulk stores: nobody may write `shared` until this thread has waited for it to be read; they reach
// global memory when it has waited for that, or when the grid ends.
void store_bulk(void* global, const void* shared, uint32_t bytes);
void commit_bulk_stores();
void wait_until_bulk_stores_are_read(int pending);
void wait_for_bulk_stores(int pending);

// Every lane gives where a row of a matrix is, 16 bytes of shared memory, and gets those of all 32
// lanes, until it gives something again.
const uint32_t* gather_rows(uint32_t offset);
// Matrices that gather_rows() has been asked for since the grid started, and how many times shared
// memory was read or written for them: once for each unless rows meet in banks.
struct MatrixTraffic {
  int64_t matrices = 0;
  int64_t wavefronts = 0;
};
MatrixTraffic matrix_traffic();

}  // namespace simt
