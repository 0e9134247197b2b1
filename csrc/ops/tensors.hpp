// Tensors as the kernels see them: rows, vectors, and the outputs allocated for them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "attnres/backend.hpp"
#include "attnres/check.hpp"
#include "attnres/params.hpp"

namespace attnres::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// The functions that compute on the tensors' device.
const Backend& backend_of(const Tensor& tensor);

// The tensor's dtype if the operators take it.
std::optional<DType> supported_dtype(const Tensor& tensor);
DType dtype_of(const Tensor& tensor);  // of a tensor that passed check_floating
ScalarType scalar_type_of(DType dtype);
// What PyTorch promotes two floating dtypes to.
DType promote(DType a, DType b);
// float64 if any of the dtypes is, else float32.
DType compute_dtype(DType a, DType b = DType::kFloat32);

Shape shape_of(const Tensor& tensor);
// Number of rows of [..., D].
int64_t num_rows(const Tensor& tensor);

Tensor empty(const Shape& shape, DType dtype, const Tensor& like);
// A tensor of no elements: the value of an output that was not asked for.
Tensor nothing(DType dtype, const Tensor& like);
void fill_zero(Tensor& tensor);

Rows rows_of_new(const Tensor& contiguous);
// Rows of a tensor that may not be copied; nothing if its layout needs more than two strides or
// strided columns.
std::optional<Rows> addressable_rows(const Tensor& tensor);

// Inputs of one call. Rows are read where they lie; a tensor whose layout the kernels cannot
// address is copied, and the copy kept until the call ends. Queries and gains are copied as well
// where their address alone would make the kernels read the rows value by value: in a flat buffer
// of parameters they lie anywhere.
class Inputs {
 public:
  ConstRows rows(const Tensor& tensor);
  ConstVector vector(const Tensor& tensor);
  ConstVector vector(const OptionalTensor& tensor);
  ConstRows vectors(const Tensor& tensor);  // [S, D]
  // Contiguous values of dtype `dtype`.
  const void* values(const Tensor& tensor, DType dtype);
  const void* values(const OptionalTensor& tensor, DType dtype);

 private:
  const Tensor& keep(Tensor tensor);
  std::vector<Tensor> kept_;
};

}  // namespace attnres::ops
