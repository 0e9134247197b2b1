// Depth attention, backward, for aligned rows of one 16-bit dtype: everything is read once, and all
// arithmetic on rows is done by tensor cores. With the notation of rows_backward.cuh, and g
// the gradient of the mix,
//
//   t_i  = <g, v_i> + grad_weights_i
//   dl_i = p_i (t_i - sum_j p_j t_j)
//   dv_i = p_i g + b_i u + c_i v_i,   b_i = dl_i r_i,  c_i = -dl_i l_i r_i^2 / D
//   du   = sum_i b_i v_i
//
// A token's rows lie in a stage of shared memory as a matrix of 16 rows: twelve sources, g, and u
// in three parts that add up to its float32 values; more sources make more such matrices, groups.
// The matrix times its transpose is every sum that is needed: squares on the diagonal, and the rows
// of g and u. A matrix of coefficients times it is dv, which takes the sources' place and is stored
// from there. du is added up in registers over all rows of the CTA.
//
// With an output norm of gain w, the incoming gradient is that of the norm's result. With h = w
// times it, s = 1 / rms of the mix and y_i = <mix, v_i> = sum_j p_j <v_j, v_i>,
//
//   g          = s h - k mix,   k = s^3 <mix, h> / D
//   <g, v_i>   = s <h, v_i> - k y_i
//   dv_i       = p_i s h - sum_j p_i k p_j v_j + b_i u + c_i v_i
//
// so the same products say all of it, if all sources are in one matrix: ten, h in three parts, u.
//
// Warps have a role each, and hand stages and sums to one another by barriers:
//
//   loads        whole rows into the stages that are free
//   computes     (most) products of its columns; and, one row later, dv and du of its columns
//   finds        adds up the products of all warps, and over the cluster, and makes coefficients
//   stores       dv, and frees the stage
//
// While coefficients of a row are found the computing warps are at the next row's products.
#pragma once

#include "common/mma.cuh"
#include "common/parts.cuh"
#include "common/ring.cuh"
#include "common/rows.cuh"
#include "common/teams.cuh"
#include "depth_attention/args.cuh"
#include "depth_attention/backward_config.hpp"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// Sources, the incoming gradient, and gradients that exist.
constexpr int kMostLoadedRows = 2 * kMostBackwardSources + 1;

struct DepthAttentionBackwardTileArgs {
  DepthAttentionConfig config;
  DepthAttentionBackwardLayout layout;
  int num_tokens;
  int hidden;
  int num_sources;
  int num_bases;
  float inverse_hidden;
  float eps;
  float out_eps;
  float scale;
  GainVector query;
  GainVector key_weight;
  GainVector out_weight;
  const float* grad_weights;  // [N, M], or null
  float* parts;  // [num_teams, 2, D]: sums over a team's rows of du and, with a norm, of the
                 // gradient of out_weight; or null
  // The sources, the incoming gradient, and the gradients that are added to, in order of sources.
  ConstByteRows rows[kMostLoadedRows];
  uint8_t base_rows[kMostBackwardSources];  // which of the rows a source's is, or 0: it has none
  ByteRows grads[kMostBackwardSources];     // or absent
};

// Values of a vector at the columns that column_of(i) says, all of them under way at once; and
// `otherwise` beyond `end` or where there is no vector.
template <int kCount, typename ColumnOf>
__device__ __forceinline__ void load_values(const GainVector& vector, int end, float otherwise,
                                            float (&x)[kCount], ColumnOf&& column_of) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = otherwise;
  if (vector.data == nullptr) return;
  with_storage(vector.dtype, [&](auto type) {
    using T = decltype(type);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = column_of(i);
      if (column < end) {
        x[i] = widen<float>(load_global<T>(vector.data + column * static_cast<int>(sizeof(T))));
      }
    }
  });
}

template <typename T, bool kHasNorm>
class DepthAttentionBackwardTileBody {
  using Args = DepthAttentionBackwardTileArgs;
  using Layout = DepthAttentionBackwardLayout;
  // Of a matrix: sources, rows of the incoming gradient, parts of the query.
  static constexpr int kGradientRows = kHasNorm ? 3 : 1;
  static constexpr int kSources = kTileSources - kGradientRows;
  static_assert(!kHasNorm || !kScalesParts<T>, "a row's h would want a power of two of its own");

 public:
  __device__ __forceinline__ explicit DepthAttentionBackwardTileBody(const Args& args)
      : args_(args),
        layout_(args.layout),
        lane_(static_cast<unsigned>(thread_rank()) % kWarpSize),
        warp_(static_cast<unsigned>(thread_rank()) / kWarpSize) {
    if (args.config.cluster > 1) {
      rank_ = rank_in_cluster();
      team_ = cluster_rank();
      num_teams_ = num_clusters();
    } else {
      rank_ = 0;
      team_ = cta_rank();
      num_teams_ = num_ctas();
    }
    num_rows_ =
        team_ < args.num_tokens ? (args.num_tokens - team_ + num_teams_ - 1) / num_teams_ : 0;
    const int most = layout_.slices * kSliceColumns;
    first_column_ = rank_ * most;
    const int left = args.hidden - first_column_;
    num_columns_ = left < most ? left : most;
  }

