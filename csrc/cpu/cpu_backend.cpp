// The CPU backend: prepares what all tokens share, and splits the tokens over torch's threads.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attnres/backend.hpp"
#include "attnres/build_info.hpp"
#include "attnres/check.hpp"
#include "attnres/dispatch.hpp"
#include "kernels.hpp"

namespace attnres {
namespace cpu {
namespace {

// Memory for vectors and scratch, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {
    ATTNRES_CHECK(data_ != nullptr, "attnres: could not allocate ", bytes,
                  " bytes of scratch memory");
  }
  void* data() const { return data_.get(); }
  template <typename A>
  A* as() const {
    return static_cast<A*>(data());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

template <DType kDType>
struct ValueOf;
template <>
struct ValueOf<DType::kFloat32> {
  using type = float;
};
template <>
struct ValueOf<DType::kFloat64> {
  using type = double;
};
template <>
struct ValueOf<DType::kBFloat16> {
  using type = torch::headeronly::BFloat16;
};
template <>
struct ValueOf<DType::kFloat16> {
  using type = torch::headeronly::Half;
};

template <typename A>
void read_values(const void* data, DType dtype, int64_t offset, int64_t count, A* values) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename ValueOf<tag()>::type;
    const T* typed = static_cast<const T*>(data) + offset;
    for (int64_t c = 0; c < count; ++c) values[c] = static_cast<A>(typed[c]);
  });
}

template <typename A>
void write_values(const A* values, int64_t count, void* data, DType dtype, int64_t offset) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename ValueOf<tag()>::type;
    T* typed = static_cast<T*>(data) + offset;
    for (int64_t c = 0; c < count; ++c) typed[c] = static_cast<T>(values[c]);
  });
}

template <typename A>
void read_row(const ConstRows& rows, int64_t m, int64_t count, A* values) {
  read_values(rows.data, rows.dtype, rows.offset(m), count, values);
}

ConstRows as_rows(const ConstVector& vector) { return {vector.data, 1, 0, 0, vector.dtype}; }
Rows as_rows(const Vector& vector) { return {vector.data, 1, 0, 0, vector.dtype}; }

// scale * key_weights * queries, [count, D].
template <typename A>
void make_score_vectors(const ConstRows& queries, const ConstRows& key_weights, int64_t count,
                        int64_t hidden, double scale, A* score) {
  std::vector<A> gain(key_weights.data == nullptr ? 0 : hidden);
  for (int64_t s = 0; s < count; ++s) {
    A* row = score + s * hidden;
    read_row(queries, s, hidden, row);
    if (key_weights.data != nullptr) {
      read_row(key_weights, s, hidden, gain.data());
      for (int64_t c = 0; c < hidden; ++c) row[c] *= gain[c];
    }
    for (int64_t c = 0; c < hidden; ++c) row[c] *= static_cast<A>(scale);
  }
}

// The other way round: from the gradient of the score vectors to those of queries and key gains.
template <typename A>
void finish_score_gradient(const A* grad_score, const ConstRows& queries,
                           const ConstRows& key_weights, const Rows& grad_queries,
                           const Rows& grad_key_weights, int64_t count, int64_t hidden,
                           double scale) {
  std::vector<A> other(hidden), gradient(hidden);
  const auto finish = [&](const ConstRows& factor, const Rows& target, int64_t s) {
    if (factor.data == nullptr) {
      std::fill(other.begin(), other.end(), A(1));
    } else {
      read_row(factor, s, hidden, other.data());
    }
    for (int64_t c = 0; c < hidden; ++c)
      gradient[c] = grad_score[s * hidden + c] * other[c] * static_cast<A>(scale);
    write_values(gradient.data(), hidden, target.data, target.dtype, target.offset(s));
  };
  for (int64_t s = 0; s < count; ++s) {
    if (grad_queries.data != nullptr) finish(key_weights, grad_queries, s);
    if (grad_key_weights.data != nullptr) finish(queries, grad_key_weights, s);
  }
}

