// Phase 1 over a range of tokens: S score vectors against N finished blocks, forward and backward. Each block row is read
// from memory once; queries are taken four at a time, so that a vector of a row in a register serves four of them.
#pragma once

#include "depth_attention.hpp"

namespace attnres::cpu {
namespace {

constexpr int kQueries = 4;

template <int kQueriesInGroup>
struct QueryGroup {
  static constexpr int kCount = kQueriesInGroup;
  int64_t first;
};

// f(group) for groups of four queries, then for single ones.
template <typename F>
ATTNRES_INLINE void for_query_groups(int64_t num_queries, F&& f) {
  int64_t s = 0;
  for (; s + kQueries <= num_queries; s += kQueries) f(QueryGroup<kQueries>{s});
  for (; s < num_queries; ++s) f(QueryGroup<1>{s});
}

// products[q * stride] = <v, vectors[q]> for `kCount` rows of `vectors` [., D]; and <v, v> if wanted.
template <typename Access, int kCount, bool kSquares, typename A = typename Access::A>
ATTNRES_INLINE void dots(Row v, const A* vectors, int64_t hidden, A* products, int64_t stride, A* squares) {
  Sum<A, 2> sums[kCount], own;
  for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int k = 0; k < tile.kCount; ++k) {
      const Vec<A> x = tile.load(v, k);
#pragma GCC unroll 4
      for (int q = 0; q < kCount; ++q) sums[q].parts[k] += x * tile.load(vectors + q * hidden, k);
      if constexpr (kSquares) own.parts[k] += x * x;
    }
  });
  for (int q = 0; q < kCount; ++q) products[q * stride] = sums[q].total();
  if constexpr (kSquares) *squares = own.total();
}

// products[s * stride] = <v, vectors[s]> for all S rows of `vectors`.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void all_dots(Row v, const A* vectors, int64_t num_queries, int64_t hidden, A* products, int64_t stride) {
  for_query_groups(num_queries, [&](auto group) __attribute__((always_inline)) {
    const int64_t s = group.first;
    dots<Access, group.kCount, false>(v, vectors + s * hidden, hidden, products + s * stride, stride, static_cast<A*>(nullptr));
  });
}

// logits [S, N] and rstd [N] of one token.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void score_all(const Row* rows, int n, const A* u, int64_t num_queries, int64_t hidden, double eps,
                              const float* known_rstd, int64_t known_stride, A* logits, A* rstd) {
  for (int i = 0; i < n; ++i) {
    if (known_rstd != nullptr) {
      rstd[i] = static_cast<A>(known_rstd[i * known_stride]);
      all_dots<Access>(rows[i], u, num_queries, hidden, logits + i, n);
    } else {
      A squares;
      dots<Access, 1, true>(rows[i], u, hidden, logits + i, n, &squares);
      rstd[i] = inverse_rms<A>(squares, hidden, eps);
      all_dots<Access>(rows[i], u + hidden, num_queries - 1, hidden, logits + n + i, n);
    }
    for (int64_t s = 0; s < num_queries; ++s) logits[s * n + i] *= rstd[i];
  }
}

template <typename A>
struct InterForwardScratch {
  Row* rows;
  A* rstd;
  A* logits;
  A* weights;

  InterForwardScratch(Arena& arena, const InterBlockForward& p)
      : rows(arena.take<Row>(p.num_sources)),
        rstd(arena.take<A>(p.num_sources)),
        logits(arena.take<A>(p.num_sources * p.num_queries)),
        weights(arena.take<A>(p.num_sources * p.num_queries)) {}
};

