// How the tile of depth attention cuts its work: a pure function of shape and device, which can be
// printed and overridden. No torch, no CUDA.
//
// A CTA has `warps` warps that compute, each on `columns` columns of every row, and `stages` places
// for a token's row of all sources. Where too few stages fit, a cluster of CTAs shares the columns.
// The number of tokens is not asked for: sums are taken in an order that follows from warps,
// columns and cluster, and a row's result depends on that row alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>

#include "arch.hpp"
#include "attnres/check.hpp"
#include "device.hpp"
#include "wishes.hpp"

namespace attnres::cuda {

// Sources share tiles of 16 rows with the three parts of the query: 13 to a tile.
constexpr int kTileRows = 16;
constexpr int kTileSources = 13;
constexpr int kQueryParts = kTileRows - kTileSources;
// Parts of a weight that are handed out. The third one counts where the mix is kept; the fourth is
// zero, so that two may always be read.
constexpr int kWeightParts = 4;
// A product is 16 columns wide and four of them share their sums: columns come in such slices.
constexpr int kSliceColumns = 64;
constexpr int kWarpColumns[] = {64, 128, 192, 256};
// Rows of a stage, a delta among them: two for each lane of the warp that copies them.
constexpr int kMostTileRows = 64;
constexpr int kMostGroups = (kMostTileRows + kTileSources - 1) / kTileSources;
constexpr int kMostTileWarps = 16;
// Beside those that compute: one copies, one does the softmax, one stores sums, one adds up norms.
constexpr int kMostHelperWarps = 4;
constexpr int kMostTileThreads = 32 * (kMostTileWarps + kMostHelperWarps);
// What __launch_bounds__(kMostTileThreads, 1) leaves to a thread.
constexpr int kTileRegisters = 96;
static_assert(most_threads_with(kTileRegisters) >= kMostTileThreads);
// The tile scores the next row before it gives back the stage of this one.
constexpr int kLeastStages = 2;
constexpr int kMostStages = 8;

struct DepthAttentionConfig {
  int warps = 0;  // 0: nothing fits
  int columns = 0;
  int cluster = 0;
  int stages = 0;
  int ctas = 0;  // that a multiprocessor is meant to have

  std::string text() const {
    return "warps=" + std::to_string(warps) + ",columns=" + std::to_string(columns) +
           ",cluster=" + std::to_string(cluster) + ",stages=" + std::to_string(stages) +
           ",ctas=" + std::to_string(ctas);
  }
};

struct DepthAttentionRead {
  int64_t hidden;
  int num_sources;
  bool adds;  // a delta to the last source
  bool stores_sum;
  bool has_norm;
};

constexpr int helper_warps(const DepthAttentionRead& read) {
  return 2 + (read.stores_sum ? 1 : 0) + (read.has_norm ? 1 : 0);
}

// Where things are in a CTA's shared memory, in bytes. `ldmatrix` reads eight rows at once if they
// lie in different sixteenths of 128 bytes, so rows are 16 bytes more than a multiple of 128 apart:
// the 13 sources of a tile lie in sixteenths 0 to 7 and 0 to 4, and the query in 5 to 7.
struct DepthAttentionTileLayout {
  int num_groups;  // of 13 sources
  int pitch;       // of rows
  int last;        // source, in a stage
  int delta;       // in a stage
  int stage;       // size
  int group;       // size
  int row_sums;    // size of what a CTA's warps find out about a row
  int warp_sums;   // and one of them
  int sums;        // float [2][warp][group][4][16]: three parts of <query, v>, squares
  int message;     // float2 [2][source]: square, <query, v>
  int inbox;       // float2 [2][CTA][source]
  int message_bytes;
  int squares;  // float [2][warp], then [2]: 1 / rms of the mix
  int unit;     // float: of the query's parts
  int norms;    // float4 [2], then [2][CTA]: sums of squares of the mix
  int ring;
  int bytes;

  static constexpr int kGroupPadding = 48;
  static constexpr int kPartSumBytes = 4 * kTileRows;
  static constexpr int kGroupSumBytes = (kQueryParts + 1) * kPartSumBytes;
  static constexpr int kPartWeightBytes = 2 * kTileRows;
  static constexpr int kGroupWeightBytes = kWeightParts * kPartWeightBytes;