template <typename F>
void with_compute(DType compute, F&& f) {
  if (is_double(compute)) {
    f(double{});
  } else {
    f(float{});
  }
}

// Fewer tokens than this for a thread cost more to hand over than to compute: 64 KiB of reads is
// some 10 us of work.
int64_t grain(int64_t rows_per_token, int64_t hidden) {
  constexpr int64_t kValues = 16384;
  return std::max<int64_t>(1, kValues / std::max<int64_t>(1, rows_per_token * hidden));
}

void depth_attention_forward(const DepthAttentionForward& p, int) {
  const Kernels& k = kernels();
  const int64_t item = size_of(p.compute);
  const Buffer vectors(2 * p.hidden * item);
  SharedVectors shared;
  with_compute(p.compute, [&](auto zero) {
    using A = decltype(zero);
    A* score = vectors.as<A>();
    make_score_vectors(as_rows(p.query), as_rows(p.key_weight), 1, p.hidden, p.scale, score);
    shared.score = score;
    if (p.out_weight.data != nullptr) {
      read_row(as_rows(p.out_weight), 0, p.hidden, score + p.hidden);
      shared.out_weight = score + p.hidden;
    }
  });
  const int64_t scratch_size = k.depth_attention_forward_scratch(p);
  torch::stable::parallel_for(0, p.num_tokens, grain(p.num_sources, p.hidden),
                              [&](int64_t begin, int64_t end) {
                                const Buffer scratch(scratch_size);
                                k.depth_attention_forward(p, shared, {begin, end, scratch.data()});
                              });
}

// Tokens are split into parts by their number alone; each part's sums are made in token order and
// the parts are added in order, so that weight gradients depend neither on the number of threads
// nor on their timing.
int64_t num_weight_gradient_parts(int64_t num_tokens, int) {
  constexpr int64_t kTokens = 16, kMost = 64;
  return std::clamp<int64_t>((num_tokens + kTokens - 1) / kTokens, 1, kMost);
}

// f(begin, end, part) over all parts, and then sum = the parts' sum of `values` values each.
template <typename A, typename F>
void over_parts(int64_t num_tokens, int64_t num_parts, void* parts, int64_t values, A* sum, F&& f) {
  torch::stable::parallel_for(0, num_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      A* part = static_cast<A*>(parts) + i * values;
      std::fill(part, part + values, A(0));
      f(num_tokens * i / num_parts, num_tokens * (i + 1) / num_parts, static_cast<void*>(part));
    }
  });
  std::fill(sum, sum + values, A(0));
  for (int64_t i = 0; i < num_parts; ++i) {
    const A* part = static_cast<const A*>(parts) + i * values;
    for (int64_t c = 0; c < values; ++c) sum[c] += part[c];
  }
}

void depth_attention_backward(const DepthAttentionBackward& p, int) {
  const Kernels& k = kernels();
  const int64_t hidden = p.hidden;
  const Buffer vectors(4 * hidden * size_of(p.compute));
  const int64_t scratch_size = k.depth_attention_backward_scratch(p);
  with_compute(p.compute, [&](auto zero) {
    using A = decltype(zero);
    A* score = vectors.as<A>();
    A* out_weight = score + hidden;
    A* sums = out_weight + hidden;
    SharedVectors shared;
    make_score_vectors(as_rows(p.query), as_rows(p.key_weight), 1, hidden, p.scale, score);
    shared.score = score;
    if (p.out_weight.data != nullptr) {
      read_row(as_rows(p.out_weight), 0, hidden, out_weight);
      shared.out_weight = out_weight;
    }
    if (p.num_parts == 0) {
      torch::stable::parallel_for(
          0, p.num_tokens, grain(2 * p.num_sources, hidden), [&](int64_t begin, int64_t end) {
            const Buffer scratch(scratch_size);
            k.depth_attention_backward(p, shared, {begin, end, scratch.data()}, nullptr);
          });
      return;
    }
    over_parts(p.num_tokens, p.num_parts, p.parts, 2 * hidden, sums,
               [&](int64_t begin, int64_t end, void* part) {
                 const Buffer scratch(scratch_size);
                 k.depth_attention_backward(p, shared, {begin, end, scratch.data()}, part);
               });
    finish_score_gradient(sums, as_rows(p.query), as_rows(p.key_weight), as_rows(p.grad_query),
                          as_rows(p.grad_key_weight), 1, hidden, p.scale);
    if (p.grad_out_weight.data != nullptr) {
      write_values(sums + hidden, hidden, p.grad_out_weight.data, p.grad_out_weight.dtype, 0);
    }
  });
}

