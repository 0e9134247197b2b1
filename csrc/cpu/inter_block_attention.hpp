// Phase 1 over a range of tokens: S score vectors against N finished blocks, forward and backward.
// Each block row is read from memory once. A token is worked on in panels of columns that stay in
// the first-level cache, and products of rows and queries are made in small tiles, so that what is
// loaded into a register serves several.
#pragma once

#include "depth_attention.hpp"

namespace attnres::cpu {
namespace {

// Columns of a panel: those of 9 float32 rows are 9 KiB. Products are made of wider ones, as each
// ends with adding its sums to those of the row.
constexpr int64_t kPanel = kRun, kWidePanel = 2 * kPanel;
// So many queries are multiplied with so many rows at a time, as registers hold pairs of sums.
constexpr int kQueries = kVectorBytes == 64 ? 4 : 3;
constexpr int kRows = kVectorBytes == 64 ? 3 : 2;
// So many are mixed at a time, and vectors of each: whole cache lines of rows, which often lie at
// equal distances from a page's beginning and then push each other out of the first-level cache.
template <typename Held>
constexpr int kMixes = kVectorBytes == 64 || !Held::kSplits ? 6 : 3;
template <typename Held>
constexpr int kMixed = kVectorBytes == 64 || Held::kSplits ? 4 : 2;

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

// What a panel holds: rows as they lie, but of float16 copies in float32, since every conversion
// takes longer than the products that it would be made for.
template <typename Access>
struct PanelOf {
  using type = Access;
};
template <>
struct PanelOf<Uniform<float, Float16>> {
  using type = Uniform<float, float>;
};

template <typename Access>
struct Panel {
  using A = typename Access::A;
  using T = typename Access::T;
  using Held = typename PanelOf<Access>::type;
  using P = typename Held::T;
  static constexpr bool kCopied = !kSame<P, T>;
  const P** rows;
  P* copies;  // [rows, kWidePanel]

  Panel(Arena& arena, int num_rows)
      : rows(arena.take<const P*>(num_rows)),
        copies(arena.take<P>(kCopied ? num_rows * kWidePanel : 0)) {}

  ATTNRES_INLINE void copy_columns(const T* row, int64_t count, P* copy) {
    for_tiles<Access, kUnroll>(count, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int k = 0; k < tile.kCount; ++k) tile.store(copy, k, tile.load(row, k));
    });
  }
  // Columns from `begin` on of rows.
  void read(const T* const* from, int num_rows, int64_t begin, int64_t count) const {
    for (int i = 0; i < num_rows; ++i) {
      if constexpr (kCopied) {
        copy_columns(from[i] + begin, count, copies + i * kWidePanel);
        rows[i] = copies + i * kWidePanel;
      } else {
        rows[i] = from[i] + begin;
      }
    }
  }
};

// Writes a panel of a row, plus `base` where there is one: a run of columns at a time, which is
// what memory wants of rows that go past the caches.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
ATTNRES_INLINE void write_panel(const A* values, const T* base, MutableRow<T> row, int64_t begin,
                                int64_t count) {
  row.data += begin;
  for_tiles<Access, 2>(count, [&](auto tile) __attribute__((always_inline)) {
    Vec<A> v[2];
#pragma GCC unroll 2
    for (int k = 0; k < tile.kCount; ++k) {
      v[k] = tile.load(values, k);
      if (base != nullptr) v[k] += tile.load(base + begin, k);
    }
    tile.store_all(row, v);
  });
}

// Asks for the panel's share of half of each row, `which` is 0 or 1.
template <typename T>
ATTNRES_INLINE void prefetch_panel(const T* const* rows, int64_t num_rows, int which, int64_t begin,
                                   int64_t end, int64_t columns) {
  const int64_t first = (begin + which * columns) * sizeof(T) / 2;
  const int64_t last = (end + which * columns) * sizeof(T) / 2;
  for (int64_t i = 0; i < num_rows; ++i) prefetch_bytes(rows[i], first, last);
}

// Sums over columns, still one for each lane of a pair of vectors, so that they can be put back
// into the columns' own order: no bit depends on how rows are loaded.
template <typename Held, typename A = typename Held::A>
ATTNRES_INLINE A total_of_pair(const Vec<A>* pair) {
  Vec<A> first = pair[0], second = pair[1];
  if constexpr (Held::kSplits) interleave(first, second);
  return sum_lanes<A>(first + second);
}

