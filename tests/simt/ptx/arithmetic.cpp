// Instructions that compute with a thread's own registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>

#include "ptx/thread.hpp"

namespace simt::ptx {
namespace {

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

// Integers wrap.
template <typename T, typename F>
T wrapping(T a, T b, F f) {
  if constexpr (std::is_floating_point_v<T> || std::is_same_v<T, bool>) {
    return f(a, b);
  } else {
    return static_cast<T>(f(static_cast<uint64_t>(a), static_cast<uint64_t>(b)));
  }
}

struct Add {
  template <typename T>
  static T of(T a, T b) {
    return wrapping(a, b, [](auto x, auto y) { return x + y; });
  }
};
struct Subtract {
  template <typename T>
  static T of(T a, T b) {
    return wrapping(a, b, [](auto x, auto y) { return x - y; });
  }
};
struct Multiply {
  template <typename T>
  static T of(T a, T b) {
    return wrapping(a, b, [](auto x, auto y) { return x * y; });
  }
};
struct Divide {
  template <typename T>
  static T of(T a, T b) {
    if (b == 0) fail("PTX: an integer is divided by zero");
    return a / b;
  }
};
struct Remainder {
  template <typename T>
  static T of(T a, T b) {
    if (b == 0) fail("PTX: an integer is divided by zero");
    return a % b;
  }
};
struct Minimum {
  template <typename T>
  static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
    return b < a ? b : a;
  }
};
struct Maximum {
  template <typename T>
  static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
    return a < b ? b : a;
  }
};
struct And {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

template <typename T, typename F>
void binary(Thread& t, const Instruction& i) {
  set(t, i, 0, F::of(get<T>(t, i, 1), get<T>(t, i, 2)));
}
template <typename F, typename Allowed>
Operation binary_of(std::string_view type, Allowed allowed) {
  return with_type(type, [&](auto x) -> Operation {
    using T = decltype(x);
    if constexpr (allowed(T{})) return binary<T, F>;
    fail("PTX: no such operation on", type);
  });
}
constexpr auto numbers = [](auto x) { return !std::is_same_v<decltype(x), bool>; };
constexpr auto integers = [](auto x) {
  return std::is_integral_v<decltype(x)> && !std::is_same_v<decltype(x), bool>;
};
constexpr auto bits = [](auto x) { return std::is_integral_v<decltype(x)>; };

// Shifts by the width and more leave nothing, or the sign.
template <typename T>
void shift_left(Thread& t, const Instruction& i) {
  const auto by = get<uint32_t>(t, i, 2);
  const auto x = get<Unsigned<T>>(t, i, 1);
  set(t, i, 0, static_cast<T>(by >= 8 * sizeof(T) ? 0 : x << by));
}
template <typename T>
void shift_right(Thread& t, const Instruction& i) {
  const uint32_t most = 8 * sizeof(T) - 1;
  const auto by = get<uint32_t>(t, i, 2);
  const auto x = get<T>(t, i, 1);
  if (by <= most) return set(t, i, 0, static_cast<T>(x >> by));
  set(t, i, 0, static_cast<T>(std::is_signed_v<T> ? x >> most : 0));
}

template <typename T>
void multiply_add_low(Thread& t, const Instruction& i) {
  set(t, i, 0, Add::of(Multiply::of(get<T>(t, i, 1), get<T>(t, i, 2)), get<T>(t, i, 3)));
}
template <typename T, typename Wide>
void multiply_wide(Thread& t, const Instruction& i) {
  set(t, i, 0, static_cast<Wide>(static_cast<Wide>(get<T>(t, i, 1)) * get<T>(t, i, 2)));
}
template <typename T>
void fused_multiply_add(Thread& t, const Instruction& i) {
  set(t, i, 0, std::fma(get<T>(t, i, 1), get<T>(t, i, 2), get<T>(t, i, 3)));
}
void fused_multiply_add_down(Thread& t, const Instruction& i) {
  volatile float a = get<float>(t, i, 1), b = get<float>(t, i, 2), c = get<float>(t, i, 3);
  std::fesetround(FE_DOWNWARD);
  volatile float result = std::fma(a, b, c);
  std::fesetround(FE_TONEAREST);
  set(t, i, 0, static_cast<float>(result));
}

// f of one number, in T.
template <typename T, auto kFunction>
void unary(Thread& t, const Instruction& i) {
  set(t, i, 0, kFunction(get<T>(t, i, 1)));
}
template <typename T>
T negated(T x) {
  return static_cast<T>(-x);
}
template <typename T>
T inverted(T x) {
  if constexpr (std::is_same_v<T, bool>) {
    return !x;
  } else {
    return static_cast<T>(~x);
  }
}
template <typename T>
T inverse(T x) {
  return 1 / x;
}
// Approximations are a unit in the last place off, up or down, as they may be.
template <typename T>
T about(T exact, T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(x));
  const T bound = std::numeric_limits<T>::infinity();
  return std::isfinite(exact) ? std::nextafter(exact, bits % 2 == 0 ? bound : -bound) : exact;
}
template <typename T>
T inverse_square_root(T x) {
  return about(1 / std::sqrt(x), x);
}
// The first approximation that a division starts from: its lower half is missing.
double roughly_inverse(double x) {
  uint64_t result;
  const double exact = 1 / x;
  std::memcpy(&result, &exact, sizeof(result));
  result &= ~uint64_t{0xffffffff};
  double rough;
  std::memcpy(&rough, &result, sizeof(rough));
  return rough;
}
float power_of_two(float x) {
  const float y = about(std::exp2(x), x);
  return y < std::numeric_limits<float>::min() ? 0 : y;
}
float saturated(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0; }
float magnitude(float x) { return std::fabs(x); }

