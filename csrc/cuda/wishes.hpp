// What ATTNRES_CUDA_CONFIG asks of the kernels that can be configured: "name=value", one after the
// other with commas between. Each operator's config.hpp knows its names. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <string_view>

#include "attnres/check.hpp"

namespace attnres::cuda {

// Read at every call, so that one process can try them all.
inline std::string_view text_of_wishes() {
  const char* const text = std::getenv("ATTNRES_CUDA_CONFIG");
  return text == nullptr ? std::string_view{} : std::string_view{text};
}

// Takes `prefix` off, where it is there.
inline bool take_prefix(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// Names of phase 1 begin with this one, behind "backward_" if they are for that.
constexpr std::string_view kInterBlockPrefix = "inter_block_";

// A wish, and whether it is for the backward, whose names begin with "backward_".
struct Wish {
  std::string_view name;
  std::string_view value;
  bool is_backward;

  // "rows" for the general body, or "tile".
  bool asks_for_rows(std::string_view operator_name) const {
    ATTNRES_CHECK(value == "rows" || value == "tile", "ATTNRES_CUDA_CONFIG: ", operator_name,
                  " is \"", value, "\", expected \"rows\" or \"tile\"");
    return value == "rows";
  }
  // A number greater than zero; `is_known` says whether it is one of those that there are.
  template <typename IsKnown>
  int number(std::string_view expected, IsKnown&& is_known) const {
    int number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    const bool is_number = error == std::errc{} && end == value.data() + value.size();
    ATTNRES_CHECK(is_number && number > 0 && is_known(number), "ATTNRES_CUDA_CONFIG: ", name,
                  " is \"", value, "\", expected ", expected);
    return number;
  }
};

// f(wish) for each.
template <typename F>
void for_wishes(std::string_view text, F&& f) {
  while (!text.empty()) {
    const std::string_view entry = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), entry.size() + 1));
    const size_t sign = entry.find('=');
    Wish wish = {entry.substr(0, sign), {}, false};
    if (sign != std::string_view::npos) wish.value = entry.substr(sign + 1);
    wish.is_backward = take_prefix(wish.name, "backward_");
    f(wish);
  }
}

}  // namespace attnres::cuda
