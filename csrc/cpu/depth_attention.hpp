// Depth attention over a range of tokens, forward and backward. Serves `depth_attention`,
// `accumulate_depth_attention`, `merge_partial` and the block cache, which differ in what the
// parameters hold (see attnres/params.hpp).
//
// A token's N rows come from memory in the first pass over them; the passes that follow find them
// in the core's own cache (N = 9 rows of 2304 float32 values are 81 KiB).
#pragma once

#include "kernels.hpp"
#include "staging.hpp"

namespace attnres::cpu {
namespace {

// <v, u> and <v, v> of one row, while memory brings half of `next`.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
__attribute__((noinline)) void score(const T* v, const T* next, const A* u, int64_t columns, A& dot,
                                     A& squares) {
  Sum<A, kUnroll> dots, sums;
  sum_over_tiles<Access, kUnroll>(
      columns,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> x = tile.load(v, k);
          dots.parts[k] += x * tile.load(u, k);
          sums.parts[k] += x * x;
        }
        tile.prefetch_half(next, 0, columns);
      },
      dots, sums);
  dot = dots.total();
  squares = sums.total();
}

template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
__attribute__((noinline)) A dot(const T* v, const T* next, const A* g, int64_t columns) {
  Sum<A, kUnroll> dots;
  sum_over_tiles<Access, kUnroll>(
      columns,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) dots.parts[k] += tile.load(v, k) * tile.load(g, k);
        tile.prefetch_half(next, 0, columns);
      },
      dots);
  return dots.total();
}

// <v, u>, <v, v> and <v, g>: what the backward needs of a row when nothing was saved. Sums in the
// order of `score` and `dot`, so that gradients do not depend on what was saved.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
ATTNRES_INLINE void score_and_dot(const T* v, const T* next, const A* u, const A* g,
                                  int64_t columns, A& dot_u, A& squares, A& dot_g) {
  Sum<A, kUnroll> us, sums, gs;
  sum_over_tiles<Access, kUnroll>(
      columns,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> x = tile.load(v, k);
          us.parts[k] += x * tile.load(u, k);
          sums.parts[k] += x * x;
          gs.parts[k] += x * tile.load(g, k);
        }
        tile.prefetch_half(next, 0, columns);
      },
      us, sums, gs);
  dot_u = us.total();
  squares = sums.total();
  dot_g = gs.total();
}

// Rows that memory is to bring while others are added: one of them, and the first half of two.
template <typename T>
struct Ahead {
  const T* all;
  const T* half;
  const T* other_half;
};

// sum = round(partial + delta), which may lie where partial does, and the same past the caches if
// wanted. Its product with u and its squares are those of the rounded values.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
__attribute__((noinline)) void add_and_score(const T* partial, const T* delta, T* sum,
                                             T* past_caches, Ahead<T> ahead, const A* u,
                                             int64_t columns, A& dot, A& squares) {
  Sum<A, kUnroll> dots, sums;
  sum_over_tiles<Access, kUnroll>(
      columns,
      [&](auto tile) __attribute__((always_inline)) {
        Vec<A> added[tile.kCount];
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k)
          added[k] = tile.load(delta, k) + tile.load(partial, k);
        tile.template store_pairs<false>(sum, added);
        if (past_caches != nullptr) tile.template store_pairs<true>(past_caches, added);
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> x = tile.load(sum, k);
          dots.parts[k] += x * tile.load(u, k);
          sums.parts[k] += x * x;
        }
        tile.prefetch_half(ahead.all, 0, columns);
        tile.prefetch_half(ahead.all, 1, columns);
        tile.prefetch_half(ahead.half, 0, columns);
        tile.prefetch_half(ahead.other_half, 0, columns);
      },
      dots, sums);
  dot = dots.total();
  squares = sums.total();
}

// Block summation of one token after the other.
template <typename Access>
struct Summation {
  using A = typename Access::A;
  using T = typename Access::T;
  T* nothing;  // what takes the place of an absent partial
  T* delta;
  T* partial;
  T* sum;

