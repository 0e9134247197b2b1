// Merging, backward. With g the gradient of the mix, (w_0, w_1) the weights of state and value, r =
// 1 / rms(value), u = scale * query * key_weight and l = r <u, value>:
//
//   dl = w_0 w_1 <g, value - state>
//   dstate = w_0 g,  dlse = -dl
//   dvalue = w_1 g + dl r u - dl l r^2 / D value + what it is added to
//   du = sum over rows of dl r value
//
// With an output norm g is made of the incoming gradient h = grad_out * out_weight and of the mix
// m: with q = 1 / rms(m), g = q h - q^3 <m, h> / D m.
//
// As in the forward a team of warps has a row in its registers, and the next row is on its way
// while this one is worked on. Two rounds of sums: <value, value>, <u, value>, <h, state> and <h,
// value>; then, for the norm, those of the mix with itself, h, state and value. Each lane adds up
// its columns of the gradients of u, in registers, and of the norm's gain, in shared memory, over
// all rows of its team; the teams of a CTA add theirs up at the end, one after the other, and the
// parts of all CTAs are added by a second kernel.
#pragma once

#include "merge_partial/row_team.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

struct MergeBackwardArgs {
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
  ConstByteRows value;
  ConstByteRows grad_out;
  ConstByteRows grad_base;  // what the value's gradient is added to, or absent
  ByteRows grad_state;      // or absent
  ByteRows grad_value;      // or absent; may be the base itself
  float* grad_lse;          // [M], or null
  float* parts;             // [CTAs, 2, D], or null
};

template <typename T, int kChunks>
class MergeBackward {
  using Args = MergeBackwardArgs;
  using Team = RowTeam<kChunks>;
  static constexpr int kWidth = Team::kWidth;
  using Share = float[kChunks][kWidth];

 public:
  __device__ __forceinline__ static void run(const Args& args) {
    const MergeConfig& config = args.config;
    std::byte* const memory = dynamic_shared_memory();
    const SharedVector score(memory, config.vector_bytes);
    const SharedVector gain(memory + config.vector_bytes, config.vector_bytes);
    std::byte* const of_teams = memory + kMergeVectors * config.vector_bytes;
    Team team(config, args.hidden / kWidth, of_teams);
    const SharedVector grad_gain(
        of_teams + config.teams * config.sum_bytes + team.team() * config.gradient_bytes,
        config.gradient_bytes);
    wait_for_previous_kernel();
    let_next_kernel_start();
    Row of = {}, next = {};
    typename Team::Chunks base = {};
    int row = team.first_row();
    if (row < args.num_tokens) load(args, team, row, of);
    const int num_threads = config.teams * config.warps * kWarpSize;
    score.fill(num_threads, [&](int i) {
      if (i >= args.hidden) return 0.0f;
      return args.scale * (gain_or_one(args.query, i) * gain_or_one(args.key_weight, i));
    });
    gain.fill(num_threads,
              [&](int i) { return i < args.hidden ? gain_or_one(args.out_weight, i) : 0; });
    sync_cta();
    Share grad_score = {};
#pragma unroll
    for (int k = 0; k < kChunks; ++k) grad_gain.store(team.chunk(k), grad_score[k]);
    while (row < args.num_tokens) {
      const int next_row = row + team.row_step();
      if (args.grad_base.data != nullptr) team.load(args.grad_base, row, base);
      if (next_row < args.num_tokens) load(args, team, next_row, next);
      differentiate(args, team, row, score, gain, of, base, grad_score, grad_gain);
      of = next;
      row = next_row;
    }
    if (args.parts == nullptr) return;
    float* const part = args.parts + int64_t{2} * cta_rank() * args.hidden;
    add_up_teams(config.teams, team, score, grad_score, part);
    Share sums;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) grad_gain.load(team.chunk(k), sums[k]);
    add_up_teams(config.teams, team, gain, sums, part + args.hidden);
  }

 private:
  // Chunks behind the end of a row are zeros.
  struct Row {
    typename Team::Chunks state, values, grads;
    float lse;
  };

  __device__ __forceinline__ static void load(const Args& args, const Team& team, int row,
                                              Row& to) {
    team.load(args.value, row, to.values);
    team.load(args.grad_out, row, to.grads);
    team.load(args.state, row, to.state);
    to.lse = load_global<float>(args.lse + row);
  }

  // h of chunk k.
  __device__ __forceinline__ static void load_gradient(const Team& team, const SharedVector& gain,
                                                       const Row& of, int k, float (&h)[kWidth]) {
    float factors[kWidth];
    unpack(of.grads[k], T{}, h);
    gain.load(team.chunk(k), factors);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) h[j] *= factors[j];
  }

  // Sums of a row, in this order.
  enum Product { kValueValue, kScoreValue, kGradState, kGradValue, kStateState, kStateValue };

  __device__ __forceinline__ static void add_products(const Team& team, const SharedVector& score,
                                                      const SharedVector& gain, const Row& of,
                                                      float (&sums)[kMergeSums]) {
    clear(sums);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float s[kWidth], v[kWidth], h[kWidth], u[kWidth], of_chunk[kMergeSums] = {};
      unpack(of.state[k], T{}, s);
      unpack(of.values[k], T{}, v);
      load_gradient(team, gain, of, k, h);
      score.load(team.chunk(k), u);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        of_chunk[kValueValue] += v[j] * v[j];
        of_chunk[kScoreValue] += u[j] * v[j];
        of_chunk[kGradState] += h[j] * s[j];
        of_chunk[kGradValue] += h[j] * v[j];
        of_chunk[kStateState] += s[j] * s[j];
        of_chunk[kStateValue] += s[j] * v[j];
      }
