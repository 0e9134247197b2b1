// The tile of depth attention, forward: 16-bit rows, all arithmetic over columns on tensor cores.
//
// A stage holds one token's row of all sources. Its rows, and the query in three 16-bit parts that
// add up to it, are rows of tiles of 16: "the query is one more row". The product of a tile with
// itself then holds every sum that a logit is made of, <v, v> on its diagonal and <query part, v>
// in its last three rows; the mix is the same tile, transposed as it is loaded, times the weights.
//
// Each warp has one thing to do, and no barrier of the whole CTA stands in a row's way:
//
//   loader    copies whole rows, one bulk copy for each source, into a ring of stages
//   compute   each on columns of its own: delta + partial in the stage; sums of the next row; the
//             mix of this one
//   softmax   adds up the sums, exchanges them with the other CTAs of a cluster, hands out weights
//   storer    stores delta + partial from its stage
//   norm      adds up the mix's squares: a row is scaled and written one row later, so that nobody
//             waits for its norm
//
// Two rows are in work, so what is handed over once a row has two places. None is written again too
// early: sums of row i + 2 come from warps that have the weights of row i; its weights are made of
// those sums; a CTA's message of row i + 2 goes out when every message of row i + 1 has come, which
// each CTA sends after it has used up row i's; squares of row i + 2 come from warps that have
// row i's norm.
//
// See attnres/params.hpp for what is computed.
#pragma once

#include "common/elements.cuh"
#include "common/mma.cuh"
#include "common/parts.cuh"
#include "common/reduce.cuh"
#include "common/ring.cuh"
#include "common/rows.cuh"
#include "depth_attention/args.cuh"
#include "depth_attention/config.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

struct DepthAttentionTileArgs {
  DepthAttentionConfig config;
  DepthAttentionTileLayout layout;
  int num_tokens;
  int hidden;
  int num_sources;
  int num_rows;  // of a stage: a delta is one more
  float inverse_hidden;
  float eps;
  float out_eps;
  float scale;
  GainVector query;
  GainVector key_weight;
  GainVector out_weight;
  const float* known_rstd;  // [num_known_rstd, M], or null
  int num_known_rstd;
  ByteRows new_partial;  // delta + partial, or absent
  ByteRows out;          // rows of one level, and so is the mix
  int64_t out_step;      // bytes from a CTA's row to its next one
  ByteRows mix;          // float, or absent
  float* weights;        // [N, M], or null
  float* stats;          // [2N + 1, M], or null
  float* last_rstd;      // [M], or null
  // With block summation the last source is the partial sum, or the delta if there is none, and the
  // delta comes behind it if there is one.
  ConstByteRows rows[kMostTileRows];
};

// Of a weight, which is at most 1.
template <typename T>
constexpr float kWeightScale = kScalesParts<T> ? 16384.0f : 1.0f;