  Summation(Arena& arena, int64_t columns)
      : nothing(arena.take<T>(columns)),
        delta(arena.take<T>(columns)),
        partial(arena.take<T>(columns)),
        sum(arena.take<T>(columns)) {}
  // -0 changes no number that it is added to, not even -0.
  void fill(int64_t columns) const {
    const Vec<A> v = broadcast<A>(-A(0));
    for_tiles<Access, 2>(columns, [&](auto tile) __attribute__((always_inline)) {
      const Vec<A> pair[2] = {v, v};
      tile.template store_pairs<false>(nothing, pair);
    });
  }
  // Row m of `result` = partial + delta, where it can be read, and its score.
  const T* add(const ConstRows& partials, const ConstRows& deltas, const Rows& results, int64_t m,
               int64_t hidden, bool streamed, Ahead<T> ahead, const A* u, A& dot,
               A& squares) const {
    const int64_t columns = whole_pairs<A>(hidden);
    const T* before =
        partials.data == nullptr ? nothing : bring<Access>(partials, m, hidden, partial);
    const T* added = bring<Access>(deltas, m, hidden, delta);
    T* result = place<Access>(results, m, hidden, false, sum).data;
    // The rounded sum is read again: where it goes past the caches, a copy is kept.
    T* past_caches = streamed && before != result && result != sum ? result : nullptr;
    T* kept = past_caches != nullptr ? sum : result;
    add_and_score<Access>(before, added, kept, past_caches, ahead, u, columns, dot, squares);
    put_back<Access>(results, m, hidden, kept);
    if (!holds<T>(results.dtype)) {  // was rounded on its way
      bring<Access>(as_const(results), m, hidden, sum);
      score<Access>(kept, kept, u, columns, dot, squares);
    }
    return kept;
  }
};

// f(tile, the tile's vectors of sum_i weights[i] * rows[i]) for all of the mix. The rows come from
// cache, so that memory is free to bring the other half of `next`. Of more rows than can be read
// side by side some are mixed at a time, and the sums lie in `sums` meanwhile.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T,
          typename F>
ATTNRES_INLINE void mix(const T* const* rows, const T* const* next, const A* weights, int count,
                        int64_t columns, A* sums, F&& f) {
  constexpr int kSideBySide = 12, kMost = 8;
  for_runs(columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int first = 0; first < count; first += kSideBySide) {
      const int last = first + kSideBySide < count ? first + kSideBySide : count;
      const auto mix_tile = [&](auto tile) __attribute__((always_inline)) {
        Vec<A> mixed[tile.kCount] = {};
        if (first > 0) {
#pragma GCC unroll 8
          for (int k = 0; k < tile.kCount; ++k) mixed[k] = tile.load(sums, k);
        }
        for (int i = first; i < last; ++i) {
          const Vec<A> weight = broadcast<A>(weights[i]);
#pragma GCC unroll 8
          for (int k = 0; k < tile.kCount; ++k) mixed[k] += weight * tile.load(rows[i], k);
          tile.prefetch_half(next[i], 1, columns);
        }
        if (last == count) return f(tile, mixed);
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) tile.store(sums, k, mixed[k]);
      };
      for_columns<Access, kMost>(begin, end, mix_tile);
    }
  });
}

// Writes the mix to a row of results.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
__attribute__((noinline)) void mix_rows(const T* const* rows, const T* const* next,
                                        const A* weights, int count, int64_t columns, A* sums,
                                        MutableRow<T> out) {
  mix<Access>(rows, next, weights, count, columns, sums,
              [&](auto tile, const Vec<A>* v)
                  __attribute__((always_inline)) { tile.store_all(out, v); });
}
// Writes it to `mixed` in the compute type, and returns the sum of its squares.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
__attribute__((noinline)) A mix_and_square(const T* const* rows, const T* const* next,
                                           const A* weights, int count, int64_t columns, A* mixed) {
  Sum<A, kUnroll> squares;
  mix<Access>(rows, next, weights, count, columns, mixed,
              [&](auto tile, const Vec<A>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int k = 0; k < tile.kCount; ++k) {
                  tile.store(mixed, k, v[k]);
                  squares.parts[k % kUnroll] += v[k] * v[k];
                }
              });
  squares.template restore_order<Access>(false);
  return squares.total();
}

// The token after m, or m where this range ends.
ATTNRES_INLINE int64_t token_after(int64_t m, const TokenRange& range) {
  return m + 1 < range.end ? m + 1 : m;
}