// sums [num_rows, 2] += the squares of `count` columns.
template <typename Held, typename A = typename Held::A, typename P = typename Held::T>
__attribute__((noinline)) void add_squares(const P* const* rows, int num_rows, int64_t count,
                                           Vec<A>* sums) {
  for (int i = 0; i < num_rows; ++i) {
    const P* row = rows[i];
    Vec<A> parts[kUnroll] = {};
    for_tiles<Held, kUnroll>(count, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int k = 0; k < tile.kCount; ++k) {
        const Vec<A> x = tile.load(row, k);
        parts[k] += x * x;
      }
    });
    sums[2 * i] += parts[0] + parts[2];
    sums[2 * i + 1] += parts[1] + parts[3];
  }
}

// sums[s * num_rows + i] += <rows[i], vectors[s]> over `count` columns, pairs of vectors. Every
// product is made in the same order, whatever group it falls into.
template <typename Held, typename V, typename A = typename Held::A, typename P = typename Held::T>
__attribute__((noinline)) void add_products(const P* const* rows, int num_rows,
                                            const V* const* vectors, int64_t num_vectors,
                                            int64_t count, Vec<A>* sums) {
  for_groups<kQueries>(num_vectors, [&](auto queries) __attribute__((always_inline)) {
    for_groups<kRows>(num_rows, [&](auto sources) __attribute__((always_inline)) {
      const P* row[sources.kCount];
      const V* vector[queries.kCount];
      for (int i = 0; i < sources.kCount; ++i) row[i] = rows[sources.first + i];
      for (int q = 0; q < queries.kCount; ++q) vector[q] = vectors[queries.first + q];
      Vec<A> products[queries.kCount][sources.kCount][2] = {};
      for_tiles<Held, 2>(count, [&](auto tile) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int k = 0; k < tile.kCount; ++k) {
          Vec<A> values[sources.kCount];
#pragma GCC unroll 8
          for (int i = 0; i < sources.kCount; ++i) {
            if (Held::kSplits && k == 1) load_anew(row[i] + tile.c);
            values[i] = tile.load(row[i], k);
          }
#pragma GCC unroll 8
          for (int q = 0; q < queries.kCount; ++q) {
            const Vec<A> factor = in_register(tile.load(vector[q], k));
#pragma GCC unroll 8
            for (int i = 0; i < sources.kCount; ++i) products[q][i][k] += factor * values[i];
          }
        }
      });
#pragma GCC unroll 8
      for (int q = 0; q < queries.kCount; ++q) {
#pragma GCC unroll 8
        for (int i = 0; i < sources.kCount; ++i) {
          Vec<A>* sum = sums + 2 * ((queries.first + q) * num_rows + sources.first + i);
          sum[0] += products[q][i][0];
          sum[1] += products[q][i][1];
        }
      }
    });
  });
}

// Score vectors as rows are loaded, and sums over the panels of a row.
template <typename Access>
struct ScoreSums {
  using A = typename Access::A;
  int64_t columns;
  A* u;               // [S, columns]
  const A** vectors;  // [S], a panel of the score vectors
  Vec<A>* products;   // [S, rows, 2]
  Vec<A>* squares;    // [rows, 2]

  ScoreSums(Arena& arena, int num_rows, int64_t num_queries, int64_t hidden)
      : columns(whole_pairs<A>(hidden)),
        u(arena.take<A>(num_queries * columns)),
        vectors(arena.take<const A*>(num_queries)),
        products(arena.take<Vec<A>>(2 * num_queries * num_rows)),
        squares(arena.take<Vec<A>>(2 * num_rows)) {}

  void read_vectors(const void* score, int64_t num_queries, int64_t hidden) const {
    const A* from = static_cast<const A*>(score);
    for (int64_t s = 0; s < num_queries; ++s) {
      A* row = u + s * columns;
      copy_in<A>(from + s * hidden, hidden, row);
      split_columns<Access>(row, columns);
    }
  }
  void panel_of_vectors(int64_t num_queries, int64_t begin) const {
    for (int64_t s = 0; s < num_queries; ++s) vectors[s] = u + s * columns + begin;
  }
};

