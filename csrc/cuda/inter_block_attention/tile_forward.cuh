// The tile of phase 1, forward: 16-bit rows, all arithmetic over columns on tensor cores. With u_s
// = query_s * key_weight_s and r_i = 1 / rms(v_i):
//
//   l_si = r_i <u_s, v_i>,  lse_s = log sum_i exp(l_si),  out_s = sum_i exp(l_si - lse_s) v_i
//
// A stage holds the rows of one token's sources, up to 16, or of two tokens' with up to 8 each: a
// tile of 16 rows. Queries come in groups of eight, and stay in registers from the first row to the
// last one, in 16-bit parts that add up to them: the tile times a group is its logits' products,
// its product with itself has the squares on its diagonal, and the tile transposed as it is loaded,
// times weights in two parts, is the group's results.
//
// Each warp has one thing to do, and no barrier of the whole CTA stands in a token's way:
//
//   compute   each one group of queries and columns of its own: products of the next stage; results
//             of this one
//   find      adds up products, exchanges them with the other CTAs of a cluster, does the softmax
//             and hands out weights
//   load      copies whole rows, one bulk copy for each source, into a ring of stages
//   store     stores results, a token's at a time, from where they were made
//
// Two stages are in work, so what is handed over once a stage has two places. None is written again
// too early: products of stage i + 2 come from warps that have all weights of stage i; a CTA's
// message of stage i + 2 goes out when every message of stage i + 1 has come, which each CTA sends
// after it has used up stage i's.
#pragma once

#include "common/elements.cuh"
#include "common/mma.cuh"
#include "common/parts.cuh"
#include "common/reduce.cuh"
#include "common/ring.cuh"
#include "common/rows.cuh"
#include "inter_block_attention/config.hpp"
#include "inter_block_attention/score_vector.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

struct InterBlockTileArgs {
  InterBlockConfig config;
  InterBlockTileLayout layout;
  int num_tokens;
  int hidden;
  int num_sources;
  int num_queries;
  float inverse_hidden;
  float eps;
  float scale;
  ConstByteRows queries;      // [S, D]
  ConstByteRows key_weights;  // [S, D], or absent
  const float* known_rstd;    // [N, M], or null
  ByteRows out;               // [S * M, D]
  float* lse;                 // [S, M]
  float* stats;               // [N + S * N, M], or null
  ConstByteRows rows[kInterBlockTileRows];
};

