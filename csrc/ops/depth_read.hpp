// What the operators that read N sources at a site share: depth_attention,
// accumulate_depth_attention, merge_partial and the block cache check the same arguments, fill in
// the same parameters and save the same statistics.
#pragma once

#include <tuple>
#include <vector>

#include "tensors.hpp"

namespace attnres::ops {

// Checks query and gains against `source` and fills in everything that does not depend on the list
// of sources.
DepthAttentionForward prepare_read(const char* op, Inputs& inputs, const Tensor& source,
                                   const Tensor& query, const OptionalTensor& key_weight,
                                   const OptionalTensor& out_weight, double eps,
                                   std::optional<double> out_eps, double scale);

void add_sources(Inputs& inputs, std::vector<ConstRows>& rows, const std::vector<Tensor>& sources);
DType compute_dtype_of(const std::vector<ConstRows>& rows);
DType promoted_dtype_of(const std::vector<ConstRows>& rows);

// [count, ...] for sources [..., D].
Shape stacked_shape(int64_t count, const Tensor& source);

struct Saved {
  Tensor stats;
  Tensor mix;
};
// Allocates what the backward is to reuse; tensors without elements for what it is not.
Saved allocate_saved(DepthAttentionForward& p, const Tensor& like, bool save_stats, bool save_mix);

void run_forward(const char* op, const DepthAttentionForward& p, const Tensor& like);

// Points the gradients of the first `count` sources, where `needs` is set, at tensors that the
// caller keeps; checks them.
void use_gradients(const char* op, const char* name, const std::vector<Tensor>& sources,
                   const std::vector<bool>& needs, size_t count,
                   const std::vector<Tensor>& gradients, const std::vector<bool>& accumulate,
                   const OptionalTensor& grad_out, std::vector<Rows>& grad_rows,
                   std::vector<ConstRows>& base_rows);

// A backward over N sources under construction. Keeps alive what its parameters point to.
class BackwardCall {
 public:
  BackwardCall(const char* op, const std::vector<Tensor>& sources, const Tensor& query,
               const OptionalTensor& key_weight, const OptionalTensor& out_weight, double eps,
               std::optional<double> out_eps, double scale);

  void set_grad_out(const char* name, const Tensor& grad_out, const OptionalTensor& grad_weights);
  void set_saved(const OptionalTensor& stats, const OptionalTensor& mix);
  // Source 0 is a merged state of this log-sum-exp; its gradient goes to `grad_lse` if there is
  // one.
  void set_first_logit(const Tensor& lse, Tensor* grad_lse);

  // Gradients of the sources whose flag is set, newly allocated; tensors without elements for the
  // others.
  std::vector<Tensor> allocate_source_gradients(const std::vector<bool>& needs);
  // Gradients of the first `count` sources whose flag is set go into the caller's tensors.
  void use_source_gradients(const char* name, const std::vector<bool>& needs, size_t count,
                            const std::vector<Tensor>& gradients,
                            const std::vector<bool>& accumulate);
  // The gradient of source i, newly allocated, with `base` (if any) added to it.
  Tensor allocate_source_gradient(size_t i, const char* base_name, const OptionalTensor& base);
  // The gradient of source i is written into the caller's tensor.
  void use_source_gradient(size_t i, const char* name, const Tensor& gradient);

  // Gradients of query, key_weight and out_weight, whose flags are the last three of `needs`.
  std::tuple<Tensor, Tensor, Tensor> run(const std::vector<bool>& needs);

 private:
  const char* op_;
  const std::vector<Tensor>& sources_;
  const Tensor& query_;
  const OptionalTensor& key_weight_;
  const OptionalTensor& out_weight_;
  Inputs inputs_;
  std::vector<ConstRows> rows_;
  std::vector<Rows> grad_rows_;
  std::vector<ConstRows> base_rows_;
  OptionalTensor grad_out_;
  DepthAttentionBackward p_;
};

}  // namespace attnres::ops
