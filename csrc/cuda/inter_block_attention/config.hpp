// How the tile of phase 1 cuts its work: a pure function of shape and device, which can be printed
// and overridden. No torch, no CUDA.
//
// A stage holds the rows of one token's sources, up to 16, or of two tokens' with up to 8 each, as
// a tile of 16 rows. Queries come in groups of eight. A computing warp has one group, whose parts
// it keeps in registers for its columns, so every group has the same number of warps, and those
// share the columns of a CTA. Where a CTA has no room, or too few warps, a cluster shares the
// columns. The number of tokens is not asked for: a token's results depend on its rows alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string>
#include <string_view>

#include "arch.hpp"
#include "attnres/check.hpp"
#include "device.hpp"
#include "wishes.hpp"

namespace attnres::cuda {

constexpr int kInterBlockTileRows = 16;
constexpr int kGroupQueries = 8;
constexpr int kInterBlockColumns[] = {128, 192, 224};
// Warps that compute; beside them one copies rows in, one stores results, and there is at most one
// softmax warp for each group of queries. 16 warps leave 128 registers to a thread: the parts of
// eight queries take 84 of them for 224 columns.
constexpr int kMostInterBlockWarps = 12;
constexpr int kMostInterBlockTileThreads = kMaxThreads;
constexpr int kMostInterBlockCluster = 16;
// The tile scores the next stage before it gives this one back.
constexpr int kLeastInterBlockStages = 2;
constexpr int kMostInterBlockStages = 8;

struct InterBlockConfig {
  int warps = 0;  // of each group of queries; 0: nothing fits
  int columns = 0;
  int cluster = 0;
  int tokens = 0;  // of a stage
  int stages = 0;
  int ctas = 0;     // that a multiprocessor is meant to have
  int finders = 0;  // softmax warps

  std::string text() const {
    return "inter_block_warps=" + std::to_string(warps) +
           ",inter_block_columns=" + std::to_string(columns) +
           ",inter_block_cluster=" + std::to_string(cluster) +
           ",inter_block_tokens=" + std::to_string(tokens) +
           ",inter_block_stages=" + std::to_string(stages) +
           ",inter_block_ctas=" + std::to_string(ctas);
  }
};

struct InterBlockRead {
  int64_t hidden;
  int num_sources;
  int64_t num_queries;

  constexpr int num_groups() const {
    return saturated((num_queries + kGroupQueries - 1) / kGroupQueries);
  }
};

constexpr int num_warps(const InterBlockConfig& config, int num_groups) {
  return num_groups * config.warps + config.finders + 2;
}

// Where things are in a CTA's shared memory, in bytes. Rows lie 16 bytes more than a multiple of
// 128 apart, so that the eight rows of a matrix lie in different sixteenths of 128 bytes and are
// read or written at once.
struct InterBlockTileLayout {
  int num_groups;
  int cta_columns;  // that a CTA of the cluster has at most
  int pitch;        // of rows
  int stage;        // size
  int sums;         // of two stages, for each warp: float [16][8] products, [16] squares
  int message;      // of two stages, for each group: float [rows][8] products, [rows] squares,
  int message_bytes;
  int inbox;    // and of all CTAs of the cluster
  int weights;  // of two stages, for each group
  int results;  // 16-bit [2][groups][8], one token's each
  int result_bytes;
  int ring;
  int bytes;

  static constexpr int kStageBarriers = 0;  // two each
  static constexpr int kBarriers = kStageBarriers + 2 * 8 * kMostInterBlockStages;
  static constexpr int kSquares = 4 * kInterBlockTileRows * kGroupQueries;  // in sums
  static constexpr int kSumBytes = kSquares + 4 * kInterBlockTileRows;
  static constexpr int kWeightBytes = 2 * 2 * kInterBlockTileRows * kGroupQueries;  // two parts

