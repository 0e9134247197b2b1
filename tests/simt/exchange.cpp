// Exchange between the CTAs of a cluster, on its own: rounds in which one warp or all threads read.
#include "cases.hpp"
#include "common/teams.cuh"

namespace simt {
namespace {

struct ExchangeArgs {
  int num_rounds;
  int count;
  bool all_read;
  float* sums;  // [num_ctas, num_rounds, count]
};

void exchange_kernel(const ExchangeArgs& args) {
  using namespace cuda;
  const int capacity = cluster_size() * args.count * static_cast<int>(sizeof(Pair<float>));
  Exchange exchange(dynamic_shared_memory(), capacity);
  auto* shown = reinterpret_cast<float*>(dynamic_shared_memory() + Exchange::bytes(capacity));
  wait_for_previous_kernel();
  exchange.start();
  float* sums = args.sums + cta_rank() * args.num_rounds * args.count;
  for (int round = 0; round < args.num_rounds; ++round, sums += args.count) {
    const auto number = [&](int i) { return static_cast<float>((cta_rank() + 1) * (round + i)); };
    const auto give = [&](int rank, int i) {
      exchange.give_to(rank, rank_in_cluster() * args.count + i, Pair<float>{number(i), 1});
    };
    const auto sum = [&](const Pair<float>* numbers, int i) {
      float total = 0;
      for (int rank = 0; rank < cluster_size(); ++rank) {
        const Pair<float> pair = numbers[rank * args.count + i];
        total += pair.first + pair.second;
      }
      return total;
    };
    if (thread_rank() == 0) exchange.begin(static_cast<uint32_t>(capacity));
    if (args.all_read) {
      // Lane r of a warp gives to rank r.
      for (int i = thread_rank() / kWarpSize; i < args.count; i += 2) {
        const int rank = thread_rank() % kWarpSize;
        if (rank < cluster_size()) give(rank, i);
      }
      const auto* numbers = exchange.wait<Pair<float>>();
      for (int i = thread_rank(); i < args.count; i += 2 * kWarpSize) sums[i] = sum(numbers, i);
    } else {
      if (thread_rank() < kWarpSize) {
        for (int i = thread_rank(); i < args.count; i += kWarpSize) {
          for (int rank = 0; rank < cluster_size(); ++rank) give(rank, i);
        }
        const auto* numbers = exchange.wait<Pair<float>>();
        for (int i = thread_rank(); i < args.count; i += kWarpSize) shown[i] = sum(numbers, i);
      }
      sync_cta();
      for (int i = thread_rank(); i < args.count; i += 2 * kWarpSize) sums[i] = shown[i];
    }
    exchange.next();
    sync_cta();
  }
}

}  // namespace

void run_exchange(File& cases, File& results) {
  const auto order = static_cast<Order>(cases.take<int64_t>());
  const auto size = static_cast<int>(cases.take<int64_t>());
  const auto count = static_cast<int>(cases.take<int64_t>());
  const auto all_read = cases.take<int64_t>() != 0;
  constexpr int kRounds = 6, kTeams = 2;
  std::vector<float> sums(static_cast<size_t>(kTeams * size * kRounds * count));
  const int capacity = size * count * static_cast<int>(sizeof(cuda::Pair<float>));
  const int shared_bytes =
      cuda::Exchange::bytes(capacity) + count * static_cast<int>(sizeof(float));
  run({kTeams * size, 2 * kWarpSize, shared_bytes, order, 7, size, nullptr},
      [&] { exchange_kernel({kRounds, count, all_read, sums.data()}); });
  results.put(sums.data(), sums.size() * sizeof(float));
}

}  // namespace simt
