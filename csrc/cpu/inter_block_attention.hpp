// Phase 1 over a range of tokens: S score vectors against N finished blocks, forward and backward.
// Each block row is read from memory once. A token is worked on in panels of columns whose values,
// in the compute type, stay in the first-level cache, and products of rows and queries are made in
// small tiles, so that what is loaded into a register serves several.
#pragma once

#include "depth_attention.hpp"

namespace attnres::cpu {
namespace {

// Columns of a panel: those of 9 float32 rows are 9 KiB.
constexpr int64_t kPanel = kRun;
// So many queries are multiplied with so many rows at a time, as registers hold sums.
constexpr int kQueries = 6;
constexpr int kRows = kVectorBytes == 64 ? 4 : 2;
// Vectors of an output that are mixed at a time.
constexpr int kMixed = kVectorBytes == 64 ? 4 : 2;

// Columns in their own order. A product's sum is made vector by vector here, so that it depends on
// the order of columns, which must not depend on what else is read.
template <typename Access>
struct InOrder : Access {
  using A = typename Access::A;
  static constexpr bool kSplits = false;
  ATTNRES_INLINE Vec<A> load_of_pair(Row row, int64_t c, int which) {
    return Access::load(row, c + which * kLanes<A>);
  }
  template <bool>
  ATTNRES_INLINE void store_pair(MutableRow row, int64_t c, Vec<A> v, Vec<A> w) {
    Access::store(row, c, v);
    Access::store(row, c + kLanes<A>, w);
  }
};

template <int kItems>
struct Group {
  static constexpr int kCount = kItems;
  int64_t first;
};

template <int kMost, typename F>
ATTNRES_INLINE void with_group(int64_t first, int64_t count, F&& f) {
  if (count == kMost) return f(Group<kMost>{first});
  if constexpr (kMost > 1) with_group<kMost - 1>(first, count, f);
}

// f(group) for as few groups of at most kMost items as there can be, of nearly the same size: one
// row or query on its own has too few sums to keep the multipliers busy.
template <int kMost, typename F>
ATTNRES_INLINE void for_groups(int64_t count, F&& f) {
  int64_t first = 0;
  for (int64_t left = (count + kMost - 1) / kMost; left > 0; --left) {
    const int64_t size = (count - first + left - 1) / left;
    with_group<kMost>(first, size, f);
    first += size;
  }
}

template <typename Access>
constexpr bool kIsCompute<InOrder<Access>> = kIsCompute<Access>;

ATTNRES_INLINE Row columns_from(Row row, int64_t begin) {
  return {row_at(row.data, row.dtype, begin), row.dtype};
}
ATTNRES_INLINE MutableRow columns_from(MutableRow row, int64_t begin) {
  return {const_cast<void*>(row_at(row.data, row.dtype, begin)), row.dtype, row.streamed};
}

// A panel of rows in the compute type: where they lie if they have it, else a copy.
template <typename A>
struct Panel {
  const A** rows;
  A* copies;  // [rows, kPanel]

  Panel(Arena& arena, int num_rows)
      : rows(arena.take<const A*>(num_rows)), copies(arena.take<A>(num_rows * kPanel)) {}
};

// Also adds the squares of each row's values to `squares` if wanted, still one sum for each lane.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void read_panel(const Row* rows, int num_rows, int64_t begin, int64_t count,
                               const Panel<A>& panel, Vec<A>* squares = nullptr) {
  for (int i = 0; i < num_rows; ++i) {
    const Row row = columns_from(rows[i], begin);
    A* copy = panel.copies + i * kPanel;
    panel.rows[i] = kIsCompute<Access> ? static_cast<const A*>(row.data) : copy;
    if (kIsCompute<Access> && squares == nullptr) continue;
    Vec<A> sums[kUnroll] = {};
    for_tiles<Access, kUnroll>(count, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int k = 0; k < tile.kCount; ++k) {
        const Vec<A> x = tile.load(row, k);
        if constexpr (!kIsCompute<Access>) tile.store(copy, k, x);
        sums[k] += x * x;
      }
    });
    if (squares != nullptr) squares[i] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// Writes a panel of a row, plus `base` where there is one: a run of columns at a time, which is
// what memory wants of rows that go past the caches.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void write_panel(const A* values, Row base, MutableRow row, int64_t begin,
                                int64_t count) {
  const MutableRow target = columns_from(row, begin);
  const Row added = base.data == nullptr ? base : columns_from(base, begin);
  for_tiles<Access, 2>(count, [&](auto tile) __attribute__((always_inline)) {
    Vec<A> v[2];
#pragma GCC unroll 2
    for (int k = 0; k < tile.kCount; ++k) {
      v[k] = tile.load(values, k);
      if (added.data != nullptr) v[k] += tile.load(added, k);
    }
    tile.store_all(target, v);
  });
}

