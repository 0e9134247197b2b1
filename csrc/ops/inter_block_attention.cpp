// Phase 1: all S pseudo-queries of a block against its N finished blocks, in one sweep over the
// blocks.
#include "checks.hpp"
#include "depth_read.hpp"

namespace attnres::ops {
namespace {

constexpr const char* kName = "inter_block_attention";

void check_matrix(const Argument& argument, const Tensor& matrix, const Tensor& source) {
  const int64_t hidden = source.size(source.dim() - 1);
  check_floating(argument, matrix);
  ATTNRES_CHECK(matrix.dim() == 2 && matrix.size(0) >= 1 && matrix.size(1) == hidden,
                argument.text(), " has shape ", to_string(shape_of(matrix)), ", expected [S, ",
                hidden, "] with S of at least 1");
  check_device(argument, matrix, source, "the blocks");
}

void check_queries(const std::vector<Tensor>& blocks, const Tensor& queries,
                   const OptionalTensor& key_weights, double eps, double scale) {
  check_sources(kName, "blocks", blocks);
  check_matrix({kName, "queries"}, queries, blocks[0]);
  if (key_weights.has_value()) {
    check_matrix({kName, "key_weights"}, *key_weights, blocks[0]);
    check_shape({kName, "key_weights"}, *key_weights, shape_of(queries), "like queries");
  }
  check_eps(kName, eps, eps);
  check_scale(kName, scale);
}

// [S, ...] or [S, ..., D] in front of a block's shape.
Shape per_query(const Tensor& queries, const Tensor& block, bool with_hidden) {
  Shape shape = stacked_shape(queries.size(0), block);
  if (with_hidden) shape.push_back(block.size(block.dim() - 1));
  return shape;
}

struct Result {
  Tensor out;
  Tensor lse;
  Tensor stats;
};

Result attend(const std::vector<Tensor>& blocks, const Tensor& queries,
              const OptionalTensor& key_weights, double eps, double scale, bool save_stats) {
  check_queries(blocks, queries, key_weights, eps, scale);
  Inputs inputs;
  std::vector<ConstRows> rows;
  add_sources(inputs, rows, blocks);
  const Tensor& like = blocks[0];

  InterBlockForward p;
  p.op = kName;
  p.num_tokens = num_rows(like);
  p.hidden = like.size(like.dim() - 1);
  p.num_sources = static_cast<int>(rows.size());
  p.num_queries = queries.size(0);
  p.compute = compute_dtype_of(rows);
  p.sources = rows.data();
  p.queries = inputs.vectors(queries);
  if (key_weights.has_value()) p.key_weights = inputs.vectors(*key_weights);
  p.eps = eps;
  p.scale = scale;

  Result result{empty(per_query(queries, like, true), promoted_dtype_of(rows), like),
                empty(per_query(queries, like, false), p.compute, like), nothing(p.compute, like)};
  p.out = rows_of_new(result.out);
  p.lse = result.lse.mutable_data_ptr();
  if (save_stats) {
    result.stats = empty(stacked_shape(p.num_sources * (1 + p.num_queries), like), p.compute, like);
    p.stats = result.stats.mutable_data_ptr();
  }
  const auto kernel = kernel_of(kName, like, &Backend::inter_block_forward);
  if (p.num_tokens > 0) kernel(p, like.get_device_index());
  return result;
}

std::tuple<Tensor, Tensor> inter_block_attention(const std::vector<Tensor>& blocks,
                                                 const Tensor& queries,
                                                 const OptionalTensor& key_weights, double eps,
                                                 double scale) {
  Result result = attend(blocks, queries, key_weights, eps, scale, false);
  return {result.out, result.lse};
}

std::tuple<Tensor, Tensor, Tensor> inter_block_attention_with_stats(
    const std::vector<Tensor>& blocks, const Tensor& queries, const OptionalTensor& key_weights,
    double eps, double scale) {
  Result result = attend(blocks, queries, key_weights, eps, scale, true);
  return {result.out, result.lse, result.stats};
}

// A backward under construction; keeps alive what its parameters point to.
struct Backward {
  Inputs inputs;
  std::vector<ConstRows> rows;
  std::vector<Rows> grad_rows;
  std::vector<ConstRows> base_rows;
  InterBlockBackward p;

