// Run-time values to compile-time ones, without macros.
#pragma once

#include <type_traits>

#include "attnres/params.hpp"

namespace attnres {

// f(std::integral_constant<int, V>) for the V in Values that equals `value`; false if there is
// none.
template <int... Values, typename F>
bool dispatch_int(int value, F&& f) {
  return ((value == Values && (f(std::integral_constant<int, Values>{}), true)) || ...);
}

template <typename F>
decltype(auto) dispatch_bool(bool value, F&& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

// f(std::integral_constant<DType, V>).
template <typename F>
decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(std::integral_constant<DType, DType::kFloat64>{});
    case DType::kBFloat16:
      return f(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16:
      return f(std::integral_constant<DType, DType::kFloat16>{});
    case DType::kFloat32:
      break;
  }
  return f(std::integral_constant<DType, DType::kFloat32>{});
}

}  // namespace attnres
