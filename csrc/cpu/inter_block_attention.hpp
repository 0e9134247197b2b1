// Phase 1 over a range of tokens: S score vectors against N finished blocks, forward and backward.
// Each block row is read from memory once; the products of rows and queries are made in small
// tiles, so that what is loaded serves several.
#pragma once

#include "depth_attention.hpp"

namespace attnres::cpu {
namespace {

// A vector of four queries is multiplied with one of several rows: as many products as registers
// hold.
constexpr int kQueries = 4;
constexpr int kRows = kVectorBytes == 64 ? 4 : 2;

template <int kItems>
struct Group {
  static constexpr int kCount = kItems;
  int64_t first;
};

// f(group) for groups of kMost items, then for single ones.
template <int kMost, typename F>
ATTNRES_INLINE void for_groups(int64_t count, F&& f) {
  int64_t first = 0;
  for (; first + kMost <= count; first += kMost) f(Group<kMost>{first});
  for (; first < count; ++first) f(Group<1>{first});
}

template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE A sum_of_squares(Row v, int64_t hidden) {
  Sum<A, kUnroll> squares;
  sum_over_tiles<Access, kUnroll>(
      hidden,
      [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) {
          const Vec<A> x = tile.load(v, k);
          squares.parts[k] += x * x;
        }
      },
      squares);
  return squares.total();
}

// products[s * n + i] = <rows[i], vectors[s]> for n rows and S rows of `vectors` [S, D]. Every
// product is one running sum over the columns, whatever group it falls into.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void all_products(const Row* rows, int n, const A* vectors, int64_t num_queries,
                                 int64_t hidden, A* products) {
  for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
    for_groups<kRows>(n, [&](auto sources) __attribute__((always_inline)) {
      Sum<A, 1> sums[queries.kCount][sources.kCount];
      int64_t run = 0;
      for_tiles<Access, 1>(hidden, [&](auto tile) __attribute__((always_inline)) {
        Vec<A> values[sources.kCount];
        for (int i = 0; i < sources.kCount; ++i) values[i] = tile.load(rows[sources.first + i], 0);
        for (int q = 0; q < queries.kCount; ++q) {
          const Vec<A> vector = tile.load(vectors + (queries.first + q) * hidden, 0);
          for (int i = 0; i < sources.kCount; ++i) sums[q][i].parts[0] += vector * values[i];
        }
        if (++run == kUnroll * kLongestRun) {
          for (int q = 0; q < queries.kCount; ++q) {
            for (int i = 0; i < sources.kCount; ++i) sums[q][i].carry();
          }
          run = 0;
        }
      });
      for (int q = 0; q < queries.kCount; ++q) {
        for (int i = 0; i < sources.kCount; ++i) {
          products[(queries.first + q) * n + sources.first + i] = sums[q][i].total();
        }
      }
    });
  });
}

// logits [S, N] and rstd [N] of one token.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void score_all(const Row* rows, int n, const A* u, int64_t num_queries,
                              int64_t hidden, double eps, const float* known_rstd,
                              int64_t known_stride, A* logits, A* rstd) {
  for (int i = 0; i < n; ++i) {
    rstd[i] = known_rstd != nullptr
                  ? static_cast<A>(known_rstd[i * known_stride])
                  : inverse_rms<A>(sum_of_squares<Access>(rows[i], hidden), hidden, eps);
  }
  all_products<Access>(rows, n, u, num_queries, hidden, logits);
  for (int64_t s = 0; s < num_queries; ++s) {
    for (int i = 0; i < n; ++i) logits[s * n + i] *= rstd[i];
  }
}

template <typename A>
struct InterForwardScratch {
  Row* rows;
  Row* next;
  MutableRow* outs;
  A* rstd;
  A* logits;
  A* weights;

  InterForwardScratch(Arena& arena, const InterBlockForward& p)
      : rows(arena.take<Row>(p.num_sources)),
        next(arena.take<Row>(p.num_sources)),
        outs(arena.take<MutableRow>(p.num_queries)),
        rstd(arena.take<A>(p.num_sources)),
        logits(arena.take<A>(p.num_sources * p.num_queries)),
        weights(arena.take<A>(p.num_sources * p.num_queries)) {}
};