  __device__ __forceinline__ void run() {
    prepare();
    if (warp_ < args_.config.warps) {
      compute();
    } else if (warp_ == args_.config.warps) {
      find_coefficients();
    } else if (warp_ == args_.config.warps + 1) {
      load();
    } else {
      store();
    }
    // A CTA's shared memory is there until no other one of its cluster writes to it any more.
    sync_warp();
    if (args_.config.cluster > 1) sync_cluster();
  }

 private:
  // Of a source: p, b, c, times a power of two.
  struct alignas(16) Coefficient {
    float weight, score, value, unused;
  };
  // What the CTAs of a cluster tell one another about a source.
  struct alignas(16) Sums {
    float square, dot, gradient, unused;
  };
  // A lane's share of a group's matrices: coefficients [16, 16], as `a` of a product has them, in
  // an upper and a lower part; and of b, as `b` has it.
  enum WhichFragment { kUpper, kLower, kScores, kFragments };

  template <typename U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(dynamic_shared_memory() + offset);
  }
  // Barriers. Of two rows: products are there, and those of the cluster, and coefficients.
  __device__ __forceinline__ Barrier* barrier(int i) const {
    return at<Barrier>(layout_.barriers) + i;
  }
  __device__ __forceinline__ Barrier* summed(int half) const { return barrier(half); }
  __device__ __forceinline__ Barrier* arrived(int half) const { return barrier(2 + half); }
  __device__ __forceinline__ Barrier* ready(int half) const { return barrier(4 + half); }
  // Of a stage: its rows are there, and its gradients, and those are stored.
  __device__ __forceinline__ Barrier* filled(int slot) const { return barrier(6 + slot); }
  __device__ __forceinline__ Barrier* written(int slot) const {
    return barrier(6 + args_.config.stages + slot);
  }
  __device__ __forceinline__ Barrier* free(int slot) const {
    return barrier(6 + 2 * args_.config.stages + slot);
  }

  __device__ __forceinline__ int row_number(int i) const { return team_ + i * num_teams_; }
  // Sources with those that fill up the last group.
  __device__ __forceinline__ int padded_sources() const { return layout_.num_groups * kSources; }

  __device__ __forceinline__ void prepare() {
    if (thread_rank() == 0) {
      const auto warps = static_cast<uint32_t>(args_.config.warps);
      for (int i = 0; i < 2; ++i) {
        init_barrier(summed(i), warps);
        init_barrier(arrived(i), 1);
        init_barrier(ready(i), 1);
      }
      for (int i = 0; i < args_.config.stages; ++i) {
        init_barrier(filled(i), 1);
        init_barrier(written(i), warps);
        init_barrier(free(i), 1);
      }
      publish_barriers();
      const uint32_t ones = pack_pair(T{}, {1, 1});
      *at<uint4>(layout_.zeros) = uint4{0, 0, 0, 0};
      for (int i = 0; i < 2; ++i) at<uint4>(layout_.ones)[i] = uint4{ones, ones, ones, ones};
    }
    if (thread_rank() < args_.num_sources) {
      const int row = args_.base_rows[thread_rank()];
      at<int>(layout_.base_offsets)[thread_rank()] = row == 0 ? 0 : row_offset(row);
    }
    // Columns of the last slice that no row has are zero, in every stage.
    const int num_rows = args_.num_sources + 1 + args_.num_bases;
    for (int slot = warp_; slot < args_.config.stages;
         slot += args_.config.warps + kBackwardHelperWarps) {
      for (int row = 0; row < num_rows; ++row) clear_tail(slot * layout_.stage + row_offset(row));
    }
    sync_cta();
    if (args_.config.cluster > 1) {
      arrive_at_cluster();
      wait_for_cluster();
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
  }

  // Of a stage's source; and of its row of args.rows.
  __device__ __forceinline__ int source_offset(int source) const {
    return source / kSources * layout_.group + source % kSources * layout_.pitch;
  }
  __device__ __forceinline__ int row_offset(int row) const {
    if (row < args_.num_sources) return source_offset(row);
    if (row == args_.num_sources) return layout_.loaded_gradient;
    return layout_.bases + (row - args_.num_sources - 1) * layout_.pitch;
  }
  // By a warp: what a slice has beyond the end of a row, in shared memory.
  __device__ __forceinline__ void clear_tail(int row) const {
    const int end = (num_columns_ + kSliceColumns - 1) / kSliceColumns * kSliceColumns;
    const int column = num_columns_ + 8 * lane_;
    if (column < end) *at<uint4>(row + 2 * column) = uint4{0, 0, 0, 0};
  }

  // The loading warp.
  __device__ __forceinline__ void load() const {
    constexpr int kPerLane = (kMostLoadedRows + kWarpSize - 1) / kWarpSize;
    const int count = args_.num_sources + 1 + args_.num_bases;
    const uint32_t bytes = static_cast<uint32_t>(num_columns_) * 2;
    ConstByteRows rows[kPerLane];
    int to[kPerLane];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const int row = lane_ + e * kWarpSize;
      if (row >= count) continue;
      rows[e] = args_.rows[row];
      rows[e].data += first_column_ * 2;
      to[e] = row_offset(row);
    }
    RingPosition stage;
    for (int i = 0; i < num_rows_; ++i) {
      if (lane_ == 0) {
        wait(free(stage.slot), stage.parity ^ 1);
        arrive_and_expect(filled(stage.slot), static_cast<uint32_t>(count) * bytes);
      }
      sync_warp();
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        if (lane_ + e * kWarpSize < count) {
          copy_bulk(at<std::byte>(stage.slot * layout_.stage + to[e]),
                    row_at(rows[e], row_number(i)), bytes, filled(stage.slot));
        }
      }
      stage.advance(args_.config.stages);
    }
  }

  // The storing warp.
  __device__ __forceinline__ void store() const {
    constexpr int kPerLane = (kMostBackwardSources + kWarpSize - 1) / kWarpSize;
    const uint32_t bytes = static_cast<uint32_t>(num_columns_) * 2;
    ByteRows rows[kPerLane];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const int source = lane_ + e * kWarpSize;
      rows[e].data = nullptr;
      if (source >= args_.num_sources) continue;
      rows[e] = args_.grads[source];
      if (rows[e].data != nullptr) rows[e].data += first_column_ * 2;
    }
    RingPosition stage;
    for (int i = 0; i < num_rows_; ++i) {
      wait(written(stage.slot), stage.parity);
      const int first = stage.slot * layout_.stage;
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        if (rows[e].data != nullptr) {
          store_bulk(row_at(rows[e], row_number(i)),
                     at<std::byte>(first + source_offset(lane_ + e * kWarpSize)), bytes);
        }
      }
      commit_bulk_stores();
      // A row of NaN has left NaN there, too.
      if (num_columns_ % kSliceColumns != 0) {
        for (int source = 0; source < args_.num_sources; ++source) {
          clear_tail(first + source_offset(source));
        }
      }
      wait_until_bulk_stores_are_read<0>();
      sync_warp();
      if (lane_ == 0) arrive(free(stage.slot));
      stage.advance(args_.config.stages);
    }
  }

  // The finding warp: a lane has up to two sources.
  static constexpr int kSourcesOfLane =
      kHasNorm ? 1 : (kMostBackwardSources + kWarpSize - 1) / kWarpSize;
  // Of a row, as a lane knows them of its sources.
  struct Found {
    float square[kSourcesOfLane];
    float dot[kSourcesOfLane];
    float gradient[kSourcesOfLane];  // <g, v_i>; with a norm, <h, v_i> at first
  };

  __device__ __forceinline__ void find_coefficients() const {
    const int count = args_.num_sources;
    float query_unscale = 1;
    if constexpr (kScalesParts<T>) {
      sync_first_threads(kWarpSize * (args_.config.warps + 1));
      query_unscale = inverse_of_scale(query_scale());
    }
    for (int i = 0; i < num_rows_; ++i) {
      const int half = i % 2;
      const uint32_t parity = i / 2 % 2;
      float grad_weight[kSourcesOfLane] = {};
      if (args_.grad_weights != nullptr) {
#pragma unroll
        for (int e = 0; e < kSourcesOfLane; ++e) {
          const int source = lane_ + e * kWarpSize;
          if (source < count) {
            grad_weight[e] =
                load_global<float>(args_.grad_weights +
                                   static_cast<int64_t>(source) * args_.num_tokens + row_number(i));
          }
        }
      }
      wait(summed(half), parity);
      Found found = {};
      if constexpr (kHasNorm) {
        add_products(half, parity, found);
      } else {
        add_sums(half, parity, found);
      }

      float rstd[kSourcesOfLane], logit[kSourcesOfLane], weight[kSourcesOfLane];
      float largest = -INFINITY;
#pragma unroll
      for (int e = 0; e < kSourcesOfLane; ++e) {
        rstd[e] = inverse_square_root(found.square[e] * args_.inverse_hidden + args_.eps);
        logit[e] = rstd[e] * found.dot[e];
        if (lane_ + e * kWarpSize < count) largest = logit[e] > largest ? logit[e] : largest;
      }
      largest = warp_max(largest);
      float sum = 0;
#pragma unroll
      for (int e = 0; e < kSourcesOfLane; ++e) {
        // A single source has weight 1 whatever its logit, minus infinity too.
        weight[e] = lane_ + e * kWarpSize >= count ? 0
                    : count == 1                   ? 1
                                                   : exponential(logit[e] - largest);
        sum += weight[e];
      }
      const float inverse_sum = 1 / warp_sum(sum);
#pragma unroll
      for (int e = 0; e < kSourcesOfLane; ++e) weight[e] *= inverse_sum;

      Norm norm = {1, 0};
      if constexpr (kHasNorm) {
        norm = find_norm(half, weight[0], found.gradient[0]);
        if (lane_ == 0) at<float>(layout_.scales)[half] = norm.rstd;
      }
      float mean = 0;
#pragma unroll
      for (int e = 0; e < kSourcesOfLane; ++e) {
        found.gradient[e] += grad_weight[e];
        // Of sources that there are not it may be NaN.
        if (lane_ + e * kWarpSize < count) mean += weight[e] * found.gradient[e];
      }
      mean = warp_sum(mean);
      float score[kSourcesOfLane], value[kSourcesOfLane], largest_score = 0;
#pragma unroll
      for (int e = 0; e < kSourcesOfLane; ++e) {
        // And so its logit's gradient is 0 and not a rounding error.
        const float grad_logit = count == 1 ? 0 * mean : weight[e] * (found.gradient[e] - mean);
        score[e] = grad_logit * rstd[e];
        value[e] = -grad_logit * logit[e] * rstd[e] * rstd[e] * args_.inverse_hidden;
        if (lane_ + e * kWarpSize >= count) weight[e] = score[e] = value[e] = 0;
        largest_score = magnitude_of_larger(largest_score, score[e]);
      }
      float row_scale = 1;
      if constexpr (kScalesParts<T>) {
        row_scale = scale_of(warp_max(largest_score));
        if (lane_ == 0) at<float>(layout_.scales)[half] = inverse_of_scale(row_scale);
      }
#pragma unroll
      for (int e = 0; e < kSourcesOfLane; ++e) {
        const int source = lane_ + e * kWarpSize;
        if (source < padded_sources()) {
          write_coefficient(half, source, weight[e], score[e], value[e], row_scale, query_unscale);
        }
      }
      sync_warp();
      for (int group = 0; group < layout_.num_groups; ++group) {
        write_fragments(half, group, norm);
      }
      sync_warp();
      if (lane_ == 0) arrive(ready(half));
    }
  }

  __device__ __forceinline__ static float magnitude_of_larger(float magnitude, float x) {
    const float other = x < 0 ? -x : x;
    return other > magnitude ? other : magnitude;
  }

  // Products of all warps, and over the cluster, for each source of this lane.
  __device__ __forceinline__ void add_sums(int half, uint32_t parity, Found& found) const {
    const int count = padded_sources(), of_warp = layout_.sums_of_warp / 4;
    auto* mine = at<Sums>(layout_.message + half * layout_.message_bytes);
#pragma unroll
    for (int e = 0; e < kSourcesOfLane; ++e) {
      const int source = lane_ + e * kWarpSize;
      if (source >= count) continue;
      const float* from = at<float>(layout_.sums) + half * args_.config.warps * of_warp +
                          source / kSources * (kQueryParts + 2) * kTileRows + source % kSources;
#pragma unroll 4
      for (int warp = 0; warp < args_.config.warps; ++warp, from += of_warp) {
        found.gradient[e] += from[0];
        found.dot[e] += from[16] + (from[32] + from[48]);
        found.square[e] += from[64];
      }
      if (args_.config.cluster > 1) {
        mine[source] = {found.square[e], found.dot[e], found.gradient[e], 0};
      }
    }
    if (args_.config.cluster == 1) return;
    const auto* all = reinterpret_cast<const Sums*>(exchange(half, parity));
#pragma unroll
    for (int e = 0; e < kSourcesOfLane; ++e) {
      const int source = lane_ + e * kWarpSize;
      found.square[e] = found.dot[e] = found.gradient[e] = 0;
      if (source >= count) continue;
      for (int rank = 0; rank < args_.config.cluster; ++rank) {
        const Sums more = all[rank * count + source];
        found.square[e] += more.square;
        found.dot[e] += more.dot;
        found.gradient[e] += more.gradient;
      }
    }
  }

  // With a norm: all products [16, kSources], in the place of the first warp's.
  static constexpr int kProducts = kTileRows * kSources;
  __device__ __forceinline__ float* products_of_row(int half) const {
    return at<float>(layout_.sums) + half * args_.config.warps * kProducts;
  }

  __device__ __forceinline__ void add_products(int half, uint32_t parity, Found& found) const {
    float* of_row = products_of_row(half);
    if (args_.config.cluster == 1) {
      add_parts(of_row, args_.config.warps, of_row);
    } else {
      add_parts(of_row, args_.config.warps,
                at<float>(layout_.message + half * layout_.message_bytes));
      const auto* all = reinterpret_cast<const float*>(exchange(half, parity));
      add_parts(all, args_.config.cluster, of_row);
    }
    sync_warp();
    if (lane_ >= kSources) return;
    const auto of = [&](int row) { return of_row[row * kSources + lane_]; };
    found.square[0] = of(lane_);
    found.gradient[0] = of(kSources) + (of(kSources + 1) + of(kSources + 2));
    found.dot[0] = of(kTileSources) + (of(kTileSources + 1) + of(kTileSources + 2));
  }
  __device__ __forceinline__ void add_parts(const float* parts, int count, float* to) const {
    constexpr int kPerLane = kProducts / kWarpSize;
    static_assert(!kHasNorm || kProducts % kWarpSize == 0);
    float sums[kPerLane] = {};
#pragma unroll 2
    for (int part = 0; part < count; ++part, parts += kProducts) {
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) sums[e] += parts[lane_ + e * kWarpSize];
    }
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) to[lane_ + e * kWarpSize] = sums[e];
  }

  // What all CTAs of the cluster have as their message. A CTA sends that of the row after the next
  // when it has those of the next row from everybody, who sent them when they had used up this
  // row's.
  __device__ __forceinline__ const std::byte* exchange(int half, uint32_t parity) const {
    const auto bytes = static_cast<uint32_t>(layout_.message_bytes);
    const int size = args_.config.cluster;
    auto* inbox = at<std::byte>(layout_.inbox + half * size * layout_.message_bytes);
    show_to_copy_engine();
    if (lane_ == 0) arrive_and_expect(arrived(half), static_cast<uint32_t>(size) * bytes);
    sync_warp();
    if (lane_ < size) {
      copy_bulk_to(lane_, inbox + rank_ * layout_.message_bytes,
                   at<std::byte>(layout_.message + half * layout_.message_bytes), bytes,
                   arrived(half));
    }
    wait_for_remote(arrived(half), parity);
    return inbox;
  }

  // Of the output norm: s and k, see above.
  struct Norm {
    float rstd;
    float mix;
  };
  // From a lane's p and <h, v_i>, which becomes <g, v_i>.
  __device__ __forceinline__ Norm find_norm(int half, float weight, float& gradient) const {
    auto* weights = at<float>(layout_.scales) + 2;
    if (lane_ < kSources) weights[lane_] = weight;
    sync_warp();
    float of_mix = 0;
    if (lane_ < kSources) {
      const float* products = products_of_row(half);
#pragma unroll
      for (int j = 0; j < kSources; ++j) of_mix += weights[j] * products[j * kSources + lane_];
    }
    const bool is_source = lane_ < args_.num_sources;
    const float square = warp_sum(is_source ? weight * of_mix : 0);
    const float dot = warp_sum(is_source ? weight * gradient : 0);
    Norm norm;
    // Rounding can make less than nothing of it.
    norm.rstd =
        inverse_square_root((square < 0 ? 0 : square) * args_.inverse_hidden + args_.out_eps);
    norm.mix = norm.rstd * norm.rstd * norm.rstd * dot * args_.inverse_hidden;
    gradient = norm.rstd * gradient - norm.mix * of_mix;
    return norm;
  }

  __device__ __forceinline__ void write_coefficient(int half, int source, float weight, float score,
                                                    float value, float row_scale,
                                                    float query_unscale) const {
    Pair<float> scores = {score, weight};
    if constexpr (kScalesParts<T>) {
      scores.first *= row_scale;
      score *= query_unscale;
      const float scale = scale_of(magnitude_of_larger(magnitude_of_larger(weight, score), value));
      weight *= scale;
      score *= scale;
      value *= scale;
      at<float>(layout_.scales)[2 + half * padded_sources() + source] = inverse_of_scale(scale);
    }
    at<Coefficient>(layout_.coefficients)[source] = {weight, score, value, 0};
    // Three parts of b, and with a norm of p, for the products that add up over rows.
    uint32_t parts[3];
#pragma unroll
    for (uint32_t& part : parts) part = split_off(T{}, scores);
    *at<uint4>(layout_.scores + source * 16) =
        uint4{(parts[0] & 0xffffu) | parts[1] << 16, parts[2] & 0xffffu,
              parts[0] >> 16 | (parts[1] & 0xffff0000u), parts[2] >> 16};
  }

  // Each lane writes its own share.
  __device__ __forceinline__ void write_fragments(int half, int group, const Norm& norm) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const auto* coefficients = at<Coefficient>(layout_.coefficients) + group * kSources;
    const Coefficient none = {0, 0, 0, 0};
    const Coefficient above = coefficients[g];
    const Coefficient below = g + 8 < kSources ? coefficients[g + 8] : none;
    const auto coefficient = [&](const Coefficient& of, int row, int column) {
      if (column >= kTileSources) return of.score;
      float x = 0;
      if constexpr (kHasNorm) {
        if (column >= kSources) return of.weight * norm.rstd;
        x = -(of.weight * norm.mix) * coefficients[column].weight;
      } else {
        if (column >= kSources) return of.weight;
      }
      return row == column ? x + of.value : x;
    };
    uint32_t words[kFragments][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Coefficient& of = j % 2 == 0 ? above : below;
      const int row = g + j % 2 * 8, column = 2 * t + j / 2 * 8;
      Pair<float> pair = {coefficient(of, row, column), coefficient(of, row, column + 1)};
      words[kUpper][j] = split_off(T{}, pair);
      words[kLower][j] = split_off(T{}, pair);
    }
    // Without a norm columns 0 to 2 of b's matrix are for 16 columns of a row, 4 to 6 for the next;
    // with one these are parts of p, for the gradient of the norm's gain.
    const auto* parts =
        at<uint16_t>(layout_.scores + group * kSources * 16) + (kHasNorm ? g : g % 4);
    const auto parts_of = [&](int source) {
      uint32_t word = 0;
      if (source < kSources) word = parts[source * 8];
      if (source + 1 < kSources) word |= static_cast<uint32_t>(parts[source * 8 + 8]) << 16;
      return word;
    };
    const uint32_t first = parts_of(2 * t), last = parts_of(2 * t + 8);
    const bool is_left = kHasNorm || g < 4, is_right = kHasNorm || g >= 4;
    words[kScores][0] = is_left ? first : 0;
    words[kScores][1] = is_left ? last : 0;
    words[kScores][2] = is_right ? first : 0;
    words[kScores][3] = is_right ? last : 0;
    auto* to = at<uint4>(layout_.fragments) +
               (half * layout_.num_groups + group) * kFragments * kWarpSize + lane_;