template <typename Access>
void inter_block_forward(const InterBlockForward& p, const SharedVectors& shared, TokenRange range) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.score);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  Arena arena(range.scratch);
  const InterForwardScratch<A> t(arena, p);

  for (int64_t m = range.begin; m < range.end; ++m) {
    for (int i = 0; i < n; ++i) t.rows[i] = row(p.sources[i], m);
    const float* known_rstd = p.known_rstd == nullptr ? nullptr : p.known_rstd + m;
    score_all<Access>(t.rows, n, u, num_queries, hidden, p.eps, known_rstd, m_total, t.logits, t.rstd);
    for (int64_t s = 0; s < num_queries; ++s) {
      const A lse = softmax<A>(t.logits + s * n, t.weights + s * n, n);
      static_cast<A*>(p.lse)[s * m_total + m] = lse;
    }

    for_query_groups(num_queries, [&](auto group) __attribute__((always_inline)) {
      const int64_t s = group.first;
      MutableRow outs[kQueries];
      for (int q = 0; q < group.kCount; ++q) outs[q] = row(p.out, (s + q) * m_total + m);
      for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
        Vec<A> sums[kQueries][2] = {};
        for (int i = 0; i < n; ++i) {
#pragma GCC unroll 2
          for (int k = 0; k < tile.kCount; ++k) {
            const Vec<A> v = tile.load(t.rows[i], k);
#pragma GCC unroll 4
            for (int q = 0; q < group.kCount; ++q) sums[q][k] += broadcast<A>(t.weights[(s + q) * n + i]) * v;
          }
        }
#pragma GCC unroll 4
        for (int q = 0; q < group.kCount; ++q) {
#pragma GCC unroll 2
          for (int k = 0; k < tile.kCount; ++k) tile.store(outs[q], k, sums[q][k]);
        }
      });
    });

    if (p.stats != nullptr) {
      A* stats = static_cast<A*>(p.stats) + m;
      for (int i = 0; i < n; ++i) stats[i * m_total] = t.rstd[i];
      for (int64_t j = 0; j < num_queries * n; ++j) stats[(n + j) * m_total] = t.logits[j];
    }
  }
}

template <typename A>
struct InterBackwardScratch {
  Row* rows;
  Row* bases;
  MutableRow* grads;
  A* rstd;
  A* logits;        // [S, N]
  A* weights;       // [S, N]
  A* products;      // [S, N], <g_s, v_i>
  A* score_factor;  // [S, N], of u_s in dv_i and of v_i in du_s
  A* value_factor;  // [N], of v_i in dv_i
  A* g;             // [S, D], the output gradients in the compute type

  InterBackwardScratch(Arena& arena, const InterBlockBackward& p)
      : rows(arena.take<Row>(p.num_sources)),
        bases(arena.take<Row>(p.num_sources)),
        grads(arena.take<MutableRow>(p.num_sources)),
        rstd(arena.take<A>(p.num_sources)),
        logits(arena.take<A>(p.num_sources * p.num_queries)),
        weights(arena.take<A>(p.num_sources * p.num_queries)),
        products(arena.take<A>(p.num_sources * p.num_queries)),
        score_factor(arena.take<A>(p.num_sources * p.num_queries)),
        value_factor(arena.take<A>(p.num_sources)),
        g(arena.take<A>(p.num_queries * p.hidden)) {}
};