// logits [S, N] and rstd [N] of one token.
template <typename Access, typename A = typename Access::A, typename T = typename Access::T>
ATTNRES_INLINE void score_all(const T* const* rows, const T* const* next, int n,
                              int64_t num_queries, int64_t hidden, double eps, const A* known_rstd,
                              int64_t known_stride, const Panel<Access>& panel,
                              const ScoreSums<Access>& sums, A* logits, A* rstd) {
  using Held = typename PanelOf<Access>::type;
  for (int64_t j = 0; j < 2 * num_queries * n; ++j) sums.products[j] = Vec<A>{};
  for (int i = 0; i < 2 * n; ++i) sums.squares[i] = Vec<A>{};
  for_runs<kWidePanel>(
      sums.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
        const int64_t count = end - begin;
        panel.read(rows, n, begin, count);
        if (known_rstd == nullptr) add_squares<Held>(panel.rows, n, count, sums.squares);
        prefetch_panel(next, n, 0, begin, end, sums.columns);
        sums.panel_of_vectors(num_queries, begin);
        add_products<Held, A>(panel.rows, n, sums.vectors, num_queries, count, sums.products);
      });
  for (int i = 0; i < n; ++i) {
    rstd[i] = known_rstd != nullptr
                  ? known_rstd[i * known_stride]
                  : inverse_rms<A>(total_of_pair<Held>(sums.squares + 2 * i), hidden, eps);
  }
  for (int64_t s = 0; s < num_queries; ++s) {
    for (int i = 0; i < n; ++i) {
      const int64_t j = s * n + i;
      logits[j] = total_of_pair<Held>(sums.products + 2 * j) * rstd[i];
    }
  }
}

// sums[q] += weights[q * stride] * row, over a tile.
template <typename AnyTile, typename P, typename A, int kCount, int kSums>
ATTNRES_INLINE void add_weighted(AnyTile tile, const P* row, const A* weights, int stride,
                                 Vec<A> (&sums)[kSums][kCount]) {
#pragma GCC unroll 4
  for (int k = 0; k < kCount; k += 2) {
    const Vec<A> first = tile.load(row, k), second = tile.load(row, k + 1);
#pragma GCC unroll 8
    for (int q = 0; q < kSums; ++q) {
      if (k > 0) load_anew(weights + q * stride);
      const Vec<A> weight = broadcast<A>(weights[q * stride]);
      sums[q][k] += weight * first;
      sums[q][k + 1] += weight * second;
    }
  }
}

template <typename Access>
struct InterForwardScratch {
  using A = typename Access::A;
  using T = typename Access::T;
  ScoreSums<Access> sums;
  const T** rows;
  const T** next;
  MutableRow<T>* outs;
  Panel<Access> panel;
  A* mixed;   // [S, kPanel]
  T* copies;  // [N, columns], of rows that are not read in place
  T* out;
  A* rstd;
  A* logits;
  A* weights;

  InterForwardScratch(Arena& arena, const InterBlockForward& p)
      : sums(arena, p.num_sources, p.num_queries, p.hidden),
        rows(arena.take<const T*>(p.num_sources)),
        next(arena.take<const T*>(p.num_sources)),
        outs(arena.take<MutableRow<T>>(p.num_queries)),
        panel(arena, p.num_sources),
        mixed(arena.take<A>(p.num_queries * kPanel)),
        copies(arena.take<T>(needs_copies<Access>(p) ? p.num_sources * sums.columns : 0)),
        out(arena.take<T>(sums.columns)),
        rstd(arena.take<A>(p.num_sources)),
        logits(arena.take<A>(p.num_sources * p.num_queries)),
        weights(arena.take<A>(p.num_sources * p.num_queries)) {}
};

