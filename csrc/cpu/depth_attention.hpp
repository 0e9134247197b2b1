// Depth attention over a range of tokens, forward and backward. Serves `depth_attention`,
// `accumulate_depth_attention`, `merge_partial` and the block cache, which differ in what the
// parameters hold (see attnres/params.hpp).
//
// A token's N rows come from memory in the first pass over them; the passes that follow find them
// in the core's own cache (N = 9 rows of 2304 float32 values are 81 KiB).
#pragma once

#include "kernels.hpp"
#include "rows.hpp"

namespace attnres::cpu {
namespace {

// <v, u> and <v, v> of one row, while memory brings half of `next`.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void score(Row v, Row next, const A* u, int64_t hidden, A& dot, A& squares) {
  Sum<A, kUnroll> dots, sums;
  sum_over_tiles<Access, kUnroll>(
      hidden,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> x = tile.load(v, k);
          dots.parts[k] += x * tile.load(u, k);
          sums.parts[k] += x * x;
        }
        tile.prefetch_half(next, 0, hidden);
      },
      dots, sums);
  dot = dots.total();
  squares = sums.total();
}

template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE A dot(Row v, Row next, const A* g, int64_t hidden) {
  Sum<A, kUnroll> dots;
  sum_over_tiles<Access, kUnroll>(
      hidden,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) dots.parts[k] += tile.load(v, k) * tile.load(g, k);
        tile.prefetch_half(next, 0, hidden);
      },
      dots);
  return dots.total();
}

// <v, u>, <v, v> and <v, g>: what the backward needs of a row when nothing was saved. Sums in the
// order of `score` and `dot`, so that gradients do not depend on what was saved.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void score_and_dot(Row v, Row next, const A* u, const A* g, int64_t hidden, A& dot_u,
                                  A& squares, A& dot_g) {
  Sum<A, kUnroll> us, sums, gs;
  sum_over_tiles<Access, kUnroll>(
      hidden,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> x = tile.load(v, k);
          us.parts[k] += x * tile.load(u, k);
          sums.parts[k] += x * x;
          gs.parts[k] += x * tile.load(g, k);
        }
        tile.prefetch_half(next, 0, hidden);
      },
      us, sums, gs);
  dot_u = us.total();
  squares = sums.total();
  dot_g = gs.total();
}

// Block summation: result = round(partial + delta), and the same in `rounded`, which may be the
// result; an absent partial counts as zero. Returns the sum of squares of the rounded values, and
// their product with u.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void add_and_score(Row partial, Row delta, MutableRow result, Row rounded,
                                  const A* u, int64_t hidden, A& dot, A& squares) {
  const MutableRow kept{const_cast<void*>(rounded.data), rounded.dtype};
  Sum<A, kUnroll> dots, sums;
  sum_over_tiles<Access, kUnroll>(
      hidden,
      [&](auto tile) __attribute__((always_inline)) {
        Vec<A> added[kUnroll];
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          added[k] = tile.load(delta, k);
          if (partial.data != nullptr) added[k] += tile.load(partial, k);
        }
        tile.store_all(kept, added);
        if (result.data != kept.data) tile.store_all(result, added);
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> x = tile.load(rounded, k);
          if (u != nullptr) dots.parts[k] += x * tile.load(u, k);
          sums.parts[k] += x * x;
        }
      },
      dots, sums);
  dot = dots.total();
  squares = sums.total();
}

// The rows of the token after m, or of m where this range ends. An absent source has none:
// `instead`.
ATTNRES_INLINE void next_rows(const ConstRows* sources, const ConstRows& instead, int count,
                              int64_t m, const TokenRange& range, Row* rows) {
  const int64_t next = m + 1 < range.end ? m + 1 : m;
  for (int i = 0; i < count; ++i) {
    rows[i] = row(sources[i].data == nullptr ? instead : sources[i], next);
  }
}

