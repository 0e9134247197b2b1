// Phase 1 over a range of tokens: S score vectors against N finished blocks, forward and backward.
// Each block row is read from memory once. A token is worked on in panels of columns whose values,
// in the compute type, stay in the first-level cache, and products of rows and queries are made in
// small tiles, so that what is loaded into a register serves several.
#pragma once

#include "depth_attention.hpp"

namespace attnres::cpu {
namespace {

// Columns of a panel: those of 9 float32 rows are 9 KiB.
constexpr int64_t kPanel = 256;
// So many queries are multiplied with so many rows at a time, as registers hold sums.
constexpr int kQueries = 4;
constexpr int kRows = kVectorBytes == 64 ? 4 : 2;
// Vectors of an output that are mixed at a time.
constexpr int kMixed = kVectorBytes == 64 ? 4 : 2;

template <int kItems>
struct Group {
  static constexpr int kCount = kItems;
  int64_t first;
};

template <int kMost, typename F>
ATTNRES_INLINE void rest_of_groups(int64_t first, int64_t rest, F&& f) {
  if constexpr (kMost > 0) {
    if (rest == kMost) return f(Group<kMost>{first});
    rest_of_groups<kMost - 1>(first, rest, f);
  }
}

// f(group) for groups of kMost items, and one of those that are left.
template <int kMost, typename F>
ATTNRES_INLINE void for_groups(int64_t count, F&& f) {
  int64_t first = 0;
  for (; first + kMost <= count; first += kMost) f(Group<kMost>{first});
  rest_of_groups<kMost - 1>(first, count - first, f);
}

// f(first column, number of columns) for every panel of a row.
template <typename F>
ATTNRES_INLINE void for_panels(int64_t hidden, F&& f) {
  for (int64_t begin = 0; begin < hidden; begin += kPanel) {
    f(begin, hidden - begin < kPanel ? hidden - begin : kPanel);
  }
}

ATTNRES_INLINE Row columns_from(Row row, int64_t begin) {
  return {row_at(row.data, row.dtype, begin), row.dtype};
}
ATTNRES_INLINE MutableRow columns_from(MutableRow row, int64_t begin) {
  return {const_cast<void*>(row_at(row.data, row.dtype, begin)), row.dtype};
}

// A panel of the N rows of one token in the compute type: where they lie if they have it, else a
// copy.
template <typename A>
struct Panel {
  const A** rows;  // [N]
  A* copies;       // [N, kPanel]

  Panel(Arena& arena, int num_sources)
      : rows(arena.take<const A*>(num_sources)), copies(arena.take<A>(num_sources * kPanel)) {}
};

template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void read_panel(const Row* rows, const Row* next, int n, int64_t begin,
                               int64_t count, const Panel<A>& panel) {
  for (int i = 0; i < n; ++i) {
    const Row row = columns_from(rows[i], begin);
    if constexpr (kIsCompute<Access>) {
      panel.rows[i] = static_cast<const A*>(row.data);
    } else {
      A* copy = panel.copies + i * kPanel;
      for_tiles<Access, kUnroll>(count, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; ++k) tile.store(copy, k, tile.load(row, k));
      });
      panel.rows[i] = copy;
    }
    if (next == nullptr) continue;
    const Row later = columns_from(next[i], begin);
    for_tiles<Access, kUnroll>(
        count, [&](auto tile) __attribute__((always_inline)) { tile.prefetch(later); });
  }
}

// sums[s * n + i] += <rows[i], vectors[s]> for n rows of `count` columns and S vectors `stride`
// values apart. Every product is made in the same order, whatever group it falls into.
template <typename A>
void add_products(const A* const* rows, int n, const A* vectors, int64_t stride,
                  int64_t num_queries, int64_t count, Vec<A>* sums) {
  for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
    for_groups<kRows>(n, [&](auto sources) __attribute__((always_inline)) {
      Vec<A> products[queries.kCount][sources.kCount] = {};
      for_tiles<Uniform<A, A>, 1>(count, [&](auto tile) __attribute__((always_inline)) {
        Vec<A> values[sources.kCount];
        for (int i = 0; i < sources.kCount; ++i) {
          values[i] = tile.load(rows[sources.first + i], 0);
        }
        for (int q = 0; q < queries.kCount; ++q) {
          const Vec<A> vector = tile.load(vectors + (queries.first + q) * stride, 0);
          for (int i = 0; i < sources.kCount; ++i) products[q][i] += vector * values[i];
        }
      });
      for (int q = 0; q < queries.kCount; ++q) {
        for (int i = 0; i < sources.kCount; ++i) {
          sums[(queries.first + q) * n + sources.first + i] += products[q][i];
        }
      }
    });
  });
}

