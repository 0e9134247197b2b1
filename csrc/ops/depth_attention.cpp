// Softmax attention over depth: out = sum_i softmax_i(scale * (key_weight * query) .
// RMSNorm(source_i)) source_i.
#include "checks.hpp"
#include "depth_read.hpp"

namespace attnres::ops {
namespace {

constexpr const char* kName = "depth_attention";

// Checks what every form of the operator takes and fills in the inputs.
DepthAttentionForward prepare(Inputs& inputs, std::vector<ConstRows>& rows,
                              const std::vector<Tensor>& sources, const Tensor& query,
                              const OptionalTensor& key_weight, const OptionalTensor& out_weight,
                              double eps, std::optional<double> out_eps, double scale) {
  check_sources(kName, "sources", sources);
  DepthAttentionForward p =
      prepare_read(kName, inputs, sources[0], query, key_weight, out_weight, eps, out_eps, scale);
  add_sources(inputs, rows, sources);
  p.compute = compute_dtype_of(rows);
  p.sources = rows.data();
  p.num_sources = static_cast<int>(rows.size());
  return p;
}

Tensor depth_attention(const std::vector<Tensor>& sources, const Tensor& query,
                       const OptionalTensor& key_weight, const OptionalTensor& out_weight,
                       double eps, std::optional<double> out_eps, double scale) {
  Inputs inputs;
  std::vector<ConstRows> rows;
  DepthAttentionForward p =
      prepare(inputs, rows, sources, query, key_weight, out_weight, eps, out_eps, scale);
  Tensor out = empty(shape_of(sources[0]), promoted_dtype_of(rows), query);
  p.out = rows_of_new(out);
  run_forward(kName, p, sources[0]);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depth_attention_with_stats(
    const std::vector<Tensor>& sources, const Tensor& query, const OptionalTensor& key_weight,
    const OptionalTensor& out_weight, double eps, std::optional<double> out_eps, double scale,
    bool return_weights, bool save_stats, bool save_mix) {
  Inputs inputs;
  std::vector<ConstRows> rows;
  DepthAttentionForward p =
      prepare(inputs, rows, sources, query, key_weight, out_weight, eps, out_eps, scale);
  const Tensor& like = sources[0];
  Tensor out = empty(shape_of(like), promoted_dtype_of(rows), like);
  p.out = rows_of_new(out);
  Tensor weights = return_weights ? empty(stacked_shape(p.num_sources, like), p.compute, like)
                                  : nothing(p.compute, like);
  if (return_weights) p.weights = weights.mutable_data_ptr();
  Saved saved = allocate_saved(p, like, save_stats, save_mix);
  run_forward(kName, p, like);
  return {out, weights, saved.stats, saved.mix};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> depth_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_weights, const std::vector<Tensor>& sources,
    const Tensor& query, const OptionalTensor& key_weight, const OptionalTensor& out_weight,
    const OptionalTensor& stats, const OptionalTensor& mix, double eps,
    std::optional<double> out_eps, double scale, const std::vector<bool>& needs) {
  check_sources(kName, "sources", sources);
  check_needs(kName, needs, sources.size() + 3);
  BackwardCall call(kName, sources, query, key_weight, out_weight, eps, out_eps, scale);
  call.set_grad_out("grad_out", grad_out, grad_weights);
  call.set_saved(stats, mix);
  std::vector<Tensor> grads = call.allocate_source_gradients(needs);
  auto [grad_query, grad_key_weight, grad_out_weight] = call.run(needs);
  return {grads, grad_query, grad_key_weight, grad_out_weight};
}

// The same, with source gradients written into, or added to, tensors that the caller keeps.
std::tuple<Tensor, Tensor, Tensor> depth_attention_backward_(
    const Tensor& grad_out, const OptionalTensor& grad_weights, const std::vector<Tensor>& sources,
    const Tensor& query, const OptionalTensor& key_weight, const OptionalTensor& out_weight,
    const OptionalTensor& stats, const OptionalTensor& mix, double eps,
    std::optional<double> out_eps, double scale, const std::vector<bool>& needs,
    const std::vector<Tensor>& grad_sources, const std::vector<bool>& accumulate) {
  check_sources(kName, "sources", sources);
  check_needs(kName, needs, sources.size() + 3);
  BackwardCall call(kName, sources, query, key_weight, out_weight, eps, out_eps, scale);
  call.set_grad_out("grad_out", grad_out, grad_weights);
  call.set_saved(stats, mix);
  call.use_source_gradients("grad_sources", needs, sources.size(), grad_sources, accumulate);
  return call.run(needs);
}

STABLE_TORCH_LIBRARY_FRAGMENT(attnres, m) {
  m.def(
      "depth_attention(Tensor[] sources, Tensor query, Tensor? key_weight=None, Tensor? "
      "out_weight=None, float eps=1e-6, "
      "float? out_eps=None, float scale=1.0) -> Tensor");
  // stats [2N + 1, ...]: 1/rms of each source, its logit, and their log-sum-exp. mix [..., D]:
  // before the output norm.
  m.def(
      "depth_attention_with_stats(Tensor[] sources, Tensor query, Tensor? key_weight=None, Tensor? "
      "out_weight=None, "
      "float eps=1e-6, float? out_eps=None, float scale=1.0, bool return_weights=False, bool "
      "save_stats=True, "
      "bool save_mix=False) -> (Tensor out, Tensor weights, Tensor stats, Tensor mix)");
  // needs: one flag for each source, then query, key_weight and out_weight. An unneeded gradient
  // has no elements.
  m.def(
      "depth_attention_backward(Tensor grad_out, Tensor? grad_weights, Tensor[] sources, Tensor "
      "query, Tensor? key_weight, "
      "Tensor? out_weight, Tensor? stats, Tensor? mix, float eps, float? out_eps, float scale, "
      "bool[] needs) -> "
      "(Tensor[] grad_sources, Tensor grad_query, Tensor grad_key_weight, Tensor grad_out_weight)");
  // grad_sources: one tensor for each source that needs a gradient; accumulate: whether to add to
  // it.
  m.def(
      "depth_attention_backward_(Tensor grad_out, Tensor? grad_weights, Tensor[] sources, Tensor "
      "query, "
      "Tensor? key_weight, Tensor? out_weight, Tensor? stats, Tensor? mix, float eps, float? "
      "out_eps, float scale, "
      "bool[] needs, Tensor(a!)[] grad_sources, bool[] accumulate) -> "
      "(Tensor grad_query, Tensor grad_key_weight, Tensor grad_out_weight)");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("depth_attention", TORCH_BOX(&depth_attention));
  m.impl("depth_attention_with_stats", TORCH_BOX(&depth_attention_with_stats));
  m.impl("depth_attention_backward", TORCH_BOX(&depth_attention_backward));
  m.impl("depth_attention_backward_", TORCH_BOX(&depth_attention_backward_));
}

STABLE_TORCH_LIBRARY_IMPL(attnres, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(attnres, CUDA, m) { implement(m); }

}  // namespace
}  // namespace attnres::ops