#pragma unroll
    for (int which = 0; which < kFragments; ++which) {
      to[which * kWarpSize] =
          uint4{words[which][0], words[which][1], words[which][2], words[which][3]};
    }
  }

  // A power of two for the CTA's part of u.
  __device__ __forceinline__ float query_scale() const {
    const float* of_warps = at<float>(layout_.scales) + 2 + 2 * padded_sources();
    float largest = 0;
    for (int warp = 0; warp < args_.config.warps; ++warp) {
      largest = magnitude_of_larger(largest, of_warps[warp]);
    }
    return scale_of(largest);
  }

  // The computing warps. What a lane = 4 * g + t adds up over rows: of 16 columns (with a norm) or
  // 32 two sums, of columns g and g + 8; see write_part().
  static constexpr int kTotalsOfSlice = kHasNorm ? 4 : 2;
  using Totals = float[kMostSlices * kTotalsOfSlice][2];
  using Gains = float[2 * kMostSlices];

  // The columns of a computing warp, within its CTA's.
  struct Share {
    int column;
    int slices;
  };

  __device__ __forceinline__ void compute() const {
    const int of_warp = args_.config.columns / kSliceColumns, first = warp_ * of_warp;
    const int left = (num_columns_ + kSliceColumns - 1) / kSliceColumns - first;
    Share share = {first * kSliceColumns, left < of_warp ? left : of_warp};
    if (share.slices < 0) share.slices = 0;
    write_query(share);
    const float query_unscale = kScalesParts<T> ? inverse_of_scale(query_scale()) : 1;
    Gains gains = {};
    if constexpr (kHasNorm) {
      const int end = num_columns_ < share.column + share.slices * kSliceColumns
                          ? num_columns_
                          : share.column + share.slices * kSliceColumns;
      load_values(args_.out_weight, first_column_ + end, 0, gains, [&](int i) {
        return first_column_ + share.column + i / 2 * kSliceColumns + 2 * lane_ + i % 2;
      });
    }

    Totals totals = {};
    RingPosition next;
    int slot = 0;
    for (int i = -1; i < num_rows_; ++i) {
      if (i + 1 < num_rows_) multiply(i + 1, next, share, query_unscale, gains);
      if (i >= 0) differentiate(i, slot, share, totals);
      slot = next.slot;
      next.advance(args_.config.stages);
    }
    if (args_.parts != nullptr) write_part(share, totals);
  }

  // The parts of u, of this warp's columns, into the rows that all stages share.
  __device__ __forceinline__ void write_query(const Share& share) const {
    constexpr int kPerLane = kMostSlices * kSliceColumns / kWarpSize;
    const int end = share.column + share.slices * kSliceColumns;
    const int row_end = first_column_ + (end < num_columns_ ? end : num_columns_);
    const auto column_of = [&](int i) {
      return first_column_ + share.column + lane_ + i * kWarpSize;
    };
    float x[kPerLane], gain[kPerLane];
    load_values(args_.query, row_end, 0, x, column_of);
    load_values(args_.key_weight, row_end, 1, gain, column_of);
    float largest = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      x[k] = x[k] * gain[k] * args_.scale;
      largest = magnitude_of_larger(largest, x[k]);
    }
    float scale = 1;
    if constexpr (kScalesParts<T>) {
      largest = warp_max(largest);
      if (lane_ == 0) at<float>(layout_.scales)[2 + 2 * padded_sources() + warp_] = largest;
      sync_first_threads(kWarpSize * (args_.config.warps + 1));
      scale = query_scale();
    }
    const int to = layout_.query + (share.column + lane_) * 2;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      if (k * kWarpSize >= share.slices * kSliceColumns) break;
      Pair<float> rest = {x[k] * scale, 0};