// Asks for the panel's share of half of each row, `which` is 0 or 1.
template <typename Access>
ATTNRES_INLINE void prefetch_panel(const Row* rows, int num_rows, int which, int64_t begin,
                                   int64_t end, int64_t hidden) {
  for (int i = 0; i < num_rows; ++i) {
    const Row row = rows[i];
    for_columns<Access, kUnroll>(begin, end, hidden, [&](auto tile) __attribute__((always_inline)) {
      tile.prefetch_half(row, which, hidden);
    });
  }
}

// sums[s * num_rows + i] += <rows[i], vectors[s]> over `count` columns. Every product is made in
// the same order, whatever group it falls into.
template <typename A>
__attribute__((noinline)) void add_products(const A* const* rows, int num_rows,
                                            const A* const* vectors, int64_t num_vectors,
                                            int64_t count, Vec<A>* sums) {
  for_groups<kQueries>(num_vectors, [&](auto queries) __attribute__((always_inline)) {
    for_groups<kRows>(num_rows, [&](auto sources) __attribute__((always_inline)) {
      Vec<A> products[queries.kCount][sources.kCount] = {};
      for_tiles<Uniform<A, A>, 2>(count, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int k = 0; k < tile.kCount; ++k) {
          Vec<A> values[sources.kCount];
#pragma GCC unroll 8
          for (int i = 0; i < sources.kCount; ++i) {
            values[i] = tile.load(rows[sources.first + i], k);
          }
#pragma GCC unroll 8
          for (int q = 0; q < queries.kCount; ++q) {
            const Vec<A> vector = in_register(tile.load(vectors[queries.first + q], k));
#pragma GCC unroll 8
            for (int i = 0; i < sources.kCount; ++i) products[q][i] += vector * values[i];
          }
        }
      });
#pragma GCC unroll 8
      for (int q = 0; q < queries.kCount; ++q) {
#pragma GCC unroll 8
        for (int i = 0; i < sources.kCount; ++i) {
          sums[(queries.first + q) * num_rows + sources.first + i] += products[q][i];
        }
      }
    });
  });
}

// Sums over the panels of a row, still one for each lane.
template <typename A>
struct ScoreSums {
  const A** vectors;  // [S], a panel of the score vectors
  Vec<A>* products;   // [S, rows]
  Vec<A>* squares;    // [rows]

  ScoreSums(Arena& arena, int num_rows, int64_t num_queries)
      : vectors(arena.take<const A*>(num_queries)),
        products(arena.take<Vec<A>>(num_queries * num_rows)),
        squares(arena.take<Vec<A>>(num_rows)) {}
};

// logits [S, N] and rstd [N] of one token.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void score_all(const Row* rows, const Row* next, int n, const A* u,
                              int64_t num_queries, int64_t hidden, double eps, const A* known_rstd,
                              int64_t known_stride, const Panel<A>& panel, const ScoreSums<A>& sums,
                              A* logits, A* rstd) {
  for (int64_t j = 0; j < num_queries * n; ++j) sums.products[j] = Vec<A>{};
  for (int i = 0; i < n; ++i) sums.squares[i] = Vec<A>{};
  for_runs(hidden, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const int64_t count = end - begin;
    read_panel<InOrder<Access>>(rows, n, begin, count, panel,
                                known_rstd == nullptr ? sums.squares : nullptr);
    prefetch_panel<Access>(next, n, 0, begin, end, hidden);
    for (int64_t s = 0; s < num_queries; ++s) sums.vectors[s] = u + s * hidden + begin;
    add_products<A>(panel.rows, n, sums.vectors, num_queries, count, sums.products);
  });
  for (int i = 0; i < n; ++i) {
    rstd[i] = known_rstd != nullptr ? known_rstd[i * known_stride]
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
  A* mixed;  // [S, kPanel]
  ScoreSums<A> sums;
  A* rstd;
  A* logits;
  A* weights;

  InterForwardScratch(Arena& arena, const InterBlockForward& p)
      : rows(arena.take<Row>(p.num_sources)),
        next(arena.take<Row>(p.num_sources)),
        outs(arena.take<MutableRow>(p.num_queries)),
        panel(arena, p.num_sources),
        mixed(arena.take<A>(p.num_queries * kPanel)),
        sums(arena, p.num_sources, p.num_queries),
        rstd(arena.take<A>(p.num_sources)),
        logits(arena.take<A>(p.num_sources * p.num_queries)),
        weights(arena.take<A>(p.num_sources * p.num_queries)) {}
};

