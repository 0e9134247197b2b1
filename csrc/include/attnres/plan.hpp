// The traffic plan: how many bytes each operator must move, and from that whether a block's sites
// read its finished blocks one by one (single pass) or all at once (two phases).
//
// Everything here is pure arithmetic. The unit is X = num_tokens * hidden * itemsize, one full-size
// tensor. Statistics (4 bytes per token, source and site) and weights (D per site) are left out:
// against X they are 1/D and 1/M.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

namespace attnres {

enum class DeviceKind { kCpu, kCuda };

// A device, as far as the plan asks. One of CUDA is an H100 unless it says what it is.
struct Device {
  DeviceKind kind;
  int capability;        // 10 * major + minor
  int64_t shared_bytes;  // of shared memory that a CTA may use, with opt-in

  constexpr Device(DeviceKind of_kind, int of_capability = 90,
                   int64_t with_shared_bytes = 227 << 10)
      : kind(of_kind), capability(of_capability), shared_bytes(with_shared_bytes) {}
};

enum class Direction { kForward, kBackward };

// Shape of a question to the plan. `num_sources` counts the finished blocks (with the embedding),
// without the open partial sum; `num_queries` counts the sites that read them.
struct Shape {
  int64_t num_sources = 1;  // N
  int64_t num_queries = 1;  // S
  int64_t num_tokens = 1;   // M
  int64_t hidden = 1;       // D
  int64_t itemsize = 2;     // bytes per element
};

constexpr int64_t tensor_bytes(const Shape& s) { return s.num_tokens * s.hidden * s.itemsize; }

// Full-size tensors that one call of an operator reads and writes. `accumulate` says that the
// backward adds into source gradients that exist already, so it also reads them.
namespace tensors_moved {

// Forward: read N, write the mix. Backward: read grad_out and N sources, write N gradients.
constexpr int64_t depth_attention(Direction direction, int64_t n, bool accumulate) {
  if (direction == Direction::kForward) return n + 1;
  return 2 * n + 1 + (accumulate ? n : 0);
}

// Forward: read N blocks, partial, delta; write the new partial and the mix.
// Backward: read two incoming gradients, N blocks and the new partial; write N gradients and the
// one that partial and delta share.
constexpr int64_t accumulate_depth_attention(Direction direction, int64_t n, bool accumulate) {
  if (direction == Direction::kForward) return n + 4;
  return 2 * n + 4 + (accumulate ? n : 0);
}

// Forward: read N blocks, write S mixes. Backward: read S gradients and N blocks, write N.
constexpr int64_t inter_block_attention(Direction direction, int64_t n, int64_t s,
                                        bool accumulate) {
  if (direction == Direction::kForward) return n + s;
  return 2 * n + s + (accumulate ? n : 0);
}

// Forward: read out, partial, delta; write the new partial and the mix.
// Backward: read two incoming gradients, out and the new partial; write the gradient of out and the
// one that partial and delta share.
constexpr int64_t merge_partial(Direction direction) {
  return direction == Direction::kForward ? 5 : 6;
}

// A write into an open slot: delta in, slot out, and the slot read once more when it is added to.
constexpr int64_t block_cache_write(bool add) { return add ? 3 : 2; }

}  // namespace tensors_moved

// Bytes one call must move, by the operator's name. For cache operators `accumulate` says that the
// delta is added to an open slot that holds something, and `num_sources` counts the sealed slots.
inline int64_t bytes_moved(std::string_view op, Direction direction, const Shape& shape,
                           bool accumulate) {
  const int64_t n = shape.num_sources;
  const int64_t x = tensor_bytes(shape);
  const bool forward = direction == Direction::kForward;
  if (op == "depth_attention") {
    return tensors_moved::depth_attention(direction, n, accumulate) * x;
  }
  if (op == "accumulate_depth_attention") {
    return tensors_moved::accumulate_depth_attention(direction, n, accumulate) * x;
  }
  if (op == "inter_block_attention") {
    return tensors_moved::inter_block_attention(direction, n, shape.num_queries, accumulate) * x;
  }
  if (op == "merge_partial") return tensors_moved::merge_partial(direction) * x;
  const bool cache_op = op.substr(0, 12) == "block_cache_";
  if (cache_op && !forward) {
    throw std::invalid_argument("bytes_moved: " + std::string(op) +
                                " is an inference operator and has no backward");
  }
  if (op == "block_cache_write") return tensors_moved::block_cache_write(accumulate) * x;
  // Reading the sealed slots and writing the mix comes on top of the write; the open slot's new
  // content is scored and mixed while it is on chip.
  if (op == "block_cache_attend") {
    return (n + 1 + tensors_moved::block_cache_write(accumulate)) * x;
  }
  if (op == "block_cache_inter") return (n + shape.num_queries) * x;
  if (op == "block_cache_merge") {
    return (2 + tensors_moved::block_cache_write(accumulate)) * x;
  }
  throw std::invalid_argument("bytes_moved: unknown operator '" + std::string(op) +
                              "', expected depth_attention, accumulate_depth_attention, "
                              "inter_block_attention, merge_partial or block_cache_{write,attend,"
                              "inter,merge}");
}

// What the plan assumes of a device.
struct DeviceFacts {
  // Whether bytes decide how long an operator takes. Two phases save bytes, never arithmetic.
  bool bandwidth_bound;
  // A kernel launch (with its tail and ramp) costs about as much time as moving this many bytes.
  int64_t launch_bytes;
  // On-chip bytes in which one tile's sources wait between being scored and being mixed.
  int64_t tile_bytes;
  // So many times that much may be shared by those who work on a token in phase 1; 0: sources that
  // do not fit are read again from where they were, and nothing is lost.
  int64_t most_tiles_shared;
};

// CTAs that may work on a token together: a cluster's, from 9.0 on. Large chips run 16 of them, all
// others 8.
constexpr int64_t most_ctas_in_team(int capability) {
  if (capability < 90) return 1;
  return capability < 110 ? 16 : 8;
}

constexpr DeviceFacts device_facts(const Device& device) {
  switch (device.kind) {
    case DeviceKind::kCpu:
      // Sources of a row wait in L2 and are scored and mixed there, which takes longer than
      // fetching them: two phases took 0.9 to 1.2 times as long as the single pass forward and 1.1
      // to 1.7 times backward (16 to 54 sublayers of D 256 to 2304, S 4 to 12, 256 to 2048 tokens,
      // fp32 and bf16; one thread of a Xeon with AVX-512, 2026-11). A call costs ~10 us, at ~20
      // GB/s; half of a 1 MiB private L2.
      return {false, 200 << 10, 512 << 10, 0};
    case DeviceKind::kCuda:
      // ~2 us at ~3 TB/s.
      return {true, 6 << 20, device.shared_bytes, most_ctas_in_team(device.capability)};
  }
  return {};
}

// Bytes that the sites of one block move: S sites, each with N finished blocks before it and the
// block's partial sum beside them. The first site saves 2X in either schedule, because the block's
// first delta is its partial sum: nothing to add, nothing to write.
constexpr int64_t single_pass_bytes(const Shape& shape, bool training) {
  // Backward: delta's and partial's gradient is one tensor, block gradients are added to in place.
  const int64_t forward = shape.num_queries * (shape.num_sources + 4) - 2;
  const int64_t backward = shape.num_queries * (3 * shape.num_sources + 4);
  return (forward + (training ? backward : 0)) * tensor_bytes(shape);
}

constexpr int64_t two_phase_bytes(const Shape& shape, bool training) {
  // Phase 1 N + S and S merges of 5, so N + 6S; backward 3N + S and S merges of 6, which write
  // what phase 1's backward reads where it reads it.
  const int64_t forward = shape.num_sources + 6 * shape.num_queries - 2;
  const int64_t backward = 3 * shape.num_sources + 7 * shape.num_queries;
  return (forward + (training ? backward : 0)) * tensor_bytes(shape);
}

// Of those, what phase 1 moves.
constexpr int64_t phase_one_bytes(const Shape& shape, bool training) {
  const int64_t forward = shape.num_sources + shape.num_queries;
  const int64_t backward = 3 * shape.num_sources + shape.num_queries;
  return (forward + (training ? backward : 0)) * tensor_bytes(shape);
}

// Tokens of which phase 1 of a block has all rows on chip at once, beside the score vectors, shared
// by some number of CTAs. 2: one is worked on and the next one is on its way, and in the backward
// the sums of the score vectors' gradients have room too. 1: a token has to be waited for, and such
// sums are read and written in the second-level cache. 0: rows or score vectors come more than
// once. An estimate from below of what csrc/cuda/ then chooses.
constexpr int phase_one_tokens(const Shape& shape, const DeviceFacts& facts, bool training) {
  if (facts.most_tiles_shared == 0) return 2;
  constexpr auto round_up = [](int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  };
  const int64_t n = shape.num_sources, s = shape.num_queries;
  // A half-precision score vector is three values of that precision to a tensor core.
  const int64_t vector_bytes = shape.itemsize == 2 ? 3 * shape.itemsize : shape.itemsize;
  const int64_t number_bytes = shape.itemsize == 8 ? 8 : 4;
  const int64_t rows = n + (training ? s : 0);
  // Products are numbers of each source and query: one of each, three in the backward, and partial
  // sums of each warp; and there are a few of each source and of each query.
  const int64_t products = (training ? 3 : 1) * round_up(n, 8) * (round_up(s, 8) + 4);
  const int64_t partials = 16 * (std::min<int64_t>(round_up(s, 8), 32) + 8);
  const int64_t most_warps = training ? 11 : 15;
  const int64_t panels = (shape.hidden + 63) / 64;
  const auto have_room = [&](int tokens) {
    const int64_t sum_bytes = training && tokens > 1 ? number_bytes : 0;
    const int64_t column_bytes = s * (vector_bytes + sum_bytes) + tokens * rows * shape.itemsize;
    // A row ends with 16 bytes of padding.
    const int64_t padding = (tokens * rows + 3 * s) * 16;
    // Columns are shared out 64 at a time, to CTAs and then to their warps, at least 4. CTAs tell
    // one another products, two rounds of them.
    for (int64_t ctas = 1; ctas <= facts.most_tiles_shared && ctas <= panels; ctas *= 2) {
      const int64_t slice = (panels + ctas - 1) / ctas;
      const int64_t warps = std::clamp<int64_t>(slice, 4, most_warps);
      const int64_t told = ctas > 1 ? 2 * ctas * n * (s + 1) : 0;
      const int64_t numbers = products + warps * partials + told + 2 * n + s + 16;
      if (slice * 64 * column_bytes + padding + numbers * number_bytes <= facts.tile_bytes) {
        return true;
      }
    }
    return false;
  };
  return have_room(2) ? 2 : have_room(1) ? 1 : 0;
}

struct Plan {
  bool two_phase = false;
  int64_t bytes_single_pass = 0;
  int64_t bytes_two_phase = 0;
  // Two phases win from this many tokens on; the largest int64 where they never do.
  int64_t two_phase_from_tokens = std::numeric_limits<int64_t>::max();
  // Tokens whose sources fit on chip at once, at least 1.
  int64_t tile_tokens = 1;
  // Whether one token's sources fit on chip, so that each is read from memory once.
  bool row_resident = true;
  // The same for the rows that phase 1 takes at once, of a token at least.
  bool phase_one_resident = true;
  std::string reason;
};

namespace detail {

inline void require_positive(const char* name, int64_t value) {
  if (value < 1) {
    throw std::invalid_argument(std::string("plan: ") + name + " is " + std::to_string(value) +
                                ", expected at least 1");
  }
}

}  // namespace detail

// Chooses how a block's sites read. In bytes alone two phases win where
// S(N+4) > N + 6S, that is N(1 - 1/S) > 2; with a backward where N(1 - 1/S) > 1.25. They
// take one launch more, which decides for small M. Where arithmetic and not bandwidth is the limit,
// the single pass, which does no more of it, is taken; and where phase 1 would have to read rows
// more than once. Where it has room for one token and not for the next, it is expected to take
// twice as long as its bytes: an estimate, not a measurement.
//
// One answer serves forward and backward, for a mixture never moves fewer bytes than the better of
// the two. A backward in two phases after a single-pass forward first has to run phase 1:
// S(N+4) + N+S, no less than the N + 6S of a forward in two phases. And where the backward is
// better off with the single pass, N(1 - 1/S) < 1, the forward is too.
inline Plan make_plan(const Shape& shape, const Device& device, bool training = false) {
  detail::require_positive("num_sources", shape.num_sources);
  detail::require_positive("num_queries", shape.num_queries);
  detail::require_positive("hidden", shape.hidden);
  detail::require_positive("itemsize", shape.itemsize);
  if (shape.num_tokens < 0) {
    throw std::invalid_argument("plan: num_tokens is " + std::to_string(shape.num_tokens) +
                                ", expected at least 0");
  }
  if (device.kind == DeviceKind::kCuda) {
    detail::require_positive("capability", device.capability);
    detail::require_positive("shared_bytes", device.shared_bytes);
  }
  const DeviceFacts facts = device_facts(device);
  Plan plan;
  plan.bytes_single_pass = single_pass_bytes(shape, training);
  plan.bytes_two_phase = two_phase_bytes(shape, training);

  Shape one_token = shape;
  one_token.num_tokens = 1;
  const int tokens_on_chip = phase_one_tokens(shape, facts, training);
  plan.phase_one_resident = tokens_on_chip > 0;
  const int64_t saved_per_token = single_pass_bytes(one_token, training) -
                                  two_phase_bytes(one_token, training) -
                                  (tokens_on_chip == 1 ? phase_one_bytes(one_token, training) : 0);
  const int64_t extra_launches = training ? 2 : 1;
  if (saved_per_token > 0 && facts.bandwidth_bound && plan.phase_one_resident) {
    plan.two_phase_from_tokens =
        (extra_launches * facts.launch_bytes + saved_per_token - 1) / saved_per_token;
  }
  plan.two_phase = shape.num_tokens >= plan.two_phase_from_tokens;

  const int64_t row_bytes = (shape.num_sources + 1) * shape.hidden * shape.itemsize;
  plan.row_resident = row_bytes <= facts.tile_bytes;
  plan.tile_tokens = plan.row_resident ? facts.tile_bytes / row_bytes : 1;

  if (plan.two_phase) {
    plan.reason = "two phases move fewer bytes, by more than their extra launch costs";
  } else if (single_pass_bytes(one_token, training) <= two_phase_bytes(one_token, training)) {
    plan.reason = "the single pass moves no more bytes than two phases";
  } else if (!facts.bandwidth_bound) {
    plan.reason = "two phases would move fewer bytes, but arithmetic takes longer here, and stays";
  } else if (!plan.phase_one_resident) {
    plan.reason = "two phases would move fewer bytes, but phase 1 has no room for a token on chip";
  } else if (saved_per_token <= 0) {
    plan.reason =
        "two phases would move fewer bytes, but phase 1 has no room for a second token on chip";
  } else {
    plan.reason = "two phases would move fewer bytes, but by less than their extra launch costs";
  }
  return plan;
}

}  // namespace attnres