template <typename A>
ATTNRES_INLINE Vec<A> sum_of_squares(const A* values, int64_t count) {
  Vec<A> parts[kUnroll] = {};
  for_tiles<Uniform<A, A>, kUnroll>(count, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < tile.kCount; ++k) {
      const Vec<A> x = tile.load(values, k);
      parts[k] += x * x;
    }
  });
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Sums over the panels of a row, still one for each lane.
template <typename A>
struct ScoreSums {
  Vec<A>* products;  // [S, N]
  Vec<A>* squares;   // [N]

  ScoreSums(Arena& arena, int n, int64_t num_queries)
      : products(arena.take<Vec<A>>(num_queries * n)), squares(arena.take<Vec<A>>(n)) {}
};

// logits [S, N] and rstd [N] of one token.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void score_all(const Row* rows, int n, const A* u, int64_t num_queries,
                              int64_t hidden, double eps, const float* known_rstd,
                              int64_t known_stride, const Panel<A>& panel, const ScoreSums<A>& sums,
                              A* logits, A* rstd) {
  for (int64_t j = 0; j < num_queries * n; ++j) sums.products[j] = Vec<A>{};
  for (int i = 0; i < n; ++i) sums.squares[i] = Vec<A>{};
  for_panels(hidden, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    read_panel<Access>(rows, nullptr, n, begin, count, panel);
    if (known_rstd == nullptr) {
      for (int i = 0; i < n; ++i) sums.squares[i] += sum_of_squares<A>(panel.rows[i], count);
    }
    add_products<A>(panel.rows, n, u + begin, hidden, num_queries, count, sums.products);
  });
  for (int i = 0; i < n; ++i) {
    rstd[i] = known_rstd != nullptr ? static_cast<A>(known_rstd[i * known_stride])
                                    : inverse_rms<A>(sum_lanes<A>(sums.squares[i]), hidden, eps);
  }
  for (int64_t s = 0; s < num_queries; ++s) {
    for (int i = 0; i < n; ++i) {
      logits[s * n + i] = sum_lanes<A>(sums.products[s * n + i]) * rstd[i];
    }
  }
}

template <typename A>
struct InterForwardScratch {
  Row* rows;
  Row* next;
  MutableRow* outs;
  Panel<A> panel;
  ScoreSums<A> sums;
  A* rstd;
  A* logits;
  A* weights;

  InterForwardScratch(Arena& arena, const InterBlockForward& p)
      : rows(arena.take<Row>(p.num_sources)),
        next(arena.take<Row>(p.num_sources)),
        outs(arena.take<MutableRow>(p.num_queries)),
        panel(arena, p.num_sources),
        sums(arena, p.num_sources, p.num_queries),
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
    score_all<Access>(t.rows, n, u, num_queries, hidden, p.eps, known_rstd, m_total, t.panel,
                      t.sums, t.logits, t.rstd);
    for (int64_t s = 0; s < num_queries; ++s) {
      const A lse = softmax<A>(t.logits + s * n, t.weights + s * n, n);
      static_cast<A*>(p.lse)[s * m_total + m] = lse;
    }

