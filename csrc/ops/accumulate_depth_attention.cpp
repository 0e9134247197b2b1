// Block summation and depth attention in one pass: new_partial = round(partial + delta), then
// attention over
// [*blocks, new_partial].
#include "checks.hpp"
#include "depth_read.hpp"

namespace attnres::ops {
namespace {

constexpr const char* kName = "accumulate_depth_attention";

struct Forward {
  Inputs inputs;
  std::vector<ConstRows> rows;
  DepthAttentionForward p;
  Tensor hidden;
  Tensor new_partial;
};

Forward prepare(const Tensor& partial, const Tensor& delta, const std::vector<Tensor>& blocks,
                const Tensor& query, const OptionalTensor& key_weight,
                const OptionalTensor& out_weight, double eps, std::optional<double> out_eps,
                double scale) {
  check_floating({kName, "partial"}, partial);
  check_hidden({kName, "partial"}, partial);
  check_like({kName, "delta"}, delta, partial, "partial");
  ATTNRES_CHECK(blocks.size() < static_cast<size_t>(kMaxSources), kName, ": blocks has ",
                blocks.size(), " tensors, expected at most ", kMaxSources - 1,
                " beside the partial");
  for (size_t i = 0; i < blocks.size(); ++i) {
    check_like({kName, "blocks", static_cast<int64_t>(i)}, blocks[i], partial, "partial");
  }
  Inputs inputs;
  DepthAttentionForward p =
      prepare_read(kName, inputs, partial, query, key_weight, out_weight, eps, out_eps, scale);
  std::vector<ConstRows> rows;
  add_sources(inputs, rows, blocks);
  rows.push_back(inputs.rows(partial));
  p.delta = inputs.rows(delta);
  p.compute = compute_dtype(compute_dtype_of(rows), p.delta.dtype);
  p.num_sources = static_cast<int>(rows.size());
  Tensor new_partial = empty(shape_of(partial), dtype_of(partial), partial);
  Tensor hidden = empty(shape_of(partial), promoted_dtype_of(rows), partial);
  p.new_partial = rows_of_new(new_partial);
  p.out = rows_of_new(hidden);
  Forward forward{std::move(inputs), std::move(rows), p, hidden, new_partial};
  forward.p.sources = forward.rows.data();
  return forward;
}

std::tuple<Tensor, Tensor> accumulate_depth_attention(const Tensor& partial, const Tensor& delta,
                                                      const std::vector<Tensor>& blocks,
                                                      const Tensor& query,
                                                      const OptionalTensor& key_weight,
                                                      const OptionalTensor& out_weight, double eps,
                                                      std::optional<double> out_eps, double scale) {
  Forward f = prepare(partial, delta, blocks, query, key_weight, out_weight, eps, out_eps, scale);
  run_forward(kName, f.p, partial);
  return {f.hidden, f.new_partial};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> accumulate_depth_attention_with_stats(
    const Tensor& partial, const Tensor& delta, const std::vector<Tensor>& blocks,
    const Tensor& query, const OptionalTensor& key_weight, const OptionalTensor& out_weight,
    double eps, std::optional<double> out_eps, double scale, bool save_stats, bool save_mix) {
  Forward f = prepare(partial, delta, blocks, query, key_weight, out_weight, eps, out_eps, scale);
  Saved saved = allocate_saved(f.p, partial, save_stats, save_mix);
  run_forward(kName, f.p, partial);
  return {f.hidden, f.new_partial, saved.stats, saved.mix};
}

std::vector<Tensor> all_sources(const std::vector<Tensor>& blocks, const Tensor& new_partial) {
  std::vector<Tensor> sources = blocks;
  sources.push_back(new_partial);
  check_sources(kName, "blocks with new_partial", sources);
  return sources;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> accumulate_depth_attention_backward(
    const Tensor& grad_hidden, const OptionalTensor& grad_new_partial,
    const std::vector<Tensor>& blocks, const Tensor& new_partial, const Tensor& query,
    const OptionalTensor& key_weight, const OptionalTensor& out_weight, const OptionalTensor& stats,
    const OptionalTensor& mix, double eps, std::optional<double> out_eps, double scale,
    const std::vector<bool>& needs) {
  check_needs(kName, needs, blocks.size() + 4);
  const std::vector<Tensor> sources = all_sources(blocks, new_partial);
  BackwardCall call(kName, sources, query, key_weight, out_weight, eps, out_eps, scale);
  call.set_grad_out("grad_hidden", grad_hidden, std::nullopt);
  call.set_saved(stats, mix);
  std::vector<bool> block_needs = needs;
  block_needs[blocks.size()] = false;
  std::vector<Tensor> grads = call.allocate_source_gradients(block_needs);
  Tensor grad_partial = grads.back();
  grads.pop_back();
  if (needs[blocks.size()]) {
    grad_partial =
        call.allocate_source_gradient(blocks.size(), "grad_new_partial", grad_new_partial);
  }
  auto [grad_query, grad_key_weight, grad_out_weight] = call.run(needs);
  return {grads, grad_partial, grad_query, grad_key_weight, grad_out_weight};
}

// The same, with block gradients written into, or added to, tensors that the caller keeps.
std::tuple<Tensor, Tensor, Tensor, Tensor> accumulate_depth_attention_backward_(
    const Tensor& grad_hidden, const OptionalTensor& grad_new_partial,
    const std::vector<Tensor>& blocks, const Tensor& new_partial, const Tensor& query,
    const OptionalTensor& key_weight, const OptionalTensor& out_weight, const OptionalTensor& stats,
    const OptionalTensor& mix, double eps, std::optional<double> out_eps, double scale,
    const std::vector<bool>& needs, const std::vector<Tensor>& grad_blocks,
    const std::vector<bool>& accumulate) {
  check_needs(kName, needs, blocks.size() + 4);
  const std::vector<Tensor> sources = all_sources(blocks, new_partial);
  BackwardCall call(kName, sources, query, key_weight, out_weight, eps, out_eps, scale);
  call.set_grad_out("grad_hidden", grad_hidden, std::nullopt);
  call.set_saved(stats, mix);
  call.use_source_gradients("grad_blocks", needs, blocks.size(), grad_blocks, accumulate);
  Tensor grad_partial =
      needs[blocks.size()]
          ? call.allocate_source_gradient(blocks.size(), "grad_new_partial", grad_new_partial)
          : nothing(dtype_of(new_partial), new_partial);
  auto [grad_query, grad_key_weight, grad_out_weight] = call.run(needs);
  return {grad_partial, grad_query, grad_key_weight, grad_out_weight};
}

STABLE_TORCH_LIBRARY_FRAGMENT(attnres, m) {
  m.def(
      "accumulate_depth_attention(Tensor partial, Tensor delta, Tensor[] blocks, Tensor query, "
      "Tensor? key_weight=None, "
      "Tensor? out_weight=None, float eps=1e-6, float? out_eps=None, float scale=1.0) -> "
      "(Tensor hidden, Tensor new_partial)");
  m.def(
      "accumulate_depth_attention_with_stats(Tensor partial, Tensor delta, Tensor[] blocks, Tensor "
      "query, "
      "Tensor? key_weight=None, Tensor? out_weight=None, float eps=1e-6, float? out_eps=None, "
      "float scale=1.0, "
      "bool save_stats=True, bool save_mix=False) -> (Tensor hidden, Tensor new_partial, Tensor "
      "stats, Tensor mix)");
  // needs: one flag for each block, then new_partial (its gradient is that of partial and of
  // delta), query, key_weight and out_weight.
  m.def(
      "accumulate_depth_attention_backward(Tensor grad_hidden, Tensor? grad_new_partial, Tensor[] "
      "blocks, "
      "Tensor new_partial, Tensor query, Tensor? key_weight, Tensor? out_weight, Tensor? stats, "
      "Tensor? mix, float eps, "
      "float? out_eps, float scale, bool[] needs) -> (Tensor[] grad_blocks, Tensor grad_partial, "
      "Tensor grad_query, "
      "Tensor grad_key_weight, Tensor grad_out_weight)");
  m.def(
      "accumulate_depth_attention_backward_(Tensor grad_hidden, Tensor? grad_new_partial, Tensor[] "
      "blocks, "
      "Tensor new_partial, Tensor query, Tensor? key_weight, Tensor? out_weight, Tensor? stats, "
      "Tensor? mix, float eps, "
      "float? out_eps, float scale, bool[] needs, Tensor(a!)[] grad_blocks, bool[] accumulate) -> "
      "(Tensor grad_partial, "
      "Tensor grad_query, Tensor grad_key_weight, Tensor grad_out_weight)");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("accumulate_depth_attention", TORCH_BOX(&accumulate_depth_attention));
  m.impl("accumulate_depth_attention_with_stats",
         TORCH_BOX(&accumulate_depth_attention_with_stats));
  m.impl("accumulate_depth_attention_backward", TORCH_BOX(&accumulate_depth_attention_backward));
  m.impl("accumulate_depth_attention_backward_", TORCH_BOX(&accumulate_depth_attention_backward_));
}

STABLE_TORCH_LIBRARY_IMPL(attnres, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(attnres, CUDA, m) { implement(m); }

}  // namespace
}  // namespace attnres::ops
