// Phase 2: the open block's partial sum joins what phase 1 found over the finished blocks, as one
// more source whose logit is known and one state whose log-sum-exp is known. That is depth
// attention over [out, new_partial] with the first logit given.
#include "checks.hpp"
#include "depth_read.hpp"

namespace attnres::ops {
namespace {

constexpr const char* kName = "merge_partial";

void check_lse(const Tensor& lse, const Tensor& out) {
  const Argument argument{kName, "lse"};
  check_floating(argument, lse);
  Shape wanted = shape_of(out);
  wanted.pop_back();
  check_shape(argument, lse, wanted, "for `out` of shape [..., D]");
  check_device(argument, lse, out, "out");
}

// new_partial has no elements unless both a partial and a delta are given: the value merged is then
// the one that is.
std::tuple<Tensor, Tensor> merge_partial(const Tensor& out, const Tensor& lse,
                                         const OptionalTensor& partial, const OptionalTensor& delta,
                                         const Tensor& query, const OptionalTensor& key_weight,
                                         const OptionalTensor& out_weight, double eps,
                                         std::optional<double> out_eps, double scale) {
  check_floating({kName, "out"}, out);
  check_hidden({kName, "out"}, out);
  check_lse(lse, out);
  if (partial.has_value()) check_like({kName, "partial"}, *partial, out, "out");
  if (delta.has_value()) check_like({kName, "delta"}, *delta, out, "out");

  Inputs inputs;
  DepthAttentionForward p =
      prepare_read(kName, inputs, out, query, key_weight, out_weight, eps, out_eps, scale);
  std::vector<ConstRows> rows{inputs.rows(out)};
  if (partial.has_value()) rows.push_back(inputs.rows(*partial));
  const bool sum = partial.has_value() && delta.has_value();
  if (delta.has_value() && !sum) rows.push_back(inputs.rows(*delta));
  p.compute = compute_dtype_of(rows);
  Tensor new_partial =
      sum ? empty(shape_of(out), dtype_of(*partial), out) : nothing(p.compute, out);
  if (sum) {
    p.delta = inputs.rows(*delta);
    p.new_partial = rows_of_new(new_partial);
    p.compute = compute_dtype(p.compute, p.delta.dtype);
  }
  p.sources = rows.data();
  p.num_sources = static_cast<int>(rows.size());
  p.first_logit = inputs.values(lse, p.compute);
  Tensor hidden = empty(shape_of(out), promoted_dtype_of(rows), out);
  p.out = rows_of_new(hidden);
  run_forward(kName, p, out);
  return {hidden, new_partial};
}

// A backward under construction; keeps alive what its parameters point to.
struct Backward {
  std::vector<Tensor> sources;  // out, and value if there is one
  BackwardCall call;

  Backward(const Tensor& grad_hidden, const Tensor& out, const Tensor& lse,
           const OptionalTensor& value, const Tensor& query, const OptionalTensor& key_weight,
           const OptionalTensor& out_weight, double eps, std::optional<double> out_eps,
           double scale)
      : sources(checked_sources(out, lse, value)),
        call(kName, sources, query, key_weight, out_weight, eps, out_eps, scale) {
    call.set_grad_out("grad_hidden", grad_hidden, std::nullopt);
  }
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  DType compute() const {
    DType dtype = DType::kFloat32;
    for (const Tensor& source : sources) dtype = compute_dtype(dtype, dtype_of(source));
    return dtype;
  }

  // Gradients of value, query, key_weight and out_weight, which the last four of `needs` ask for.
  std::tuple<Tensor, Tensor, Tensor, Tensor> run(const OptionalTensor& grad_new_partial,
                                                 const std::vector<bool>& needs) {
    const bool needs_value = needs[needs.size() - 4] && sources.size() == 2;
    Tensor grad_value = needs_value
                            ? call.allocate_source_gradient(1, "grad_new_partial", grad_new_partial)
                            : nothing(compute(), sources[0]);
    auto [grad_query, grad_key_weight, grad_out_weight] = call.run(needs);
    return {grad_value, grad_query, grad_key_weight, grad_out_weight};
  }