template <typename Access>
struct ForwardScratch {
  using A = typename Access::A;
  using T = typename Access::T;
  int64_t columns;
  const T** rows;
  const T** next;
  A* logits;
  A* weights;
  A* rstd;
  A* u;
  A* out_weight;
  A* mixed;
  T* copies;  // [N, columns], of rows that are not read in place
  T* out;
  Summation<Access> summation;

  ForwardScratch(Arena& arena, const DepthAttentionForward& p)
      : columns(whole_pairs<A>(p.hidden)),
        rows(arena.take<const T*>(p.num_sources)),
        next(arena.take<const T*>(p.num_sources)),
        logits(arena.take<A>(p.num_sources)),
        weights(arena.take<A>(p.num_sources)),
        rstd(arena.take<A>(p.num_sources)),
        u(arena.take<A>(columns)),
        out_weight(arena.take<A>(columns)),
        mixed(arena.take<A>(columns)),
        copies(arena.take<T>(needs_copies<Access>(p) ? p.num_sources * columns : 0)),
        out(arena.take<T>(columns)),
        summation(arena, p.delta.data != nullptr ? columns : 0) {}
};

// An empty state (lse = -inf) has weight 0 but may hold anything, NaN too: point at a row that is
// mixed anyway.
template <typename A, typename T>
ATTNRES_INLINE void skip_empty_state(A first_logit, const T** rows, int count) {
  if (count > 1 && first_logit == -__builtin_inf()) rows[0] = rows[1];
}

template <typename Access>
void depth_attention_forward(const DepthAttentionForward& p, const SharedVectors& shared,
                             TokenRange range) {
  using A = typename Access::A;
  using T = typename Access::T;
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden;
  const int64_t result_bytes = m_total * hidden * size_of(p.out.dtype);
  const bool streamed = streams(p.out, result_bytes);
  const bool sum_streamed = streams(p.new_partial, result_bytes);
  Arena arena(range.scratch);
  const ForwardScratch<Access> s(arena, p);
  const int64_t columns = s.columns;
  const A* u = as_loaded<Access>(shared.score, hidden, s.u);
  const A* out_weight = as_loaded<Access>(shared.out_weight, hidden, s.out_weight);
  if (p.delta.data != nullptr) s.summation.fill(columns);

  for (int64_t m = range.begin; m < range.end; ++m) {
    const int64_t after = token_after(m, range);
    for (int i = 0; i < n; ++i) {
      T* copy = s.copies + i * columns;
      A product, squares;
      if (i == n - 1 && p.delta.data != nullptr) {
        const T* delta = row_ahead<Access>(p.delta, after, hidden, copy);
        s.next[i] = row_ahead<Access>(p.sources[i], after, hidden, delta);
        // Source 0 of a merge is not scored, so nothing has asked for its first half.
        const Ahead<T> ahead{delta, s.next[i], s.next[p.first_logit != nullptr ? 0 : i]};
        s.rows[i] = s.summation.add(p.sources[i], p.delta, p.new_partial, m, hidden, sum_streamed,
                                    ahead, u, product, squares);
      } else {
        s.rows[i] = bring<Access>(p.sources[i], m, hidden, copy);
        s.next[i] = row_ahead<Access>(p.sources[i], after, hidden, s.rows[i]);
        if (i == 0 && p.first_logit != nullptr) {
          s.logits[0] = static_cast<const A*>(p.first_logit)[m];
          s.rstd[0] = 0;
          continue;
        }
        if (i < p.num_known_rstd) {
          s.rstd[i] = static_cast<const A*>(p.known_rstd)[i * m_total + m];
          s.logits[i] = s.rstd[i] * dot<Access>(s.rows[i], s.next[i], u, columns);
          continue;
        }
        score<Access>(s.rows[i], s.next[i], u, columns, product, squares);
      }
      s.rstd[i] = inverse_rms<A>(squares, hidden, p.eps);
      s.logits[i] = s.rstd[i] * product;
    }
    if (p.first_logit != nullptr) skip_empty_state(s.logits[0], s.rows, n);
    const A lse = softmax<A>(s.logits, s.weights, n);

    const MutableRow<T> out = place<Access>(p.out, m, hidden, streamed, s.out);
    if (out_weight == nullptr) {
      mix_rows<Access>(s.rows, s.next, s.weights, n, columns, s.mixed, out);
    } else {
      const A squares = mix_and_square<Access>(s.rows, s.next, s.weights, n, columns, s.mixed);
      const A rstd = inverse_rms<A>(squares, hidden, p.out_eps);
      for_tiles<Access, kUnroll>(columns, [&](auto tile) __attribute__((always_inline)) {
        Vec<A> normed[tile.kCount];
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          normed[k] = tile.load(s.mixed, k) * rstd * tile.load(out_weight, k);
        }
        tile.store_all(out, normed);
      });
      if (p.mix.data != nullptr) {
        join_columns<Access>(s.mixed, columns);
        __builtin_memcpy(row_at(p.mix, m), s.mixed, hidden * sizeof(A));
      }
    }
    put_back<Access>(p.out, m, hidden, out.data);

    if (p.weights != nullptr) {
      for (int i = 0; i < n; ++i) static_cast<A*>(p.weights)[i * m_total + m] = s.weights[i];
    }
    if (p.stats != nullptr) {
      A* stats = static_cast<A*>(p.stats) + m;
      for (int i = 0; i < n; ++i) stats[i * m_total] = s.rstd[i];
      for (int i = 0; i < n; ++i) stats[(n + i) * m_total] = s.logits[i];
      stats[2 * n * m_total] = lse;
    }
    if (p.last_rstd != nullptr) static_cast<A*>(p.last_rstd)[m] = s.rstd[n - 1];
  }
  finish_streaming();
}

