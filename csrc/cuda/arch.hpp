// The constants that kernels are tuned by, for each architecture. Whoever measures one writes down
// where and when; "derived" is arithmetic that no device has confirmed. No torch, no CUDA.
#pragma once

namespace attnres::cuda {

// Of the tile of depth attention, forward.
struct DepthAttentionTuning {
  // Warps that compute, of a CTA that has a multiprocessor to itself. Derived: three for each of
  // its four schedulers cover the latency of shared memory, about 30 cycles, between one another's
  // products; each further one repeats what a warp does once a row.
  int wanted_warps;
  // Stages that a CTA has before a cluster is asked to share a row. Derived: the tile scores one
  // row while it mixes the one before, and a third one is then on its way.
  int wanted_stages;
  // More than this many rows under way bring nothing. Derived: latency times bandwidth is less than
  // two rows of 9 x 2304 values.
  int most_stages;
  // Bytes under way in a multiprocessor, beyond the rows in work, that one CTA is enough for.
  // Derived: 800 ns at a multiprocessor's share of the memory's speed, twice.
  int bytes_under_way;
};

// And backward.
struct DepthAttentionBackwardTuning {
  // Warps that compute, and where a row's sources make several matrices of 16 rows. Derived: three
  // for each scheduler; with more matrices each has more to do between two waits.
  int wanted_warps;
  int wanted_warps_of_groups;
  // Stages before a cluster shares a row. Derived: one row is differentiated while products of the
  // next one are made, and a third one is stored and loaded.
  int wanted_stages;
  int most_stages;
};

// Of the tile of phase 1.
struct InterBlockAttentionTuning {
  // Stages of one or two tokens before a cluster shares their columns, or two become one. Derived:
  // one is mixed while the next one is scored, and a third one is on its way.
  int wanted_stages;
  int most_stages;
};

struct Architecture {
  int capability;  // 10 * major + minor, and later until the next one
  DepthAttentionTuning depth_attention;
  DepthAttentionBackwardTuning depth_attention_backward;
  InterBlockAttentionTuning inter_block_attention;
};

// H100, H200: 13 and 18 bytes a cycle and multiprocessor.
constexpr Architecture kHopper = {90, {12, 3, 6, 64 << 10}, {12, 6, 3, 6}, {3, 6}};
// B200, B300: 28 bytes a cycle and multiprocessor.
constexpr Architecture kBlackwell = {100, {12, 3, 6, 96 << 10}, {12, 6, 3, 6}, {3, 6}};
// RTX 50 and RTX PRO: 100 KB of shared memory, 5 bytes a cycle and multiprocessor.
constexpr Architecture kBlackwellRtx = {120, {12, 3, 4, 24 << 10}, {12, 6, 3, 4}, {3, 4}};

constexpr const Architecture& architecture(int capability) {
  return capability >= kBlackwellRtx.capability ? kBlackwellRtx
         : capability >= kBlackwell.capability  ? kBlackwell
                                                : kHopper;
}

}  // namespace attnres::cuda