    for (int64_t s = 0; s < num_queries; ++s) t.outs[s] = row(p.out, s * m_total + m);
    const Row* next = next_rows(p.sources, n, m, range, t.next);
    for_panels(hidden, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
      read_panel<Access>(t.rows, next, n, begin, count, t.panel);
      for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
        for_tiles<Access, kMixed>(count, [&](auto tile) __attribute__((always_inline)) {
          Vec<A> sums[queries.kCount][kMixed] = {};
          for (int i = 0; i < n; ++i) {
            Vec<A> v[kMixed];
            for (int k = 0; k < tile.kCount; ++k) v[k] = tile.load(t.panel.rows[i], k);
            for (int q = 0; q < queries.kCount; ++q) {
              const Vec<A> weight = broadcast<A>(t.weights[(queries.first + q) * n + i]);
              for (int k = 0; k < tile.kCount; ++k) sums[q][k] += weight * v[k];
            }
          }
          for (int q = 0; q < queries.kCount; ++q) {
            const MutableRow out = columns_from(t.outs[queries.first + q], begin);
            for (int k = 0; k < tile.kCount; ++k) tile.store(out, k, sums[q][k]);
          }
        });
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
  Panel<A> panel;
  ScoreSums<A> sums;
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
        panel(arena, p.num_sources),
        sums(arena, p.num_sources, p.num_queries),
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
      score_all<Access>(t.rows, n, u, num_queries, hidden, p.eps, nullptr, 0, t.panel, t.sums,
                        t.logits, t.rstd);
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
    for (int64_t j = 0; j < num_queries * n; ++j) t.sums.products[j] = Vec<A>{};
    for_panels(hidden, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
      read_panel<Access>(t.rows, nullptr, n, begin, count, t.panel);
      add_products<A>(t.panel.rows, n, t.g + begin, hidden, num_queries, count, t.sums.products);
    });
    for (int64_t j = 0; j < num_queries * n; ++j) {
      t.products[j] = sum_lanes<A>(t.sums.products[j]);
    }

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

    // dv_i = sum_s (p_si g_s + a_si u_s) - b_i v_i and du_s += sum_i a_si v_i.
    for_panels(hidden, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
      read_panel<Access>(t.rows, nullptr, n, begin, count, t.panel);
      if (any_source_gradient) {
        for_groups<kRows>(n, [&](auto sources) __attribute__((always_inline)) {
          for_tiles<Access, 2>(count, [&](auto tile) __attribute__((always_inline)) {
            Vec<A> dv[sources.kCount][2];
            for (int j = 0; j < sources.kCount; ++j) {
              const int64_t i = sources.first + j;
              for (int k = 0; k < tile.kCount; ++k) {
                dv[j][k] = broadcast<A>(-t.value_factor[i]) * tile.load(t.panel.rows[i], k);
              }
            }
            for (int64_t s = 0; s < num_queries; ++s) {
              Vec<A> g[2], score_vector[2];
              for (int k = 0; k < tile.kCount; ++k) {
                g[k] = tile.load(t.g + s * hidden + begin, k);
                score_vector[k] = tile.load(u + s * hidden + begin, k);
              }
              for (int j = 0; j < sources.kCount; ++j) {
                const Vec<A> weight = broadcast<A>(t.weights[s * n + sources.first + j]);
                const Vec<A> a = broadcast<A>(t.score_factor[s * n + sources.first + j]);
                for (int k = 0; k < tile.kCount; ++k) {
                  dv[j][k] += weight * g[k] + a * score_vector[k];
                }
              }
            }
            // A buffer may be the gradient of two sources: one is added to after the other is
            // stored.
            for (int j = 0; j < sources.kCount; ++j) {
              const int64_t i = sources.first + j;
              if (t.grads[i].data == nullptr) continue;
              const bool adds = t.bases[i].data != nullptr;
              const Row base = adds ? columns_from(t.bases[i], begin) : Row{};
              for (int k = 0; k < tile.kCount; ++k) {
                if (adds) dv[j][k] += tile.load(base, k);
                tile.store(columns_from(t.grads[i], begin), k, dv[j][k]);
              }
            }
          });
        });
      }
      if (grad_score != nullptr) {
        for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
          for_tiles<Access, 2>(count, [&](auto tile) __attribute__((always_inline)) {
            A* sums = grad_score + queries.first * hidden + begin;
            Vec<A> du[queries.kCount][2];
            for (int q = 0; q < queries.kCount; ++q) {
              for (int k = 0; k < tile.kCount; ++k) du[q][k] = tile.load(sums + q * hidden, k);
            }
            for (int i = 0; i < n; ++i) {
              Vec<A> v[2];
              for (int k = 0; k < tile.kCount; ++k) v[k] = tile.load(t.panel.rows[i], k);
              for (int q = 0; q < queries.kCount; ++q) {
                const Vec<A> a = broadcast<A>(t.score_factor[(queries.first + q) * n + i]);
                for (int k = 0; k < tile.kCount; ++k) du[q][k] += a * v[k];
              }
            }
            for (int q = 0; q < queries.kCount; ++q) {
              for (int k = 0; k < tile.kCount; ++k) tile.store(sums + q * hidden, k, du[q][k]);
            }
          });
        });
      }
    });
  }
}

}  // namespace
}  // namespace attnres::cpu
