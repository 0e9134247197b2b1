// What a driver said is remembered by what it depends on.
#include <atomic>
#include <thread>
#include <vector>

#include "check.hpp"
#include "cluster_counts.hpp"

using namespace attnres::cuda;

namespace {

struct Question {
  int device;
  LaunchShape shape;
};

// Neighbouring sizes, as those of a model's sites are.
std::vector<Question> questions(int count) {
  std::vector<Question> all;
  for (int i = 0; i < count; ++i) {
    const LaunchShape shape = {.num_ctas = i % 7,
                               .num_threads = 32 * (1 + i / 2 % 32),
                               .shared_bytes = 1024 * (i % 227) + 16 * (i / 227),
                               .fills_shared_memory = true,
                               .cluster_size = 2 << i % 4};
    all.push_back({i % 3, shape});
  }
  return all;
}

int answer_to(const Question& question) {
  const LaunchShape& shape = question.shape;
  return (question.device * 31 + shape.num_threads + shape.shared_bytes + shape.cluster_size) %
         1000;
}

void test_each_question_is_asked_once() {
  ClusterCounts counts;
  int asked = 0;
  for (int round = 0; round < 3; ++round) {
    for (const Question& question : questions(64)) {
      const int got = counts.get(question.device, question.shape, [&] {
        ++asked;
        return answer_to(question);
      });
      CHECK(got == answer_to(question));
    }
  }
  CHECK(asked == 64);
}

// All that an answer depends on makes it another question, and nothing else does.
void test_what_a_question_is() {
  ClusterCounts counts;
  const LaunchShape shape = {132, 512, 200 << 10, true, 8};
  const auto is_new = [&](int device, const LaunchShape& of) {
    bool asked = false;
    counts.get(device, of, [&] {
      asked = true;
      return 16;
    });
    return asked;
  };
  CHECK(is_new(0, shape));
  CHECK(!is_new(0, shape));
  CHECK(is_new(1, shape));
  for (auto change :
       {+[](LaunchShape& s) { s.num_threads = 480; }, +[](LaunchShape& s) { s.shared_bytes += 16; },
        +[](LaunchShape& s) { s.cluster_size = 16; }}) {
    LaunchShape other = shape;
    change(other);
    CHECK(is_new(0, other));
    CHECK(!is_new(0, other));
  }
  LaunchShape larger = shape;
  larger.num_ctas = 8;
  CHECK(!is_new(0, larger));
}

void test_errors_are_not_remembered() {
  ClusterCounts counts;
  const LaunchShape shape = {132, 512, 200 << 10, true, 16};
  CHECK(counts.get(0, shape, [] { return -1; }) == -1);
  CHECK(counts.get(0, shape, [] { return 0; }) == 0);
  CHECK(counts.get(0, shape, [] { return 5; }) == 0);
}

void test_what_does_not_fit_is_asked_again() {
  ClusterCounts counts;
  const LaunchShape shape = {132, 512, 1 << 20, true, 8};
  CHECK(counts.get(0, shape, [] { return 3; }) == 3);
  CHECK(counts.get(0, shape, [] { return 4; }) == 4);
  const LaunchShape small = {132, 512, 1 << 10, true, 8};
  CHECK(counts.get(0, small, [] { return 1 << 20; }) == 1 << 20);
  CHECK(counts.get(0, small, [] { return 4; }) == 4);
}

// More questions than there is room for, from several threads at the same time.
void test_threads_get_their_own_answers() {
  ClusterCounts counts;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      const std::vector<Question> all = questions(500);
      for (size_t i = 0; i < 20000; ++i) {
        const Question& question = all[(i * (2 * static_cast<size_t>(thread) + 1)) % all.size()];
        wrong += counts.get(question.device, question.shape, [&] { return answer_to(question); }) !=
                 answer_to(question);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

}  // namespace

int main() {
  test_each_question_is_asked_once();
  test_what_a_question_is();
  test_errors_are_not_remembered();
  test_what_does_not_fit_is_asked_again();
  test_threads_get_their_own_answers();
  return attnres::testing::finish();
}
