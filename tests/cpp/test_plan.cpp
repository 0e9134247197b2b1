#include "attnres/plan.hpp"
#include "check.hpp"

using namespace attnres;

namespace {

constexpr Shape shape_of(int64_t n, int64_t s, int64_t m = 100) { return {n, s, m, 64, 2}; }
constexpr int64_t kX = 100 * 64 * 2;

// The arithmetic is there at compile time.
static_assert(tensors_moved::depth_attention(Direction::kForward, 9, false) == 10);
static_assert(tensors_moved::depth_attention(Direction::kBackward, 9, true) == 28);
static_assert(tensors_moved::accumulate_depth_attention(Direction::kForward, 8, false) == 12);
static_assert(single_pass_bytes(shape_of(9, 6), false) == (6 * 13 - 2) * kX);
static_assert(two_phase_bytes(shape_of(9, 6), false) == (9 + 6 * 6 - 2) * kX);
static_assert(two_phase_bytes(shape_of(9, 6), true) == (4 * 9 + 13 * 6 - 2) * kX);

void test_bytes_decide_for_many_tokens() {
  for (int64_t n = 1; n <= 64; ++n) {
    for (int64_t s = 1; s <= 32; ++s) {
      const Plan plan = make_plan(shape_of(n, s, int64_t{1} << 40), DeviceKind::kCuda);
      CHECK(plan.two_phase == (n * (s - 1) > 2 * s));
      CHECK(plan.two_phase == (plan.bytes_two_phase < plan.bytes_single_pass));
      // A backward reads blocks and their gradients: sharing the reads pays earlier.
      const Plan training = make_plan(shape_of(n, s, int64_t{1} << 40), DeviceKind::kCuda, true);
      CHECK(training.two_phase == (4 * n * (s - 1) > 5 * s));
    }
  }
}

void test_arithmetic_bound_devices_take_the_single_pass() {
  const Plan plan = make_plan(shape_of(9, 6, int64_t{1} << 40), DeviceKind::kCpu);
  CHECK(!plan.two_phase && plan.bytes_two_phase < plan.bytes_single_pass);
  CHECK(plan.two_phase_from_tokens == std::numeric_limits<int64_t>::max());
  CHECK(plan.reason.find("arithmetic") != std::string::npos);
}

void test_threshold() {
  for (bool training : {false, true}) {
    const int64_t from =
        make_plan(shape_of(9, 6), DeviceKind::kCuda, training).two_phase_from_tokens;
    CHECK(!make_plan(shape_of(9, 6, from - 1), DeviceKind::kCuda, training).two_phase);
    CHECK(make_plan(shape_of(9, 6, from), DeviceKind::kCuda, training).two_phase);
  }
  CHECK(make_plan(shape_of(9, 6, 0), DeviceKind::kCpu).two_phase == false);
}

void test_no_overflow_at_sizes_people_use() {
  // 8 blocks of a million tokens at D 16384 in fp64: 1.2e12 bytes a site.
  const Shape large = {8, 24, int64_t{1} << 20, 16384, 8};
  CHECK(single_pass_bytes(large, true) > two_phase_bytes(large, true));
  CHECK(two_phase_bytes(large, true) > 0);
}

void test_phase_one_has_room() {
  // Kimi Linear 48B and K3 have, forward and backward.
  for (bool training : {false, true}) {
    CHECK(make_plan({9, 6, 8192, 2304, 2}, DeviceKind::kCuda, training).two_phase);
    CHECK(make_plan({8, 24, 8192, 7168, 2}, DeviceKind::kCuda, training).two_phase);
  }
  const Plan plan = make_plan({64, 64, 8192, 8192, 2}, DeviceKind::kCuda);
  CHECK(!plan.two_phase && !plan.phase_one_resident);
  CHECK(plan.bytes_two_phase < plan.bytes_single_pass);
  CHECK(plan.reason.find("no room for a token") != std::string::npos);
  // Gradients take room too.
  const Shape between = {16, 40, 8192, 7168, 2};
  CHECK(make_plan(between, DeviceKind::kCuda, false).two_phase);
  CHECK(!make_plan(between, DeviceKind::kCuda, true).two_phase);
}

void test_devices_with_less_room() {
  const Device a100 = {DeviceKind::kCuda, 80, 163 << 10};
  const Device rtx3090 = {DeviceKind::kCuda, 86, 99 << 10};
  const Device rtx5090 = {DeviceKind::kCuda, 120, 99 << 10};
  const Shape kimi = {9, 6, 8192, 2304, 2}, k3 = {8, 24, 8192, 7168, 2};
  for (bool training : {false, true}) {
    // One token at a time on the A100, a cluster on the RTX 5090.
    CHECK(make_plan(kimi, a100, training).two_phase);
    CHECK(!make_plan(kimi, rtx3090, training).two_phase);
    CHECK(make_plan(kimi, rtx5090, training).two_phase);
    for (const Device& device : {a100, rtx3090, rtx5090}) {
      const Plan plan = make_plan(k3, device, training);
      CHECK(!plan.two_phase && !plan.phase_one_resident);
      CHECK(make_plan({9, 6, 8192, 768, 2}, device, training).two_phase);
    }
  }
  // Room for one token does not pay where little is to be saved.
  const Plan little = make_plan({9, 2, 8192, 4096, 2}, a100);
  CHECK(!little.two_phase && little.phase_one_resident);
  CHECK(little.bytes_two_phase < little.bytes_single_pass);
  CHECK(little.reason.find("second token") != std::string::npos);
}

void test_tiles() {
  const Plan plan = make_plan({9, 6, 8192, 2304, 2}, DeviceKind::kCuda);
  CHECK(plan.row_resident && plan.tile_tokens == 5);
  const Plan wide = make_plan({255, 6, 8192, 7168, 2}, DeviceKind::kCuda);
  CHECK(!wide.row_resident && wide.tile_tokens == 1);
}

void test_errors() {
  CHECK_THROWS(make_plan(shape_of(0, 1), DeviceKind::kCpu), std::invalid_argument,
               "num_sources is 0, expected at least 1");
  CHECK_THROWS(make_plan(shape_of(1, 1, -1), DeviceKind::kCpu), std::invalid_argument,
               "num_tokens is -1, expected at least 0");
  CHECK_THROWS(bytes_moved("softmax", Direction::kForward, shape_of(1, 1), false),
               std::invalid_argument, "unknown operator 'softmax'");
  CHECK_THROWS(bytes_moved("block_cache_write", Direction::kBackward, shape_of(1, 1), false),
               std::invalid_argument, "has no backward");
}

}  // namespace

int main() {
  test_bytes_decide_for_many_tokens();
  test_arithmetic_bound_devices_take_the_single_pass();
  test_threshold();
  test_phase_one_has_room();
  test_devices_with_less_room();
  test_no_overflow_at_sizes_people_use();
  test_tiles();
  test_errors();
  return testing::finish();
}