// mixed[s * kPanel] = sum_i weights[s * n + i] rows[i] over a panel, for all queries.
template <typename A>
__attribute__((noinline)) void mix_panel(const A* const* rows, int n, const A* weights,
                                         int64_t num_queries, int64_t count, A* mixed) {
  for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
    const A* first = weights + queries.first * n;
    for_tiles<Uniform<A, A>, kMixed>(count, [&](auto tile) __attribute__((always_inline)) {
      Vec<A> sums[queries.kCount][kMixed] = {};
      for (int i = 0; i < n; ++i) {
        Vec<A> v[kMixed];
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) v[k] = tile.load(rows[i], k);
#pragma GCC unroll 8
        for (int q = 0; q < queries.kCount; ++q) {
          const Vec<A> weight = broadcast<A>(first[q * n + i]);
#pragma GCC unroll 8
          for (int k = 0; k < tile.kCount; ++k) sums[q][k] += weight * v[k];
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < queries.kCount; ++q) {
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) {
          tile.store(mixed + (queries.first + q) * kPanel, k, sums[q][k]);
        }
      }
    });
  });
}

template <typename Access>
void inter_block_forward(const InterBlockForward& p, const SharedVectors& shared,
                         TokenRange range) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.in_order);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  Arena arena(range.scratch);
  const InterForwardScratch<A> t(arena, p);
  const bool streamed = streams(p.out, num_queries * m_total * hidden * size_of(p.out.dtype));

  for (int64_t m = range.begin; m < range.end; ++m) {
    for (int i = 0; i < n; ++i) t.rows[i] = row(p.sources[i], m);
    next_rows(p.sources, ConstRows{}, n, m, range, t.next);
    const A* known_rstd = static_cast<const A*>(p.known_rstd);
    if (known_rstd != nullptr) known_rstd += m;
    score_all<Access>(t.rows, t.next, n, u, num_queries, hidden, p.eps, known_rstd, m_total,
                      t.panel, t.sums, t.logits, t.rstd);
    for (int64_t s = 0; s < num_queries; ++s) {
      const A lse = softmax<A>(t.logits + s * n, t.weights + s * n, n);
      static_cast<A*>(p.lse)[s * m_total + m] = lse;
      t.outs[s] = row(p.out, s * m_total + m);
      t.outs[s].streamed = streamed;
    }
    // Memory is free meanwhile to bring the other half of the next rows.
    for_runs(hidden, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      const int64_t count = end - begin;
      read_panel<Access>(t.rows, n, begin, count, t.panel);
      prefetch_panel<Access>(t.next, n, 1, begin, end, hidden);
      mix_panel<A>(t.panel.rows, n, t.weights, num_queries, count, t.mixed);
      for (int64_t s = 0; s < num_queries; ++s) {
        write_panel<Access>(t.mixed + s * kPanel, Row{}, t.outs[s], begin, count);
      }
    });

    if (p.stats != nullptr) {
      A* stats = static_cast<A*>(p.stats) + m;
      for (int i = 0; i < n; ++i) stats[i * m_total] = t.rstd[i];
      for (int64_t j = 0; j < num_queries * n; ++j) stats[(n + j) * m_total] = t.logits[j];
    }
  }
  finish_streaming();
}

// Sources whose gradients are made at a time, and vectors of each.
constexpr int kGradients = 4;
constexpr int kGradientVectors = kVectorBytes == 64 ? 4 : 2;

template <typename A>
struct InterBackwardScratch {
  Row* rows;
  Row* next;
  Row* bases;
  MutableRow* grads;
  Row* grad_outs;      // [S]
  Panel<A> panel;      // of the rows
  Panel<A> out_panel;  // of the output gradients
  A* gradients;        // [N, kPanel], of the rows
  ScoreSums<A> sums;
  A* rstd;
  A* logits;        // [S, N]
  A* weights;       // [S, N]
  A* products;      // [S, N], <g_s, v_i>
  A* score_factor;  // [S, N], of u_s in dv_i and of v_i in du_s
  A* value_factor;  // [N], of v_i in dv_i