template <typename Access>
void inter_block_forward(const InterBlockForward& p, const SharedVectors& shared,
                         TokenRange range) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.score);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  Arena arena(range.scratch);
  const InterForwardScratch<A> t(arena, p);

  for (int64_t m = range.begin; m < range.end; ++m) {
    for (int i = 0; i < n; ++i) t.rows[i] = row(p.sources[i], m);
    const float* known_rstd = p.known_rstd == nullptr ? nullptr : p.known_rstd + m;
    score_all<Access>(t.rows, n, u, num_queries, hidden, p.eps, known_rstd, m_total, t.logits,
                      t.rstd);
    for (int64_t s = 0; s < num_queries; ++s) {
      const A lse = softmax<A>(t.logits + s * n, t.weights + s * n, n);
      static_cast<A*>(p.lse)[s * m_total + m] = lse;
    }

    // Columns outside, queries inside: a tile of the N rows stays in the first-level cache for all
    // S of them.
    for (int64_t s = 0; s < num_queries; ++s) t.outs[s] = row(p.out, s * m_total + m);
    const Row* next = next_rows(p.sources, n, m, range, t.next);
    for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
      if (next != nullptr) {
        for (int i = 0; i < n; ++i) tile.prefetch(next[i]);
      }
      for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
        Vec<A> sums[queries.kCount][2] = {};
        for (int i = 0; i < n; ++i) {
          Vec<A> v[2];
          for (int k = 0; k < tile.kCount; ++k) v[k] = tile.load(t.rows[i], k);
          for (int q = 0; q < queries.kCount; ++q) {
            const Vec<A> weight = broadcast<A>(t.weights[(queries.first + q) * n + i]);
            for (int k = 0; k < tile.kCount; ++k) sums[q][k] += weight * v[k];
          }
        }
        for (int q = 0; q < queries.kCount; ++q) {
          for (int k = 0; k < tile.kCount; ++k)
            tile.store(t.outs[queries.first + q], k, sums[q][k]);
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
void inter_block_backward(const InterBlockBackward& p, const SharedVectors& shared,
                          TokenRange range, void* part) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.score);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  const bool any_query_gradient =
      p.grad_queries.data != nullptr || p.grad_key_weights.data != nullptr;
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
    all_products<Access>(t.rows, n, t.g, num_queries, hidden, t.products);

    for (int i = 0; i < n; ++i) t.value_factor[i] = 0;
    for (int64_t s = 0; s < num_queries; ++s) {
      softmax<A>(t.logits + s * n, t.weights + s * n, n);
      A mean = 0;
      for (int i = 0; i < n; ++i) mean += t.weights[s * n + i] * t.products[s * n + i];
      const A grad_lse =
          p.grad_lse == nullptr ? A(0) : static_cast<const A*>(p.grad_lse)[s * m_total + m];
      for (int i = 0; i < n; ++i) {
        const int64_t j = s * n + i;
        const A centred = n == 1 ? A(0) * mean : t.products[j] - mean;
        const A grad_logit = t.weights[j] * (centred + grad_lse);
        t.score_factor[j] = grad_logit * t.rstd[i];
        t.value_factor[i] +=
            grad_logit * t.logits[j] * t.rstd[i] * t.rstd[i] / static_cast<A>(hidden);
      }
    }

    // dv_i = sum_s (p_si g_s + a_si u_s) - b_i v_i and du_s += sum_i a_si v_i, a tile of columns at
    // a time.
    for_tiles<Access, 2>(hidden, [&](auto tile) __attribute__((always_inline)) {
      if (any_source_gradient) {
        for_groups<kRows>(n, [&](auto sources) __attribute__((always_inline)) {
          Vec<A> dv[sources.kCount][2];
          for (int j = 0; j < sources.kCount; ++j) {
            const int64_t i = sources.first + j;
            for (int k = 0; k < tile.kCount; ++k) {
              dv[j][k] = broadcast<A>(-t.value_factor[i]) * tile.load(t.rows[i], k);
            }
          }
          for (int64_t s = 0; s < num_queries; ++s) {
            Vec<A> g[2], score_vector[2];
            for (int k = 0; k < tile.kCount; ++k) {
              g[k] = tile.load(t.g + s * hidden, k);
              score_vector[k] = tile.load(u + s * hidden, k);
            }
            for (int j = 0; j < sources.kCount; ++j) {
              const Vec<A> weight = broadcast<A>(t.weights[s * n + sources.first + j]);
              const Vec<A> a = broadcast<A>(t.score_factor[s * n + sources.first + j]);
              for (int k = 0; k < tile.kCount; ++k) dv[j][k] += weight * g[k] + a * score_vector[k];
            }
          }
          // A buffer may be the gradient of two sources: one is added to after the other is stored.
          for (int j = 0; j < sources.kCount; ++j) {
            const int64_t i = sources.first + j;
            if (t.grads[i].data == nullptr) continue;
            for (int k = 0; k < tile.kCount; ++k) {
              if (t.bases[i].data != nullptr) dv[j][k] += tile.load(t.bases[i], k);
              tile.store(t.grads[i], k, dv[j][k]);
            }
          }
        });
      }
      if (grad_score != nullptr) {
        for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
          Vec<A> du[queries.kCount][2];
          for (int q = 0; q < queries.kCount; ++q) {
            for (int k = 0; k < tile.kCount; ++k) {
              du[q][k] = tile.load(grad_score + (queries.first + q) * hidden, k);
            }
          }
          for (int i = 0; i < n; ++i) {
            Vec<A> v[2];
            for (int k = 0; k < tile.kCount; ++k) v[k] = tile.load(t.rows[i], k);
            for (int q = 0; q < queries.kCount; ++q) {
              const Vec<A> a = broadcast<A>(t.score_factor[(queries.first + q) * n + i]);
              for (int k = 0; k < tile.kCount; ++k) du[q][k] += a * v[k];
            }
          }
          for (int q = 0; q < queries.kCount; ++q) {
            for (int k = 0; k < tile.kCount; ++k) {
              tile.store(grad_score + (queries.first + q) * hidden, k, du[q][k]);
            }
          }
        });
      }
    });
  }
}

}  // namespace
}  // namespace attnres::cpu