  Backward(const OptionalTensor& grad_out, const OptionalTensor& grad_lse,
           const std::vector<Tensor>& blocks, const Tensor& queries,
           const OptionalTensor& key_weights, const OptionalTensor& stats, double eps,
           double scale) {
    check_queries(blocks, queries, key_weights, eps, scale);
    const Tensor& like = blocks[0];
    add_sources(inputs, rows, blocks);
    grad_rows.resize(rows.size());
    base_rows.resize(rows.size());
    p.op = kName;
    p.num_tokens = num_rows(like);
    p.hidden = like.size(like.dim() - 1);
    p.num_sources = static_cast<int>(rows.size());
    p.num_queries = queries.size(0);
    p.compute = compute_dtype_of(rows);
    p.sources = rows.data();
    p.grad_sources = grad_rows.data();
    p.grad_base = base_rows.data();
    p.queries = inputs.vectors(queries);
    if (key_weights.has_value()) p.key_weights = inputs.vectors(*key_weights);
    p.eps = eps;
    p.scale = scale;
    if (grad_out.has_value()) {
      check_floating({kName, "grad_out"}, *grad_out);
      check_shape({kName, "grad_out"}, *grad_out, per_query(queries, like, true),
                  "as the forward returned it");
      check_device({kName, "grad_out"}, *grad_out, like, "the blocks");
      p.grad_out = inputs.rows(*grad_out);
    }
    if (grad_lse.has_value()) {
      check_floating({kName, "grad_lse"}, *grad_lse);
      check_shape({kName, "grad_lse"}, *grad_lse, per_query(queries, like, false),
                  "as the forward returned it");
      check_device({kName, "grad_lse"}, *grad_lse, like, "the blocks");
      p.grad_lse = inputs.values(grad_lse, p.compute);
    }
    if (stats.has_value() && stats->numel() > 0) {
      check_floating({kName, "stats"}, *stats);
      check_shape({kName, "stats"}, *stats,
                  stacked_shape(p.num_sources * (1 + p.num_queries), like),
                  "as the forward saved it");
      check_device({kName, "stats"}, *stats, like, "the blocks");
      p.stats = inputs.values(stats, p.compute);
    }
  }