void inter_block_forward(const InterBlockForward& p, int) {
  const Kernels& k = kernels();
  const Buffer vectors(p.num_queries * p.hidden * size_of(p.compute));
  with_compute(p.compute, [&](auto zero) {
    make_score_vectors(p.queries, p.key_weights, p.num_queries, p.hidden, p.scale,
                       vectors.as<decltype(zero)>());
  });
  const SharedVectors shared{.score = vectors.data()};
  const int64_t scratch_size = k.inter_block_forward_scratch(p);
  const int64_t rows = p.num_sources * p.num_queries;
  torch::stable::parallel_for(0, p.num_tokens, grain(rows, p.hidden),
                              [&](int64_t begin, int64_t end) {
                                const Buffer scratch(scratch_size);
                                k.inter_block_forward(p, shared, {begin, end, scratch.data()});
                              });
}

void inter_block_backward(const InterBlockBackward& p, int) {
  const Kernels& k = kernels();
  const int64_t values = p.num_queries * p.hidden;
  const Buffer vectors(2 * values * size_of(p.compute));
  const int64_t scratch_size = k.inter_block_backward_scratch(p);
  with_compute(p.compute, [&](auto zero) {
    using A = decltype(zero);
    A* score = vectors.as<A>();
    A* sums = score + values;
    make_score_vectors(p.queries, p.key_weights, p.num_queries, p.hidden, p.scale, score);
    const SharedVectors shared{.score = score};
    if (p.num_parts == 0) {
      const int64_t rows = p.num_sources * p.num_queries;
      torch::stable::parallel_for(
          0, p.num_tokens, grain(2 * rows, p.hidden), [&](int64_t begin, int64_t end) {
            const Buffer scratch(scratch_size);
            k.inter_block_backward(p, shared, {begin, end, scratch.data()}, nullptr);
          });
      return;
    }
    over_parts(p.num_tokens, p.num_parts, p.parts, values, sums,
               [&](int64_t begin, int64_t end, void* part) {
                 const Buffer scratch(scratch_size);
                 k.inter_block_backward(p, shared, {begin, end, scratch.data()}, part);
               });
    finish_score_gradient(sums, p.queries, p.key_weights, p.grad_queries, p.grad_key_weights,
                          p.num_queries, p.hidden, p.scale);
  });
}

void block_cache_write(const BlockCacheWrite& p, int) {
  const Kernels& k = kernels();
  const int64_t scratch_size = k.block_cache_write_scratch(p);
  torch::stable::parallel_for(0, p.num_tokens, grain(2, p.hidden), [&](int64_t begin, int64_t end) {
    const Buffer scratch(scratch_size);
    k.block_cache_write(p, {begin, end, scratch.data()});
  });
}

}  // namespace
}  // namespace cpu

const char* cpu_instruction_set() { return cpu::kernels().name; }

const Backend& cpu_backend() {
  static constexpr Backend kBackend{
      .depth_attention_forward = cpu::depth_attention_forward,
      .depth_attention_backward = cpu::depth_attention_backward,
      .inter_block_forward = cpu::inter_block_forward,
      .inter_block_backward = cpu::inter_block_backward,
      .block_cache_write = cpu::block_cache_write,
      .num_weight_gradient_parts = cpu::num_weight_gradient_parts,
      .vector_alignment = 1,
  };
  return kBackend;
}

}  // namespace attnres