template <typename T, int kColumns, int kTokens>
class InterBlockTileForward {
  using Args = InterBlockTileArgs;
  using Layout = InterBlockTileLayout;
  static constexpr int kSliceColumns = 16;
  static constexpr int kSlices = kColumns / kSliceColumns;
  static constexpr int kSources = kInterBlockTileRows / kTokens;  // of a token, at most
  static constexpr int kQueryParts = kScalesParts<T> ? 2 : 3;
  // Of a weight, which is at most 1.
  static constexpr float kWeightScale = kScalesParts<T> ? 16384.0f : 1.0f;
  // Slices are loaded and stored two at a time.
  static constexpr int kPairs = kSlices / 2;
  static constexpr int kPairBytes = 2 * 2 * kSliceColumns;
  static_assert(kSlices % 2 == 0 && (kTokens == 1 || kTokens == 2));

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    const InterBlockTileForward tile(args);
    tile.prepare();
    const int helper = tile.warp_ - tile.num_computing();
    if (helper < 0) {
      tile.compute();
    } else if (helper == 0) {
      tile.load();
    } else if (helper == 1) {
      tile.store();
    } else {
      tile.find(helper - 2);
    }
    sync_warp();
    // No CTA ends while another may still write to it.
    if (tile.size_ > 1) {
      arrive_at_cluster();
      wait_for_cluster();
    }
  }

 private:
  __device__ __forceinline__ explicit InterBlockTileForward(const Args& args)
      : args_(args),
        layout_(args.layout),
        lane_(static_cast<int>(static_cast<uint32_t>(thread_rank()) % kWarpSize)),
        warp_(static_cast<int>(static_cast<uint32_t>(thread_rank()) / kWarpSize)),
        size_(args.config.cluster),
        rank_(size_ > 1 ? rank_in_cluster() : 0),
        first_column_(rank_ * args.layout.cta_columns),
        num_columns_(min_of(args.hidden - first_column_, args.layout.cta_columns)) {}

  __device__ __forceinline__ static int min_of(int a, int b) { return a < b ? a : b; }

  __device__ __forceinline__ int num_computing() const {
    return layout_.num_groups * args_.config.warps;
  }
  __device__ __forceinline__ int num_threads() const {
    return kWarpSize * (num_computing() + 2 + args_.config.finders);
  }

  template <typename V>
  __device__ __forceinline__ static V* shared(int offset) {
    return reinterpret_cast<V*>(dynamic_shared_memory() + offset);
  }
  __device__ __forceinline__ std::byte* stage(int slot) const {
    return shared<std::byte>(layout_.ring + slot * layout_.stage);
  }
  // Of a stage, by token and source.
  __device__ __forceinline__ int place(int token, int source) const {
    return (token * kSources + source) * layout_.pitch;
  }

  __device__ __forceinline__ static Barrier* filled(int slot) {
    return shared<Barrier>(Layout::kStageBarriers) + slot;
  }
  __device__ __forceinline__ static Barrier* free(int slot) {
    return filled(slot) + kMostInterBlockStages;
  }
  // Barriers of stage i, or result i, which has them from number i - 2.
  enum Kind { kSummed, kReady, kDone, kStored };
  __device__ __forceinline__ static Barrier* of(Kind kind, int i) {
    return shared<Barrier>(Layout::kBarriers) + 2 * kind + i % 2;
  }
  __device__ __forceinline__ static Barrier* arrived(int group, int i) {
    return shared<Barrier>(Layout::kBarriers) + Layout::kNumBarriers + 2 * group + i % 2;
  }
  __device__ __forceinline__ static uint32_t parity(int i) {
    return static_cast<uint32_t>(i) / 2 % 2;
  }

  // f(i, first token) for this team's stages in turn.
  template <typename F>
  __device__ __forceinline__ void for_stages(F&& f) const {
    const int first = size_ > 1 ? cluster_rank() : cta_rank();
    const int step = kTokens * (size_ > 1 ? num_clusters() : num_ctas());
    int i = 0;
#pragma unroll 1
    for (int token = kTokens * first; token < args_.num_tokens; token += step) f(i++, token);
  }

  // Barriers, and zeros where rows end before their warps' columns do.
  __device__ __forceinline__ void prepare() const {
    const int stages = args_.config.stages;
    const auto computing = static_cast<uint32_t>(num_computing());
    if (thread_rank() == 0) {
      for (int slot = 0; slot < stages; ++slot) {
        init_barrier(filled(slot), 1);
        init_barrier(free(slot), computing);
      }
      for (int i = 0; i < 2; ++i) {
        init_barrier(of(kSummed, i), computing);
        init_barrier(of(kReady, i), static_cast<uint32_t>(args_.config.finders));
        init_barrier(of(kDone, i), computing);
        init_barrier(of(kStored, i), 1);
        for (int group = 0; group < layout_.num_groups; ++group) {
          init_barrier(arrived(group, i), 1);
        }
      }
      publish_barriers();
    }
    if (size_ > 1) arrive_at_cluster();
    const int row_bytes = 2 * num_columns_, words = (layout_.pitch - 16 - row_bytes) / 4;
    const int num_rows = kTokens * args_.num_sources;
    for (int i = thread_rank(); i < words * num_rows * stages; i += num_threads()) {
      const int row = i / words % num_rows;
      std::byte* const at = stage(i / words / num_rows) +
                            place(row / args_.num_sources, row % args_.num_sources) + row_bytes;
      reinterpret_cast<uint32_t*>(at)[i % words] = 0;
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    sync_cta();
    if (size_ > 1) wait_for_cluster();
  }

  __device__ __forceinline__ void load() const {
    const int num_rows = kTokens * args_.num_sources;
    const int mine = min_of(lane_, num_rows - 1);
    const int token = mine / args_.num_sources, source = mine % args_.num_sources;
    const int to = place(token, source);
    const uint32_t bytes = 2 * static_cast<uint32_t>(num_columns_);
    // In registers: parameters are not read by index.
    ConstByteRows rows = args_.rows[source];
    rows.data += 2 * first_column_;
    RingPosition at;
    for_stages([&](int, int first) {
      if (lane_ == 0) {
        wait(free(at.slot), at.parity ^ 1);
        arrive_and_expect(filled(at.slot), static_cast<uint32_t>(num_rows) * bytes);
      }
      sync_warp();
      // A second token that there is not is the first one again.
      if (lane_ < num_rows) {
        copy_bulk(stage(at.slot) + to, row_at(rows, min_of(first + token, args_.num_tokens - 1)),
                  bytes, filled(at.slot));
      }
      at.advance(args_.config.stages);
    });
  }

  __device__ __forceinline__ void store() const {
    const uint32_t bytes = 2 * static_cast<uint32_t>(num_columns_);
    for_stages([&](int i, int first) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const int n = i * kTokens + j, token = first + j;
        wait(of(kDone, n), parity(n));
        if (token < args_.num_tokens) {
          const std::byte* const results =
              shared<std::byte>(layout_.results) + n % 2 * layout_.result_bytes;
          for (int query = lane_; query < args_.num_queries; query += kWarpSize) {
            const int64_t row = static_cast<int64_t>(query) * args_.num_tokens + token;
            store_bulk(row_at(args_.out, row) + 2 * first_column_, results + query * layout_.pitch,
                       bytes);
          }
          commit_bulk_stores();
          wait_until_bulk_stores_are_read<0>();
        }
        sync_warp();
        if (lane_ == 0) arrive(of(kStored, n));
      }
    });
    wait_for_bulk_stores<0>();
  }

  // A lane of a finding warp has a row of the tile, and four queries of a group.
  struct alignas(16) FourFloats {
    float x[4];
  };
  struct Found {
    FourFloats dots;
    float square;
  };
  struct Finder {
    int row;     // of the tile
    int token;   // of the stage
    int source;  // of the token
    int first;   // query of the group
    bool is_source;
  };

  __device__ __forceinline__ void find(int which) const {
    const int row = lane_ % kInterBlockTileRows;
    const Finder lane = {row, row / kSources, row % kSources,
                         lane_ / kInterBlockTileRows * (kGroupQueries / 2),
                         row % kSources < args_.num_sources};
    for_stages([&](int i, int first) {
      const int token = first + lane.token;
      const bool is_there = lane.is_source && token < args_.num_tokens;
      const int64_t at = static_cast<int64_t>(lane.source) * args_.num_tokens + token;
      // On its way while products are made.
      float known = 0;
      if (args_.known_rstd != nullptr && is_there)
        known = load_global<float>(args_.known_rstd + at);
      wait(of(kSummed, i), parity(i));
      const float square = square_of_warps(i, lane);
      if (size_ > 1) {
        for_groups(which, [&](int group) {
          send(i, group, lane, {dots_of_warps(i, group, lane), square});
        });
      }
      for_groups(which, [&](int group) {
        const Found found =
            size_ > 1 ? receive(i, group, lane) : Found{dots_of_warps(i, group, lane), square};
        const float rstd =
            args_.known_rstd != nullptr
                ? known
                : inverse_square_root(found.square * args_.inverse_hidden + args_.eps);
        if (args_.stats != nullptr && rank_ == 0 && group == 0 && is_there && lane.first == 0) {
          args_.stats[at] = rstd;
        }
        do_softmax(i, group, lane, token, found.dots, rstd);
      });
      sync_warp();
      if (lane_ == 0) arrive(of(kReady, i));
    });
  }
  // f(group) for the groups of this finding warp.
  template <typename F>
  __device__ __forceinline__ void for_groups(int which, F&& f) const {
#pragma unroll 1
    for (int group = which; group < layout_.num_groups; group += args_.config.finders) f(group);
  }

  __device__ __forceinline__ const std::byte* sums_of_warp(int i, int warp) const {
    return shared<std::byte>(layout_.sums + (i % 2 * num_computing() + warp) * Layout::kSumBytes);
  }
  __device__ __forceinline__ float square_of_warps(int i, const Finder& lane) const {
    const std::byte* of_warp = sums_of_warp(i, 0) + Layout::kSquares + 4 * lane.row;
    float sum = 0;
#pragma unroll 4
    for (int warp = 0; warp < num_computing(); ++warp, of_warp += Layout::kSumBytes) {
      sum += *reinterpret_cast<const float*>(of_warp);
    }
    return sum;
  }
  __device__ __forceinline__ static void add(FourFloats& sum, const FourFloats& more) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.x[j] += more.x[j];
  }
  __device__ __forceinline__ FourFloats dots_of_warps(int i, int group, const Finder& lane) const {
    const std::byte* of_warp =
        sums_of_warp(i, group * args_.config.warps) + 4 * (lane.row * kGroupQueries + lane.first);
    FourFloats sum = {};
#pragma unroll 4
    for (int warp = 0; warp < args_.config.warps; ++warp, of_warp += Layout::kSumBytes) {
      add(sum, *reinterpret_cast<const FourFloats*>(of_warp));
    }
    return sum;
  }

  // A message has products [rows][8] and squares [rows] of the rows that sources have.
  __device__ __forceinline__ int row_in_message(const Finder& lane) const {
    return lane.token * args_.num_sources + lane.source;
  }
  __device__ __forceinline__ int dots_in_message(const Finder& lane) const {
    return 4 * (row_in_message(lane) * kGroupQueries + lane.first);
  }
  __device__ __forceinline__ int square_in_message(const Finder& lane) const {
    return 4 * (kTokens * args_.num_sources * kGroupQueries + row_in_message(lane));
  }
  __device__ __forceinline__ std::byte* inbox(int i, int group) const {
    return shared<std::byte>(layout_.inbox +
                             (i % 2 * layout_.num_groups + group) * size_ * layout_.message_bytes);
  }
  // Sums over this CTA's columns, to every CTA of the cluster.
  __device__ __forceinline__ void send(int i, int group, const Finder& lane,
                                       const Found& found) const {
    const int bytes = layout_.message_bytes;
    auto* const message =
        shared<std::byte>(layout_.message + (i % 2 * layout_.num_groups + group) * bytes);
    if (lane.is_source) {
      *reinterpret_cast<FourFloats*>(message + dots_in_message(lane)) = found.dots;
      if (lane.first == 0) {
        *reinterpret_cast<float*>(message + square_in_message(lane)) = found.square;
      }
    }
    show_to_copy_engine();
    if (lane_ == 0) arrive_and_expect(arrived(group, i), static_cast<uint32_t>(size_ * bytes));
    sync_warp();
    if (lane_ < size_) {
      copy_bulk_to(lane_, inbox(i, group) + rank_ * bytes, message, static_cast<uint32_t>(bytes),
                   arrived(group, i));
    }
  }
  __device__ __forceinline__ Found receive(int i, int group, const Finder& lane) const {
    wait_for_remote(arrived(group, i), parity(i));
    const std::byte* from = inbox(i, group);
    Found sum = {};
    if (!lane.is_source) return sum;
#pragma unroll 4
    for (int rank = 0; rank < size_; ++rank, from += layout_.message_bytes) {
      add(sum.dots, *reinterpret_cast<const FourFloats*>(from + dots_in_message(lane)));
      sum.square += *reinterpret_cast<const float*>(from + square_in_message(lane));
    }
    return sum;
  }

  // Over the sources of this lane's token.
  __device__ __forceinline__ static float token_max(float x) {
#pragma unroll
    for (int mask = kSources / 2; mask > 0; mask /= 2) {
      const float other = shuffle_xor(x, mask);
      x = other > x ? other : x;
    }
    return x;
  }
  __device__ __forceinline__ static float token_sum(float x) {
#pragma unroll
    for (int mask = kSources / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
  }

  __device__ __forceinline__ void do_softmax(int i, int group, const Finder& lane, int token,
                                             const FourFloats& dots, float rstd) const {
    const int first_query = group * kGroupQueries + lane.first;
    const bool writes = rank_ == 0 && token < args_.num_tokens;
    float weights[4], my_largest = 0, my_sum = 1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float logit = rstd * dots.x[j];
      const int query = first_query + j;
      if (args_.stats != nullptr && writes && lane.is_source && query < args_.num_queries) {
        const int64_t row = args_.num_sources + int64_t{query} * args_.num_sources + lane.source;
        args_.stats[row * args_.num_tokens + token] = logit;
      }
      const float largest = token_max(lane.is_source && logit > -INFINITY ? logit : -INFINITY);
      // A single source has weight 1 whatever its logit, minus infinity too.
      const float weight = args_.num_sources == 1 ? 1.0f : exponential(logit - largest);
      weights[j] = lane.is_source ? weight : 0;
      const float sum = token_sum(weights[j]);
      weights[j] *= 1 / sum;
      // A lane for each query, where there are as many.
      if (lane.source == j) my_largest = largest, my_sum = sum;
    }
    hand_out(i, group, lane, weights);
    const int query = first_query + lane.source;
    if (writes && lane.source < 4 && query < args_.num_queries) {
      args_.lse[int64_t{query} * args_.num_tokens + token] = my_largest + logarithm(my_sum);
    }
  }

  // As `b` of a product has them, for a lane 4 * g + t of a computing warp: of query g, rows 2t and
  // 2t + 1, 2t + 8 and 2t + 9; what that leaves of them. Lanes of neighbouring rows exchange, so
  // that each writes two neighbours of two queries.
  __device__ __forceinline__ void hand_out(int i, int group, const Finder& lane,
                                           const float (&weights)[4]) const {
    const bool is_odd = lane.row % 2 != 0;
    const int pair = lane.row / 2;
    std::byte* const to = shared<std::byte>(layout_.weights) +
                          (i % 2 * layout_.num_groups + group) * Layout::kWeightBytes +
                          16 * (4 * (lane.first + (is_odd ? 2 : 0)) + pair % 4) + pair / 4 * 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float got = shuffle_xor(is_odd ? weights[j] : weights[2 + j], 1);
      Pair<float> rest = {(is_odd ? got : weights[j]) * kWeightScale,
                          (is_odd ? weights[2 + j] : got) * kWeightScale};
      auto* const words = reinterpret_cast<uint32_t*>(to + 4 * 16 * j);
      words[0] = split_off(T{}, rest);
      words[2] = split_off(T{}, rest);
    }
  }

  // What a lane of a computing warp knows all along, and the compiler does not make anew. The rest
  // it finds out again: the queries leave few registers.
  struct Lane {
    SharedAddress base;
    int first_pair;      // of slices, whose squares this warp adds up
    SharedAddress from;  // of the first stage, for products
    SharedAddress sums;  // of the first of two stages, and so are weights
    SharedAddress weights;
    SharedAddress results;  // of the first of two tokens that are in work
    float units[2];         // of queries 2t and 2t + 1: what takes sums of their parts back
  };
  using Query = uint32_t[kSlices][kQueryParts][2];

  __device__ __forceinline__ static SharedAddress row_barrier(const Lane& lane, Kind kind, int i) {
    return lane.base + Layout::kBarriers + 8 * (2 * kind + i % 2);
  }
  __device__ __forceinline__ static SharedAddress stage_barrier(const Lane& lane, bool is_free,
                                                                int slot) {
    return lane.base + Layout::kStageBarriers + 8 * (slot + (is_free ? kMostInterBlockStages : 0));
  }
  __device__ __forceinline__ int lane_made_anew() const {
    return static_cast<int>(static_cast<uint32_t>(lane_) | opaque_zero());
  }

  // Rows of a tile that no source has are other rows in the same banks, or the same row: their sums
  // are not looked at, and they have no weight.
  __device__ __forceinline__ int row_read(int row) const {
    const int source = row % kSources, first = row - source;
    if (source < args_.num_sources) return row;
    return kTokens == 1 && source % 8 < args_.num_sources ? source % 8 : first;
  }

  __device__ __forceinline__ Lane make_lane(int group, int column) const {
    const SharedAddress base = shared_address(dynamic_shared_memory());
    const int half = lane_ / 8 % 2 * 8, late = lane_ / 16 * 8;
    const int groups = layout_.num_groups;
    Lane lane;
    lane.base = keep_in_register(base);
    lane.first_pair = keep_in_register((group + groups - column / kColumns % groups) % groups);
    lane.from = keep_in_register(base + layout_.ring + row_read(lane_ % 8 + half) * layout_.pitch +
                                 2 * (column + late));
    lane.sums = keep_in_register(base + layout_.sums + warp_ * Layout::kSumBytes);
    lane.weights =
        keep_in_register(base + layout_.weights + group * Layout::kWeightBytes + 16 * lane_);
    lane.results = keep_in_register(base + layout_.results +
                                    (group * kGroupQueries + lane_ % 8) * layout_.pitch +
                                    2 * (column + lane_ / 8 * 8));
    return lane;
  }

  // Score vectors [groups][8] of this CTA's columns, as float32, where results will be.
  __device__ __forceinline__ void stage_vectors() const {
    constexpr int kChunk = 8;
    const int chunks = args_.config.warps * kColumns / kChunk;
    const int num_rows = layout_.num_groups * kGroupQueries;
#pragma unroll 1
    for (int i = thread_rank(); i < num_rows * chunks; i += kWarpSize * num_computing()) {
      const int query = i / chunks, chunk = i % chunks;
      float u[kChunk] = {};
      if (query < args_.num_queries && chunk * kChunk < num_columns_) {
        load_score_vector(args_, query, first_column_ / kChunk + chunk, u);
      }
      auto* const to = shared<uint4>(layout_.results + 2 * query * layout_.pitch) + 2 * chunk;
      to[0] = pack(float{}, u);
      to[1] = pack(float{}, u + kChunk / 2);
    }
    sync_first_threads(kWarpSize * num_computing());
  }
  // Of this lane, query g of the group: two neighbours of a half of a slice.
  __device__ __forceinline__ Pair<float> staged(int group, int column, int slice, int half) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const int from = layout_.results + 2 * (group * kGroupQueries + g) * layout_.pitch +
                     4 * (column + slice * kSliceColumns + half * 8 + 2 * t);
    return *shared<const Pair<float>>(from);
  }
  // Their parts, at this warp's columns.
  __device__ __forceinline__ void split_vectors(int group, int column, Query& parts,
                                                float (&units)[2]) const {
    float factor = 1;
    units[0] = units[1] = 1;
    if constexpr (kScalesParts<T>) {
      float largest = 0;
#pragma unroll 1
      for (int half = 0; half < 2 * kSlices; ++half) {
        const Pair<float> pair = staged(group, column, half / 2, half % 2);
        largest = larger(largest, larger(fabsf(pair.first), fabsf(pair.second)));
      }
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        largest = larger(largest, shuffle_xor(largest, mask));
      }
      factor = scale_of(largest);
      const float unit = inverse_of_scale(factor);
      units[0] = shuffle_from(unit, 4 * (2 * (lane_ % 4)));
      units[1] = shuffle_from(unit, 4 * (2 * (lane_ % 4) + 1));
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      // One after the other: all at once would take more registers than the parts do.
      sync_warp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pair<float> rest = staged(group, column, slice, half);
        rest = {rest.first * factor, rest.second * factor};
#pragma unroll
        for (int part = 0; part < kQueryParts; ++part) {
          parts[slice][part][half] = keep_in_register(split_off(T{}, rest));
        }
      }
    }
    // Results take their place.
    sync_first_threads(kWarpSize * num_computing());
  }
  __device__ __forceinline__ static float larger(float a, float b) { return b > a ? b : a; }

  __device__ __forceinline__ void compute() const {
    const int group = warp_ / args_.config.warps;
    const int column = warp_ % args_.config.warps * kColumns;
    stage_vectors();
    Query query;
    float units[2];
    split_vectors(group, column, query, units);
    Lane lane = make_lane(group, column);
    lane.units[0] = units[0], lane.units[1] = units[1];
    const int first = size_ > 1 ? cluster_rank() : cta_rank();
    const int count = size_ > 1 ? num_clusters() : num_ctas();
    const int all = (args_.num_tokens + kTokens - 1) / kTokens;
    const int num_stages = first < all ? (all - first + count - 1) / count : 0;
    RingPosition next;
#pragma unroll 1
    for (int i = -1; i < num_stages; ++i) {
      const int here = (next.slot == 0 ? args_.config.stages : next.slot) - 1;
      if (i + 1 < num_stages) multiply(lane, query, i + 1, next);
      if (i >= 0) make_results(lane, i, here);
      next.advance(args_.config.stages);
    }
  }

  // Products and squares of a stage, over this warp's columns.
  __device__ __forceinline__ void multiply(const Lane& lane, const Query& query, int i,
                                           const RingPosition& at) const {
    wait(stage_barrier(lane, false, at.slot), at.parity);
    const SharedAddress from = lane.from + at.slot * layout_.stage;
    const SharedAddress to = lane.sums + i % 2 * num_computing() * Layout::kSumBytes;
    add_squares(lane, from, to + Layout::kSquares);
    multiply_by_queries(lane, query, from, to);
    sync_warp();
    if (lane_made_anew() == 0) arrive(row_barrier(lane, kSummed, i));
  }

  __device__ __forceinline__ void multiply_by_queries(const Lane& lane, const Query& query,
                                                      SharedAddress from, SharedAddress to) const {
    // A tensor core's sums are cut off, so they are short: see docs/numerics.md.
    float dots[2][4] = {};
    // As many loads under way as there are registers for, beside the queries' parts.
    constexpr int kAhead = 2 * kSlices * kQueryParts > 72 ? 3 : 4;
    uint32_t x[kAhead][4];
    const auto load = [&](int slice) {
      if (slice < kSlices) load_matrices(x[slice % kAhead], from + 2 * kSliceColumns * slice);
    };
#pragma unroll
    for (int slice = 0; slice < kAhead; ++slice) load(slice);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int part = 0; part < kQueryParts; ++part) {
        multiply_add_16x8x16(T{}, dots[slice % 2], x[slice % kAhead], query[slice][part]);
      }
      load(slice + kAhead);
    }
    const int number = lane_made_anew(), g = number / 4, t = number % 4;
    to += 4 * (g * kGroupQueries + 2 * t);
    store_shared(to, Pair<float>{(dots[0][0] + dots[1][0]) * lane.units[0],
                                 (dots[0][1] + dots[1][1]) * lane.units[1]});
    store_shared(to + 4 * 8 * kGroupQueries,
                 Pair<float>{(dots[0][2] + dots[1][2]) * lane.units[0],
                             (dots[0][3] + dots[1][3]) * lane.units[1]});
  }

  // The diagonal of the tile's product with itself. Warps of different groups that have the same
  // columns take pairs of slices by turns.
  __device__ __forceinline__ void add_squares(const Lane& lane, SharedAddress from,
                                              SharedAddress to) const {
    float early[4] = {}, late[4] = {};
#pragma unroll 1
    for (int pair = lane.first_pair; pair < kPairs; pair += layout_.num_groups) {
      uint32_t x[2][4];
      load_matrices(x[0], from + kPairBytes * pair);
      load_matrices(x[1], from + kPairBytes * pair + 2 * kSliceColumns);
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          multiply_add_16x8x8(T{}, early, x[j][half], x[j][half + 1], x[j][half]);
          multiply_add_16x8x8(T{}, late, x[j][half], x[j][half + 1], x[j][half + 1]);
        }
      }
    }
    const int number = lane_made_anew(), g = number / 4, t = number % 4;
    if (t != g / 2) return;
    const bool is_odd = g % 2 != 0;
    const float first = is_odd ? early[1] : early[0], second = is_odd ? late[3] : late[2];
    store_shared(to + 4 * g, first);
    store_shared(to + 4 * (g + 8), second);
  }

  __device__ __forceinline__ void make_results(const Lane& lane, int i, int slot) const {
    wait(row_barrier(lane, kReady, i), parity(i));
    const SharedAddress weights = lane.weights + i % 2 * layout_.num_groups * Layout::kWeightBytes;
    const SharedAddress from = turned(lane) + slot * layout_.stage;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const int n = i * kTokens + token;
      // Results of two tokens before are stored by now.
      wait(row_barrier(lane, kStored, n), parity(n) ^ 1);
      const SharedAddress to = keep_in_register(lane.results) + n % 2 * layout_.result_bytes;
      Weights parts[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int j = 0; j < kLoadsOfPair; ++j) {
          parts[part][j] = load_shared<uint32_t>(weights + 8 * part + 4 * (token + j));
        }
      }
      mix(parts[0], parts[1], from + token * kSources * layout_.pitch, to);
      show_to_copy_engine();
      sync_warp();
      if (lane_made_anew() == 0) arrive(row_barrier(lane, kDone, n));
    }
    if (lane_made_anew() == 0) arrive(stage_barrier(lane, true, slot));
  }
  // Where a lane has matrices read for results, from where another one has them read for products:
  // of 16 rows the second and third one change places; of a token's eight there are four in a row.
  __device__ __forceinline__ SharedAddress turned(const Lane& lane) const {
    const int number = lane_made_anew();
    if constexpr (kTokens == 1) {
      return shuffle_from(lane.from, (number & 7) | (number & 8) << 1 | (number & 16) >> 1);
    } else {
      return shuffle_from(lane.from, number & 7) + 2 * (number & ~7);
    }
  }

  // Columns g and g + 8 of every slice, of queries 2t and 2t + 1 of the group.
  static constexpr int kLoadsOfPair = 2 / kTokens;
  using Weights = uint32_t[kLoadsOfPair];
  __device__ __forceinline__ static void mix(const Weights& upper, const Weights& lower,
                                             SharedAddress from, SharedAddress to) {
    // One load more than those that are in work: another would take registers that queries have.
    constexpr int kLoads = kPairs * kLoadsOfPair, kAhead = kLoadsOfPair + 1;
    uint32_t x[kAhead][4];
    const auto load = [&](int first, int count) {
#pragma unroll
      for (int l = first; l < first + count && l < kLoads; ++l) {
        load_matrices_transposed(x[l % kAhead], from + kPairBytes / kLoadsOfPair * l);
      }
    };
    load(0, kAhead);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      float sums[2][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (kTokens == 1) {
          const auto& rows = x[(2 * pair + j) % kAhead];
          multiply_add_16x8x16(T{}, sums[j], rows, upper);
          multiply_add_16x8x16(T{}, sums[j], rows, lower);
        } else {
          const auto& rows = x[pair % kAhead];
          multiply_add_16x8x8(T{}, sums[j], rows[2 * j], rows[2 * j + 1], upper[0]);
          multiply_add_16x8x8(T{}, sums[j], rows[2 * j], rows[2 * j + 1], lower[0]);
        }
      }
      store_matrices_transposed(to + kPairBytes * pair,
                                {packed(sums[0][0], sums[0][1]), packed(sums[0][2], sums[0][3]),
                                 packed(sums[1][0], sums[1][1]), packed(sums[1][2], sums[1][3])});
      load(pair * kLoadsOfPair + kAhead, kLoadsOfPair);
    }
  }
  __device__ __forceinline__ static uint32_t packed(float first, float second) {
    return pack_pair(T{}, {first * (1 / kWeightScale), second * (1 / kWeightScale)});
  }

  const Args& args_;
  const Layout& layout_;
  const int lane_;
  const int warp_;
  const int size_;  // of the cluster
  const int rank_;
  const int first_column_;  // of this CTA
  const int num_columns_;
};

template <typename T, int kColumns, int kTokens>
__global__ void __launch_bounds__(kMostInterBlockTileThreads, 1)
    inter_block_attention_tile_fwd_kernel(const __grid_constant__ InterBlockTileArgs args) {
  InterBlockTileForward<T, kColumns, kTokens>::run(args);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