template <typename Access>
void inter_block_backward(const InterBlockBackward& p, const SharedVectors& shared, TokenRange range, void* part) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.score);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  const bool any_query_gradient = p.grad_queries.data != nullptr || p.grad_key_weights.data != nullptr;
  A* grad_score = any_query_gradient ? static_cast<A*>(part) : nullptr;
  bool any_source_gradient = false;
  for (int i = 0; i < n; ++i) any_source_gradient |= p.grad_sources[i].data != nullptr;
  Arena arena(range.scratch);
  const InterBackwardScratch<A> t(arena, p);

  for (int64_t m = range.begin; m < range.end; ++m) {
    for (int i = 0; i < n; ++i) {
      t.rows[i] = row(p.sources[i], m);
      t.grads[i] = p.grad_sources[i].data == nullptr ? MutableRow{} : row(p.grad_sources[i], m);
      t.bases[i] = p.grad_base[i].data == nullptr ? Row{} : row(p.grad_base[i], m);
    }
    if (p.stats != nullptr) {
      const A* stats = static_cast<const A*>(p.stats) + m;
      for (int i = 0; i < n; ++i) t.rstd[i] = stats[i * m_total];
      for (int64_t j = 0; j < num_queries * n; ++j) t.logits[j] = stats[(n + j) * m_total];
    } else {
      score_all<Access>(t.rows, n, u, num_queries, hidden, p.eps, nullptr, 0, t.logits, t.rstd);
    }

    for (int64_t s = 0; s < num_queries; ++s) {
      A* g = t.g + s * hidden;
      if (p.grad_out.data == nullptr) {
        for (int64_t c = 0; c < hidden; ++c) g[c] = 0;
        continue;
      }
      const Row grad_out = row(p.grad_out, s * m_total + m);
      for_tiles<Access, 1>(hidden, [&](auto tile) __attribute__((always_inline)) {
        tile.store(g, 0, tile.load(grad_out, 0));
      });
    }
    for (int i = 0; i < n; ++i) all_dots<Access>(t.rows[i], t.g, num_queries, hidden, t.products + i, n);

    for (int i = 0; i < n; ++i) t.value_factor[i] = 0;
    for (int64_t s = 0; s < num_queries; ++s) {
      softmax<A>(t.logits + s * n, t.weights + s * n, n);
      A mean = 0;
      for (int i = 0; i < n; ++i) mean += t.weights[s * n + i] * t.products[s * n + i];
      const A grad_lse = p.grad_lse == nullptr ? A(0) : static_cast<const A*>(p.grad_lse)[s * m_total + m];
      for (int i = 0; i < n; ++i) {
        const int64_t j = s * n + i;
        const A centred = n == 1 ? A(0) * mean : t.products[j] - mean;
        const A grad_logit = t.weights[j] * (centred + grad_lse);
        t.score_factor[j] = grad_logit * t.rstd[i];
        t.value_factor[i] += grad_logit * t.logits[j] * t.rstd[i] * t.rstd[i] / static_cast<A>(hidden);
      }
    }

    // dv_i = sum_s (p_si g_s + a_si u_s) - b_i v_i
    if (any_source_gradient) {
      for (int i = 0; i < n; ++i) {
        if (t.grads[i].data == nullptr) continue;
        for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
          Vec<A> dv[2];
#pragma GCC unroll 2
          for (int k = 0; k < tile.kCount; ++k) {
            dv[k] = broadcast<A>(-t.value_factor[i]) * tile.load(t.rows[i], k);
            if (t.bases[i].data != nullptr) dv[k] += tile.load(t.bases[i], k);
          }
          for (int64_t s = 0; s < num_queries; ++s) {
            const Vec<A> weight = broadcast<A>(t.weights[s * n + i]);
            const Vec<A> a = broadcast<A>(t.score_factor[s * n + i]);
#pragma GCC unroll 2
            for (int k = 0; k < tile.kCount; ++k) {
              dv[k] += weight * tile.load(t.g + s * hidden, k) + a * tile.load(u + s * hidden, k);
            }
          }
#pragma GCC unroll 2
          for (int k = 0; k < tile.kCount; ++k) tile.store(t.grads[i], k, dv[k]);
        });
      }
    }

    // du_s += sum_i a_si v_i
    if (grad_score != nullptr) {
      for_query_groups(num_queries, [&](auto group) __attribute__((always_inline)) {
        const int64_t s = group.first;
        for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
          Vec<A> du[kQueries][2];
#pragma GCC unroll 4
          for (int q = 0; q < group.kCount; ++q) {
#pragma GCC unroll 2
            for (int k = 0; k < tile.kCount; ++k) du[q][k] = tile.load(grad_score + (s + q) * hidden, k);
          }
          for (int i = 0; i < n; ++i) {
#pragma GCC unroll 2
            for (int k = 0; k < tile.kCount; ++k) {
              const Vec<A> v = tile.load(t.rows[i], k);
#pragma GCC unroll 4
              for (int q = 0; q < group.kCount; ++q) du[q][k] += broadcast<A>(t.score_factor[(s + q) * n + i]) * v;
            }
          }
#pragma GCC unroll 4
          for (int q = 0; q < group.kCount; ++q) {
#pragma GCC unroll 2
            for (int k = 0; k < tile.kCount; ++k) tile.store(grad_score + (s + q) * hidden, k, du[q][k]);
          }
        });
      });
    }
  }
}

}  // namespace
}  // namespace attnres::cpu