template <typename T>
void select(Thread& t, const Instruction& i) {
  set(t, i, 0, get<T>(t, i, get<bool>(t, i, 3) ? 1 : 2));
}

// Comparisons; those with a "u" hold for NaN too.
template <typename T, typename F>
void compare(Thread& t, const Instruction& i) {
  set(t, i, 0, F::of(get<T>(t, i, 1), get<T>(t, i, 2)));
}
#define ATTNRES_COMPARISON(NAME, EXPRESSION) \
  struct NAME {                              \
    template <typename T>                    \
    static bool of(T a, T b) {               \
      return EXPRESSION;                     \
    }                                        \
  };
ATTNRES_COMPARISON(Equal, a == b)
ATTNRES_COMPARISON(NotEqual, a<b || a> b)
ATTNRES_COMPARISON(Less, a < b)
ATTNRES_COMPARISON(LessOrEqual, a <= b)
ATTNRES_COMPARISON(NotLess, !(a < b))
ATTNRES_COMPARISON(NotLessOrEqual, !(a <= b))
ATTNRES_COMPARISON(NotEqualOrNaN, !(a == b))
#undef ATTNRES_COMPARISON

template <typename T, typename F>
void compare_swapped(Thread& t, const Instruction& i) {
  set(t, i, 0, F::of(get<T>(t, i, 2), get<T>(t, i, 1)));
}

Operation comparison(std::string_view how, std::string_view type) {
  return with_type(type, [&](auto x) -> Operation {
    using T = decltype(x);
    if (how == "eq") return compare<T, Equal>;
    if (how == "ne") return compare<T, NotEqual>;
    if (how == "lt") return compare<T, Less>;
    if (how == "le") return compare<T, LessOrEqual>;
    if (how == "gt") return compare_swapped<T, Less>;
    if (how == "ge") return compare_swapped<T, LessOrEqual>;
    if (how == "neu") return compare<T, NotEqualOrNaN>;
    if (how == "geu") return compare<T, NotLess>;
    if (how == "gtu") return compare<T, NotLessOrEqual>;
    if (how == "leu") return compare_swapped<T, NotLess>;
    if (how == "ltu") return compare_swapped<T, NotLessOrEqual>;
    fail("PTX: an unknown comparison:", how);
  });
}

template <typename To, typename From>
void convert(Thread& t, const Instruction& i) {
  set(t, i, 0, static_cast<To>(get<From>(t, i, 1)));
}
Operation conversion(std::string_view to, std::string_view from) {
  return with_type(to, [&](auto x) {
    return with_type(from, [&](auto y) -> Operation {
      using To = decltype(x);
      using From = decltype(y);
      if constexpr (std::is_integral_v<To> && std::is_floating_point_v<From>) {
        fail("PTX: numbers are not made integers by the kernels", to);
      } else {
        return convert<To, From>;
      }
    });
  });
}
// To and from 16 bits, by the functions of the CUDA headers.
float from_half(uint16_t bits) { return __half2float(__half_raw{bits}); }
float from_bfloat16(uint16_t bits) { return __bfloat162float(__nv_bfloat16_raw{bits}); }
uint16_t to_half(float x) { return static_cast<__half_raw>(__float2half_rn(x)).x; }
uint16_t to_bfloat16(float x) { return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x; }
// The first operand becomes the upper half.
template <auto kConvert>
void convert_two(Thread& t, const Instruction& i) {
  const uint32_t upper = kConvert(get<float>(t, i, 1));
  set(t, i, 0, upper << 16 | kConvert(get<float>(t, i, 2)));
}

// mov, also between one register and several that share its bits.
template <typename T>
void move(Thread& t, const Instruction& i) {
  set(t, i, 0, get<T>(t, i, 1));
}
template <typename T>
void pack(Thread& t, const Instruction& i) {
  uint64_t packed = 0;
  for (uint32_t j = i.count; j > 0; --j) {
    const int width = static_cast<int>(8 * sizeof(T) / i.count);
    const uint64_t part = get<uint64_t>(t, i, j) & ((uint64_t{1} << width) - 1);
    packed = packed << width | part;
  }
  set(t, i, 0, static_cast<T>(packed));
}
template <typename T>
void unpack(Thread& t, const Instruction& i) {
  const int width = static_cast<int>(8 * sizeof(T) / i.count);
  const auto packed = static_cast<uint64_t>(get<T>(t, i, i.count));
  for (uint32_t j = 0; j < i.count; ++j) {
    set(t, i, j, packed >> (j * static_cast<uint32_t>(width)) & ((uint64_t{1} << width) - 1));
  }
}
template <typename T>
void move_any(Thread& t, const Instruction& i) {
  if (i.count == 1) return move<T>(t, i);
  if constexpr (std::is_integral_v<T>)
    return i.first_in_braces == 0 ? unpack<T>(t, i) : pack<T>(t, i);
  fail("PTX: only bits are packed:", i.text);
}