template <typename Access>
struct BackwardScratch {
  using A = typename Access::A;
  using T = typename Access::T;
  int64_t columns;
  const T** rows;
  const T** next;
  const T** bases;
  MutableRow<T>* grads;
  A* logits;
  A* weights;
  A* rstd;
  A* dots;
  A* score_factor;  // of u in dv and of v in du
  A* value_factor;  // of v in dv
  A* u;
  A* out_weight;
  A* mixed;
  A* g;
  A* du;  // of a run of columns
  A* grad_score;
  A* grad_out_weight;
  T* copies;  // [N, columns], of rows that are not read in place
  T* grad_out;
  T* base;
  T* grad;

  BackwardScratch(Arena& arena, const DepthAttentionBackward& p)
      : columns(whole_pairs<A>(p.hidden)),
        rows(arena.take<const T*>(p.num_sources)),
        next(arena.take<const T*>(p.num_sources)),
        bases(arena.take<const T*>(p.num_sources)),
        grads(arena.take<MutableRow<T>>(p.num_sources)),
        logits(arena.take<A>(p.num_sources)),
        weights(arena.take<A>(p.num_sources)),
        rstd(arena.take<A>(p.num_sources)),
        dots(arena.take<A>(p.num_sources)),
        score_factor(arena.take<A>(p.num_sources)),
        value_factor(arena.take<A>(p.num_sources)),
        u(arena.take<A>(columns)),
        out_weight(arena.take<A>(columns)),
        mixed(arena.take<A>(columns)),
        g(arena.take<A>(columns)),
        du(arena.take<A>(columns)),
        grad_score(arena.take<A>(columns)),
        grad_out_weight(arena.take<A>(columns)),
        copies(arena.take<T>(needs_copies<Access>(p) ? p.num_sources * columns : 0)),
        grad_out(arena.take<T>(columns)),
        base(arena.take<T>(columns)),
        grad(arena.take<T>(columns)) {}
};

// Through the output norm: g = rstd * (dh * w - o_hat * <dh * w, o_hat> / D), and adds dh * o_hat
// to the gain's gradient.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
ATTNRES_INLINE void output_norm_backward(const T* grad_out, const A* mixed, const A* out_weight,
                                         int64_t hidden, double out_eps, A* g, A* grad_out_weight) {
  const int64_t columns = whole_pairs<A>(hidden);
  Sum<A, 2> squares, products;
  sum_over_tiles<Access, 2>(
      columns,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> o = tile.load(mixed, k);
          squares.parts[k] += o * o;
          products.parts[k] += o * tile.load(grad_out, k) * tile.load(out_weight, k);
        }
      },
      squares, products);
  const A rstd = inverse_rms<A>(squares.total(), hidden, out_eps);
  const A mean = products.total() * rstd / static_cast<A>(hidden);
  for_tiles<Access, 2>(columns, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int k = 0; k < tile.kCount; ++k) {
      const Vec<A> normed = tile.load(mixed, k) * rstd;
      const Vec<A> dh = tile.load(grad_out, k);
      tile.store(g, k, (dh * tile.load(out_weight, k) - normed * mean) * rstd);
      tile.store(grad_out_weight, k, tile.load(grad_out_weight, k) + dh * normed);
    }
  });
}