 private:
  static std::vector<Tensor> checked_sources(const Tensor& out, const Tensor& lse,
                                             const OptionalTensor& value) {
    std::vector<Tensor> sources{out};
    if (value.has_value()) sources.push_back(*value);
    check_sources(kName, "out with value", sources);
    check_lse(lse, out);
    return sources;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_partial_backward(
    const Tensor& grad_hidden, const OptionalTensor& grad_new_partial, const Tensor& out,
    const Tensor& lse, const OptionalTensor& value, const Tensor& query,
    const OptionalTensor& key_weight, const OptionalTensor& out_weight, double eps,
    std::optional<double> out_eps, double scale, const std::vector<bool>& needs) {
  check_needs(kName, needs, 6);
  Backward backward(grad_hidden, out, lse, value, query, key_weight, out_weight, eps, out_eps,
                    scale);
  const DType compute = backward.compute();
  Tensor grad_lse = needs[1] ? empty(shape_of(lse), compute, out) : nothing(compute, out);
  backward.call.set_first_logit(lse, needs[1] ? &grad_lse : nullptr);
  Tensor grad_out = needs[0] ? backward.call.allocate_source_gradient(0, nullptr, std::nullopt)
                             : nothing(compute, out);
  auto [grad_value, grad_query, grad_key_weight, grad_out_weight] =
      backward.run(grad_new_partial, needs);
  return {grad_out, grad_lse, grad_value, grad_query, grad_key_weight, grad_out_weight};
}

// The same, with the gradients of out and lse written into tensors that the caller keeps: the
// site's slices of what phase 1's backward takes.
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_partial_backward_(
    const Tensor& grad_hidden, const OptionalTensor& grad_new_partial, const Tensor& out,
    const Tensor& lse, const OptionalTensor& value, const Tensor& query,
    const OptionalTensor& key_weight, const OptionalTensor& out_weight, double eps,
    std::optional<double> out_eps, double scale, const std::vector<bool>& needs,
    const Tensor& grad_out, const Tensor& grad_lse) {
  check_needs(kName, needs, 4);
  Backward backward(grad_hidden, out, lse, value, query, key_weight, out_weight, eps, out_eps,
                    scale);
  backward.call.use_source_gradient(0, "grad_out", grad_out);
  const Argument argument{kName, "grad_lse"};
  const ScalarType wanted = scalar_type_of(backward.compute());
  ATTNRES_CHECK(grad_lse.scalar_type() == wanted && grad_lse.is_contiguous(), argument.text(),
                " must be a contiguous ", torch::headeronly::toString(wanted), " tensor");
  check_shape(argument, grad_lse, shape_of(lse), "like `lse`");
  check_device(argument, grad_lse, out, "out");
  check_no_overlap(argument, grad_lse, lse, "lse");
  Tensor target = grad_lse;
  backward.call.set_first_logit(lse, &target);
  return backward.run(grad_new_partial, needs);
}

STABLE_TORCH_LIBRARY_FRAGMENT(attnres, m) {
  m.def(
      "merge_partial(Tensor out, Tensor lse, Tensor? partial, Tensor? delta, Tensor query, Tensor? "
      "key_weight=None, "
      "Tensor? out_weight=None, float eps=1e-6, float? out_eps=None, float scale=1.0) -> "
      "(Tensor hidden, Tensor new_partial)");
  // value: what was merged, new_partial where a sum was made. needs: out, lse, value, query,
  // key_weight, out_weight.
  m.def(
      "merge_partial_backward(Tensor grad_hidden, Tensor? grad_new_partial, Tensor out, Tensor "
      "lse, Tensor? value, "
      "Tensor query, Tensor? key_weight, Tensor? out_weight, float eps, float? out_eps, float "
      "scale, bool[] needs) -> "
      "(Tensor grad_out, Tensor grad_lse, Tensor grad_value, Tensor grad_query, Tensor "
      "grad_key_weight, "
      "Tensor grad_out_weight)");
  // needs: value, query, key_weight, out_weight.
  m.def(
      "merge_partial_backward_(Tensor grad_hidden, Tensor? grad_new_partial, Tensor out, Tensor "
      "lse, Tensor? value, Tensor query, Tensor? key_weight, Tensor? out_weight, float eps, float? "
      "out_eps, float scale, bool[] needs, Tensor(a!) grad_out, Tensor(b!) grad_lse) -> "
      "(Tensor grad_value, Tensor grad_query, Tensor grad_key_weight, Tensor grad_out_weight)");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("merge_partial", TORCH_BOX(&merge_partial));
  m.impl("merge_partial_backward", TORCH_BOX(&merge_partial_backward));
  m.impl("merge_partial_backward_", TORCH_BOX(&merge_partial_backward_));
}

STABLE_TORCH_LIBRARY_IMPL(attnres, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(attnres, CUDA, m) { implement(m); }

}  // namespace
}  // namespace attnres::ops
