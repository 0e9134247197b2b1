// What operators demand of their arguments. Every failed check throws a sentence that names the
// operator, the argument, what came and what was wanted, before anything is allocated, launched or
// written.
#pragma once

#include <string>
#include <vector>

#include "attnres/no_kernel.hpp"
#include "tensors.hpp"

namespace attnres::ops {

std::string to_string(const Shape& shape);

// One argument under check: "depth_attention: sources[2]".
struct Argument {
  const char* op;
  const char* name;
  int64_t index = -1;

  std::string text() const;
};

void check_floating(const Argument& argument, const Tensor& tensor);
void check_device(const Argument& argument, const Tensor& tensor, const Tensor& like,
                  const char* like_name);
void check_shape(const Argument& argument, const Tensor& tensor, const Shape& wanted,
                 const char* why);
// At least one dimension, hidden size of at least 1.
void check_hidden(const Argument& argument, const Tensor& tensor);

// 1 <= N <= kMaxSources sources of one shape [..., D] on one device.
void check_sources(const char* op, const char* name, const std::vector<Tensor>& sources,
                   size_t at_least = 1);
// Same shape and device as another argument.
void check_like(const Argument& argument, const Tensor& tensor, const Tensor& like,
                const char* like_name);
// A query: [D], [1, D] or [D, 1].
void check_query(const char* op, const Tensor& query, const Tensor& source);
// A gain [D], if given.
void check_gain(const Argument& argument, const OptionalTensor& gain, const Tensor& source);
void check_eps(const char* op, double eps, double out_eps);
void check_scale(const char* op, double scale);
void check_needs(const char* op, const std::vector<bool>& needs, size_t wanted);

// Written by the operator: must be addressable in place and share no memory with an input.
Rows check_output(const Argument& argument, const Tensor& output);
// Whether two tensors are views of the same elements in the same order.
bool same_memory(const Tensor& a, const Tensor& b);
void check_no_overlap(const Argument& argument, const Tensor& output, const Tensor& input,
                      const std::string& input_name);

// The backend's kernel for an operator, or a sentence that says that there is none.
template <typename Function>
Function kernel_of(const char* op, const Tensor& like, Function Backend::* member) {
  const Function function = backend_of(like).*member;
  ATTNRES_CHECK(function != nullptr, no_cuda_kernel_for(op, ATTNRES_CUDA_ARCHITECTURES));
  return function;
}

}  // namespace attnres::ops
