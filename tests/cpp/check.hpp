// The least that a C++ test needs: conditions that report themselves, and a count of failures.
#pragma once

#include <exception>
#include <iostream>
#include <string>

namespace attnres::testing {

inline int failures = 0;

inline void report(bool passed, const char* file, int line, const std::string& what) {
  if (passed) return;
  ++failures;
  std::cerr << file << ":" << line << ": failed: " << what << "\n";
}

// Runs `statement`; whether it threw an `Exception` whose message contains `part`.
template <typename Exception, typename F>
bool throws_with(F&& statement, const std::string& part) {
  try {
    statement();
  } catch (const Exception& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return true;
    std::cerr << "message was: " << error.what() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "another exception: " << error.what() << "\n";
  }
  return false;
}

inline int finish() {
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}

}  // namespace attnres::testing

#define CHECK(condition) \
  ::attnres::testing::report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_THROWS(statement, exception, part)                                                \
  ::attnres::testing::report(                                                                   \
      ::attnres::testing::throws_with<exception>([&] { (void)(statement); }, (part)), __FILE__, \
      __LINE__, #statement " throws " #exception " with " #part)