  InterBackwardScratch(Arena& arena, const InterBlockBackward& p)
      : rows(arena.take<Row>(p.num_sources)),
        next(arena.take<Row>(p.num_sources)),
        bases(arena.take<Row>(p.num_sources)),
        grads(arena.take<MutableRow>(p.num_sources)),
        grad_outs(arena.take<Row>(p.num_queries)),
        panel(arena, p.num_sources),
        out_panel(arena, static_cast<int>(p.num_queries)),
        gradients(arena.take<A>(p.num_sources * kPanel)),
        sums(arena, p.num_sources, p.num_queries),
        rstd(arena.take<A>(p.num_sources)),
        logits(arena.take<A>(p.num_sources * p.num_queries)),
        weights(arena.take<A>(p.num_sources * p.num_queries)),
        products(arena.take<A>(p.num_sources * p.num_queries)),
        score_factor(arena.take<A>(p.num_sources * p.num_queries)),
        value_factor(arena.take<A>(p.num_sources)) {}
};

// A panel of the output gradients of one token; without any they are zero.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void read_output_gradients(const Row* grad_outs, int num_queries, int64_t begin,
                                          int64_t count, const Panel<A>& panel) {
  if (grad_outs[0].data != nullptr) {
    return read_panel<Access>(grad_outs, num_queries, begin, count, panel);
  }
  for (int64_t c = 0; c < count; ++c) panel.copies[c] = 0;
  for (int s = 0; s < num_queries; ++s) panel.rows[s] = panel.copies;
}

// gradients[i * kPanel] = sum_s (p_si g_s + a_si u_s) - b_i v_i over a panel.
template <typename A>
__attribute__((noinline)) void source_gradients(const InterBackwardScratch<A>& t, int n,
                                                int64_t num_queries, int64_t count) {
  for_groups<kGradients>(n, [&](auto sources) __attribute__((always_inline)) {
    for_tiles<Uniform<A, A>, kGradientVectors>(
        count, [&](auto tile) __attribute__((always_inline)) {
          Vec<A> dv[sources.kCount][kGradientVectors];
#pragma GCC unroll 8
          for (int j = 0; j < sources.kCount; ++j) {
            const int64_t i = sources.first + j;
#pragma GCC unroll 8
            for (int k = 0; k < tile.kCount; ++k) {
              dv[j][k] = broadcast<A>(-t.value_factor[i]) * tile.load(t.panel.rows[i], k);
            }
          }
          for (int64_t s = 0; s < num_queries; ++s) {
            Vec<A> g[kGradientVectors], u[kGradientVectors];
#pragma GCC unroll 8
            for (int k = 0; k < tile.kCount; ++k) {
              g[k] = tile.load(t.out_panel.rows[s], k);
              u[k] = tile.load(t.sums.vectors[s], k);
            }
#pragma GCC unroll 8
            for (int j = 0; j < sources.kCount; ++j) {
              const Vec<A> weight = broadcast<A>(t.weights[s * n + sources.first + j]);
              const Vec<A> a = broadcast<A>(t.score_factor[s * n + sources.first + j]);
          // Two fused operations; the sum of both products would take a third.
#pragma GCC unroll 8
              for (int k = 0; k < tile.kCount; ++k) {
                dv[j][k] += weight * g[k];
                dv[j][k] += a * u[k];
              }
            }
          }
#pragma GCC unroll 8
          for (int j = 0; j < sources.kCount; ++j) {
#pragma GCC unroll 8
            for (int k = 0; k < tile.kCount; ++k) {
              tile.store(t.gradients + (sources.first + j) * kPanel, k, dv[j][k]);
            }
          }
        });
  });
}

// du_s += sum_i a_si v_i over a panel; sums[s * stride] is where du_s begins.
template <typename A>
__attribute__((noinline)) void add_score_gradients(const InterBackwardScratch<A>& t, int n,
                                                   int64_t num_queries, int64_t count, A* sums,
                                                   int64_t stride) {
  for_groups<kQueries>(num_queries, [&](auto queries) __attribute__((always_inline)) {
    for_tiles<Uniform<A, A>, kMixed>(count, [&](auto tile) __attribute__((always_inline)) {
      Vec<A> du[queries.kCount][kMixed];
      A* first = sums + queries.first * stride;
#pragma GCC unroll 8
      for (int q = 0; q < queries.kCount; ++q) {
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) du[q][k] = tile.load(first + q * stride, k);
      }
      for (int i = 0; i < n; ++i) {
        Vec<A> v[kMixed];
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) v[k] = tile.load(t.panel.rows[i], k);
#pragma GCC unroll 8
        for (int q = 0; q < queries.kCount; ++q) {
          const Vec<A> a = broadcast<A>(t.score_factor[(queries.first + q) * n + i]);
#pragma GCC unroll 8
          for (int k = 0; k < tile.kCount; ++k) du[q][k] += a * v[k];
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < queries.kCount; ++q) {
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) tile.store(first + q * stride, k, du[q][k]);
      }
    });
  });
}