// mixed[s * kPanel] = sum_i weights[s * n + i] rows[i] over a panel, for all queries.
template <typename Held, typename A = typename Held::A, typename P = typename Held::T>
__attribute__((noinline)) void mix_panel(const P* const* rows, int n, const A* weights,
                                         int64_t num_queries, int64_t count, A* mixed) {
  for_groups<kMixes<Held>>(num_queries, [&](auto queries) __attribute__((always_inline)) {
    const A* first = weights + queries.first * n;
    for_tiles<Held, kMixed<Held>>(count, [&](auto tile) __attribute__((always_inline)) {
      Vec<A> sums[queries.kCount][tile.kCount] = {};
      for (int i = 0; i < n; ++i) add_weighted(tile, rows[i], first + i, n, sums);
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
  using T = typename Access::T;
  using Held = typename PanelOf<Access>::type;
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  Arena arena(range.scratch);
  const InterForwardScratch<Access> t(arena, p);
  const int64_t columns = t.sums.columns;
  t.sums.read_vectors(shared.score, num_queries, hidden);
  const bool streamed = streams(p.out, num_queries * m_total * hidden * size_of(p.out.dtype));

  for (int64_t m = range.begin; m < range.end; ++m) {
    for (int i = 0; i < n; ++i) {
      t.rows[i] = bring<Access>(p.sources[i], m, hidden, t.copies + i * columns);
      t.next[i] = row_ahead<Access>(p.sources[i], token_after(m, range), hidden, t.rows[i]);
    }
    const A* known_rstd = static_cast<const A*>(p.known_rstd);
    if (known_rstd != nullptr) known_rstd += m;
    score_all<Access>(t.rows, t.next, n, num_queries, hidden, p.eps, known_rstd, m_total, t.panel,
                      t.sums, t.logits, t.rstd);
    for (int64_t s = 0; s < num_queries; ++s) {
      const A lse = softmax<A>(t.logits + s * n, t.weights + s * n, n);
      static_cast<A*>(p.lse)[s * m_total + m] = lse;
      t.outs[s] = place<Access>(p.out, s * m_total + m, hidden, streamed, t.out);
    }
    // Memory is free meanwhile to bring the other half of the next rows.
    for_runs(columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      const int64_t count = end - begin;
      t.panel.read(t.rows, n, begin, count);
      prefetch_panel(t.next, n, 1, begin, end, columns);
      mix_panel<Held>(t.panel.rows, n, t.weights, num_queries, count, t.mixed);
      for (int64_t s = 0; s < num_queries; ++s) {
        write_panel<Access>(t.mixed + s * kPanel, static_cast<const T*>(nullptr), t.outs[s], begin,
                            count);
        put_back<Access>(p.out, s * m_total + m, begin, end, hidden, t.outs[s].data);
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

// Sources whose gradients are made at a time.
template <typename Held>
constexpr int kGradients = kVectorBytes == 64 || !Held::kSplits ? 4 : 2;

template <typename Access>
struct InterBackwardScratch {
  using A = typename Access::A;
  using T = typename Access::T;
  ScoreSums<Access> sums;
  const T** rows;
  const T** next;
  const T** bases;
  MutableRow<T>* grads;
  const T** grad_outs;      // [S]
  const T** next_outs;      // [S]
  Panel<Access> panel;      // of the rows
  Panel<Access> out_panel;  // of the output gradients
  A* gradients;             // [N, kPanel], of the rows
  A* grad_score;            // [S, columns]
  T* copies;                // [N, columns], of rows that are not read in place
  T* out_copies;            // [S, columns]; where there are no output gradients a row of zeros
  T* base;
  T* grad;
  A* rstd;
  A* logits;        // [S, N]
  A* weights;       // [S, N]
  A* products;      // [S, N], <g_s, v_i>
  A* score_factor;  // [S, N], of u_s in dv_i and of v_i in du_s
  A* value_factor;  // [N], of v_i in dv_i

  InterBackwardScratch(Arena& arena, const InterBlockBackward& p)
      : sums(arena, p.num_sources, p.num_queries, p.hidden),
        rows(arena.take<const T*>(p.num_sources)),
        next(arena.take<const T*>(p.num_sources)),
        bases(arena.take<const T*>(p.num_sources)),
        grads(arena.take<MutableRow<T>>(p.num_sources)),
        grad_outs(arena.take<const T*>(p.num_queries)),
        next_outs(arena.take<const T*>(p.num_queries)),
        panel(arena, p.num_sources),
        out_panel(arena, static_cast<int>(p.num_queries)),
        gradients(arena.take<A>(p.num_sources * kPanel)),
        grad_score(arena.take<A>(p.num_queries * sums.columns)),
        copies(arena.take<T>(needs_copies<Access>(p) ? p.num_sources * sums.columns : 0)),
        out_copies(arena.take<T>((needs_copies<Access>(p) ? p.num_queries : 1) * sums.columns)),
        base(arena.take<T>(sums.columns)),
        grad(arena.take<T>(sums.columns)),
        rstd(arena.take<A>(p.num_sources)),
        logits(arena.take<A>(p.num_sources * p.num_queries)),
        weights(arena.take<A>(p.num_sources * p.num_queries)),
        products(arena.take<A>(p.num_sources * p.num_queries)),
        score_factor(arena.take<A>(p.num_sources * p.num_queries)),
        value_factor(arena.take<A>(p.num_sources)) {}
};

// gradients[i * kPanel] = sum_s (p_si g_s + a_si u_s) - b_i v_i over a panel.
template <typename Access, typename A = typename Access::A>
__attribute__((noinline)) void source_gradients(const InterBackwardScratch<Access>& t, int n,
                                                int64_t num_queries, int64_t count) {
  using Held = typename PanelOf<Access>::type;
  for_groups<kGradients<Held>>(n, [&](auto sources) __attribute__((always_inline)) {
    for_tiles<Held, kMixed<Held>>(count, [&](auto tile) __attribute__((always_inline)) {
      Vec<A> dv[sources.kCount][tile.kCount];
#pragma GCC unroll 8
      for (int j = 0; j < sources.kCount; ++j) {
        const int64_t i = sources.first + j;
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) {
          dv[j][k] = broadcast<A>(-t.value_factor[i]) * tile.load(t.panel.rows[i], k);
        }
      }
      for (int64_t s = 0; s < num_queries; ++s) {
        const A* weights = t.weights + s * n + sources.first;
        const A* factors = t.score_factor + s * n + sources.first;
#pragma GCC unroll 4
        for (int k = 0; k < tile.kCount; k += 2) {
          const Vec<A> g[2] = {tile.load(t.out_panel.rows[s], k),
                               tile.load(t.out_panel.rows[s], k + 1)};
          const Vec<A> u[2] = {tile.load(t.sums.vectors[s], k),
                               tile.load(t.sums.vectors[s], k + 1)};
#pragma GCC unroll 8
          for (int j = 0; j < sources.kCount; ++j) {
            if (k > 0) load_anew(weights + j);
            if (k > 0) load_anew(factors + j);
            const Vec<A> weight = broadcast<A>(weights[j]), a = broadcast<A>(factors[j]);
            // Two fused operations; the sum of both products would take a third.
            dv[j][k] += weight * g[0];
            dv[j][k + 1] += weight * g[1];
            dv[j][k] += a * u[0];
            dv[j][k + 1] += a * u[1];
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
template <typename Access, typename A = typename Access::A>
__attribute__((noinline)) void add_score_gradients(const InterBackwardScratch<Access>& t, int n,
                                                   int64_t num_queries, int64_t count, A* sums,
                                                   int64_t stride) {
  using Held = typename PanelOf<Access>::type;
  for_groups<kMixes<Held>>(num_queries, [&](auto queries) __attribute__((always_inline)) {
    for_tiles<Held, kMixed<Held>>(count, [&](auto tile) __attribute__((always_inline)) {
      Vec<A> du[queries.kCount][tile.kCount];
      A* first = sums + queries.first * stride;
#pragma GCC unroll 8
      for (int q = 0; q < queries.kCount; ++q) {
#pragma GCC unroll 8
        for (int k = 0; k < tile.kCount; ++k) du[q][k] = tile.load(first + q * stride, k);
      }
      const A* factors = t.score_factor + queries.first * n;
      for (int i = 0; i < n; ++i) add_weighted(tile, t.panel.rows[i], factors + i, n, du);
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
ATTNRES_INLINE void find_factors(const InterBlockBackward& p, int64_t m,
                                 const InterBackwardScratch<Access>& t) {
  using Held = typename PanelOf<Access>::type;
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  if (p.stats != nullptr) {
    const A* stats = static_cast<const A*>(p.stats) + m;
    for (int i = 0; i < n; ++i) t.rstd[i] = stats[i * m_total];
    for (int64_t j = 0; j < num_queries * n; ++j) t.logits[j] = stats[(n + j) * m_total];
  } else {
    score_all<Access>(t.rows, t.rows, n, num_queries, hidden, p.eps, static_cast<const A*>(nullptr),
                      0, t.panel, t.sums, t.logits, t.rstd);
  }

  for (int64_t j = 0; j < 2 * num_queries * n; ++j) t.sums.products[j] = Vec<A>{};
  for_runs<kWidePanel>(t.sums.columns,
                       [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
                         const int64_t count = end - begin;
                         t.panel.read(t.rows, n, begin, count);
                         t.out_panel.read(t.grad_outs, static_cast<int>(num_queries), begin, count);
                         prefetch_panel(t.next, n, 0, begin, end, t.sums.columns);
                         prefetch_panel(t.next_outs, num_queries, 0, begin, end, t.sums.columns);
                         add_products<Held, typename Held::T>(t.panel.rows, n, t.out_panel.rows,
                                                              num_queries, count, t.sums.products);
                       });
  for (int64_t j = 0; j < num_queries * n; ++j) {
    t.products[j] = total_of_pair<Held>(t.sums.products + 2 * j);
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
}

template <typename Access>
void inter_block_backward(const InterBlockBackward& p, const SharedVectors& shared,
                          TokenRange range, void* part) {
  using A = typename Access::A;
  using T = typename Access::T;
  const int n = p.num_sources;
  const int64_t m_total = p.num_tokens, hidden = p.hidden, num_queries = p.num_queries;
  const bool wants_score = p.grad_queries.data != nullptr || p.grad_key_weights.data != nullptr;
  const int64_t gradient_bytes = bytes_of_gradients(p);
  const bool any_source_gradient = gradient_bytes > 0;
  Arena arena(range.scratch);
  const InterBackwardScratch<Access> t(arena, p);
  const int64_t columns = t.sums.columns;
  t.sums.read_vectors(shared.score, num_queries, hidden);
  for (int64_t c = 0; c < num_queries * columns; ++c) t.grad_score[c] = 0;
  if (p.grad_out.data == nullptr) {
    for (int64_t c = 0; c < columns; ++c) t.out_copies[c] = T{};
    for (int64_t s = 0; s < num_queries; ++s) t.grad_outs[s] = t.next_outs[s] = t.out_copies;
  }

  for (int64_t m = range.begin; m < range.end; ++m) {
    for (int i = 0; i < n; ++i) {
      t.rows[i] = bring<Access>(p.sources[i], m, hidden, t.copies + i * columns);
      t.next[i] = row_ahead<Access>(p.sources[i], token_after(m, range), hidden, t.rows[i]);
      t.bases[i] = row_ahead<Access>(p.grad_base[i], m, hidden, t.base);
      t.grads[i] = {};
      if (p.grad_sources[i].data != nullptr) {
        t.grads[i] = place<Access>(p.grad_sources[i], m, hidden,
                                   streams_gradient(p, i, gradient_bytes), t.grad);
      }
    }
    for (int64_t s = 0; s < num_queries && p.grad_out.data != nullptr; ++s) {
      const int64_t first = s * m_total;
      t.grad_outs[s] = bring<Access>(p.grad_out, first + m, hidden, t.out_copies + s * columns);
      t.next_outs[s] =
          row_ahead<Access>(p.grad_out, first + token_after(m, range), hidden, t.grad_outs[s]);
    }
    find_factors<Access>(p, m, t);

    for_runs(columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      const int64_t count = end - begin;
      t.panel.read(t.rows, n, begin, count);
      prefetch_panel(t.next, n, 1, begin, end, columns);
      prefetch_panel(t.next_outs, num_queries, 1, begin, end, columns);
      if (any_source_gradient) {
        t.out_panel.read(t.grad_outs, static_cast<int>(num_queries), begin, count);
        t.sums.panel_of_vectors(num_queries, begin);
        source_gradients<Access>(t, n, num_queries, count);
        // One after the other: a buffer may be the gradient of two sources, and is added to then.
        for (int i = 0; i < n; ++i) {
          if (t.grads[i].data == nullptr) continue;
          const T* base = p.grad_base[i].data == nullptr ? nullptr : t.bases[i];
          if (base == t.base) bring<Access>(p.grad_base[i], m, begin, end, hidden, t.base);
          write_panel<Access>(t.gradients + i * kPanel, base, t.grads[i], begin, count);
          put_back<Access>(p.grad_sources[i], m, begin, end, hidden, t.grads[i].data);
        }
      }
      if (wants_score) {
        add_score_gradients<Access>(t, n, num_queries, count, t.grad_score + begin, columns);
      }
    });
  }
  for (int64_t s = 0; s < num_queries && wants_score; ++s) {
    add_joined<Access>(t.grad_score + s * columns, hidden, static_cast<A*>(part) + s * hidden);
  }
  finish_streaming();
}

}  // namespace
}  // namespace attnres::cpu