#pragma unroll
      for (int i = 0; i < kMergeSums; ++i) sums[i] += of_chunk[i];
    }
  }

  // Of the mix with itself, h, state and value.
  struct MixProducts {
    float square, grad, state, value;
  };
  // From the products of what it is made of, or anew where these leave little of one another.
  __device__ __forceinline__ static MixProducts mix_products(Team& team, const SharedVector& gain,
                                                             const Pair<float>& weights,
                                                             const float (&sums)[kMergeSums],
                                                             Row& of) {
    constexpr float kLittle = 1.0f / 64;
    const auto [of_state, of_value] = weights;
    const float state = of_state * sums[kStateState] + of_value * sums[kStateValue];
    const float value = of_state * sums[kStateValue] + of_value * sums[kValueValue];
    const float square = of_state * state + of_value * value;
    const float apart =
        of_state * of_state * sums[kStateState] + of_value * of_value * sums[kValueValue];
    if (!(square < kLittle * apart)) {
      return {square, of_state * sums[kGradState] + of_value * sums[kGradValue], state, value};
    }
    float anew[4] = {};
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      float s[kWidth], v[kWidth], h[kWidth];
      unpack(of.state[k], T{}, s);
      unpack(of.values[k], T{}, v);
      load_gradient(team, gain, of, k, h);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float m = of_state * s[j] + of_value * v[j];
        anew[0] += m * m;
        anew[1] += m * h[j];
        anew[2] += m * s[j];
        anew[3] += m * v[j];
      }
    }
    team.add_up(anew);
    keep_packed(of);
    return {anew[0], anew[1], anew[2], anew[3]};
  }

  __device__ __forceinline__ static void keep_packed(Row& of) {
    Team::keep_packed(of.state);
    Team::keep_packed(of.values);
    Team::keep_packed(of.grads);
  }

  __device__ __forceinline__ static void differentiate(const Args& args, Team& team, int row,
                                                       const SharedVector& score,
                                                       const SharedVector& gain, Row& of,
                                                       const typename Team::Chunks& base,
                                                       Share& grad_score,
                                                       const SharedVector& grad_gain) {
    float sums[kMergeSums];
    add_products(team, score, gain, of, sums);
    team.add_up(sums);
    keep_packed(of);
    const float rstd = inverse_square_root(sums[kValueValue] * args.inverse_hidden + args.eps);
    const float logit = rstd * sums[kScoreValue];
    const Pair<float> weights = merge_weights(of.lse, logit);
    if (weights.first == 0) {
      // An empty state may hold anything, NaN too.
#pragma unroll
      for (int k = 0; k < kChunks; ++k) of.state[k] = {0, 0, 0, 0};
      sums[kGradState] = sums[kStateState] = sums[kStateValue] = 0;
    }
    // <g, state> and <g, value>.
    Pair<float> dots = {sums[kGradState], sums[kGradValue]};
    // The normed mix is of_parts.first state + of_parts.second value, and g = of_gradient h +
    // of_mix normed.
    Pair<float> of_parts = {0, 0};
    float of_gradient = 1, of_mix = 0;
    if (args.out_weight.data != nullptr) {
      const MixProducts mix = mix_products(team, gain, weights, sums, of);
      of_gradient = inverse_square_root(mix.square * args.inverse_hidden + args.out_eps);
      of_parts = {weights.first * of_gradient, weights.second * of_gradient};
      of_mix = -of_gradient * of_gradient * args.inverse_hidden * mix.grad;
      dots = {of_gradient * (dots.first + of_mix * mix.state),
              of_gradient * (dots.second + of_mix * mix.value)};
    }
    const float grad_logit = weights.first * weights.second * (dots.second - dots.first);
    if (args.grad_lse != nullptr && team.leads()) args.grad_lse[row] = -grad_logit;
    const float of_score = grad_logit * rstd;
    const float of_value = -of_score * logit * rstd * args.inverse_hidden;

#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      // One chunk after the other: all at once take more registers than there are.
      sync_warp();
      float s[kWidth], v[kWidth], h[kWidth], x[kWidth], u[kWidth], sum[kWidth];
      unpack(of.state[k], T{}, s);
      unpack(of.values[k], T{}, v);
      unpack(of.grads[k], T{}, x);
      gain.load(team.chunk(k), h);
      grad_gain.load(team.chunk(k), sum);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float normed = of_parts.first * s[j] + of_parts.second * v[j];
        sum[j] += x[j] * normed;
        h[j] = of_gradient * (h[j] * x[j]) + of_mix * normed;
        x[j] = weights.first * h[j];
      }
      grad_gain.store(team.chunk(k), sum);
      of.state[k] = pack(T{}, x);
      score.load(team.chunk(k), u);
      unpack(base[k], T{}, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        grad_score[k][j] += of_score * v[j];
        x[j] += weights.second * h[j];
        x[j] += of_score * u[j];
        x[j] += of_value * v[j];
      }
      of.values[k] = pack(T{}, x);
    }
    if (args.grad_state.data != nullptr) {
      team.store(args.grad_state, row, [&](int k) { return of.state[k]; });
    }
    if (args.grad_value.data != nullptr) {
      team.store(args.grad_value, row, [&](int k) { return of.values[k]; });
    }
  }

  // The teams' sums of one vector, in their order, in the place of another that nobody reads any
  // more; the last team has all of it.
  __device__ __forceinline__ static void add_up_teams(int num_teams, const Team& team,
                                                      const SharedVector& place, Share& mine,
                                                      float* to) {
    for (int i = 0; i < num_teams; ++i) {
      sync_cta();
      if (i != team.team()) continue;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        if (i > 0) {
          float before[kWidth];
          place.load(team.chunk(k), before);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) mine[k][j] = before[j] + mine[k][j];
        }
        if (i + 1 < num_teams) {
          place.store(team.chunk(k), mine[k]);
        } else if (team.has(k)) {
          Mixed<float, kWidth>::store(reinterpret_cast<std::byte*>(to), DType::kFloat32,
                                      team.chunk(k), mine[k]);
        }
      }
    }
  }
};

template <typename T, int kChunks>
__global__ void __launch_bounds__(most_merge_threads(kMergeBackwardChoices, kChunks), 1)
    merge_partial_bwd_kernel(const __grid_constant__ MergeBackwardArgs args) {
  MergeBackward<T, kChunks>::run(args);
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