// What the gradients of token m are made with: its scores, <g_s, v_i>, and from them its weights
// and factors.
template <typename Access, typename A = typename Access::A>
ATTNRES_INLINE void find_factors(const InterBlockBackward& p, const A* u, int64_t m,
                                 const InterBackwardScratch<A>& t) {
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  if (p.stats != nullptr) {
    const A* stats = static_cast<const A*>(p.stats) + m;
    for (int i = 0; i < n; ++i) t.rstd[i] = stats[i * m_total];
    for (int64_t j = 0; j < num_queries * n; ++j) t.logits[j] = stats[(n + j) * m_total];
  } else {
    score_all<Access>(t.rows, t.rows, n, u, num_queries, hidden, p.eps,
                      static_cast<const A*>(nullptr), 0, t.panel, t.sums, t.logits, t.rstd);
  }

  for (int64_t j = 0; j < num_queries * n; ++j) t.sums.products[j] = Vec<A>{};
  for_runs(hidden, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    const int64_t count = end - begin;
    read_panel<InOrder<Access>>(t.rows, n, begin, count, t.panel);
    read_output_gradients<InOrder<Access>>(t.grad_outs, static_cast<int>(num_queries), begin, count,
                                           t.out_panel);
    prefetch_panel<Access>(t.next, n, 0, begin, end, hidden);
    add_products<A>(t.panel.rows, n, t.out_panel.rows, num_queries, count, t.sums.products);
  });
  for (int64_t j = 0; j < num_queries * n; ++j) t.products[j] = sum_lanes<A>(t.sums.products[j]);

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
}

template <typename Access>
void inter_block_backward(const InterBlockBackward& p, const SharedVectors& shared,
                          TokenRange range, void* part) {
  using A = typename Access::A;
  const A* u = static_cast<const A*>(shared.score);
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  A* grad_score = p.grad_queries.data != nullptr || p.grad_key_weights.data != nullptr
                      ? static_cast<A*>(part)
                      : nullptr;
  const int64_t gradient_bytes = bytes_of_gradients(p);
  const bool any_source_gradient = gradient_bytes > 0;
  Arena arena(range.scratch);
  const InterBackwardScratch<A> t(arena, p);

  for (int64_t m = range.begin; m < range.end; ++m) {
    for (int i = 0; i < n; ++i) {
      t.rows[i] = row(p.sources[i], m);
      t.grads[i] = p.grad_sources[i].data == nullptr ? MutableRow{} : row(p.grad_sources[i], m);
      t.bases[i] = p.grad_base[i].data == nullptr ? Row{} : row(p.grad_base[i], m);
      // What is added to is in a cache already.
      t.grads[i].streamed =
          t.bases[i].data == nullptr && streams(p.grad_sources[i], gradient_bytes);
    }
    for (int64_t s = 0; s < num_queries; ++s) {
      t.grad_outs[s] = p.grad_out.data == nullptr ? Row{} : row(p.grad_out, s * m_total + m);
    }
    next_rows(p.sources, ConstRows{}, n, m, range, t.next);
    find_factors<Access>(p, static_cast<const A*>(shared.in_order), m, t);

    for_runs(hidden, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      const int64_t count = end - begin;
      read_panel<Access>(t.rows, n, begin, count, t.panel);
      prefetch_panel<Access>(t.next, n, 1, begin, end, hidden);
      if (any_source_gradient) {
        read_output_gradients<Access>(t.grad_outs, static_cast<int>(num_queries), begin, count,
                                      t.out_panel);
        for (int64_t s = 0; s < num_queries; ++s) t.sums.vectors[s] = u + s * hidden + begin;
        source_gradients<A>(t, n, num_queries, count);
        // One after the other: a buffer may be the gradient of two sources, and is added to then.
        for (int i = 0; i < n; ++i) {
          if (t.grads[i].data == nullptr) continue;
          write_panel<Access>(t.gradients + i * kPanel, t.bases[i], t.grads[i], begin, count);
        }
      }
      if (grad_score != nullptr) {
        add_score_gradients<A>(t, n, num_queries, count, grad_score + begin, hidden);
      }
    });
  }
  finish_streaming();
}

}  // namespace
}  // namespace attnres::cpu