void permute_bytes(Thread& t, const Instruction& i) {
  const uint64_t bytes = get<uint32_t>(t, i, 1) | uint64_t{get<uint32_t>(t, i, 2)} << 32;
  const auto selector = get<uint32_t>(t, i, 3);
  uint32_t result = 0;
  for (int j = 0; j < 4; ++j) {
    const uint32_t choice = selector >> (4 * j) & 15;
    auto byte = static_cast<uint8_t>(bytes >> (8 * (choice & 7)));
    if ((choice & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= uint32_t{byte} << (8 * j);
  }
  set(t, i, 0, result);
}
void insert_bits(Thread& t, const Instruction& i) {
  const uint32_t position = get<uint32_t>(t, i, 3) & 255, length = get<uint32_t>(t, i, 4) & 255;
  const uint64_t mask = ((uint64_t{1} << length) - 1) << position;
  const uint64_t from = get<uint32_t>(t, i, 1), to = get<uint32_t>(t, i, 2);
  set(t, i, 0, static_cast<uint32_t>((to & ~mask) | (from << position & mask)));
}

const Named kNamed[] = {
    {"fma.rm.f32", fused_multiply_add_down},
    {"ex2.approx.ftz.f32", unary<float, power_of_two>},
    {"rsqrt.approx.f32", unary<float, inverse_square_root<float>>},
    {"rsqrt.approx.f64", unary<double, inverse_square_root<double>>},
    {"rcp.rn.f32", unary<float, inverse<float>>},
    {"rcp.rn.f64", unary<double, inverse<double>>},
    {"rcp.approx.ftz.f64", unary<double, roughly_inverse>},
    {"abs.f32", unary<float, magnitude>},
    {"cvt.sat.f32.f32", unary<float, saturated>},
    {"cvt.f32.f16", unary<uint16_t, from_half>},
    {"cvt.f32.bf16", unary<uint16_t, from_bfloat16>},
    {"cvt.rn.f16.f32", unary<float, to_half>},
    {"cvt.rn.bf16.f32", unary<float, to_bfloat16>},
    {"cvt.rn.f16x2.f32", convert_two<to_half>},
    {"cvt.rn.bf16x2.f32", convert_two<to_bfloat16>},
    {"prmt.b32", permute_bytes},
    {"bfi.b32", insert_bits},
    {"cvta.to.global.u64", move<uint64_t>},
};

Operation typed_operation(std::string_view name) {
  const size_t first = name.find('.'), last = name.rfind('.');
  if (first == name.npos) return nullptr;
  const std::string_view word = name.substr(0, first), type = name.substr(last + 1);
  const std::string_view between = first == last ? "" : name.substr(first + 1, last - first - 1);
  const bool is_plain = between.empty() || between == "rn" || between == "lo";
  if (word == "setp") return comparison(between, type);
  if (word == "cvt") {
    const size_t dot = between.rfind('.');
    return conversion(dot == between.npos ? between : between.substr(dot + 1), type);
  }
  if (name == "mul.wide.s32") return multiply_wide<int32_t, int64_t>;
  if (name == "mul.wide.u32") return multiply_wide<uint32_t, uint64_t>;
  if (!is_plain) return nullptr;
  if (word == "add") return binary_of<Add>(type, numbers);
  if (word == "sub") return binary_of<Subtract>(type, numbers);
  if (word == "mul") return binary_of<Multiply>(type, numbers);
  if (word == "div") return binary_of<Divide>(type, integers);
  if (word == "rem") return binary_of<Remainder>(type, integers);
  if (word == "min") return binary_of<Minimum>(type, numbers);
  if (word == "max") return binary_of<Maximum>(type, numbers);
  if (word == "and") return binary_of<And>(type, bits);
  if (word == "or") return binary_of<Or>(type, bits);
  if (word == "xor") return binary_of<Xor>(type, bits);
  return with_type(type, [&](auto x) -> Operation {
    using T = decltype(x);
    if (word == "mov") return move_any<T>;
    if (word == "selp") return select<T>;
    if constexpr (numbers(T{})) {
      if (word == "neg") return unary<T, negated<T>>;
    }
    if constexpr (bits(T{})) {
      if (word == "not") return unary<T, inverted<T>>;
    }
    if constexpr (integers(T{})) {
      if (word == "shl") return shift_left<T>;
      if (word == "shr") return shift_right<T>;
      if (word == "mad") return multiply_add_low<T>;
    } else if constexpr (numbers(T{})) {
      if (word == "fma") return fused_multiply_add<T>;
    }
    return nullptr;
  });
}

}  // namespace

Operation arithmetic_of(std::string_view name) {
  const Operation named = find(kNamed, name);
  return named != nullptr ? named : typed_operation(name);
}

}  // namespace simt::ptx
