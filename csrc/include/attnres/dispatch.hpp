// Run-time values to compile-time ones, without macros.
#pragma once

#include <type_traits>

#include "attnres/params.hpp"

namespace attnres {

// f(std::true_type{}) or f(std::false_type{}).
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
      return f(std::integral_constant<DType, DType::kFloat32>{});
    case DType::kNone:
      break;
  }
  no_such_dtype();
}

}  // namespace attnres
