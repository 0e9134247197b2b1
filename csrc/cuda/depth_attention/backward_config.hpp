// How the tile of depth attention's backward cuts its work: a pure function of shape and device,
// which can be printed and overridden like that of the forward, config.hpp. No torch, no CUDA.
//
// A CTA has a range of a row's columns, in slices of 64; a computing warp has a few slices of them.
// A stage of its shared memory holds those columns of everything that a token's backward reads: the
// sources, the incoming gradient, and the gradients that are added to. Where too few stages fit,
// the CTAs of a cluster share the columns. The number of tokens is not asked for, so that a row's
// sums are taken over the same columns in the same order wherever it is.
#pragma once

#include "depth_attention/config.hpp"

namespace attnres::cuda {

// What a warp holds in registers over all rows has room for so many slices.
constexpr int kMostSlices = 3;
constexpr int kMostBackwardSources = 60;
// Beside the warps that compute: one that finds coefficients, one that loads, one that stores.
constexpr int kBackwardHelperWarps = 3;
// 16 warps leave 128 registers to a thread.
constexpr int kMostBackwardThreads = 512;
constexpr int kMostBackwardWarps = kMostBackwardThreads / 32 - kBackwardHelperWarps;

struct DepthAttentionGradients {
  int64_t hidden;
  int num_sources;
  int num_bases;  // sources whose gradient is added to one that exists
  bool has_norm;
  bool is_float16;

