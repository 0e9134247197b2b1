#include "tensors.hpp"

#include <algorithm>

namespace attnres::ops {
namespace {

int32_t dtype_code(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
    case DType::kFloat32:
      return aoti_torch_dtype_float32();
    case DType::kNone:
      break;
  }
  no_such_dtype();
}

template <typename R>
std::optional<R> try_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  if (tensor.numel() > 0 && sizes[dims - 1] > 1 && strides[dims - 1] != 1) return std::nullopt;
  // Merge leading dimensions from the inside out, as long as each continues the one inside it.
  int64_t merged_sizes[2] = {1, 1};
  int64_t merged_strides[2] = {0, 0};
  int level = -1;
  // Without rows there is nothing to address, and strides mean nothing.
  for (int64_t d = dims - 2; d >= 0 && tensor.numel() > 0; --d) {
    if (sizes[d] == 1) continue;
    if (level >= 0 && strides[d] == merged_strides[level] * merged_sizes[level]) {
      merged_sizes[level] *= sizes[d];
      continue;
    }
    if (++level == 2) return std::nullopt;
    merged_sizes[level] = sizes[d];
    merged_strides[level] = strides[d];
  }
  R rows;
  rows.inner = merged_sizes[0] > 0 ? merged_sizes[0] : 1;
  rows.inner_stride = merged_strides[0];
  rows.outer_stride = merged_strides[1];
  rows.dtype = dtype_of(tensor);
  if constexpr (std::is_same_v<R, Rows>) {
    rows.data = tensor.mutable_data_ptr();
  } else {
    rows.data = tensor.const_data_ptr();
  }
  return rows;
}

// Whether rows of queries or gains lie where kernels would rather have a copy, and a copy would
// not.
bool is_misplaced(const ConstRows& rows, const Tensor& tensor) {
  const int64_t alignment = backend_of(tensor).vector_alignment, size = size_of(rows.dtype);
  if (alignment <= 1 || tensor.size(tensor.dim() - 1) * size % alignment != 0) return false;
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data)) % alignment != 0 ||
         rows.outer_stride * size % alignment != 0 || rows.inner_stride * size % alignment != 0;
}

}  // namespace

const Backend& backend_of(const Tensor& tensor) {
  return tensor.is_cuda() ? cuda_backend() : cpu_backend();
}

// By the code of the C interface: the stable ABI's own conversion takes ten times as long, which
// shows when a call on small tensors asks for every source's dtype.
std::optional<DType> supported_dtype(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    if (code == dtype_code(dtype)) return dtype;
  }
  return std::nullopt;
}

DType dtype_of(const Tensor& tensor) { return supported_dtype(tensor).value(); }

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kNone:
      break;
  }
  no_such_dtype();
}

DType promote(DType a, DType b) {
  if (a == b) return a;
  return compute_dtype(a, b);
}

DType compute_dtype(DType a, DType b) {
  // Of floating dtypes the float64 alone is wider than float32.
  return std::max(size_of(a), size_of(b)) > size_of(DType::kFloat32) ? DType::kFloat64
                                                                     : DType::kFloat32;
}

Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

int64_t num_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
  return rows;
}

// The C entry point costs a third of the dispatched one.
Tensor empty(const Shape& shape, DType dtype, const Tensor& like) {
  constexpr size_t kMaxDims = 64;
  int64_t strides[kMaxDims];
  ATTNRES_CHECK(shape.size() <= kMaxDims, "attnres: tensors have at most ", kMaxDims,
                " dimensions, got ", shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= shape[d] > 0 ? shape[d] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t device_index =
      device_type == aoti_torch_device_type_cpu() ? 0 : like.get_device_index();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides, dtype_code(dtype), device_type,
                                                  device_index, &handle));
  return Tensor(handle);
}

Tensor nothing(DType dtype, const Tensor& like) { return empty({0}, dtype, like); }

void fill_zero(Tensor& tensor) { torch::stable::zero_(tensor); }

Rows rows_of_new(const Tensor& contiguous) { return *try_rows<Rows>(contiguous); }

std::optional<Rows> addressable_rows(const Tensor& tensor) { return try_rows<Rows>(tensor); }

const Tensor& Inputs::keep(Tensor tensor) { return kept_.emplace_back(std::move(tensor)); }

ConstRows Inputs::rows(const Tensor& tensor) {
  if (auto rows = try_rows<ConstRows>(tensor)) return *rows;
  return *try_rows<ConstRows>(keep(torch::stable::contiguous(tensor)));
}

ConstVector Inputs::vector(const Tensor& tensor) {
  const Tensor& values = tensor.is_contiguous() ? tensor : keep(torch::stable::contiguous(tensor));
  const ConstRows row = {values.const_data_ptr(), 1, 0, 0, dtype_of(values)};
  if (!is_misplaced(row, tensor)) return {row.data, row.dtype};
  return {keep(torch::stable::clone(values)).const_data_ptr(), row.dtype};
}

ConstRows Inputs::vectors(const Tensor& tensor) {
  const ConstRows in_place = rows(tensor);
  if (!is_misplaced(in_place, tensor)) return in_place;
  return rows(keep(torch::stable::contiguous(torch::stable::clone(tensor))));
}

ConstVector Inputs::vector(const OptionalTensor& tensor) {
  return tensor.has_value() ? vector(*tensor) : ConstVector{};
}

const void* Inputs::values(const Tensor& tensor, DType dtype) {
  const bool as_is = tensor.is_contiguous() && dtype_of(tensor) == dtype;
  if (as_is) return tensor.const_data_ptr();
  return keep(torch::stable::contiguous(torch::stable::to(tensor, scalar_type_of(dtype))))
      .const_data_ptr();
}

const void* Inputs::values(const OptionalTensor& tensor, DType dtype) {
  return tensor.has_value() ? values(*tensor, dtype) : nullptr;
}

}  // namespace attnres::ops
