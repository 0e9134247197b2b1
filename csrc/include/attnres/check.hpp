// Errors as plain sentences: torch's own check puts the function, file and line of the check in
// front of its message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace attnres {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace attnres

// A macro, so that the parts of a message are made only when it is needed.
#define ATTNRES_CHECK(condition, ...)               \
  do {                                              \
    if (!(condition)) ::attnres::fail(__VA_ARGS__); \
  } while (false)