  // Barriers of two stages, or of two tokens' results: sums are there; weights; results; those are
  // stored. And for each group, messages of all CTAs.
  static constexpr int kNumBarriers = 4 * 2;
};

constexpr InterBlockTileLayout lay_out(const InterBlockConfig& config, const InterBlockRead& read) {
  InterBlockTileLayout to = {};
  to.num_groups = read.num_groups();
  // Whole lines of memory to each.
  to.cta_columns = round_up((read.hidden + config.cluster - 1) / config.cluster, 64);
  to.pitch = 2 * config.warps * config.columns + 16;
  const int rows = config.tokens * read.num_sources;
  to.stage = round_up(
      (config.tokens == 1 ? rows : kInterBlockTileRows / 2 + read.num_sources) * int64_t{to.pitch},
      128);
  int at = InterBlockTileLayout::kBarriers +
           8 * (InterBlockTileLayout::kNumBarriers + 2 * to.num_groups);
  const auto take = [&at](int bytes, int alignment = 16) {
    const int place = round_up(at, alignment);
    at = place + bytes;
    return place;
  };
  to.sums = take(2 * to.num_groups * config.warps * InterBlockTileLayout::kSumBytes);
  to.message_bytes = 4 * (rows * kGroupQueries + round_up(rows, 4));
  const bool is_shared = config.cluster > 1;
  to.message = take(is_shared ? 2 * to.num_groups * to.message_bytes : 0);
  to.inbox = take(is_shared ? 2 * to.num_groups * config.cluster * to.message_bytes : 0);
  to.weights = take(2 * to.num_groups * InterBlockTileLayout::kWeightBytes);
  to.result_bytes = round_up(int64_t{to.num_groups} * kGroupQueries * to.pitch, 128);
  to.results = take(2 * to.result_bytes, 128);
  to.ring = take(config.stages * to.stage, 128);
  to.bytes = at;
  return to;
}

// Wishes from ATTNRES_CUDA_CONFIG: "inter_block_attention=rows",
// "inter_block_columns=224,inter_block_cluster=8". What is not named is chosen as ever.
struct InterBlockWishes {
  bool rows = false;  // the general body instead of the tile
  InterBlockConfig config;