// f(tile, the tile's vectors of sum_i weights[i] * rows[i]) for all of the mix. The rows come from
// cache, so that memory is free to bring the other half of `next`. Of more rows than can be read
// side by side some are mixed at a time, and the sums lie in `sums` [D] meanwhile.
template <typename Access, typename A = typename Access::A, typename F>
ATTNRES_INLINE void mix(const Row* rows, const Row* next, const A* weights, int count,
                        int64_t hidden, A* sums, F&& f) {
  constexpr int kSideBySide = 12, kMost = Access::kMostVectors;
  for_runs(hidden, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int first = 0; first < count; first += kSideBySide) {
      const int last = first + kSideBySide < count ? first + kSideBySide : count;
      const auto mix_tile = [&](auto tile) __attribute__((always_inline)) {
        Vec<A> mixed[kMost] = {};
        if (first > 0) {
#pragma GCC unroll 8
          for (int k = 0; k < tile.kCount; ++k) mixed[k] = tile.load(sums, k);
        }
        for (int i = first; i < last; ++i) {
          const Vec<A> weight = broadcast<A>(weights[i]);
#pragma GCC unroll 8
          for (int k = 0; k < tile.kCount; ++k) mixed[k] += weight * tile.load(rows[i], k);
          tile.prefetch_half(next[i], 1, hidden);
        }
        if (last == count) return f(tile, mixed);
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) tile.store(sums, k, mixed[k]);
      };
      for_columns<Access, kMost>(begin, end, hidden, mix_tile);
    }
  });
}

template <typename A>
struct ForwardScratch {
  Row* rows;
  Row* next;
  A* logits;
  A* weights;
  A* rstd;
  A* mixed;
  void* sum;  // a row of block summation, in the dtype of `new_partial`

  ForwardScratch(Arena& arena, const DepthAttentionForward& p)
      : rows(arena.take<Row>(p.num_sources)),
        next(arena.take<Row>(p.num_sources)),
        logits(arena.take<A>(p.num_sources)),
        weights(arena.take<A>(p.num_sources)),
        rstd(arena.take<A>(p.num_sources)),
        mixed(arena.take<A>(p.hidden)),
        sum(arena.take<double>(p.delta.data == nullptr ? 0 : p.hidden)) {}
};

// An empty state (lse = -inf) has weight 0 but may hold anything, NaN too: point at a row that is
// mixed anyway.
template <typename A>
ATTNRES_INLINE void skip_empty_state(A first_logit, Row* rows, int count) {
  if (count > 1 && first_logit == -__builtin_inf()) rows[0] = rows[1];
}

template <typename Access>
void depth_attention_forward(const DepthAttentionForward& p, const SharedVectors& shared,
                             TokenRange range) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.score);
  const A* out_weight = static_cast<const A*>(shared.out_weight);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden;
  const int64_t result_bytes = m_total * hidden * size_of(p.out.dtype);
  const bool streamed = streams(p.out, result_bytes);
  const bool sum_streamed = streams(p.new_partial, result_bytes);
  Arena arena(range.scratch);
  const ForwardScratch<A> s(arena, p);

  for (int64_t m = range.begin; m < range.end; ++m) {
    next_rows(p.sources, p.delta, n, m, range, s.next);
    for (int i = 0; i < n; ++i) {
      A product, squares;
      if (i == n - 1 && p.delta.data != nullptr) {
        const Row partial = p.sources[i].data == nullptr ? Row{} : row(p.sources[i], m);
        MutableRow result = row(p.new_partial, m);
        // The rounded sum is read again: where it goes past the caches, a copy is kept.
        result.streamed = sum_streamed && partial.data != result.data;
        s.rows[i] = {result.streamed ? s.sum : result.data, result.dtype};
        add_and_score<Access>(partial, row(p.delta, m), result, s.rows[i], u, hidden, product,
                              squares);
      } else {
        s.rows[i] = row(p.sources[i], m);
        if (i == 0 && p.first_logit != nullptr) {
          s.logits[0] = static_cast<const A*>(p.first_logit)[m];
          s.rstd[0] = 0;
          continue;
        }
        if (i < p.num_known_rstd) {
          s.rstd[i] = static_cast<const A*>(p.known_rstd)[i * m_total + m];
          s.logits[i] = s.rstd[i] * dot<Access>(s.rows[i], s.next[i], u, hidden);
          continue;
        }
        score<Access>(s.rows[i], s.next[i], u, hidden, product, squares);
      }
      s.rstd[i] = inverse_rms<A>(squares, hidden, p.eps);
      s.logits[i] = s.rstd[i] * product;
    }
    if (p.first_logit != nullptr) skip_empty_state<A>(s.logits[0], s.rows, n);
    const A lse = softmax<A>(s.logits, s.weights, n);

    MutableRow out = row(p.out, m);
    out.streamed = streamed;
    if (out_weight == nullptr) {
      mix<Access>(s.rows, s.next, s.weights, n, hidden, s.mixed,
                  [&](auto tile, const Vec<A>* v)
                      __attribute__((always_inline)) { tile.store_all(out, v); });
    } else {
      Sum<A, kUnroll> squares;
      Vec<A> rest = {};
      mix<Access>(s.rows, s.next, s.weights, n, hidden, s.mixed,
                  [&](auto tile, const Vec<A>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int k = 0; k < tile.kCount; ++k) {
                      tile.store(s.mixed, k, v[k]);
                      (tile.kCount == 1 ? rest : squares.parts[k % kUnroll]) += v[k] * v[k];
                    }
                  });
      squares.template restore_order<Access>(false);
      squares.parts[0] += rest;
      const A rstd = inverse_rms<A>(squares.total(), hidden, p.out_eps);
      if (p.mix.data != nullptr) {
        A* saved = static_cast<A*>(row(p.mix, m).data);
        __builtin_memcpy(saved, s.mixed, hidden * sizeof(A));
        if (Access::kSplits) join_columns(saved, hidden);
      }
      for_tiles<Access, kUnroll>(hidden, [&](auto tile) __attribute__((always_inline)) {
        Vec<A> normed[kUnroll];
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          normed[k] = tile.load(s.mixed, k) * rstd * tile.load(out_weight, k);
        }
        tile.store_all(out, normed);
      });
    }

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

