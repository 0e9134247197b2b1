// How the CUDA kernels of phase 1 cut their work on an H100, and on devices that have no clusters
// or less shared memory.
#include "attnres/plan.hpp"
#include "check.hpp"
#include "inter_block_attention/rows_tile.hpp"

using namespace attnres::cuda;

namespace {

constexpr DeviceLimits kH100 = {132, 228 << 10, 227 << 10};
constexpr DeviceLimits kA100 = {108, 164 << 10, 163 << 10};
constexpr DeviceLimits kRtx3090 = {82, 100 << 10, 99 << 10};
constexpr DeviceLimits kRtx5090 = {170, 100 << 10, 99 << 10};

// Over bf16 rows, on tensor cores.
InterBlockShape forward_of(int num_sources, int64_t num_queries, int64_t hidden) {
  return {.hidden = hidden,
          .num_sources = num_sources,
          .num_queries = num_queries,
          .row_value_bytes = 2,
          .vector_value_bytes = 2,
          .vector_parts = 3,
          .compute_bytes = 4,
          .uses_slots = true,
          .rows_of_token = num_sources,
          .num_matrices = 1,
          .makes_sums = false};
}

InterBlockShape backward_of(int num_sources, int64_t num_queries, int64_t hidden) {
  InterBlockShape shape = forward_of(num_sources, num_queries, hidden);
  shape.rows_of_token += static_cast<int>(num_queries);
  shape.num_matrices = 3;
  shape.makes_sums = true;
  return shape;
}

InterBlockTile on_h100(const InterBlockShape& shape, int most_ctas = kMostCtasInLargeCluster) {
  return choose_inter_block_team(shape, kH100, most_ctas);
}

// Score vectors are read once, rows are on their way while others are in use, and so no byte moves
// twice; `sums` says whether those of the backward stay on chip too.
bool is_complete(const InterBlockTile& tile, const DeviceLimits& limits, bool sums) {
  return fits(tile, limits) && tile.num_passes == 1 && tile.num_slots > 1 &&
         (tile.sum_values > 0) == sums;
}

void test_one_cta_where_that_is_enough() {
  const InterBlockTile kimi = on_h100(forward_of(9, 6, 2304));
  CHECK(kimi.cluster_size == 1);
  CHECK(is_complete(kimi, kH100, false));
  const InterBlockTile narrow = on_h100(backward_of(4, 4, 1024));
  CHECK(narrow.cluster_size == 1);
  CHECK(is_complete(narrow, kH100, true));
}

void test_clusters_hold_what_one_cta_cannot() {
  const InterBlockTile kimi = on_h100(backward_of(9, 6, 2304));
  CHECK(kimi.cluster_size == 2);
  CHECK(is_complete(kimi, kH100, true));
  const InterBlockTile k3 = on_h100(forward_of(8, 24, 7168));
  CHECK(k3.cluster_size == 8);
  CHECK(is_complete(k3, kH100, false));
  const InterBlockTile k3_backward = on_h100(backward_of(8, 24, 7168));
  CHECK(k3_backward.cluster_size == 16);
  CHECK(is_complete(k3_backward, kH100, true));
  CHECK(on_h100(forward_of(8, 16, 4096)).cluster_size == 4);
  CHECK(on_h100(backward_of(8, 16, 4096)).cluster_size == 8);
}

void test_without_large_clusters_less_stays_on_chip() {
  const InterBlockTile tile = on_h100(backward_of(8, 24, 7168), 8);
  CHECK(tile.cluster_size == 8);
  CHECK(fits(tile, kH100));
  CHECK(tile.num_passes == 1);
  CHECK(tile.sum_values == 0);
}

// The plan counts on it, without knowing how tiles are cut.
void test_where_the_plan_sees_room_there_is(const DeviceLimits& limits, int capability,
                                            int most_ctas) {
  const attnres::DeviceFacts facts =
      attnres::device_facts({attnres::DeviceKind::kCuda, capability, limits.shared_bytes_per_cta});
  CHECK(facts.most_tiles_shared == most_ctas);
  // What the plan finds room for, and what the tiles have room for.
  int seen[3] = {}, there[3] = {};
  for (int n : {1, 2, 4, 8, 9, 16, 32, 64}) {
    for (int64_t s : {2, 6, 8, 12, 16, 24, 32, 64}) {
      for (int64_t hidden : {64, 1024, 2304, 4096, 7168, 8192, 16384}) {
        for (bool training : {false, true}) {
          const InterBlockTile tile = choose_inter_block_team(
              training ? backward_of(n, s, hidden) : forward_of(n, s, hidden), limits, most_ctas);
          const int tokens = is_complete(tile, limits, training)          ? 2
                             : fits(tile, limits) && tile.num_passes == 1 ? 1
                                                                          : 0;
          const int planned = attnres::phase_one_tokens({n, s, 8192, hidden, 2}, facts, training);
          CHECK(planned <= tokens);
          ++seen[planned];
          ++there[tokens];
        }
      }
    }
  }
  // The estimate misses little.
  CHECK(seen[0] > 50 && seen[2] > 150);
  CHECK(10 * seen[2] >= 9 * there[2]);
  CHECK(10 * (seen[1] + seen[2]) >= 9 * (there[1] + there[2]));
}

void test_slices_cover_all_panels() {
  for (int64_t hidden : {64, 72, 456, 1096, 7168}) {
    const int panels = static_cast<int>((hidden + kPanelColumns - 1) / kPanelColumns);
    for (int size = 1; size <= std::min(panels, kMostCtasInLargeCluster); size *= 2) {
      const InterBlockTile tile =
          choose_inter_block_tile(forward_of(3, 5, hidden), kH100, size, false);
      CHECK(tile.least_panels * size + tile.num_larger_slices == panels);
      CHECK(tile.least_panels > 0);
      CHECK(tile.num_larger_slices < size);
      CHECK(tile.pass_columns * tile.num_passes >=
            (tile.least_panels + (tile.num_larger_slices > 0 ? 1 : 0)) * kPanelColumns);
    }
  }
}

void test_no_more_ctas_than_panels_and_multiprocessors() {
  CHECK(on_h100(forward_of(64, 64, 64)).cluster_size == 1);
  const DeviceLimits few = {4, 100 << 10, 99 << 10};
  CHECK(choose_inter_block_team(forward_of(8, 24, 7168), few, 16).cluster_size <= 4);
}

void test_before_9_0_score_vectors_come_in_passes() {
  const InterBlockTile tile = choose_inter_block_team(forward_of(8, 16, 4096), kA100, 1);
  CHECK(tile.cluster_size == 1);
  CHECK(fits(tile, kA100));
  CHECK(tile.num_passes > 1);
  CHECK(!fits(choose_inter_block_team(backward_of(8, 24, 7168), kA100, 1), kA100));
}

void test_most_queries_fit_and_no_more() {
  for (const DeviceLimits& limits : {kH100, kA100}) {
    for (int n : {1, 9, 256}) {
      for (int num_matrices : {1, 3}) {
        const int64_t most = most_inter_block_queries(7168, n, 4, num_matrices, limits);
        CHECK(most > 0);
        for (int64_t s : {most / 2, most - 1, most, most + 1, 2 * most}) {
          CHECK(inter_block_queries_fit(s, 7168, n, 4, num_matrices, limits) == (s <= most));
        }
      }
    }
  }
}

// Products of sizes that pass 2^31 do not come back as small ones.
void test_no_size_overflows() {
  for (const DeviceLimits& limits : {kH100, kA100}) {
    for (int n : {1, 16, 256}) {
      for (int64_t s : {1, 16, 64, 1024}) {
        for (int64_t hidden = 64; hidden <= int64_t{1} << 28; hidden *= 2) {
          for (InterBlockShape shape : {forward_of(n, s, hidden), backward_of(n, s, hidden)}) {
            for (bool in_place : {false, true}) {
              if (in_place) {
                shape.uses_slots = false;
                shape.vector_parts = 0;
                shape.row_value_bytes = shape.vector_value_bytes = shape.compute_bytes = 8;
              }
              const InterBlockTile tile =
                  choose_inter_block_team(shape, limits, kMostCtasInLargeCluster);
              if (!fits(tile, limits)) continue;
              const int64_t slice = hidden / tile.cluster_size;
              const int64_t rows =
                  in_place ? 0 : tile.num_slots * tile.tokens * shape.rows_of_token;
              const int64_t vectors = std::max(1, shape.vector_parts) * s;
              CHECK(tile.num_slots > 0 && tile.num_passes > 0 && tile.team_bytes >= 0);
              CHECK(static_cast<int64_t>(tile.pass_columns) * tile.num_passes >= slice);
              CHECK(rows * slice * shape.row_value_bytes +
                        vectors * tile.pass_columns * shape.vector_value_bytes <=
                    limits.shared_bytes_per_cta);
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_one_cta_where_that_is_enough();
  test_clusters_hold_what_one_cta_cannot();
  test_without_large_clusters_less_stays_on_chip();
  test_where_the_plan_sees_room_there_is(kH100, 90, kMostCtasInLargeCluster);
  test_where_the_plan_sees_room_there_is(kA100, 80, 1);
  test_where_the_plan_sees_room_there_is(kRtx3090, 86, 1);
  test_where_the_plan_sees_room_there_is(kRtx5090, 120, kMostCtasInCluster);
  test_slices_cover_all_panels();
  test_no_more_ctas_than_panels_and_multiprocessors();
  test_before_9_0_score_vectors_come_in_passes();
  test_most_queries_fit_and_no_more();
  test_no_size_overflows();
  return attnres::testing::finish();
}