  bool any() const {
    return config.warps + config.columns + config.cluster + config.tokens + config.stages +
               config.ctas >
           0;
  }
};

inline InterBlockWishes parse_inter_block_wishes(std::string_view text) {
  InterBlockWishes wishes;
  for_wishes(text, [&](Wish wish) {
    if (!take_prefix(wish.name, kInterBlockPrefix)) return;
    if (wish.name == "attention") {
      const bool rows = wish.asks_for_rows("inter_block_attention");
      if (!wish.is_backward) wishes.rows = rows;
      return;
    }
    InterBlockConfig& config = wishes.config;
    int* const place = wish.is_backward         ? nullptr
                       : wish.name == "warps"   ? &config.warps
                       : wish.name == "columns" ? &config.columns
                       : wish.name == "cluster" ? &config.cluster
                       : wish.name == "tokens"  ? &config.tokens
                       : wish.name == "stages"  ? &config.stages
                       : wish.name == "ctas"    ? &config.ctas
                                                : nullptr;
    ATTNRES_CHECK(place != nullptr, "ATTNRES_CUDA_CONFIG is \"", text, "\", which names \"",
                  wish.name, "\" behind inter_block_; that may be attention, warps, columns, ",
                  "cluster, tokens, stages and ctas");
    const bool is_columns = place == &config.columns, is_tokens = place == &config.tokens;
    *place = wish.number(is_columns  ? "128, 192 or 224"
                         : is_tokens ? "1 or 2"
                                     : "a number",
                         [&](int number) {
                           return is_columns ? std::find(std::begin(kInterBlockColumns),
                                                         std::end(kInterBlockColumns),
                                                         number) != std::end(kInterBlockColumns)
                                             : !is_tokens || number <= 2;
                         });
  });
  return wishes;
}
inline InterBlockWishes inter_block_wishes() { return parse_inter_block_wishes(text_of_wishes()); }

// Warps of each group and their columns for a CTA of a cluster of that size: as few columns as can
// be that hold nothing, and of those the fewest a warp; the fewer columns, the more warps, as long
// as there are any.
inline void set_inter_block_warps(InterBlockConfig& config, const InterBlockRead& read,
                                  const InterBlockWishes& wishes) {
  const int groups = read.num_groups();
  const int columns_of_cta = lay_out(config, read).cta_columns;
  config.warps = config.columns = 0;
  // Every CTA of a cluster has columns.
  if (int64_t{config.cluster - 1} * columns_of_cta >= read.hidden) return;
  for (const int columns : kInterBlockColumns) {
    if (wishes.config.columns > 0 && columns != wishes.config.columns) continue;
    const int needed = (columns_of_cta + columns - 1) / columns;
    const int warps = std::max(needed, wishes.config.warps);
    if (groups * warps > kMostInterBlockWarps) continue;
    if (config.warps > 0 && warps * columns >= config.warps * config.columns) continue;
    config.warps = warps;
    config.columns = columns;
  }
  config.finders =
      std::clamp(kMostInterBlockTileThreads / 32 - 2 - groups * config.warps, 1, groups);
}

// Stages that each of so many CTAs of a multiprocessor has room for.
inline int inter_block_stages_that_fit(InterBlockConfig config, const InterBlockRead& read,
                                       const DeviceLimits& limits) {
  const int threads = 32 * num_warps(config, read.num_groups());
  if (config.ctas > 1 && config.ctas * threads > kMostInterBlockTileThreads) return 0;
  const int budget =
      std::min(limits.shared_bytes_per_cta,
               limits.shared_bytes_per_multiprocessor / config.ctas - kReservedSharedBytes);
  config.stages = 0;
  const InterBlockTileLayout layout = lay_out(config, read);
  return std::min(std::max(0, budget - layout.bytes - 128) / layout.stage, kMostInterBlockStages);
}

// What the device does best, or what comes nearest to the wishes; warps are 0 if nothing fits.
// `most_cluster`: CTAs that share a token at most.
inline InterBlockConfig choose_inter_block_config(const InterBlockRead& read,
                                                  const DeviceLimits& limits,
                                                  const InterBlockWishes& wishes = {},
                                                  int most_cluster = kMostInterBlockCluster) {
  constexpr int kMostGroups = kMostInterBlockWarps;
  if (wishes.rows || read.num_sources > kInterBlockTileRows || read.num_groups() > kMostGroups) {
    return {};
  }
  const InterBlockAttentionTuning& tuning = architecture(limits.capability).inter_block_attention;
  const InterBlockConfig& wish = wishes.config;
  InterBlockConfig best;
  for (int size = 1; size <= most_cluster; size *= 2) {
    if (wish.cluster > 0 && size != wish.cluster) continue;
    // Two tokens are as many products as one, and one exchange.
    for (const int tokens : {2, 1}) {
      if (wish.tokens > 0 && tokens != wish.tokens) continue;
      if (tokens * read.num_sources > kInterBlockTileRows) continue;
      InterBlockConfig config;
      config.cluster = size;
      config.tokens = tokens;
      set_inter_block_warps(config, read, wishes);
      if (config.warps == 0) continue;
      config.ctas = std::max(1, wish.ctas);
      config.stages =
          std::min(inter_block_stages_that_fit(config, read, limits), tuning.most_stages);
      // As many CTAs as have stages enough: some compute while others wait.
      while (wish.ctas == 0 && size == 1) {
        InterBlockConfig more = config;
        ++more.ctas;
        more.stages = std::min(inter_block_stages_that_fit(more, read, limits), tuning.most_stages);
        if (more.stages < tuning.wanted_stages) break;
        config = more;
      }
      if (wish.stages > 0) {
        if (wish.stages > inter_block_stages_that_fit(config, read, limits)) continue;
        config.stages = wish.stages;
      }
      if (config.stages < kLeastInterBlockStages) continue;
      if (best.warps == 0 || best.stages < std::min(tuning.wanted_stages, config.stages)) {
        best = config;
      }
      if (best.stages >= tuning.wanted_stages) return best;
    }
  }
  const bool as_wished =
      !wishes.any() || (best.warps > 0 && (wish.warps == 0 || wish.warps == best.warps));
  ATTNRES_CHECK(as_wished, "ATTNRES_CUDA_CONFIG asks for \"", wish.text(),
                "\" (0: as ever), which ", read.num_sources, " sources of ", read.hidden,
                " values and ", read.num_queries, " queries do not fit");
  return best;
}

}  // namespace attnres::cuda