template <typename T, int kColumns>
class DepthAttentionTileForward {
  using Args = DepthAttentionTileArgs;
  using Layout = DepthAttentionTileLayout;
  static constexpr int kSlices = kColumns / kSliceColumns;

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    DepthAttentionTileForward tile(args);
    tile.prepare();
    const int helper = tile.warp_ - args.config.warps;
    const bool stores_sum = args.new_partial.data != nullptr;
    if (helper < 0) {
      args.out_weight.data == nullptr ? tile.template compute<false>()
                                      : tile.template compute<true>();
    } else if (helper == 0) {
      tile.load_rows();
    } else if (helper == 1) {
      tile.do_softmax();
    } else if (helper == 2 && stores_sum) {
      tile.store_sums();
    } else {
      tile.add_up_norms();
    }
    sync_warp();
    // No CTA ends while another may still write to it.
    if (tile.size_ > 1) {
      arrive_at_cluster();
      wait_for_cluster();
    }
  }

 private:
  __device__ __forceinline__ explicit DepthAttentionTileForward(const Args& args)
      : args_(args),
        layout_(args.layout),
        lane_(static_cast<int>(static_cast<uint32_t>(thread_rank()) % kWarpSize)),
        warp_(static_cast<int>(static_cast<uint32_t>(thread_rank()) / kWarpSize)),
        size_(args.config.cluster),
        rank_(size_ > 1 ? rank_in_cluster() : 0),
        first_row_(size_ > 1 ? cluster_rank() : cta_rank()),
        row_step_(size_ > 1 ? num_clusters() : num_ctas()),
        first_column_(rank_ * args.config.warps * kColumns),
        num_columns_(min_of(args.hidden - first_column_, args.config.warps * kColumns)) {}

  __device__ __forceinline__ static int min_of(int a, int b) { return a < b ? a : b; }

  template <typename V>
  __device__ __forceinline__ static V* shared(int offset) {
    return reinterpret_cast<V*>(dynamic_shared_memory() + offset);
  }
  __device__ __forceinline__ std::byte* stage(int slot) const {
    return shared<std::byte>(layout_.ring + slot * layout_.stage);
  }

  // Barriers of stage `slot`.
  __device__ __forceinline__ static Barrier* filled(int slot) {
    return shared<Barrier>(Layout::kStageBarriers) + slot;
  }
  __device__ __forceinline__ static Barrier* free(int slot) { return filled(slot) + kMostStages; }
  __device__ __forceinline__ static Barrier* added(int slot) {
    return filled(slot) + 2 * kMostStages;
  }
  // Barriers of row i, which has them from row i - 2.
  enum Kind { kSummed, kArrived, kReady, kSquared, kMet, kNormed };
  __device__ __forceinline__ static Barrier* of_row(Kind kind, int i) {
    return shared<Barrier>(Layout::kRowBarriers + i % 2 * Layout::kRowBarrierBytes) + kind;
  }
  __device__ __forceinline__ static uint32_t row_parity(int i) {
    return static_cast<uint32_t>(i) / 2 % 2;
  }

  // f(i, row) for this cluster's rows in turn.
  template <typename F>
  __device__ __forceinline__ void for_rows(F&& f) const {
    int i = 0;
#pragma unroll 1
    for (int row = first_row_; row < args_.num_tokens; row += row_step_) f(i++, row);
  }

  // Barriers, the query's parts, and zeros where rows end before their warps' columns do.
  __device__ __forceinline__ void prepare() const {
    const int warps = args_.config.warps, stages = args_.config.stages;
    if (thread_rank() == 0) {
      for (int slot = 0; slot < stages; ++slot) {
        init_barrier(filled(slot), 1);
        init_barrier(free(slot), warps + (args_.new_partial.data != nullptr ? 1 : 0));
        init_barrier(added(slot), warps);
      }
      for (int i = 0; i < 2; ++i) {
        init_barrier(of_row(kSummed, i), warps);
        init_barrier(of_row(kArrived, i), 1);
        init_barrier(of_row(kReady, i), 1);
        init_barrier(of_row(kSquared, i), warps);
        init_barrier(of_row(kMet, i), 1);
        init_barrier(of_row(kNormed, i), 1);
      }
      publish_barriers();
    }
    if (size_ > 1) arrive_at_cluster();
    const int row_bytes = 2 * num_columns_, tail = layout_.pitch - 16 - row_bytes;
    if (tail > 0) {
      const int words = tail / 4, num_rows = args_.num_rows * stages;
      for (int i = thread_rank(); i < words * num_rows; i += num_threads()) {
        const int row = i / words % args_.num_rows;
        std::byte* const at = stage(i / words / args_.num_rows) + place(row) + row_bytes;
        reinterpret_cast<uint32_t*>(at)[i % words] = 0;
      }
    }
    // Rows of the query have no weight, nor have those that no source has.
    for (int i = thread_rank(); i < 2 * Layout::kWeightBytes / 4; i += num_threads()) {
      shared<uint32_t>(Layout::kWeights)[i] = 0;
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    split_query();
    sync_cta();
    if (size_ > 1) wait_for_cluster();
  }
  __device__ __forceinline__ int num_threads() const {
    return kWarpSize * (args_.config.warps + 2 + (args_.new_partial.data != nullptr ? 1 : 0) +
                        (args_.out_weight.data != nullptr ? 1 : 0));
  }
  // Of a row in its stage; the last one may be a delta.
  __device__ __forceinline__ int place(int row) const {
    return row < args_.num_sources
               ? row * layout_.pitch + row / kTileSources * Layout::kGroupPadding
               : layout_.delta;
  }

  __device__ __forceinline__ static float gain_at(const GainVector& gain, int i) {
    return with_storage(gain.dtype, [&](auto type) {
      using Storage = decltype(type);
      const auto* const values = reinterpret_cast<const Storage*>(gain.data);
      return widen<float>(load_global<Storage>(values + i));
    });
  }
  // Of the vector that scores: column `i` of this CTA.
  __device__ __forceinline__ float query_at(int i) const {
    if (i >= num_columns_) return 0;
    float x = gain_at(args_.query, first_column_ + i);
    if (args_.key_weight.data != nullptr) x *= gain_at(args_.key_weight, first_column_ + i);
    return x;
  }
  __device__ __forceinline__ void split_query() const {
    float factor = 1;
    if constexpr (kScalesParts<T>) {
      float largest = 0;
      for (int i = thread_rank(); i < num_columns_; i += num_threads()) {
        const float x = fabsf(query_at(i));
        largest = x > largest ? x : largest;
      }
      largest = warp_max(largest);
      float* const of_warps = shared<float>(layout_.sums);
      if (lane_ == 0) of_warps[warp_] = largest;
      sync_cta();
      largest = 0;
      for (int i = 0; i < num_threads() / kWarpSize; ++i) {
        largest = of_warps[i] > largest ? of_warps[i] : largest;
      }
      factor = scale_of(largest);
      if (thread_rank() == 0) *query_unit() = inverse_of_scale(factor);
    }
    for (int i = thread_rank(); i < args_.config.warps * kColumns; i += num_threads()) {
      T parts[kQueryParts];
      split(query_at(i) * factor, parts);
#pragma unroll
      for (int k = 0; k < kQueryParts; ++k) {
        shared<T>(Layout::kQuery + k * layout_.pitch)[i] = parts[k];
      }
    }
  }
  // What the softmax's warp takes it back with.
  __device__ __forceinline__ float* query_unit() const { return shared<float>(layout_.unit); }

  __device__ __forceinline__ void load_rows() const {
    // Two rows of a stage for each lane, in registers: parameters are not read by index.
    constexpr int kMine = kMostTileRows / kWarpSize;
    ConstByteRows rows[kMine];
    int places[kMine];
#pragma unroll
    for (int k = 0; k < kMine; ++k) {
      const int row = min_of(lane_ + k * kWarpSize, args_.num_rows - 1);
      rows[k] = args_.rows[row];
      places[k] = place(row);
    }
    const uint32_t bytes = 2 * num_columns_;
    RingPosition at;
    for_rows([&](int, int row) {
      if (lane_ == 0) {
        wait(free(at.slot), at.parity ^ 1);
        arrive_and_expect(filled(at.slot), args_.num_rows * bytes);
      }
      sync_warp();
#pragma unroll
      for (int k = 0; k < kMine; ++k) {
        if (lane_ + k * kWarpSize < args_.num_rows) {
          copy_bulk(stage(at.slot) + places[k], row_at(rows[k], row) + 2 * first_column_, bytes,
                    filled(at.slot));
        }
      }
      at.advance(args_.config.stages);
    });
  }

  // Sums of squares and of <query, v>, of this lane's sources.
  static constexpr int kLaneSources = kMostTileRows / kWarpSize;
  struct LaneSums {
    Pair<float> of[kLaneSources];
  };

  __device__ __forceinline__ void do_softmax() const {
    const int num_sources = args_.num_sources;
    float unit = 1;
    if constexpr (kScalesParts<T>) unit = *query_unit();
    for_rows([&](int i, int row) {
      // On its way while the sums are made.
      float known[kLaneSources] = {};
      if (args_.known_rstd != nullptr) {
        for_lane_sources([&](int k, int source) {
          if (source < args_.num_known_rstd) {
            known[k] =
                load_global<float>(args_.known_rstd + int64_t{source} * args_.num_tokens + row);
          }
        });
      }
      wait(of_row(kSummed, i), row_parity(i));
      LaneSums sums = {};
      for_lane_sources([&](int k, int source) { sums.of[k] = sum_of_warps(i, source); });
      if constexpr (kScalesParts<T>) {
#pragma unroll
        for (int k = 0; k < kLaneSources; ++k) sums.of[k].second *= unit;
      }
      if (size_ > 1) exchange(i, sums);

      float logits[kLaneSources], rstd[kLaneSources], weights[kLaneSources];
      float largest = -INFINITY;
#pragma unroll
      for (int k = 0; k < kLaneSources; ++k) logits[k] = -INFINITY, rstd[k] = 0, weights[k] = 0;
      for_lane_sources([&](int k, int source) {
        rstd[k] = inverse_square_root(sums.of[k].first * args_.inverse_hidden + args_.eps);
        if (source < args_.num_known_rstd) rstd[k] = known[k];
        logits[k] = args_.scale * rstd[k] * sums.of[k].second;
        largest = logits[k] > largest ? logits[k] : largest;
      });
      largest = warp_max(largest);
      float sum = 0;
      for_lane_sources([&](int k, int) {
        // A single source has weight 1 whatever its logit, minus infinity too.
        weights[k] = num_sources == 1 ? 1.0f : exponential(logits[k] - largest);
        sum += weights[k];
      });
      sum = warp_sum(sum);
      const float inverse_sum = 1 / sum;
      for_lane_sources([&](int k, int source) {
        weights[k] *= inverse_sum;
        T parts[kWeightParts - 1];
        split(weights[k] * kWeightScale<T>, parts);
        T* const to = shared<T>(Layout::kWeights + i % 2 * Layout::kWeightBytes +
                                source / kTileSources * Layout::kGroupWeightBytes) +
                      source % kTileSources;
#pragma unroll
        for (int part = 0; part < kWeightParts - 1; ++part) to[part * kTileRows] = parts[part];
      });
      sync_warp();
      if (lane_ == 0) arrive(of_row(kReady, i));

      if (rank_ != 0) return;
      const int64_t num_tokens = args_.num_tokens;
      for_lane_sources([&](int k, int source) {
        if (args_.stats != nullptr) {
          args_.stats[source * num_tokens + row] = rstd[k];
          args_.stats[(num_sources + source) * num_tokens + row] = logits[k];
        }
        if (args_.weights != nullptr) args_.weights[source * num_tokens + row] = weights[k];
        if (args_.last_rstd != nullptr && source == num_sources - 1) args_.last_rstd[row] = rstd[k];
      });
      if (args_.stats != nullptr && lane_ == 0) {
        args_.stats[2 * num_sources * num_tokens + row] = largest + logarithm(sum);
      }
    });
  }
  // f(k, source) for the sources of this lane.
  template <typename F>
  __device__ __forceinline__ void for_lane_sources(F&& f) const {
#pragma unroll
    for (int k = 0; k < kLaneSources; ++k) {
      const int source = lane_ + k * kWarpSize;
      if (source < args_.num_sources) f(k, source);
    }
  }
  __device__ __forceinline__ Pair<float> sum_of_warps(int i, int source) const {
    const int step = layout_.warp_sums / static_cast<int>(sizeof(float));
    const float* of_warp = shared<float>(layout_.sums + i % 2 * layout_.row_sums +
                                         source / kTileSources * Layout::kGroupSumBytes) +
                           source % kTileSources;
    Pair<float> sum = {0, 0};
#pragma unroll 4
    for (int warp = 0; warp < args_.config.warps; ++warp, of_warp += step) {
      sum.first += of_warp[kQueryParts * kTileRows];
      sum.second += of_warp[0] + (of_warp[kTileRows] + of_warp[2 * kTileRows]);
    }
    return sum;
  }
  // Sums over this CTA's columns become sums over those of the cluster.
  __device__ __forceinline__ void exchange(int i, LaneSums& sums) const {
    const int slot = i % 2, bytes = layout_.message_bytes;
    std::byte* const message = shared<std::byte>(layout_.message + slot * bytes);
    const int inbox = layout_.inbox + slot * size_ * bytes;
    Barrier* const arrived = of_row(kArrived, i);
    for_lane_sources(
        [&](int k, int source) { reinterpret_cast<Pair<float>*>(message)[source] = sums.of[k]; });
    show_to_copy_engine();
    if (lane_ == 0) arrive_and_expect(arrived, size_ * bytes);
    sync_warp();
    if (lane_ < size_) {
      copy_bulk_to(lane_, shared<std::byte>(inbox + rank_ * bytes), message, bytes, arrived);
    }
    wait_for_remote(arrived, row_parity(i));
    for_lane_sources([&](int k, int source) {
      Pair<float> sum = {0, 0};
      for (int rank = 0; rank < size_; ++rank) {
        const Pair<float> more = shared<Pair<float>>(inbox + rank * bytes)[source];
        sum.first += more.first;
        sum.second += more.second;
      }
      sums.of[k] = sum;
    });
  }

  __device__ __forceinline__ void store_sums() const {
    const bool is_made = args_.num_rows > args_.num_sources;
    RingPosition at;
    for_rows([&](int, int row) {
      // Without a partial sum the delta is the sum, as it came.
      wait(is_made ? added(at.slot) : filled(at.slot), at.parity);
      if (lane_ == 0) {
        store_bulk(row_at(args_.new_partial, row) + 2 * first_column_,
                   stage(at.slot) + layout_.last, 2 * num_columns_);
        commit_bulk_stores();
        wait_until_bulk_stores_are_read<0>();
        arrive(free(at.slot));
      }
      sync_warp();
      at.advance(args_.config.stages);
    });
    wait_for_bulk_stores<0>();
  }

  __device__ __forceinline__ float* norm_of(int i) const {
    return shared<float>(layout_.squares) + 2 * args_.config.warps + i % 2;
  }
  __device__ __forceinline__ float* squares_of(int i) const {
    return shared<float>(layout_.squares) + i % 2 * args_.config.warps;
  }
  __device__ __forceinline__ void add_up_norms() const {
    // Of 16 bytes, so that the copy engine takes it.
    struct alignas(16) Message {
      float sum;
    };
    auto* const message = shared<Message>(layout_.norms + sizeof(Message) * 2);
    for_rows([&](int i, int) {
      wait(of_row(kSquared, i), row_parity(i));
      float sum = warp_sum(lane_ < args_.config.warps ? squares_of(i)[lane_] : 0.0f);
      if (size_ > 1) {
        Message* const mine = shared<Message>(layout_.norms) + i % 2;
        Message* const inbox = message + i % 2 * size_;
        if (lane_ == 0) {
          *mine = {sum};
          arrive_and_expect(of_row(kMet, i), size_ * sizeof(Message));
        }
        show_to_copy_engine();
        sync_warp();
        if (lane_ < size_) {
          copy_bulk_to(lane_, inbox + rank_, mine, sizeof(Message), of_row(kMet, i));
        }
        wait_for_remote(of_row(kMet, i), row_parity(i));
        sum = 0;
        for (int rank = 0; rank < size_; ++rank) sum += inbox[rank].sum;
      }
      if (lane_ == 0) {
        *norm_of(i) = inverse_square_root(sum * args_.inverse_hidden + args_.out_eps);
        arrive(of_row(kNormed, i));
      }
      sync_warp();
    });
  }

  // Where this lane has `ldmatrix` read, of a group in a stage. Rows of a tile that no source has
  // are other rows in the same banks, a part of the query or another source: none of their sums is
  // looked at, and they have no weight.
  struct TileRow {
    SharedAddress first;  // of a group of the first stage
    uint32_t moves;       // all bits set for a source, which has a row in every stage; else none

    __device__ __forceinline__ SharedAddress at(uint32_t offset) const {
      return first + (offset & moves);
    }
  };
  __device__ __forceinline__ TileRow tile_row(int row, int column, int group) const {
    constexpr int kFirstQueryBank = kTileSources % 8;
    const int num_sources = min_of(args_.num_sources - group * kTileSources, kTileSources);
    const int bank = row % 8;
    const SharedAddress base =
        shared_address(dynamic_shared_memory()) + 2 * (warp_ * kColumns + column);
    if (row >= kTileSources || (row >= num_sources && bank >= kFirstQueryBank)) {
      const int part = bank - kFirstQueryBank;
      return {keep_in_register(base + Layout::kQuery + part * layout_.pitch), keep_in_register(0u)};
    }
    const int source = row < num_sources ? row : bank < num_sources ? bank : 0;
    return {keep_in_register(base + layout_.ring + group * layout_.group + source * layout_.pitch),
            keep_in_register(~0u)};
  }

  // What a lane of a computing warp knows all along. It costs registers, of which there are enough,
  // and saves instructions, of which there are not.
  struct Lane {
    int t, pair;  // lane 4 * g + t has row or column g of results, of which two are a pair's
    bool leads;   // the first of its warp
    bool is_odd;  // g
    bool has_query_sums;
    bool has_squares;
    SharedAddress barriers;
    // The last group has rows of its own, and is most often the only one.
    TileRow last, first;
    TileRow turned_last, turned_first;  // for transposed loads
    SharedAddress query_sums;           // of the first of two rows' first group
    SharedAddress squares;
    SharedAddress weights;
    int column;  // of the two that it writes of every slice, in this CTA
  };
  __device__ __forceinline__ Lane make_lane() const {
    constexpr int kFirstQueryRow = kTileSources - 8;
    const SharedAddress base = shared_address(dynamic_shared_memory());
    const SharedAddress sums = base + layout_.sums + warp_ * layout_.warp_sums;
    const int g = keep_in_register(lane_ / 4), t = keep_in_register(lane_ % 4);
    const int half = lane_ / 8 % 2 * 8, late = lane_ / 16 * 8, last = layout_.num_groups - 1;
    Lane lane;
    lane.t = t;
    lane.pair = keep_in_register(g / 2);
    lane.leads = keep_in_register(lane_) == 0;
    lane.is_odd = g % 2 != 0;
    lane.has_query_sums = g >= kFirstQueryRow;
    lane.has_squares = t == g / 2;
    lane.barriers = keep_in_register(base + Layout::kRowBarriers);
    lane.last = tile_row(lane_ % 8 + half, late, last);
    lane.first = tile_row(lane_ % 8 + half, late, 0);
    lane.turned_last = tile_row(lane_ % 8 + late, half, last);
    lane.turned_first = tile_row(lane_ % 8 + late, half, 0);
    lane.query_sums =
        keep_in_register(sums + (g - kFirstQueryRow) * Layout::kPartSumBytes + 4 * 2 * t);
    lane.squares = keep_in_register(sums + kQueryParts * Layout::kPartSumBytes + 4 * g);
    lane.weights =
        keep_in_register(base + Layout::kWeights + g % 2 * Layout::kPartWeightBytes + 2 * 2 * t);
    lane.column = keep_in_register(warp_ * kColumns + 16 * t + g + (g % 2 == 0 ? 0 : 7));
    return lane;
  }
  __device__ __forceinline__ static SharedAddress row_barrier(const Lane& lane, Kind kind, int i) {
    return lane.barriers + i % 2 * Layout::kRowBarrierBytes + 8 * kind;
  }
  enum StageKind { kFilled, kFree, kAdded };
  __device__ __forceinline__ static SharedAddress stage_barrier(const Lane& lane, StageKind kind,
                                                                int slot) {
    return lane.barriers + 8 * slot + Layout::kStageBarriers + 8 * kMostStages * kind;
  }

  // f(address to load from, group) for the groups of a stage, the last one first.
  template <typename F>
  __device__ __forceinline__ void for_groups(int slot, const TileRow& last, const TileRow& first,
                                             F&& f) const {
    const int others = layout_.num_groups - 1;
    uint32_t offset = slot * layout_.stage;
    SharedAddress from = last.at(offset);
    int group = others, next = 0;
#pragma unroll 1
    while (true) {
      f(from, group);
      if (next == others) break;
      from = first.at(offset);
      offset += layout_.group;
      group = next++;
    }
  }

  // Two rows are in work: while the softmax's warp makes weights of the sums of one, this warp is
  // at the sums of the next.
  template <bool kHasNorm>
  __device__ __forceinline__ void compute() const {
    const Lane lane = make_lane();
    // Of columns 16 t + g and 16 t + 8 + g of every slice.
    float gains[kSlices][2], held[kSlices][2];
    if constexpr (kHasNorm) {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int column =
              warp_ * kColumns + slice * kSliceColumns + 16 * lane.t + 8 * k + lane_ / 4;
          gains[slice][k] =
              column < num_columns_ ? gain_at(args_.out_weight, first_column_ + column) : 0;
        }
      }
    }
    std::byte* out =
        args_.out.data + first_row_ * args_.out.inner_bytes + 2 * (first_column_ + lane.column);
    RingPosition here, next;
    next.advance(args_.config.stages);
    if (first_row_ < args_.num_tokens) add_and_score(lane, 0, here);
    int num_rows = 0;
    for_rows([&](int i, int row) {
      if (row + row_step_ < args_.num_tokens) add_and_score(lane, i + 1, next);
      wait(row_barrier(lane, kReady, i), row_parity(i));
      float mix[kSlices][2];
      make_mix(lane, i, here.slot, mix);
      sync_warp();
      if (lane.leads) arrive(stage_barrier(lane, kFree, here.slot));
      if (args_.mix.data != nullptr) store_mix(lane, row, mix);
      if constexpr (!kHasNorm) {
        store_out(lane, out, mix);
      } else {
        float square = 0;
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          square += mix[slice][0] * mix[slice][0] + mix[slice][1] * mix[slice][1];
        }
        square = warp_sum(square);
        if (lane.leads) {
          squares_of(i)[warp_] = square;
          arrive(row_barrier(lane, kSquared, i));
        }
        if (i > 0) store_normed(lane, i - 1, out, held, gains);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          held[slice][0] = mix[slice][0];
          held[slice][1] = mix[slice][1];
        }
        num_rows = i + 1;
      }
      here = next;
      next.advance(args_.config.stages);
    });
    if constexpr (kHasNorm) {
      if (num_rows > 0) store_normed(lane, num_rows - 1, out, held, gains);
    }
  }

  // partial + delta of this warp's columns, rounded, where the partial sum was.
  __device__ __forceinline__ void add(const Lane& lane, int slot) const {
    std::byte* const sums = stage(slot) + layout_.last + 2 * warp_ * kColumns;
    const std::byte* const deltas = stage(slot) + layout_.delta + 2 * warp_ * kColumns;
    constexpr int kChunk = 8;
#pragma unroll
    for (int first = 0; first < kColumns / kChunk; first += kWarpSize) {
      const int chunk = first + lane_;
      if (chunk >= kColumns / kChunk) break;
      uint4* const at = reinterpret_cast<uint4*>(sums) + chunk;
      float x[kChunk], y[kChunk];
      unpack(*at, T{}, x);
      unpack(reinterpret_cast<const uint4*>(deltas)[chunk], T{}, y);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] += y[j];
      *at = pack(T{}, x);
    }
    show_to_copy_engine();
    sync_warp();
    if (lane.leads) arrive(stage_barrier(lane, kAdded, slot));
  }

  __device__ __forceinline__ void add_and_score(const Lane& lane, int i,
                                                const RingPosition& here) const {
    wait(stage_barrier(lane, kFilled, here.slot), here.parity);
    if (args_.num_rows > args_.num_sources) add(lane, here.slot);
    const int row_sums = i % 2 * layout_.row_sums;
    for_groups(here.slot, lane.last, lane.first, [&](SharedAddress from, int group) {
      score(lane, from, row_sums + group * Layout::kGroupSumBytes);
    });
    sync_warp();
    if (lane.leads) arrive(row_barrier(lane, kSummed, i));
  }

  // Sums over this warp's columns, of a group.
  __device__ __forceinline__ void score(const Lane& lane, SharedAddress from, int to) const {
    // Products with the tile's first eight rows and with its last ones. Columns in turn go to two
    // sums of each, so that none waits for the one before.
    float early[2][4] = {}, late[2][4] = {};
    uint32_t x[2][4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) load_matrices(x[0][j], from + 32 * j);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      if (slice + 1 < kSlices) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          load_matrices(x[(slice + 1) % 2][j], from + 32 * (4 * (slice + 1) + j));
        }
      }
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto& m = x[slice % 2][j];
          multiply_add_16x8x8(T{}, early[j % 2], m[half], m[half + 1], m[half]);
          multiply_add_16x8x8(T{}, late[j % 2], m[half], m[half + 1], m[half + 1]);
        }
      }
    }
    if (lane.has_query_sums) {
      store_shared(lane.query_sums + to,
                   Pair<float>{early[0][2] + early[1][2], early[0][3] + early[1][3]});
      store_shared(lane.query_sums + to + 4 * 8,
                   Pair<float>{late[0][2] + late[1][2], late[0][3] + late[1][3]});
    }
    if (lane.has_squares) {
      store_shared(lane.squares + to,
                   lane.is_odd ? early[0][1] + early[1][1] : early[0][0] + early[1][0]);
      store_shared(lane.squares + to + 4 * 8,
                   lane.is_odd ? late[0][3] + late[1][3] : late[0][2] + late[1][2]);
    }
  }

  // Columns 16 t + g and 16 t + 8 + g of every slice. A product has eight results for each of 16
  // columns, and four times 16 columns have two of them each: weights' first and second parts. The
  // third ones, which matter where the mix is kept as float, come in a round of their own.
  __device__ __forceinline__ void make_mix(const Lane& lane, int i, int slot,
                                           float (&mix)[kSlices][2]) const {
    float sums[kSlices][4] = {};
    const SharedAddress weights = lane.weights + i % 2 * Layout::kWeightBytes;
    add_weighted(lane, slot, weights, sums);
    if constexpr (!kScalesParts<T>) {
      if (args_.mix.data != nullptr) {
        add_weighted(lane, slot, weights + 2 * Layout::kPartWeightBytes, sums);
      }
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      mix[slice][0] = (sums[slice][0] + sums[slice][1]) * (1 / kWeightScale<T>);
      mix[slice][1] = (sums[slice][2] + sums[slice][3]) * (1 / kWeightScale<T>);
    }
  }
  // Of two parts of the weights.
  __device__ __forceinline__ void add_weighted(const Lane& lane, int slot, SharedAddress weights,
                                               float (&sums)[kSlices][4]) const {
    for_groups(slot, lane.turned_last, lane.turned_first, [&](SharedAddress from, int group) {
      const SharedAddress at = weights + group * Layout::kGroupWeightBytes;
      const auto early = load_shared<uint32_t>(at), late = load_shared<uint32_t>(at + 2 * 8);
      const int pair = keep_in_register(lane.pair);
      uint32_t w[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w[j][0] = pair == j ? early : 0;
        w[j][1] = pair == j ? late : 0;
      }
      uint32_t x[2][4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) load_matrices_transposed(x[0][j], from + 32 * j);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        if (slice + 1 < kSlices) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            load_matrices_transposed(x[(slice + 1) % 2][j], from + 32 * (4 * (slice + 1) + j));
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add_16x8x16(T{}, sums[slice], x[slice % 2][j], w[j]);
        }
      }
    });
  }

  // Lanes of neighbouring columns exchange, so that each writes two neighbours.
  __device__ __forceinline__ void store_out(const Lane& lane, std::byte*& out,
                                            const float (&x)[kSlices][2]) const {
    const int room = num_columns_ - lane.column;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const float got = shuffle_xor(lane.is_odd ? x[slice][0] : x[slice][1], 4);
      const float pair[2] = {lane.is_odd ? got : x[slice][0], lane.is_odd ? x[slice][1] : got};
      if (slice * kSliceColumns < room) {
        *reinterpret_cast<uint32_t*>(out + 2 * slice * kSliceColumns) = pack_pair(T{}, pair);
      }
    }
    out += args_.out_step;
  }
  __device__ __forceinline__ void store_normed(const Lane& lane, int i, std::byte*& out,
                                               const float (&x)[kSlices][2],
                                               const float (&gains)[kSlices][2]) const {
    wait(row_barrier(lane, kNormed, i), row_parity(i));
    const float norm = *norm_of(i);
    float normed[kSlices][2];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      normed[slice][0] = x[slice][0] * norm * gains[slice][0];
      normed[slice][1] = x[slice][1] * norm * gains[slice][1];
    }
    store_out(lane, out, normed);
  }
  __device__ __forceinline__ void store_mix(const Lane& lane, int row,
                                            const float (&x)[kSlices][2]) const {
    const int column = lane.column - (lane.is_odd ? 7 : 0);
    auto* const to = reinterpret_cast<float*>(row_at(args_.mix, row)) + first_column_ + column;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int further = slice * kSliceColumns + 8 * k;
        if (column + further < num_columns_) to[further] = x[slice][k];
      }
    }
  }

  const Args& args_;
  const Layout& layout_;
  const int lane_;
  const int warp_;
  const int size_;  // of the cluster
  const int rank_;
  const int first_row_;
  const int row_step_;
  const int first_column_;  // of this CTA
  const int num_columns_;
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kMostTileThreads, 1)
    depth_attention_tile_fwd_kernel(const __grid_constant__ DepthAttentionTileArgs args) {
  DepthAttentionTileForward<T, kColumns>::run(args);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
