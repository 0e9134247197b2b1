// Merging, forward: the open block's partial sum joins the state that phase 1 left, as one more
// source whose logit is scored here and one whose logit is the state's log-sum-exp:
//
//   value = round(partial + delta)
//   out = w_0 state + w_1 value,  w = softmax(lse, scale * <query * key_weight, value /
//   rms(value)>)
//
// optionally RMS-normalised. A team of warps keeps a row in registers from its loads to its stores:
// nothing but two sums, and one more for the norm, goes through shared memory. Teams of a CTA take
// rows of their own, and while one adds up the others' loads are under way.
#pragma once

#include "merge_partial/row_team.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

struct MergeForwardArgs {
  MergeConfig config;
  int num_tokens;
  int hidden;
  float inverse_hidden;
  float eps;
  float out_eps;
  float scale;
  GainVector query;
  GainVector key_weight;
  GainVector out_weight;
  const float* lse;  // [M]
  ConstByteRows state;
  ConstByteRows summands[2];  // the second one may be absent
  ByteRows new_partial;       // their sum, or absent; may be the first summand itself
  ByteRows out;
  float* last_rstd;  // [M], or null
};

template <typename T, int kChunks>
class MergeForward {
  using Args = MergeForwardArgs;
  using Team = RowTeam<kChunks>;
  static constexpr int kWidth = Team::kWidth;

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    const MergeConfig& config = args.config;
    std::byte* const memory = dynamic_shared_memory();
    const SharedVector score(memory, config.vector_bytes);
    const SharedVector gain(memory + config.vector_bytes, config.vector_bytes);
    Team team(config, args.hidden / kWidth, memory + kMergeVectors * config.vector_bytes);
    const bool has_norm = args.out_weight.data != nullptr;
    wait_for_previous_kernel();
    let_next_kernel_start();
    Row of = {};
    int row = team.first_row();
    if (row < args.num_tokens) load(args, team, row, of);
    const int num_threads = config.teams * config.warps * kWarpSize;
    score.fill(num_threads, [&](int i) {
      return i < args.hidden ? gain_or_one(args.query, i) * gain_or_one(args.key_weight, i) : 0;
    });
    if (has_norm) {
      gain.fill(num_threads,
                [&](int i) { return i < args.hidden ? gain_or_one(args.out_weight, i) : 0; });
    }
    sync_cta();
    while (row < args.num_tokens) {
      merge(args, team, row, score, gain, has_norm, of);
      row += team.row_step();
      if (row < args.num_tokens) load(args, team, row, of);
    }
  }

 private:
  // Chunks behind the end of a row are zeros.
  struct Row {
    typename Team::Chunks state, values, deltas;
    float lse;
  };

  __device__ __forceinline__ static void load(const Args& args, const Team& team, int row,
                                              Row& to) {
    team.load(args.summands[0], row, to.values);
    if (args.summands[1].data != nullptr) team.load(args.summands[1], row, to.deltas);
    team.load(args.state, row, to.state);
    to.lse = load_global<float>(args.lse + row);
  }

  __device__ __forceinline__ static void merge(const Args& args, Team& team, int row,
                                               const SharedVector& score, const SharedVector& gain,
                                               bool has_norm, Row& of) {
    if (args.summands[1].data != nullptr) add(of);
    if (args.new_partial.data != nullptr) {
      team.store(args.new_partial, row, [&](int k) { return of.values[k]; });
    }
    float sums[2];
    add_products(team, score, of, sums);
    team.add_up(sums);
    const float rstd = inverse_square_root(sums[0] * args.inverse_hidden + args.eps);
    if (args.last_rstd != nullptr && team.leads()) args.last_rstd[row] = rstd;
    const Pair<float> weights = merge_weights(of.lse, args.scale * rstd * sums[1]);
    float mix[kChunks][kWidth];
    make_mix(weights, of, mix);
    if (!has_norm) {
      team.store(args.out, row, [&](int k) { return pack(T{}, mix[k]); });
      return;
    }
    float square[1] = {sum_of_squares(mix)};
    team.add_up(square);
    const float norm = inverse_square_root(square[0] * args.inverse_hidden + args.out_eps);
    team.store(args.out, row, [&](int k) {
      float factors[kWidth];
      gain.load(team.chunk(k), factors);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) factors[j] *= mix[k][j] * norm;
      return pack(T{}, factors);
    });
  }

  // values += deltas, rounded as they are stored.
  __device__ __forceinline__ static void add(Row& of) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float x[kWidth], more[kWidth];
      unpack(of.values[k], T{}, x);
      unpack(of.deltas[k], T{}, more);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] += more[j];
      of.values[k] = pack(T{}, x);
    }
  }

  // This lane's share of sum value^2 and <score, value>. Chunks have sums of their own, so that
  // none waits for the one before.
  __device__ __forceinline__ static void add_products(const Team& team, const SharedVector& score,
                                                      const Row& of, float (&sums)[2]) {
    clear(sums);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float x[kWidth], u[kWidth], square = 0, dot = 0;
      unpack(of.values[k], T{}, x);
      score.load(team.chunk(k), u);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        square += x[j] * x[j];
        dot += x[j] * u[j];
      }
      sums[0] += square;
      sums[1] += dot;
    }
  }

  __device__ __forceinline__ static void make_mix(const Pair<float>& weights, const Row& of,
                                                  float (&mix)[kChunks][kWidth]) {
    // An empty state may hold anything, NaN too.
    const bool is_empty = weights.first == 0;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float x[kWidth];
      unpack(is_empty ? uint4{0, 0, 0, 0} : of.state[k], T{}, mix[k]);
      unpack(of.values[k], T{}, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        mix[k][j] = weights.first * mix[k][j] + weights.second * x[j];
      }
    }
  }

  __device__ __forceinline__ static float sum_of_squares(const float (&x)[kChunks][kWidth]) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float square = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) square += x[k][j] * x[k][j];
      sum += square;
    }
    return sum;
  }
};

template <typename T, int kChunks>
__global__ void __launch_bounds__(most_merge_threads(kMergeChoices, kChunks), 1)
    merge_partial_fwd_kernel(const __grid_constant__ MergeForwardArgs args) {
  MergeForward<T, kChunks>::run(args);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
