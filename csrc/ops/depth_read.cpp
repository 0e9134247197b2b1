#include "depth_read.hpp"

#include "checks.hpp"

namespace attnres::ops {

DepthAttentionForward prepare_read(const char* op, Inputs& inputs, const Tensor& source,
                                   const Tensor& query, const OptionalTensor& key_weight,
                                   const OptionalTensor& out_weight, double eps,
                                   std::optional<double> out_eps, double scale) {
  check_query(op, query, source);
  check_gain({op, "key_weight"}, key_weight, source);
  check_gain({op, "out_weight"}, out_weight, source);
  check_eps(op, eps, out_eps.value_or(eps));
  check_scale(op, scale);
  DepthAttentionForward p;
  p.op = op;
  p.num_tokens = num_rows(source);
  p.hidden = source.size(source.dim() - 1);
  p.query = inputs.vector(query);
  p.key_weight = inputs.vector(key_weight);
  p.out_weight = inputs.vector(out_weight);
  p.eps = eps;
  p.out_eps = out_eps.value_or(eps);
  p.scale = scale;
  return p;
}

void add_sources(Inputs& inputs, std::vector<ConstRows>& rows, const std::vector<Tensor>& sources) {
  rows.reserve(sources.size() + 1);
  for (const Tensor& source : sources) rows.push_back(inputs.rows(source));
}

DType compute_dtype_of(const std::vector<ConstRows>& rows) {
  DType dtype = DType::kFloat32;
  for (const ConstRows& r : rows) dtype = compute_dtype(dtype, r.dtype);
  return dtype;
}

DType promoted_dtype_of(const std::vector<ConstRows>& rows) {
  DType dtype = rows[0].dtype;
  for (const ConstRows& r : rows) dtype = promote(dtype, r.dtype);
  return dtype;
}

Shape stacked_shape(int64_t count, const Tensor& source) {
  Shape shape = shape_of(source);
  shape.pop_back();
  shape.insert(shape.begin(), count);
  return shape;
}

Saved allocate_saved(DepthAttentionForward& p, const Tensor& like, bool save_stats, bool save_mix) {
  // Without an output norm the mix is the output, and its backward needs neither.
  save_mix = save_mix && p.out_weight.data != nullptr;
  Saved saved{save_stats ? empty(stacked_shape(2 * p.num_sources + 1, like), p.compute, like)
                         : nothing(p.compute, like),
              save_mix ? empty(shape_of(like), p.compute, like) : nothing(p.compute, like)};
  if (save_stats) p.stats = saved.stats.mutable_data_ptr();
  if (save_mix) p.mix = rows_of_new(saved.mix);
  return saved;
}

void run_forward(const char* op, const DepthAttentionForward& p, const Tensor& like) {
  const auto kernel = kernel_of(op, like, &Backend::depth_attention_forward);
  if (p.num_tokens == 0) return;
  kernel(p, like.get_device_index());
}

BackwardCall::BackwardCall(const char* op, const std::vector<Tensor>& sources, const Tensor& query,
                           const OptionalTensor& key_weight, const OptionalTensor& out_weight,
                           double eps, std::optional<double> out_eps, double scale)
    : op_(op), sources_(sources), query_(query), key_weight_(key_weight), out_weight_(out_weight) {
  const DepthAttentionForward read =
      prepare_read(op, inputs_, sources[0], query, key_weight, out_weight, eps, out_eps, scale);
  add_sources(inputs_, rows_, sources);
  grad_rows_.resize(rows_.size());
  base_rows_.resize(rows_.size());
  p_.op = op;
  p_.num_tokens = read.num_tokens;
  p_.hidden = read.hidden;
  p_.num_sources = static_cast<int>(rows_.size());
  p_.compute = compute_dtype_of(rows_);
  p_.sources = rows_.data();
  p_.grad_sources = grad_rows_.data();
  p_.grad_base = base_rows_.data();
  p_.query = read.query;
  p_.key_weight = read.key_weight;
  p_.out_weight = read.out_weight;
  p_.eps = read.eps;
  p_.out_eps = read.out_eps;
  p_.scale = read.scale;
}

void BackwardCall::set_grad_out(const char* name, const Tensor& grad_out,
                                const OptionalTensor& grad_weights) {
  check_like({op_, name}, grad_out, sources_[0], "the sources");
  p_.grad_out = inputs_.rows(grad_out);
  grad_out_ = grad_out;
  if (!grad_weights.has_value()) return;
  const Argument argument{op_, "grad_weights"};
  check_floating(argument, *grad_weights);
  check_shape(argument, *grad_weights, stacked_shape(p_.num_sources, sources_[0]),
              "one row for each source");
  check_device(argument, *grad_weights, sources_[0], "the sources");
  p_.grad_weights = inputs_.values(grad_weights, p_.compute);
}

void BackwardCall::set_saved(const OptionalTensor& stats, const OptionalTensor& mix) {
  if (stats.has_value() && stats->numel() > 0) {
    check_floating({op_, "stats"}, *stats);
    check_shape({op_, "stats"}, *stats, stacked_shape(2 * p_.num_sources + 1, sources_[0]),
                "as the forward saved it");
    check_device({op_, "stats"}, *stats, sources_[0], "the sources");
    p_.stats = inputs_.values(stats, p_.compute);
  }
  if (mix.has_value() && mix->numel() > 0) {
    check_like({op_, "mix"}, *mix, sources_[0], "the sources");
    p_.mix.data = inputs_.values(mix, p_.compute);
    p_.mix.inner = p_.num_tokens;
    p_.mix.inner_stride = p_.hidden;
    p_.mix.dtype = p_.compute;
  }
}

void BackwardCall::set_first_logit(const Tensor& lse, Tensor* grad_lse) {
  p_.first_logit = inputs_.values(lse, p_.compute);
  if (grad_lse != nullptr) p_.grad_first_logit = grad_lse->mutable_data_ptr();
}

std::vector<Tensor> BackwardCall::allocate_source_gradients(const std::vector<bool>& needs) {
  std::vector<Tensor> gradients;
  gradients.reserve(rows_.size());
  for (size_t i = 0; i < rows_.size(); ++i) {
    gradients.push_back(needs[i] ? allocate_source_gradient(i, nullptr, std::nullopt)
                                 : nothing(rows_[i].dtype, sources_[0]));
  }
  return gradients;
}

Tensor BackwardCall::allocate_source_gradient(size_t i, const char* base_name,
                                              const OptionalTensor& base) {
  if (base.has_value()) {
    check_like({op_, base_name}, *base, sources_[i], "the new partial");
    base_rows_[i] = inputs_.rows(*base);
  }
  Tensor gradient = empty(shape_of(sources_[i]), rows_[i].dtype, sources_[0]);
  grad_rows_[i] = rows_of_new(gradient);
  return gradient;
}

void BackwardCall::use_source_gradient(size_t i, const char* name, const Tensor& gradient) {
  const Argument argument{op_, name};
  check_like(argument, gradient, sources_[i], "its source");
  grad_rows_[i] = check_output(argument, gradient);
  for (size_t j = 0; j < sources_.size(); ++j) {
    check_no_overlap(argument, gradient, sources_[j], "source " + std::to_string(j));
  }
  check_no_overlap(argument, gradient, *grad_out_, "the output's gradient");
}

void use_gradients(const char* op, const char* name, const std::vector<Tensor>& sources,
                   const std::vector<bool>& needs, size_t count,
                   const std::vector<Tensor>& gradients, const std::vector<bool>& accumulate,
                   const OptionalTensor& grad_out, std::vector<Rows>& grad_rows,
                   std::vector<ConstRows>& base_rows) {
  size_t wanted = 0;
  for (size_t i = 0; i < count; ++i) wanted += needs[i] ? 1 : 0;
  ATTNRES_CHECK(gradients.size() == wanted, op, ": ", name, " has ", gradients.size(),
                " tensors, expected ", wanted, ", one for each source that needs a gradient");
  ATTNRES_CHECK(accumulate.size() == wanted, op, ": accumulate has ", accumulate.size(),
                " flags, expected ", wanted, ", one for each of ", name);
  size_t next = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!needs[i]) continue;
    const Tensor& gradient = gradients[next];
    const Argument argument{op, name, static_cast<int64_t>(next)};
    check_like(argument, gradient, sources[i], "its source");
    grad_rows[i] = check_output(argument, gradient);
    for (size_t j = 0; j < sources.size(); ++j) {
      check_no_overlap(argument, gradient, sources[j], "source " + std::to_string(j));
    }
    if (grad_out.has_value())
      check_no_overlap(argument, gradient, *grad_out, "the output's gradient");
    // A source given twice may have one gradient, which both uses add to; two gradients must not
    // overlap otherwise.
    for (size_t j = 0; j < next; ++j) {
      if (!same_memory(gradient, gradients[j])) {
        check_no_overlap(argument, gradient, gradients[j],
                         std::string(name) + "[" + std::to_string(j) + "]");
      }
    }
    if (accumulate[next]) {
      const Rows& rows = grad_rows[i];
      base_rows[i] = {rows.data, rows.inner, rows.outer_stride, rows.inner_stride, rows.dtype};
    }
    ++next;
  }
}