template <typename A>
struct BackwardScratch {
  Row* rows;
  Row* next;
  Row* bases;
  MutableRow* grads;
  A* logits;
  A* weights;
  A* rstd;
  A* dots;
  A* score_factor;  // of u in dv and of v in du
  A* value_factor;  // of v in dv
  A* mixed;
  A* g;
  A* du;  // of a run of columns

  BackwardScratch(Arena& arena, const DepthAttentionBackward& p)
      : rows(arena.take<Row>(p.num_sources)),
        next(arena.take<Row>(p.num_sources)),
        bases(arena.take<Row>(p.num_sources)),
        grads(arena.take<MutableRow>(p.num_sources)),
        logits(arena.take<A>(p.num_sources)),
        weights(arena.take<A>(p.num_sources)),
        rstd(arena.take<A>(p.num_sources)),
        dots(arena.take<A>(p.num_sources)),
        score_factor(arena.take<A>(p.num_sources)),
        value_factor(arena.take<A>(p.num_sources)),
        mixed(arena.take<A>(p.hidden)),
        g(arena.take<A>(p.hidden)),
        du(arena.take<A>(p.hidden)) {}
};

// Through the output norm: g = rstd * (dh * w - o_hat * <dh * w, o_hat> / D), and adds dh * o_hat
// to the gain's gradient.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void output_norm_backward(Row grad_out, const A* mixed, const A* out_weight,
                                         int64_t hidden, double out_eps, A* g, A* grad_out_weight) {
  Sum<A, 2> squares, products;
  sum_over_tiles<Access, 2>(
      hidden,
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
  for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int k = 0; k < tile.kCount; ++k) {
      const Vec<A> normed = tile.load(mixed, k) * rstd;
      const Vec<A> dh = tile.load(grad_out, k);
      tile.store(g, k, (dh * tile.load(out_weight, k) - normed * mean) * rstd);
      if (grad_out_weight != nullptr) {
        tile.store(grad_out_weight, k, tile.load(grad_out_weight, k) + dh * normed);
      }
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

template <typename Access>
void depth_attention_backward(const DepthAttentionBackward& p, const SharedVectors& shared,
                              TokenRange range, void* part) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.score);
  const A* out_weight = static_cast<const A*>(shared.out_weight);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden;
  A* grad_score = p.grad_query.data != nullptr || p.grad_key_weight.data != nullptr
                      ? static_cast<A*>(part)
                      : nullptr;
  A* grad_out_weight = p.grad_out_weight.data != nullptr ? static_cast<A*>(part) + hidden : nullptr;
  Arena arena(range.scratch);
  const BackwardScratch<A> s(arena, p);

  const int64_t gradient_bytes = bytes_of_gradients(p);
  const bool needs_columns = gradient_bytes > 0 || grad_score != nullptr;

  for (int64_t m = range.begin; m < range.end; ++m) {
    next_rows(p.sources, ConstRows{}, n, m, range, s.next);
    for (int i = 0; i < n; ++i) {
      s.rows[i] = row(p.sources[i], m);
      s.grads[i] = p.grad_sources[i].data == nullptr ? MutableRow{} : row(p.grad_sources[i], m);
      s.bases[i] = p.grad_base[i].data == nullptr ? Row{} : row(p.grad_base[i], m);
      // What is added to is in a cache already.
      s.grads[i].streamed =
          s.bases[i].data == nullptr && streams(p.grad_sources[i], gradient_bytes);
    }
    const int first_scored = p.first_logit != nullptr ? 1 : 0;
    if (first_scored == 1) {
      s.logits[0] = static_cast<const A*>(p.first_logit)[m];
      s.rstd[0] = 0;
      skip_empty_state<A>(s.logits[0], s.rows, n);
    }

    const Row grad_out = row(p.grad_out, m);
    const bool normed = out_weight != nullptr;
    const A* g = s.g;
    if (!normed && kIsCompute<Access>) {
      g = static_cast<const A*>(grad_out.data);
    } else if (!normed) {
      for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
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
        score<Access>(s.rows[i], s.next[i], u, hidden, product, squares);
      } else {
        score_and_dot<Access>(s.rows[i], s.next[i], u, g, hidden, product, squares, s.dots[i]);
      }
      s.rstd[i] = inverse_rms<A>(squares, hidden, p.eps);
      s.logits[i] = s.rstd[i] * product;
    }
    softmax<A>(s.logits, s.weights, n);

    if (normed) {
      if (p.mix.data != nullptr) {
        __builtin_memcpy(s.mixed, row(p.mix, m).data, hidden * sizeof(A));
        if (Access::kSplits) split_columns(s.mixed, hidden);
      } else {
        mix<Access>(s.rows, s.next, s.weights, n, hidden, s.mixed,
                    [&](auto tile, const Vec<A>* v) __attribute__((always_inline)) {
                      for (int k = 0; k < tile.kCount; ++k) tile.store(s.mixed, k, v[k]);
                    });
      }
      output_norm_backward<Access>(grad_out, s.mixed, out_weight, hidden, p.out_eps, s.g,
                                   grad_out_weight);
    }
    if (!needs_columns && p.grad_first_logit == nullptr) continue;

    for (int i = 0; i < n; ++i) {
      const bool have_dot = stats == nullptr && !normed && i >= first_scored;
      if (!have_dot) s.dots[i] = dot<Access>(s.rows[i], s.next[i], g, hidden);
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
    for_runs(hidden, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t c = begin; c < end; ++c) s.du[c] = 0;
      for (int i = 0; i < n; ++i) {
        const Row values = s.rows[i], next = s.next[i], base = s.bases[i];
        const MutableRow grad = s.grads[i];
        const Vec<A> weight = broadcast<A>(s.weights[i]);
        const Vec<A> a = broadcast<A>(s.score_factor[i]);
        const Vec<A> b = broadcast<A>(s.value_factor[i]);
        for_columns<Access, kUnroll>(
            begin, end, hidden, [&](auto tile) __attribute__((always_inline)) {
              Vec<A> dv[4];
#pragma GCC unroll 4
              for (int k = 0; k < tile.kCount; ++k) {
                const Vec<A> v = tile.load(values, k);
                tile.store(s.du, k, tile.load(s.du, k) + a * v);
                dv[k] = weight * tile.load(g, k) + a * tile.load(u, k) - b * v;
                if (base.data != nullptr) dv[k] += tile.load(base, k);
              }
              tile.prefetch_half(next, 1, hidden);
              if (grad.data != nullptr) tile.store_all(grad, dv);
            });
      }
      if (grad_score != nullptr) {
        for_columns<Access, 2>(begin, end, hidden, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int k = 0; k < tile.kCount; ++k)
            tile.store(grad_score, k, tile.load(grad_score, k) + tile.load(s.du, k));
        });
      }
    });
  }
  finish_streaming();
}

}  // namespace
}  // namespace attnres::cpu
