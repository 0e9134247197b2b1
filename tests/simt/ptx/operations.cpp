// What each instruction of PTX does. Between threads the executor does it.
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/mma.cuh"
#include "executor.hpp"
#include "ptx/program.hpp"

namespace simt::ptx {

struct Thread {
  std::vector<uint64_t> registers;
  uint32_t next = 0;
  bool done = false;
  const std::byte* parameters;
  size_t parameter_bytes;
  const std::vector<Extent>& allocations;
};

namespace {

// Addresses of shared memory are small numbers, as on a device; above them the rank of another CTA.
constexpr uint32_t kSharedBase = 1024;
constexpr int kRankShift = 24;

template <typename T>
T get(const Thread& thread, const Instruction& instruction, size_t i) {
  static_assert(sizeof(T) <= 8);
  const uint64_t bits = thread.registers[instruction.operands[i].slot];
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// Into a register of any width: what is narrower is extended.
template <typename T>
void set(Thread& thread, const Instruction& instruction, size_t i, T value) {
  uint64_t bits = 0;
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    bits = static_cast<uint64_t>(static_cast<int64_t>(value));
  } else {
    std::memcpy(&bits, &value, sizeof(T));
  }
  thread.registers[instruction.operands[i].slot] = bits;
}

// Calls f(T{}) for the type with this name.
template <typename F>
Operation with_type(std::string_view type, F f) {
  if (type == "pred") return f(bool{});
  if (type == "u8" || type == "b8") return f(uint8_t{});
  if (type == "s8") return f(int8_t{});
  if (type == "u16" || type == "b16") return f(uint16_t{});
  if (type == "s16") return f(int16_t{});
  if (type == "u32" || type == "b32") return f(uint32_t{});
  if (type == "s32") return f(int32_t{});
  if (type == "u64" || type == "b64") return f(uint64_t{});
  if (type == "s64") return f(int64_t{});
  if (type == "f32") return f(float{});
  if (type == "f64") return f(double{});
  fail("PTX: an unknown type:", type);
}

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

// Memory.
enum class Space { kGlobal, kShared, kGeneric, kParameters };

std::byte* shared_place(uint64_t address, size_t bytes, const Instruction& i) {
  const auto small = static_cast<uint32_t>(address);
  if (small < kSharedBase || small - kSharedBase + bytes > static_cast<size_t>(shared_bytes())) {
    fail("shared memory is missed by", i.text);
  }
  return shared_memory() + (small - kSharedBase);
}
uint64_t address_in(const Thread& t, const Instruction& i, size_t operand) {
  return get<uint64_t>(t, i, operand) + static_cast<uint64_t>(i.operands[operand].offset);
}

std::byte* shared_place(const Thread& t, const Instruction& i, size_t operand, size_t bytes) {
  return shared_place(address_in(t, i, operand), bytes, i);
}

std::byte* global_place(const Thread& t, const Instruction& i, uint64_t address, size_t bytes) {
  require_waited();
  auto* const at = reinterpret_cast<std::byte*>(address);
  for (const Extent& extent : t.allocations) {
    if (at >= extent.begin && at + bytes <= extent.end) return at;
  }
  fail("every allocation is missed by", i.text);
}

template <Space kSpace>
std::byte* place(const Thread& t, const Instruction& i, size_t operand, size_t bytes) {
  if constexpr (kSpace == Space::kShared) return shared_place(t, i, operand, bytes);
  const uint64_t address = address_in(t, i, operand);
  auto* const at = reinterpret_cast<std::byte*>(address);
  const auto is_within = [&](const std::byte* begin, size_t size) {
    return at >= begin && at + bytes <= begin + size;
  };
  if constexpr (kSpace == Space::kParameters) {
    if (!is_within(t.parameters, t.parameter_bytes)) fail("parameters are missed by", i.text);
    return at;
  }
  if (kSpace == Space::kGeneric &&
      is_within(shared_memory(), static_cast<size_t>(shared_bytes()))) {
    return at;
  }
  return global_place(t, i, address, bytes);
}

// The element that the operation counts with, and how many of them.
template <Space kSpace, typename T>
struct Access {
  static std::byte* at(const Thread& t, const Instruction& i, size_t operand) {
    const size_t bytes = sizeof(T) * i.count;
    std::byte* const where = place<kSpace>(t, i, operand, bytes);
    if constexpr (kSpace == Space::kParameters) return where;
    if (reinterpret_cast<uintptr_t>(where) % bytes != 0) fail("memory is not aligned for", i.text);
    return where;
  }
  static void load(Thread& t, const Instruction& i) {
    const std::byte* const from = at(t, i, i.count);
    for (uint32_t j = 0; j < i.count; ++j) {
      T value;
      std::memcpy(&value, from + j * sizeof(T), sizeof(T));
      set(t, i, j, value);
    }
  }
  static void store(Thread& t, const Instruction& i) {
    std::byte* const to = at(t, i, 0);
    for (uint32_t j = 0; j < i.count; ++j) {
      const T value = get<T>(t, i, 1 + j);
      std::memcpy(to + j * sizeof(T), &value, sizeof(T));
    }
  }
};

// Between threads.
void meet_cta(Thread& t, const Instruction& i) {
  sync_threads(static_cast<int>(get<uint32_t>(t, i, 0)),
               i.operands.size() > 1 ? static_cast<int>(get<uint32_t>(t, i, 1)) : 0);
}
void meet_warp(Thread& t, const Instruction& i) {
  if (get<uint32_t>(t, i, 0) != ~0u) fail("only whole warps meet:", i.text);
  sync_warp();
}
void shuffle_xor(Thread& t, const Instruction& i) {
  const size_t first = i.operands.size() - 4;  // after the value, perhaps a predicate too
  if (get<uint32_t>(t, i, first + 2) != 31 || get<uint32_t>(t, i, first + 3) != ~0u) {
    fail("only whole warps shuffle:", i.text);
  }
  const uint64_t mine = get<uint32_t>(t, i, first);
  const int mask = static_cast<int>(get<uint32_t>(t, i, first + 1));
  set(t, i, 0, static_cast<uint32_t>(exchange(mine, mask)));
  if (first == 2) set(t, i, 1, true);
}
template <typename T>
void multiply_matrices(Thread& t, const Instruction& i) {
  float sums[4];
  uint32_t a[4], b[2];
  for (size_t j = 0; j < 4; ++j) sums[j] = get<float>(t, i, 10 + j);
  for (size_t j = 0; j < 4; ++j) a[j] = get<uint32_t>(t, i, 4 + j);
  for (size_t j = 0; j < 2; ++j) b[j] = get<uint32_t>(t, i, 8 + j);
  attnres::cuda::multiply_add_16x8x16(T{}, sums, a, b);
  for (size_t j = 0; j < 4; ++j) set(t, i, j, sums[j]);
}

void* barrier_at(const Thread& t, const Instruction& i, size_t operand) {
  return shared_place(t, i, operand, sizeof(uint64_t));
}
const void* global_at(const Thread& t, const Instruction& i, size_t operand, size_t bytes) {
  return global_place(t, i, address_in(t, i, operand), bytes);
}

// Where an address of another CTA's memory would be in this one's.
std::byte* remote_place(const Thread& t, const Instruction& i, size_t operand, size_t bytes,
                        int rank) {
  const auto address = static_cast<uint32_t>(address_in(t, i, operand));
  if (static_cast<int>(address >> kRankShift) != rank) fail("two CTAs are meant by", i.text);
  return shared_place(address & ((1u << kRankShift) - 1), bytes, i);
}
template <typename T>
void store_to_cta(Thread& t, const Instruction& i) {
  const int rank = static_cast<int>(get<uint32_t>(t, i, 0) >> kRankShift);
  if (rank == 0) fail("an address of no other CTA is given to", i.text);
  const T value = get<T>(t, i, 1);
  store_remote(remote_place(t, i, 0, sizeof(T), rank), &value, sizeof(T), rank - 1,
               remote_place(t, i, 2, sizeof(uint64_t), rank));
}

struct Named {
  const char* name;
  Operation operation;
};

const Named kNamed[] = {
    {"ret", [](Thread& t, const Instruction&) { t.done = true; }},
    {"bra", [](Thread& t, const Instruction& i) { t.next = i.target; }},
    {"bra.uni", [](Thread& t, const Instruction& i) { t.next = i.target; }},
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
    {"cvta.shared.u64",
     [](Thread& t, const Instruction& i) {
       set(t, i, 0, reinterpret_cast<uint64_t>(shared_place(t, i, 1, 0)));
     }},
    {"bar.sync", meet_cta},
    {"bar.warp.sync", meet_warp},
    {"shfl.sync.bfly.b32", shuffle_xor},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply_matrices<__nv_bfloat16>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply_matrices<__half>},
    {"cp.async.cg.shared.global",
     [](Thread& t, const Instruction& i) {
       if (get<uint32_t>(t, i, 2) != 16) fail("other than 16 bytes are copied by", i.text);
       copy_async(shared_place(t, i, 0, 16), global_at(t, i, 1, 16));
     }},
    {"cp.async.commit_group", [](Thread&, const Instruction&) { commit_copies(); }},
    {"cp.async.wait_group",
     [](Thread& t, const Instruction& i) {
       wait_for_copies(static_cast<int>(get<uint32_t>(t, i, 0)));
     }},
    {"griddepcontrol.wait", [](Thread&, const Instruction&) { wait_for_previous_kernel(); }},
    {"griddepcontrol.launch_dependents", [](Thread&, const Instruction&) { require_waited(); }},
    {"barrier.cluster.arrive.relaxed", [](Thread&, const Instruction&) { arrive_at_cluster(); }},
    {"barrier.cluster.wait.acquire", [](Thread&, const Instruction&) { wait_for_cluster(); }},
    {"mapa.shared::cluster.u32",
     [](Thread& t, const Instruction& i) {
       const auto rank = get<uint32_t>(t, i, 2);
       if (rank >= static_cast<uint32_t>(cluster_size())) fail("no CTA has the rank in", i.text);
       set(t, i, 0, get<uint32_t>(t, i, 1) | (rank + 1) << kRankShift);
     }},
    {"st.async.shared::cluster.mbarrier::complete_tx::bytes.b32", store_to_cta<uint32_t>},
    {"st.async.shared::cluster.mbarrier::complete_tx::bytes.b64", store_to_cta<uint64_t>},
    {"fence.mbarrier_init.release.cluster", [](Thread&, const Instruction&) {}},
    {"mbarrier.init.shared::cta.b64",
     [](Thread& t, const Instruction& i) {
       init_barrier(barrier_at(t, i, 0), get<uint32_t>(t, i, 1));
     }},
    {"mbarrier.arrive.shared::cta.b64",
     [](Thread& t, const Instruction& i) { arrive(barrier_at(t, i, 1), 0); }},
    {"mbarrier.arrive.expect_tx.shared::cta.b64",
     [](Thread& t, const Instruction& i) { arrive(barrier_at(t, i, 1), get<uint32_t>(t, i, 2)); }},
    // They may return false before the phase is complete; these never do.
    {"mbarrier.try_wait.parity.shared::cta.b64",
     [](Thread& t, const Instruction& i) {
       wait(barrier_at(t, i, 1), get<uint32_t>(t, i, 2));
       set(t, i, 0, true);
     }},
    {"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64",
     [](Thread& t, const Instruction& i) {
       wait(barrier_at(t, i, 1), get<uint32_t>(t, i, 2));
       set(t, i, 0, true);
     }},
    {"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
     [](Thread& t, const Instruction& i) {
       const auto size = get<uint32_t>(t, i, 2);
       copy_bulk(shared_place(t, i, 0, size), global_at(t, i, 1, size), size, barrier_at(t, i, 3));
     }},
};

Operation memory_operation(std::string_view name) {
  const bool loads = name.substr(0, 3) == "ld.";
  std::string_view rest = name.substr(3);
  Space space = Space::kGeneric;
  const auto take = [&](std::string_view prefix) {
    const bool has = rest.substr(0, prefix.size()) == prefix;
    if (has) rest.remove_prefix(prefix.size());
    return has;
  };
  if (take("global.")) space = Space::kGlobal;
  if (take("shared.")) space = Space::kShared;
  if (take("param.")) space = Space::kParameters;
  // How many stand in the braces says the same.
  if (!take("v2.")) take("v4.");
  return with_type(rest, [&](auto x) -> Operation {
    using T = decltype(x);
    const auto of = [&]<Space kSpace>() -> Operation {
      return loads ? Access<kSpace, T>::load : Access<kSpace, T>::store;
    };
    if (space == Space::kGlobal) return of.template operator()<Space::kGlobal>();
    if (space == Space::kShared) return of.template operator()<Space::kShared>();
    if (space == Space::kParameters) return of.template operator()<Space::kParameters>();
    return of.template operator()<Space::kGeneric>();
  });
}

Operation typed_operation(std::string_view name) {
  const size_t first = name.find('.'), last = name.rfind('.');
  if (first == name.npos) fail("PTX: an unknown instruction:", name);
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
  if (!is_plain) fail("PTX: an unknown instruction:", name);
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
    fail("PTX: an unknown instruction:", name);
  });
}

}  // namespace