  // Gradients of queries and key_weights, whose flags are the last two of `needs`.
  std::tuple<Tensor, Tensor> run(const std::vector<Tensor>& blocks, const Tensor& queries,
                                 const OptionalTensor& key_weights,
                                 const std::vector<bool>& needs) {
    const Tensor& like = blocks[0];
    const auto kernel = kernel_of(kName, like, &Backend::inter_block_backward);
    const bool needs_queries = needs[blocks.size()];
    const bool needs_key = needs[blocks.size() + 1] && key_weights.has_value();
    Tensor grad_queries = needs_queries ? empty(shape_of(queries), dtype_of(queries), like)
                                        : nothing(p.compute, like);
    Tensor grad_key_weights = needs_key
                                  ? empty(shape_of(*key_weights), dtype_of(*key_weights), like)
                                  : nothing(p.compute, like);
    if (p.num_tokens == 0) {
      fill_zero(grad_queries);
      fill_zero(grad_key_weights);
      return {grad_queries, grad_key_weights};
    }
    if (needs_queries) p.grad_queries = rows_of_new(grad_queries);
    if (needs_key) p.grad_key_weights = rows_of_new(grad_key_weights);
    Tensor parts = nothing(p.compute, like);
    if (needs_queries || needs_key) {
      p.num_parts =
          backend_of(like).num_weight_gradient_parts(p.num_tokens, like.get_device_index());
      parts = empty({p.num_parts, p.num_queries, p.hidden}, p.compute, like);
      p.parts = parts.mutable_data_ptr();
    }
    kernel(p, like.get_device_index());
    return {grad_queries, grad_key_weights};
  }
};

std::tuple<std::vector<Tensor>, Tensor, Tensor> inter_block_attention_backward(
    const OptionalTensor& grad_out, const OptionalTensor& grad_lse,
    const std::vector<Tensor>& blocks, const Tensor& queries, const OptionalTensor& key_weights,
    const OptionalTensor& stats, double eps, double scale, const std::vector<bool>& needs) {
  check_needs(kName, needs, blocks.size() + 2);
  Backward call(grad_out, grad_lse, blocks, queries, key_weights, stats, eps, scale);
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < blocks.size(); ++i) {
    gradients.push_back(needs[i] ? empty(shape_of(blocks[i]), dtype_of(blocks[i]), blocks[0])
                                 : nothing(dtype_of(blocks[i]), blocks[0]));
    if (needs[i]) call.grad_rows[i] = rows_of_new(gradients[i]);
  }
  auto [grad_queries, grad_key_weights] = call.run(blocks, queries, key_weights, needs);
  return {gradients, grad_queries, grad_key_weights};
}

// The same, with block gradients written into, or added to, tensors that the caller keeps.
std::tuple<Tensor, Tensor> inter_block_attention_backward_(
    const OptionalTensor& grad_out, const OptionalTensor& grad_lse,
    const std::vector<Tensor>& blocks, const Tensor& queries, const OptionalTensor& key_weights,
    const OptionalTensor& stats, double eps, double scale, const std::vector<bool>& needs,
    const std::vector<Tensor>& grad_blocks, const std::vector<bool>& accumulate) {
  check_needs(kName, needs, blocks.size() + 2);
  Backward call(grad_out, grad_lse, blocks, queries, key_weights, stats, eps, scale);
  use_gradients(kName, "grad_blocks", blocks, needs, blocks.size(), grad_blocks, accumulate,
                grad_out, call.grad_rows, call.base_rows);
  return call.run(blocks, queries, key_weights, needs);
}

STABLE_TORCH_LIBRARY_FRAGMENT(attnres, m) {
  m.def(
      "inter_block_attention(Tensor[] blocks, Tensor queries, Tensor? key_weights=None, float "
      "eps=1e-6, "
      "float scale=1.0) -> (Tensor out, Tensor lse)");
  // stats [N + S * N, ...]: 1/rms of each block, then the logits of each query.
  m.def(
      "inter_block_attention_with_stats(Tensor[] blocks, Tensor queries, Tensor? key_weights=None, "
      "float eps=1e-6, "
      "float scale=1.0) -> (Tensor out, Tensor lse, Tensor stats)");
  // needs: one flag for each block, then queries and key_weights.
  m.def(
      "inter_block_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor[] blocks, Tensor "
      "queries, "
      "Tensor? key_weights, Tensor? stats, float eps, float scale, bool[] needs) -> "
      "(Tensor[] grad_blocks, Tensor grad_queries, Tensor grad_key_weights)");
  m.def(
      "inter_block_attention_backward_(Tensor? grad_out, Tensor? grad_lse, Tensor[] blocks, Tensor "
      "queries, "
      "Tensor? key_weights, Tensor? stats, float eps, float scale, bool[] needs, Tensor(a!)[] "
      "grad_blocks, "
      "bool[] accumulate) -> (Tensor grad_queries, Tensor grad_key_weights)");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("inter_block_attention", TORCH_BOX(&inter_block_attention));
  m.impl("inter_block_attention_with_stats", TORCH_BOX(&inter_block_attention_with_stats));
  m.impl("inter_block_attention_backward", TORCH_BOX(&inter_block_attention_backward));
  m.impl("inter_block_attention_backward_", TORCH_BOX(&inter_block_attention_backward_));
}

STABLE_TORCH_LIBRARY_IMPL(attnres, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(attnres, CUDA, m) { implement(m); }

}  // namespace
}  // namespace attnres::ops
