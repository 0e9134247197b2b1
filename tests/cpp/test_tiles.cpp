// What the CUDA kernels' plan says of an H100, and of a device with little shared memory.
#include "check.hpp"
#include "depth_attention/rows_tile.hpp"

using namespace attnres::cuda;

namespace {

constexpr DeviceLimits kH100 = {132, 228 << 10, 227 << 10};
constexpr DeviceLimits kRtx3090 = {82, 100 << 10, 99 << 10};

// The forward over bf16 rows.
DepthAttentionShape forward_of(int num_sources, int64_t hidden) {
  const bool few = hidden <= 16 * kMaxComputeThreads;
  return {.row_chunks = hidden / 8,
          .chunk_bytes = 16,
          .chunks_per_thread = few ? 2 : 4,
          .segments_per_warp = few ? 1 : 2,
          .registers = depth_attention_registers((few ? 16 : 32) * 4, 0),
          .num_sources = num_sources,
          .num_steps = num_sources,
          .compute_bytes = 4,
          .values_per_segment = 1,
          .values_per_source = 1,
          .values_per_chunk = 0,
          .uses_slots = true};
}

DepthAttentionShape shared_of(int num_sources, int64_t hidden) {
  DepthAttentionShape shape = forward_of(num_sources, hidden);
  shape.chunks_per_thread = 2;
  shape.segments_per_warp = 1;
  return shape;
}

int few_of(int64_t tokens, int num_sources, int64_t hidden) {
  const DepthAttentionShape shape = shared_of(num_sources, hidden);
  const int segments = choose_depth_attention_tile(shape, kH100, true, 1).num_segments;
  return few_token_cluster_size(tokens, segments, num_sources * hidden * 2, kH100);
}

int large_of(int num_sources, int64_t hidden) {
  return large_row_cluster_size(shared_of(num_sources, hidden),
                                choose_depth_attention_tile(forward_of(num_sources, hidden), kH100),
                                kH100);
}

void test_few_tokens_get_all_multiprocessors() {
  CHECK(few_of(1, 9, 7168) == 8);
  CHECK(few_of(16, 9, 7168) == 8);
  CHECK(few_of(17, 9, 7168) == 4);
  CHECK(few_of(33, 9, 7168) == 4);
  CHECK(few_of(34, 9, 7168) == 2);
  CHECK(few_of(128, 9, 7168) == 1);
  // 28 KB are sooner read than shared; 2304 columns are five segments.
  CHECK(few_of(1, 2, 7168) == 1);
  CHECK(few_of(1, 9, 2304) == 4);
}

void test_rows_that_do_not_fit_are_shared() {
  CHECK(large_of(9, 7168) == 0);
  CHECK(large_of(17, 7168) == 2);
  CHECK(large_of(54, 2304) == 4);
  CHECK(large_of(54, 7168) == 8);
  // Not even eight CTAs hold 3.7 MB: they read it again, from the second-level cache if they can.
  CHECK(large_of(256, 7168) == 8);
  // One segment: nothing to share.
  CHECK(large_of(256, 512) == 0);
  // Two spans in one CTA, one in a cluster; more than fits any.
  CHECK(large_of(2, 16384) > 1);
  CHECK(large_of(2, 65536) == 0);
}

void test_tiles_fit_the_device() {
  for (const int n : {1, 2, 9, 17, 54, 128, 256}) {
    for (const int64_t hidden : {8, 64, 512, 2304, 4096, 7168, 8192, 16384, 61440}) {
      for (const int size : {1, 2, 4, 8}) {
        const DepthAttentionShape shape = shared_of(n, hidden);
        // Fewer segments than CTAs; more sums than shared memory holds.
        if (size > (hidden + 511) / 512 || n * hidden > 256 * 16384) continue;
        const DepthAttentionTile tile = choose_depth_attention_tile(shape, kH100, true, size);
        if (tile.num_spans > 1) continue;
        CHECK(tile.shared_bytes <= kH100.shared_bytes_per_cta);
        CHECK(tile.num_threads <= kMaxComputeThreads);
        CHECK(tile.least_segments * size + tile.num_larger_slices == tile.num_segments);
        CHECK(tile.least_segments >= 1);
        CHECK(tile.num_threads == 32 * (tile.least_segments + (tile.num_larger_slices > 0)));
      }
    }
  }
}

// As many sources as there may be, of float32, forward and backward: what all else falls back on.
void test_sixteen_values_a_thread_fit_every_device() {
  for (const int64_t hidden : {8, 2304, 7680, 16384, 1 << 20}) {
    DepthAttentionShape shape = shared_of(256, hidden);
    shape.chunk_bytes = 32;
    for (const bool backward : {false, true}) {
      shape.values_per_segment = backward ? 2 : 1;
      shape.values_per_source = backward ? 3 : 1;
      shape.num_steps = backward ? 256 : 257;
      const DepthAttentionTile tile = choose_depth_attention_tile(shape, kRtx3090);
      CHECK(tile.shared_bytes <= kRtx3090.shared_bytes_per_cta);
      CHECK(tile.num_slots >= kLeastSlots);
    }
  }
}

}  // namespace

int main() {
  test_few_tokens_get_all_multiprocessors();
  test_rows_that_do_not_fit_are_shared();
  test_tiles_fit_the_device();
  test_sixteen_values_a_thread_fit_every_device();
  return attnres::testing::finish();
}