Operation operation_of(std::string_view name) {
  for (const Named& named : kNamed) {
    if (name == named.name) return named.operation;
  }
  if (name.substr(0, 3) == "ld." || name.substr(0, 3) == "st.") return memory_operation(name);
  return typed_operation(name);
}

void run_thread(const Program& program, const void* parameters,
                const std::vector<Extent>& allocations) {
  Thread thread = {
      program.registers,       0,          false, static_cast<const std::byte*>(parameters),
      program.parameter_bytes, allocations};
  const auto fill = [&](Special special, auto value) {
    thread.registers[static_cast<size_t>(special)] = static_cast<uint64_t>(value);
  };
  fill(Special::kThread, thread_rank());
  fill(Special::kCta, cta_rank());
  fill(Special::kNumCtas, num_ctas());
  fill(Special::kRankInCluster, rank_in_cluster());
  fill(Special::kClusterSize, cluster_size());
  fill(Special::kCluster, cta_rank() / cluster_size());
  fill(Special::kNumClusters, num_ctas() / cluster_size());
  fill(Special::kParameters, reinterpret_cast<uintptr_t>(parameters));
  fill(Special::kShared, kSharedBase);
  while (!thread.done) {
    const Instruction& instruction = program.instructions[thread.next++];
    if (instruction.guard >= 0) {
      const bool holds = (thread.registers[static_cast<size_t>(instruction.guard)] & 1) != 0;
      if (holds == instruction.guard_is_negated) continue;
    }
    instruction.operation(thread, instruction);
  }
}

}  // namespace simt::ptx