  // At the same place in every layout: barriers of every other row; three of each stage; the
  // weights, 16-bit [2][group][part][16]; the query's parts.
  static constexpr int kRowBarriers = 0;
  static constexpr int kRowBarrierBytes = 64;
  static constexpr int kStageBarriers = kRowBarriers + 2 * kRowBarrierBytes;
  static constexpr int kWeights = kStageBarriers + 3 * 8 * kMostStages;
  static constexpr int kWeightBytes = kMostGroups * kGroupWeightBytes;
  static constexpr int kQuery = kWeights + 2 * kWeightBytes + 16;
  static_assert(kQuery % 128 == 16 * (kTileSources % 8));

  // Of a source's row in its stage.
  constexpr int place(int source) const {
    return source * pitch + source / kTileSources * kGroupPadding;
  }
};

constexpr DepthAttentionTileLayout lay_out(const DepthAttentionConfig& config,
                                           const DepthAttentionRead& read) {
  DepthAttentionTileLayout to = {};
  to.num_groups = (read.num_sources + kTileSources - 1) / kTileSources;
  to.pitch = 2 * config.warps * config.columns + 16;
  to.last = to.place(read.num_sources - 1);
  to.delta = to.last + to.pitch;
  to.stage = round_up(to.delta + (read.adds ? to.pitch : 0), 128);
  int at = DepthAttentionTileLayout::kQuery + kQueryParts * to.pitch;
  const auto take = [&at](int bytes, int alignment = 16) {
    const int place = round_up(at, alignment);
    at = place + bytes;
    return place;
  };
  to.group = to.place(kTileSources);
  to.warp_sums = to.num_groups * DepthAttentionTileLayout::kGroupSumBytes;
  to.row_sums = config.warps * to.warp_sums;
  to.sums = take(2 * to.row_sums);
  to.message_bytes = 8 * round_up(read.num_sources, 2);
  to.message = take(2 * to.message_bytes);
  to.inbox = take(config.cluster > 1 ? 2 * config.cluster * to.message_bytes : 0);
  to.squares = take(4 * (2 * config.warps + 2));
  to.unit = take(4);
  to.norms = take(16 * (2 + 2 * config.cluster));
  to.ring = take(config.stages * to.stage, 128);
  to.bytes = at;
  return to;
}

// Wishes from ATTNRES_CUDA_CONFIG, "depth_attention=rows" or "warps=12,columns=192,cluster=1";
// those for the backward begin with "backward_". What is not named is chosen as ever.
struct DepthAttentionWishes {
  bool rows = false;  // the general body instead of the tile
  bool backward_rows = false;
  DepthAttentionConfig config;
  DepthAttentionConfig backward;

