#include <sys/wait.h>
#include <unistd.h>

#include "attnres/params.hpp"
#include "check.hpp"

using namespace attnres;

// Whether f() ends the program; in another process, and without a core file.
template <typename F>
bool ends_the_program(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status);
}

int main() {
  // What nobody has filled in has no dtype.
  CHECK(Rows{}.dtype == DType::kNone && ConstVector{}.dtype == DType::kNone);
  CHECK(DepthAttentionForward{}.compute == DType::kNone);
  CHECK(ends_the_program([] { return size_of(Rows{}.dtype); }));
  CHECK(ends_the_program([] { return is_double(DepthAttentionForward{}.compute); }));
  CHECK(ends_the_program([] { return is_double(DType::kBFloat16); }));
  CHECK(!ends_the_program([] { return size_of(DType::kBFloat16); }));

  float values[2] = {};
  const auto rows = [&](DType dtype) { return ConstRows{values, 1, 0, 0, dtype}; };
  SharedDType shared;
  CHECK(shared.get() == DType::kNone);
  shared.add(ConstRows{});
  shared.add(ConstRows{nullptr, 1, 0, 0, DType::kFloat32});
  CHECK(shared.get() == DType::kNone);
  shared.add(rows(DType::kBFloat16));
  shared.add(ConstRows{});
  shared.add(rows(DType::kBFloat16));
  CHECK(shared.get() == DType::kBFloat16);
  const ConstRows others[] = {rows(DType::kFloat16), rows(DType::kBFloat16)};
  shared.add(others, 2);
  CHECK(shared.get() == DType::kNone);
  // Nor may the next one take over.
  shared.add(rows(DType::kFloat32));
  CHECK(shared.get() == DType::kNone);
  return attnres::testing::finish();
}