// Bytes of the gradients that a backward writes.
template <typename Backward>
ATTNRES_INLINE int64_t bytes_of_gradients(const Backward& p) {
  int64_t bytes = 0;
  for (int i = 0; i < p.num_sources; ++i) {
    const Rows& grad = p.grad_sources[i];
    if (grad.data != nullptr) bytes += p.num_tokens * p.hidden * size_of(grad.dtype);
  }
  return bytes;
}
// Whether gradient i of a backward is written past the caches: what is added to is in one already.
template <typename Backward>
ATTNRES_INLINE bool streams_gradient(const Backward& p, int i, int64_t gradient_bytes) {
  return p.grad_base[i].data == nullptr && streams(p.grad_sources[i], gradient_bytes);
}

template <typename Access>
void depth_attention_backward(const DepthAttentionBackward& p, const SharedVectors& shared,
                              TokenRange range, void* part) {
  using A = typename Access::A;
  using T = typename Access::T;
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden;
  const bool wants_score = p.grad_query.data != nullptr || p.grad_key_weight.data != nullptr;
  Arena arena(range.scratch);
  const BackwardScratch<Access> s(arena, p);
  const int64_t columns = s.columns;
  const A* u = as_loaded<Access>(shared.score, hidden, s.u);
  const A* out_weight = as_loaded<Access>(shared.out_weight, hidden, s.out_weight);
  for (int64_t c = 0; c < columns; ++c) s.grad_score[c] = s.grad_out_weight[c] = 0;

  const int64_t gradient_bytes = bytes_of_gradients(p);
  const bool needs_columns = gradient_bytes > 0 || wants_score;

  for (int64_t m = range.begin; m < range.end; ++m) {
    const int64_t after = token_after(m, range);
    for (int i = 0; i < n; ++i) {
      s.rows[i] = bring<Access>(p.sources[i], m, hidden, s.copies + i * columns);
      s.next[i] = row_ahead<Access>(p.sources[i], after, hidden, s.rows[i]);
      s.bases[i] = row_ahead<Access>(p.grad_base[i], m, hidden, s.base);
      s.grads[i] = {};
      if (p.grad_sources[i].data != nullptr) {
        s.grads[i] = place<Access>(p.grad_sources[i], m, hidden,
                                   streams_gradient(p, i, gradient_bytes), s.grad);
      }
    }
    const int first_scored = p.first_logit != nullptr ? 1 : 0;
    if (first_scored == 1) {
      s.logits[0] = static_cast<const A*>(p.first_logit)[m];
      s.rstd[0] = 0;
      skip_empty_state(s.logits[0], s.rows, n);
    }

    const T* grad_out = bring<Access>(p.grad_out, m, hidden, s.grad_out);
    const T* next_grad_out = row_ahead<Access>(p.grad_out, after, hidden, grad_out);
    const bool normed = out_weight != nullptr;
    const A* g = s.g;
    if constexpr (kSame<A, T>) {
      if (!normed) g = grad_out;
    } else if (!normed) {
      for_tiles<Access, 2>(columns, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int k = 0; k < tile.kCount; ++k) tile.store(s.g, k, tile.load(grad_out, k));
      });
    }

    // Logits and, where g is known already, <g, v_i>.
    const A* stats = p.stats == nullptr ? nullptr : static_cast<const A*>(p.stats) + m;
    for (int i = first_scored; i < n; ++i) {
      if (stats != nullptr) {
        s.rstd[i] = stats[i * m_total];
        s.logits[i] = stats[(n + i) * m_total];
        continue;
      }
      A product, squares;
      if (normed) {
        score<Access>(s.rows[i], s.next[i], u, columns, product, squares);
      } else {
        score_and_dot<Access>(s.rows[i], s.next[i], u, g, columns, product, squares, s.dots[i]);
      }
      s.rstd[i] = inverse_rms<A>(squares, hidden, p.eps);
      s.logits[i] = s.rstd[i] * product;
    }
    softmax<A>(s.logits, s.weights, n);

    if (normed) {
      const A* mixed = s.mixed;
      if (p.mix.data != nullptr) {
        mixed = as_loaded<Access>(row_at(p.mix, m), hidden, s.mixed);
      } else {
        mix_and_square<Access>(s.rows, s.next, s.weights, n, columns, s.mixed);
      }
      output_norm_backward<Access>(grad_out, mixed, out_weight, hidden, p.out_eps, s.g,
                                   s.grad_out_weight);
    }
    if (!needs_columns && p.grad_first_logit == nullptr) continue;

    for (int i = 0; i < n; ++i) {
      const bool have_dot = stats == nullptr && !normed && i >= first_scored;
      if (!have_dot) s.dots[i] = dot<Access>(s.rows[i], s.next[i], g, columns);
      if (p.grad_weights != nullptr)
        s.dots[i] += static_cast<const A*>(p.grad_weights)[i * m_total + m];
    }
    A mean = 0;
    for (int i = 0; i < n; ++i) mean += s.weights[i] * s.dots[i];
    for (int i = 0; i < n; ++i) {
      // A single source has weight 1 whatever its logit, so its logit's gradient is 0 and not a
      // rounding error.
      const A grad_logit = n == 1 ? A(0) * mean : s.weights[i] * (s.dots[i] - mean);
      if (i < first_scored) {
        if (p.grad_first_logit != nullptr) static_cast<A*>(p.grad_first_logit)[m] = grad_logit;
        s.score_factor[i] = s.value_factor[i] = 0;
        continue;
      }
      s.score_factor[i] = grad_logit * s.rstd[i];
      s.value_factor[i] = grad_logit * s.logits[i] * s.rstd[i] * s.rstd[i] / static_cast<A>(hidden);
    }
    if (!needs_columns) continue;

    // dv_i = p_i g + a_i u - b_i v_i and du += a_i v_i, with every row read once more.
    for_runs(columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      prefetch_bytes(next_grad_out, begin * sizeof(T), end * sizeof(T));
      for (int64_t c = begin; c < end; ++c) s.du[c] = 0;
      for (int i = 0; i < n; ++i) {
        const T *values = s.rows[i], *next = s.next[i];
        const T* base = p.grad_base[i].data == nullptr ? nullptr : s.bases[i];
        if (base == s.base) bring<Access>(p.grad_base[i], m, begin, end, hidden, s.base);
        const MutableRow<T> grad = s.grads[i];
        const Vec<A> weight = broadcast<A>(s.weights[i]);
        const Vec<A> a = broadcast<A>(s.score_factor[i]);
        const Vec<A> b = broadcast<A>(s.value_factor[i]);
        for_columns<Access, kUnroll>(begin, end, [&](auto tile) __attribute__((always_inline)) {
          Vec<A> dv[tile.kCount];
#pragma GCC unroll 4
          for (int k = 0; k < tile.kCount; ++k) {
            const Vec<A> v = tile.load(values, k);
            tile.store(s.du, k, tile.load(s.du, k) + a * v);
            dv[k] = weight * tile.load(g, k) + a * tile.load(u, k) - b * v;
            if (base != nullptr) dv[k] += tile.load(base, k);
          }
          tile.prefetch_half(next, 1, columns);
          if (grad.data != nullptr) tile.store_all(grad, dv);
        });
        if (grad.data != nullptr) {
          put_back<Access>(p.grad_sources[i], m, begin, end, hidden, grad.data);
        }
      }
      for (int64_t c = begin; c < end; ++c) s.grad_score[c] += s.du[c];
    });
  }
  if (wants_score) add_joined<Access>(s.grad_score, hidden, static_cast<A*>(part));
  if (p.grad_out_weight.data != nullptr) {
    add_joined<Access>(s.grad_out_weight, hidden, static_cast<A*>(part) + hidden);
  }
  finish_streaming();
}

}  // namespace
}  // namespace attnres::cpu
