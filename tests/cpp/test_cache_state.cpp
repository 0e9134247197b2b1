#include "attnres/cache_state.hpp"
#include "check.hpp"

using attnres::CacheState;

namespace {

void test_a_forward() {
  CacheState state(3);
  CHECK(state.capacity() == 3 && state.num_sources() == 0 && state.open_slot() == 0);
  CHECK(!state.begin_write());  // the embedding: nothing to add to
  state.close();
  CHECK(state.sealed() == 1 && state.open_slot() == 1 && state.num_sources() == 1);
  CHECK(!state.begin_write());
  CHECK(state.open_holds_partial() && state.num_sources() == 2);
  CHECK(state.begin_write());  // the block's second sublayer adds
  CHECK(state.open_slot() == 1);
  state.close();
  CHECK(!state.begin_write());
  state.close();
  CHECK(state.full() && state.num_sources() == 3);
}

void test_reset() {
  CacheState state(1);
  state.begin_write();
  state.close();
  state.reset();
  CHECK(state.sealed() == 0 && !state.open_holds_partial() && !state.full());
  CHECK(!state.begin_write());
}

void test_errors() {
  CHECK_THROWS(CacheState(0), std::invalid_argument, "capacity is 0, expected at least 1");
  CacheState state(1);
  CHECK_THROWS(state.close(), std::runtime_error, "slot 0 holds nothing and cannot be closed");
  state.begin_write();
  state.close();
  for (int i = 0; i < 2; ++i) {  // an error changes nothing
    CHECK_THROWS(state.begin_write(), std::runtime_error, "all 1 slots are closed");
    CHECK_THROWS(state.close(), std::runtime_error, "all 1 slots are closed");
    CHECK_THROWS(state.open_slot(), std::runtime_error, "all 1 slots are closed");
    CHECK(state.sealed() == 1 && state.num_sources() == 1);
  }
}

}  // namespace

int main() {
  test_a_forward();
  test_reset();
  test_errors();
  return attnres::testing::finish();
}