void BackwardCall::use_source_gradients(const char* name, const std::vector<bool>& needs,
                                        size_t count, const std::vector<Tensor>& gradients,
                                        const std::vector<bool>& accumulate) {
  use_gradients(op_, name, sources_, needs, count, gradients, accumulate, grad_out_, grad_rows_,
                base_rows_);
}

std::tuple<Tensor, Tensor, Tensor> BackwardCall::run(const std::vector<bool>& needs) {
  const size_t first = needs.size() - 3;
  const Tensor& like = sources_[0];
  const bool needs_query = needs[first];
  const bool needs_key = needs[first + 1] && key_weight_.has_value();
  const bool needs_out = needs[first + 2] && out_weight_.has_value();
  const auto kernel = kernel_of(op_, like, &Backend::depth_attention_backward);

  const auto allocate = [&](bool needed, const OptionalTensor& of, DType fallback, Vector& target) {
    if (!needed) return nothing(fallback, like);
    Tensor gradient = empty(shape_of(*of), dtype_of(*of), like);
    target = {gradient.mutable_data_ptr(), dtype_of(*of)};
    return gradient;
  };
  Tensor grad_query = allocate(needs_query, query_, p_.compute, p_.grad_query);
  Tensor grad_key_weight = allocate(needs_key, key_weight_, p_.compute, p_.grad_key_weight);
  Tensor grad_out_weight = allocate(needs_out, out_weight_, p_.compute, p_.grad_out_weight);
  if (p_.num_tokens == 0) {
    for (Tensor* gradient : {&grad_query, &grad_key_weight, &grad_out_weight}) fill_zero(*gradient);
    return {grad_query, grad_key_weight, grad_out_weight};
  }

  Tensor parts = nothing(p_.compute, like);
  if (needs_query || needs_key || needs_out) {
    p_.num_parts =
        backend_of(like).num_weight_gradient_parts(p_.num_tokens, like.get_device_index());
    parts = empty({p_.num_parts, 2, p_.hidden}, p_.compute, like);
    p_.parts = parts.mutable_data_ptr();
  }
  kernel(p_, like.get_device_index());
  return {grad_query, grad_key_weight, grad_out_weight};
}

}  // namespace attnres::ops