  // A matrix of 16 rows holds the query in three parts, and the incoming gradient: as it is, or
  // with an output norm's gain, in three parts.
  constexpr int gradient_rows() const { return has_norm ? 3 : 1; }
  constexpr int group_sources() const { return kTileSources - gradient_rows(); }
  constexpr int num_groups() const { return (num_sources + group_sources() - 1) / group_sources(); }
};

// Where things are in a CTA's shared memory, in bytes. Rows lie 16 bytes more than a multiple of
// 128 apart, so that the eight rows of a matrix lie in different sixteenths of 128 bytes and are
// read at once: sources in sixteenths 0 to 7 and 0 to 3 (1), the gradient in 4 (2 to 4), the
// query's parts in 5 to 7.
struct DepthAttentionBackwardLayout {
  int num_groups;
  int slices;  // of columns
  int pitch;   // of rows
  // In a stage; the incoming gradient that is loaded is the row of the matrix, or beside it.
  int group;
  int gradient;
  int loaded_gradient;
  int bases;
  int stage;  // size
  // Behind the stages.
  int query;
  int sums;          // of two rows, for each warp and group: products that are needed
  int sums_of_warp;  // size
  int message;       // of two rows: the same, of a CTA,
  int message_bytes;
  int inbox;         // and of all CTAs of the cluster
  int coefficients;  // float4 [source]
  int scores;        // 16-bit [source][8]
  int fragments;     // of two rows, uint4 [group][3][lane]
  int scales;        // float [2], [2][source], and [warp]
  int base_offsets;  // int [source]
  int zeros;
  int ones;
  int unused;
  int barriers;
  int bytes;
};

constexpr DepthAttentionBackwardLayout lay_out(const DepthAttentionConfig& config,
                                               const DepthAttentionGradients& gradients) {
  DepthAttentionBackwardLayout to = {};
  const int64_t slices = (gradients.hidden + kSliceColumns - 1) / kSliceColumns;
  const int group_sources = gradients.group_sources();
  to.num_groups = gradients.num_groups();
  to.slices = static_cast<int>((slices + config.cluster - 1) / config.cluster);
  to.pitch = 2 * to.slices * kSliceColumns + 16;
  const int gap = 128 - 16 * group_sources % 128;
  to.group = group_sources * to.pitch + gap;
  const int last = gradients.num_sources - (to.num_groups - 1) * group_sources;
  const int sources_end = (to.num_groups - 1) * to.group + last * to.pitch;
  const int sixteenth = 5 - gradients.gradient_rows();
  to.gradient = round_up(sources_end, 128) + 16 * sixteenth;
  to.bases = to.gradient + gradients.gradient_rows() * to.pitch;
  to.loaded_gradient = to.gradient;
  if (gradients.has_norm) {
    to.loaded_gradient = to.bases;
    to.bases += to.pitch;
  }
  to.stage = round_up(to.bases + gradients.num_bases * to.pitch, 128);

  int at = config.stages * to.stage;
  const auto take = [&at](int bytes) {
    const int place = at;
    at = place + round_up(bytes, 16);
    return place;
  };
  take(5 * 16);
  to.query = take(kQueryParts * to.pitch);
  // All products of sources with all rows, or those with gradient and query, and squares.
  to.sums_of_warp = 4 * (gradients.has_norm ? kTileRows * group_sources
                                            : to.num_groups * (kQueryParts + 2) * kTileRows);
  const int sources = to.num_groups * group_sources;
  to.message_bytes = gradients.has_norm ? to.sums_of_warp : 16 * sources;
  to.sums = take(2 * config.warps * to.sums_of_warp);
  to.message = take(2 * to.message_bytes);
  to.inbox = take(config.cluster > 1 ? 2 * config.cluster * to.message_bytes : 0);
  to.coefficients = take(16 * sources);
  to.scores = take(16 * sources);
  to.fragments = take(2 * to.num_groups * 3 * 32 * 16);
  to.scales = take(4 * (2 + 2 * sources + config.warps));
  to.base_offsets = take(4 * sources);
  to.zeros = take(16);
  to.ones = take(2 * 16);
  to.unused = take(256 * config.warps);
  to.barriers = take(8 * (3 * config.stages + 3 * 2));
  to.bytes = at;
  return to;
}

// Warps of a CTA in a cluster of config.cluster, and their columns; 0 if there are none.
inline void set_backward_warps(DepthAttentionConfig& config,
                               const DepthAttentionGradients& gradients,
                               const DepthAttentionConfig& wish,
                               const DepthAttentionBackwardTuning& tuning) {
  const auto slices = static_cast<int>((gradients.hidden + kSliceColumns - 1) / kSliceColumns);
  const int of_cta = (slices + config.cluster - 1) / config.cluster;
  config.warps = config.columns = 0;
  // Every CTA of a cluster has columns, and no more than one in eight of what they could have is
  // missing.
  if ((config.cluster - 1) * of_cta >= slices) return;
  if (config.cluster > 1 && 8 * slices < 7 * config.cluster * of_cta) return;
  // What a warp does for a row and group whatever its columns is shared by more of them where there
  // are many groups.
  const int wanted =
      gradients.num_groups() > 1 ? tuning.wanted_warps_of_groups : tuning.wanted_warps;
  int of_warp = std::clamp((of_cta + wanted - 1) / wanted, 1, kMostSlices);
  if (wish.columns > 0) of_warp = wish.columns / kSliceColumns;
  const int warps = std::max((of_cta + of_warp - 1) / of_warp, wish.warps);
  if (warps > kMostBackwardWarps || of_warp > kMostSlices) return;
  config.warps = warps;
  config.columns = of_warp * kSliceColumns;
}

inline int backward_stages_that_fit(DepthAttentionConfig config,
                                    const DepthAttentionGradients& gradients,
                                    const DeviceLimits& limits) {
  const int threads = 32 * (config.warps + kBackwardHelperWarps);
  if (config.ctas * threads > kMostBackwardThreads) return 0;
  const int budget =
      std::min(limits.shared_bytes_per_cta,
               limits.shared_bytes_per_multiprocessor / config.ctas - kReservedSharedBytes);
  config.stages = 0;
  const DepthAttentionBackwardLayout layout = lay_out(config, gradients);
  // Barriers may take 16 bytes more than so many stages' have.
  return std::max(0, budget - layout.bytes - 16) / (layout.stage + 3 * 8);
}

// Where rows are so narrow that two CTAs hold them in fewer warps, a multiprocessor has two: one
// finds coefficients of its row while the other computes.
inline void use_second_cta(DepthAttentionConfig& config, const DepthAttentionGradients& gradients,
                           const DepthAttentionConfig& wish, const DeviceLimits& limits,
                           const DepthAttentionBackwardTuning& tuning) {
  constexpr int kCtas = kPartsPerMultiprocessor;
  DepthAttentionBackwardTuning half = tuning;
  half.wanted_warps = kMostBackwardThreads / kCtas / 32 - kBackwardHelperWarps;
  half.wanted_warps_of_groups = std::min(half.wanted_warps, tuning.wanted_warps_of_groups);
  DepthAttentionConfig more = config;
  set_backward_warps(more, gradients, wish, half);
  if (more.warps == 0) return;
  more.ctas = kCtas;
  more.stages = std::min(backward_stages_that_fit(more, gradients, limits), tuning.most_stages);
  if (more.stages > tuning.wanted_stages) config = more;
}

// What the device does best, or what comes nearest to the wishes; warps are 0 if nothing fits.
inline DepthAttentionConfig choose_depth_attention_backward_config(
    const DepthAttentionGradients& gradients, const DeviceLimits& limits,
    const DepthAttentionWishes& wishes = {}) {
  const DepthAttentionConfig& wish = wishes.backward;
  if (wishes.backward_rows || gradients.num_sources > kMostBackwardSources) return {};
  // All that the finding warp knows of a row's sources is of one group; and the parts of float16
  // would want a power of two for each row.
  if (gradients.has_norm && (gradients.num_groups() > 1 || gradients.is_float16)) return {};
  const DepthAttentionBackwardTuning& tuning =
      architecture(limits.capability).depth_attention_backward;
  DepthAttentionConfig best;
  for (const int size : {1, 2, 4, 6, 8}) {
    if (wish.cluster > 0 && size != wish.cluster) continue;
    DepthAttentionConfig config;
    config.cluster = size;
    set_backward_warps(config, gradients, wish, tuning);
    if (config.warps == 0) continue;
    config.ctas = std::max(1, wish.ctas);
    int fit = backward_stages_that_fit(config, gradients, limits);
    config.stages = std::min(fit, tuning.most_stages);
    if (size == 1 && wish.ctas == 0) use_second_cta(config, gradients, wish, limits, tuning);
    fit = backward_stages_that_fit(config, gradients, limits);
    if (wish.stages > 0) {
      if (wish.stages > fit) continue;
      config.stages = wish.stages;
    }
    // A row's products are made while the row before it is still in use.
    if (config.stages < kLeastStages) continue;
    if (best.warps == 0 || best.stages < tuning.wanted_stages) best = config;
    if (best.stages >= tuning.wanted_stages) break;
  }
  const bool as_wished = wish.text() == DepthAttentionConfig{}.text() || best.warps > 0;
  ATTNRES_CHECK(as_wished, "ATTNRES_CUDA_CONFIG asks for \"", wish.text(),
                "\" (0: as ever) in the backward, which ", gradients.num_sources, " sources of ",
                gradients.hidden, " values do not fit");
  return best;
}

}  // namespace attnres::cuda