#pragma unroll
      for (int part = 0; part < kQueryParts; ++part) {
        *at<uint16_t>(to + part * layout_.pitch + k * kWarpSize * 2) =
            static_cast<uint16_t>(split_off(T{}, rest));
      }
    }
    sync_warp();
  }

  // The compiler would keep all that follows from a lane's number in registers, from row to row.
  __device__ __forceinline__ unsigned lane_made_anew() const { return lane_ | opaque_zero(); }

  __device__ __forceinline__ int sources_in_group(int group) const {
    const int left = args_.num_sources - group * kSources;
    return left < kSources ? left : kSources;
  }

  // Where a row of a group's matrix begins. Where the group is smaller another source is read,
  // again and so at no cost; its coefficients are zero.
  __device__ __forceinline__ SharedAddress row_address(SharedAddress stage, int group, int count,
                                                       int row) const {
    if (row >= kTileSources) {
      return shared_address(at<std::byte>(layout_.query)) + (row - kTileSources) * layout_.pitch;
    }
    if (row >= kSources) return stage + layout_.gradient + (row - kSources) * layout_.pitch;
    const int source = row < count ? row : row < 8 || count <= 8 ? 0 : 8;
    return stage + group * layout_.group + source * layout_.pitch;
  }

  // The matrix of every group times its transpose, over this warp's columns.
  __device__ __forceinline__ void multiply(int i, const RingPosition& from, const Share& share,
                                           float query_unscale, const Gains& gains) const {
    const unsigned lane = lane_made_anew();
    const int row = lane % 16, right = lane / 16 * 8;
    const int stage_offset = from.slot * layout_.stage;
    const SharedAddress stage = shared_address(at<std::byte>(stage_offset));
    float* sums =
        at<float>(layout_.sums + (i % 2 * args_.config.warps + warp_) * layout_.sums_of_warp);
    wait(filled(from.slot), from.parity);
    if constexpr (kHasNorm) apply_gains(stage_offset, share, gains);
#pragma unroll 1
    for (int group = 0; group < layout_.num_groups; ++group) {
      const SharedAddress first =
          row_address(stage, group, sources_in_group(group), row) + (share.column + right) * 2;
      // A tensor core's sums are cut off, so they are short: see docs/numerics.md.
      float products[2][2][4] = {};
#pragma unroll
      for (int slice = 0; slice < kMostSlices; ++slice) {
        if (slice >= share.slices) break;
        uint32_t rows[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          load_matrices(rows[j], first + slice * kSliceColumns * 2 + j * 32);
        }
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            auto& x = rows[j];
            multiply_add_16x8x8(T{}, products[j % 2][0], x[k], x[k + 1], x[k]);
            multiply_add_16x8x8(T{}, products[j % 2][1], x[k], x[k + 1], x[k + 1]);
          }
        }
      }
      // Columns 0 to 7, and 8 to 15.
      float left[4], other[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        left[j] = products[0][0][j] + products[1][0][j];
        other[j] = products[0][1][j] + products[1][1][j];
      }
      if constexpr (kHasNorm) {
        store_products(lane, left, other, sums);
      } else {
        store_sums(lane, left, other, query_unscale, sums + group * (kQueryParts + 2) * kTileRows);
      }
    }
    sync_warp();
    if (lane_ == 0) arrive(summed(i % 2));
  }

  // h in three parts, of this warp's columns.
  __device__ __forceinline__ void apply_gains(int stage, const Share& share,
                                              const Gains& gains) const {
    const int offset = stage + (share.column + 2 * lane_) * 2;
#pragma unroll
    for (int slice = 0; slice < kMostSlices; ++slice) {
      if (slice >= share.slices) break;
      const int column = offset + slice * kSliceColumns * 2;
      Pair<float> rest = unpack_pair(T{}, *at<uint32_t>(column + layout_.loaded_gradient));
      rest.first *= gains[2 * slice];
      rest.second *= gains[2 * slice + 1];
#pragma unroll
      for (int part = 0; part < kGradientRows; ++part) {
        *at<uint32_t>(column + layout_.gradient + part * layout_.pitch) = split_off(T{}, rest);
      }
    }
    sync_warp();
  }

  // The rows of g and u, and the diagonal.
  __device__ __forceinline__ static void store_sums(unsigned lane, const float (&left)[4],
                                                    const float (&other)[4], float query_unscale,
                                                    float* to) {
    const int g = lane / 4, t = lane % 4;
    if (g >= 4) {
      const float unscale = kScalesParts<T> && g > 4 ? query_unscale : 1;
      auto* row = reinterpret_cast<Pair<float>*>(to + (g - 4) * kTileRows);
      row[t] = {left[2] * unscale, left[3] * unscale};
      row[t + 4] = {other[2] * unscale, other[3] * unscale};
    }
    if (t == g / 2) {
      to[64 + g] = g % 2 == 0 ? left[0] : left[1];
      to[72 + g] = g % 2 == 0 ? other[2] : other[3];
    }
  }
  __device__ __forceinline__ static void store_products(unsigned lane, const float (&left)[4],
                                                        const float (&other)[4], float* to) {
    const int g = lane / 4, t = lane % 4;
    auto* above = reinterpret_cast<Pair<float>*>(to + g * kSources);
    auto* below = reinterpret_cast<Pair<float>*>(to + (g + 8) * kSources);
    above[t] = {left[0], left[1]};
    below[t] = {left[2], left[3]};
    if (t == 0) {
      above[4] = {other[0], other[1]};
      below[4] = {other[2], other[3]};
    }
  }

  // dv into the place of v, and du.
  __device__ __forceinline__ void differentiate(int i, int slot, const Share& share,
                                                Totals& totals) const {
    const int half = i % 2;
    wait(ready(half), i / 2 % 2);
    const float row_factor = at<float>(layout_.scales)[half];
#pragma unroll 1
    for (int group = 0; group < layout_.num_groups; ++group) {
      differentiate_group(half, slot * layout_.stage, group, share, row_factor, totals);
    }
    show_to_copy_engine();
    sync_warp();
    if (lane_ == 0) arrive(written(slot));
  }

  __device__ __forceinline__ void differentiate_group(int half, int stage_offset, int group,
                                                      const Share& share, float row_factor,
                                                      Totals& totals) const {
    const unsigned lane = lane_made_anew();
    const int g = lane / 4, t = lane % 4;
    const int count = sources_in_group(group);
    const auto* fragments = at<uint4>(layout_.fragments) +
                            (half * layout_.num_groups + group) * kFragments * kWarpSize + lane;
    const uint4 upper = fragments[kUpper * kWarpSize], lower = fragments[kLower * kWarpSize];
    const uint4 scores = fragments[kScores * kWarpSize];
    float unscale[2] = {1, 1};
    if constexpr (kScalesParts<T>) {
      const auto* unscales =
          at<float>(layout_.scales) + 2 + half * padded_sources() + group * kSources;
      unscale[0] = unscales[g];
      if (g + 8 < kSources) unscale[1] = unscales[g + 8];
    }

    const SharedAddress stage = shared_address(at<std::byte>(stage_offset));
    const SharedAddress from = row_address(stage, group, count, lane % 8 + lane / 16 * 8) +
                               (share.column + lane / 8 % 2 * 8) * 2;
    // Rows that are no sources go where nobody reads.
    const int row = lane % 16, right = lane / 16 * 8;
    const int column = (share.column + right) * 2;
    SharedAddress to = stage + group * layout_.group + row * layout_.pitch + column;
    int step = 32;
    if (row >= count) {
      to = shared_address(at<std::byte>(layout_.unused)) + warp_ * 256 + lane % 8 * 16 + right * 16;
      step = 0;
    }
    SharedAddress base = shared_address(at<std::byte>(layout_.zeros));
    int base_step = 0;
    if (args_.num_bases > 0 && row < count) {
      const int offset = at<int>(layout_.base_offsets)[group * kSources + row];
      if (offset > 0) {
        base = stage + offset + column;
        base_step = 32;
      }
    }
    // Parts of p make the gradient of the norm's gain, times the incoming gradient.
    int factor = layout_.ones, factor_step = 0;
    float lane_factor = 1;
    if constexpr (kHasNorm) {
      if (t >= 2) {
        factor = stage_offset + layout_.loaded_gradient + (share.column + g) * 2;
        factor_step = 32;
        lane_factor = row_factor;
      }
    } else if constexpr (kScalesParts<T>) {
      lane_factor = row_factor;
    }

#pragma unroll
    for (int slice = 0; slice < kMostSlices; ++slice) {
      if (slice >= share.slices) break;
      uint32_t rows[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        load_matrices_transposed(rows[j], from + slice * kSliceColumns * 2 + j * 32);
      }
      // Parts of the same products are added in float32, and so are rows: rounded, and not cut off.
      const auto add_scores = [&](int j) {
        float sum[4] = {};
        float factors[2] = {lane_factor, lane_factor};
        if constexpr (kHasNorm) {
          multiply_add_16x8x16(T{}, sum, rows[j], {scores.x, scores.y});
          factors[0] *= widen<float>(*at<T>(factor));
          factors[1] *= widen<float>(*at<T>(factor + 16));
          factor += factor_step;
        } else {
          multiply_add_16x8x16(T{}, sum, rows[2 * j], {scores.x, scores.y});
          multiply_add_16x8x16(T{}, sum, rows[2 * j + 1], {scores.z, scores.w});
        }
        float (&total)[2] = totals[slice * kTotalsOfSlice + j];
        total[0] += (sum[0] + sum[1]) * factors[0];
        total[1] += (sum[2] + sum[3]) * factors[1];
      };
      // With a norm one after the other between what follows, which takes fewer registers.
      if constexpr (!kHasNorm) {
#pragma unroll
        for (int j = 0; j < kTotalsOfSlice; ++j) add_scores(j);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j, to += step) {
        if constexpr (kHasNorm) add_scores(j);
        auto& x = rows[j];
        float left[4] = {}, other[4] = {};
        multiply_add_16x8x8(T{}, left, upper.x, upper.y, x[0]);
        multiply_add_16x8x8(T{}, other, upper.x, upper.y, x[1]);
        multiply_add_16x8x8(T{}, left, upper.z, upper.w, x[2]);
        multiply_add_16x8x8(T{}, other, upper.z, upper.w, x[3]);
        multiply_add_16x8x8(T{}, left, lower.x, lower.y, x[0]);
        multiply_add_16x8x8(T{}, other, lower.x, lower.y, x[1]);
        multiply_add_16x8x8(T{}, left, lower.z, lower.w, x[2]);
        multiply_add_16x8x8(T{}, other, lower.z, lower.w, x[3]);
        if constexpr (kScalesParts<T>) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            left[k] *= unscale[k / 2];
            other[k] *= unscale[k / 2];
          }
        }
        if (args_.num_bases > 0) {
          uint32_t existing[4];
          load_matrices(existing, base);
          base += base_step;
          add_pair(existing[0], left[0], left[1]);
          add_pair(existing[1], left[2], left[3]);
          add_pair(existing[2], other[0], other[1]);
          add_pair(existing[3], other[2], other[3]);
        }
        store_matrices(
            to, {pack_pair(T{}, {left[0], left[1]}), pack_pair(T{}, {left[2], left[3]}),
                 pack_pair(T{}, {other[0], other[1]}), pack_pair(T{}, {other[2], other[3]})});
      }
    }
  }

  __device__ __forceinline__ static void add_pair(uint32_t word, float& first, float& second) {
    const Pair<float> pair = unpack_pair(T{}, word);
    first += pair.first;
    second += pair.second;
  }

  // This CTA's part: lanes 2t and 2t + 1 have different parts of the same sums. Of 16 columns those
  // of b in lanes 0 and 1, those of p in 2 and 3; without a norm, b for the next 16 columns there.
  __device__ __forceinline__ void write_part(const Share& share, const Totals& totals) const {
    const int g = lane_ / 4, t = lane_ % 4;
    float* part = args_.parts + int64_t{2} * team_ * args_.hidden;
    if (kHasNorm && t >= 2) part += args_.hidden;
#pragma unroll
    for (int k = 0; k < kMostSlices * kTotalsOfSlice; ++k) {
      if (k >= share.slices * kTotalsOfSlice) break;
      const float left = totals[k][0] + shuffle_xor(totals[k][0], 1);
      const float right = totals[k][1] + shuffle_xor(totals[k][1], 1);
      const int first = kHasNorm ? k * 16 : k * 32 + t / 2 * 16;
      const int column = share.column + first + t % 2 * 8 + g;
      if (column < num_columns_) part[first_column_ + column] = t % 2 == 0 ? left : right;
    }
  }

  const Args& args_;
  const Layout& layout_;
  int lane_;
  int warp_;
  int rank_;  // in the cluster, which is the team
  int team_;
  int num_teams_;
  int num_rows_;  // of this team
  int first_column_;
  int num_columns_;  // of this CTA
};

template <typename T, bool kHasNorm>
__global__ void __launch_bounds__(kMostBackwardThreads, 1)
    depth_attention_tile_bwd_kernel(const __grid_constant__ DepthAttentionBackwardTileArgs args) {
  DepthAttentionBackwardTileBody<T, kHasNorm>(args).run();
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