  bool any() const {
    return config.warps + config.columns + config.cluster + config.stages + config.ctas > 0;
  }
};

inline DepthAttentionWishes parse_depth_attention_wishes(std::string_view text) {
  DepthAttentionWishes wishes;
  for_wishes(text, [&](const Wish& wish) {
    if (wish.name.substr(0, kInterBlockPrefix.size()) == kInterBlockPrefix) return;
    if (wish.name == "depth_attention") {
      (wish.is_backward ? wishes.backward_rows : wishes.rows) = wish.asks_for_rows(wish.name);
      return;
    }
    DepthAttentionConfig& config = wish.is_backward ? wishes.backward : wishes.config;
    int* const place = wish.name == "warps"     ? &config.warps
                       : wish.name == "columns" ? &config.columns
                       : wish.name == "cluster" ? &config.cluster
                       : wish.name == "stages"  ? &config.stages
                       : wish.name == "ctas"    ? &config.ctas
                                                : nullptr;
    ATTNRES_CHECK(
        place != nullptr, "ATTNRES_CUDA_CONFIG is \"", text, "\", which names \"", wish.name,
        "\"; it may name depth_attention, warps, columns, cluster, stages and ctas, and each of "
        "them with backward_ before it");
    const bool is_columns = place == &config.columns;
    *place = wish.number(is_columns ? "64, 128, 192 or 256" : "a number", [&](int number) {
      return !is_columns || std::find(std::begin(kWarpColumns), std::end(kWarpColumns), number) !=
                                std::end(kWarpColumns);
    });
  });
  return wishes;
}
inline DepthAttentionWishes depth_attention_wishes() {
  return parse_depth_attention_wishes(text_of_wishes());
}

// Warps and their columns for a CTA of a cluster of that size: the fewest columns that hold
// nothing, then a number of warps near to the wanted one. Warps of 64 columns do as much beside
// their products as for them, and are for rows that have few columns, or many products for each.
inline void set_warps(DepthAttentionConfig& config, const DepthAttentionRead& read,
                      const DepthAttentionWishes& wishes, const DepthAttentionTuning& tuning) {
  const auto slices = static_cast<int>((read.hidden + config.cluster * kSliceColumns - 1) /
                                       (config.cluster * kSliceColumns));
  config.warps = config.columns = 0;
  int least = 0;
  for (const int columns : kWarpColumns) {
    if (wishes.config.columns > 0 && columns != wishes.config.columns) continue;
    const int warp_slices = columns / kSliceColumns;
    const int needed = (slices + warp_slices - 1) / warp_slices;
    const int warps = std::max(needed, wishes.config.warps);
    if (warps > kMostTileWarps) continue;
    // Every CTA of a cluster has columns.
    if (int64_t{config.cluster - 1} * warps * columns >= read.hidden) continue;
    const bool pays = warp_slices > 1 || slices <= 2 || read.num_sources > kTileSources;
    const int cost =
        (pays ? 0 : 1000000) + 1000 * warps * warp_slices + std::abs(warps - tuning.wanted_warps);
    if (config.warps > 0 && cost >= least) continue;
    least = cost;
    config.warps = warps;
    config.columns = columns;
  }
}

// Stages that each of so many CTAs of a multiprocessor has room for.
inline int stages_that_fit(DepthAttentionConfig config, const DepthAttentionRead& read,
                           const DeviceLimits& limits) {
  const int threads = 32 * (config.warps + helper_warps(read));
  if (config.ctas > 1 && config.ctas * threads * kTileRegisters > kRegistersPerMultiprocessor) {
    return 0;
  }
  const int budget =
      std::min(limits.shared_bytes_per_cta,
               limits.shared_bytes_per_multiprocessor / config.ctas - kReservedSharedBytes);
  config.stages = 0;
  const int fixed = lay_out(config, read).bytes + 128;
  return std::min(std::max(0, budget - fixed) / lay_out(config, read).stage, kMostStages);
}

// What the device does best, or what comes nearest to the wishes; warps are 0 if nothing fits.
inline DepthAttentionConfig choose_depth_attention_config(const DepthAttentionRead& read,
                                                          const DeviceLimits& limits,
                                                          const DepthAttentionWishes& wishes = {}) {
  if (wishes.rows || read.num_sources + (read.adds ? 1 : 0) > kMostTileRows) return {};
  const DepthAttentionTuning& tuning = architecture(limits.capability).depth_attention;
  DepthAttentionConfig best;
  for (int size = 1; size <= kMostCtasInCluster; size *= 2) {
    if (wishes.config.cluster > 0 && size != wishes.config.cluster) continue;
    DepthAttentionConfig config;
    config.cluster = size;
    set_warps(config, read, wishes, tuning);
    if (config.warps == 0) continue;
    config.ctas = std::max(1, wishes.config.ctas);
    config.stages = std::min(stages_that_fit(config, read, limits), tuning.most_stages);
    if (wishes.config.ctas == 0) {
      // One CTA more while those that are there have too little under way.
      while (config.stages >= tuning.most_stages &&
             config.ctas * (config.stages - kLeastStages) * lay_out(config, read).stage <
                 tuning.bytes_under_way) {
        DepthAttentionConfig more = config;
        ++more.ctas;
        more.stages = std::min(stages_that_fit(more, read, limits), tuning.most_stages);
        if (more.stages < tuning.most_stages) break;
        config = more;
      }
    }
    if (wishes.config.stages > 0) {
      if (wishes.config.stages > stages_that_fit(config, read, limits)) continue;
      config.stages = wishes.config.stages;
    }
    if (config.stages < kLeastStages) continue;
    if (best.warps == 0 || best.stages < tuning.wanted_stages) best = config;
    if (best.stages >= tuning.wanted_stages) break;
  }
  const bool as_wished =
      !wishes.any() ||
      (best.warps > 0 && (wishes.config.warps == 0 || wishes.config.warps == best.warps));
  ATTNRES_CHECK(as_wished, "ATTNRES_CUDA_CONFIG asks for \"", wishes.config.text(),
                "\" (0: as ever), which ", read.num_sources, " sources of ", read.hidden,
                " values do not fit");
  return best;
}

}  // namespace attnres::cuda
