// Rows of tensors as kernels address them: like attnres::Rows, in bytes and with 32-bit row
// numbers.
#pragma once

#include <algorithm>

#include "attnres/params.hpp"
#include "common/instructions.cuh"

namespace attnres::cuda::inline ATTNRES_CUDA_SET {

// Row m starts at (m / inner) * outer_bytes + (m % inner) * inner_bytes. A null `data` means
// "absent".
template <typename Byte>
struct ByteRowsOf {
  Byte* data;
  int64_t outer_bytes;
  int64_t inner_bytes;
  uint32_t inner;
  DType dtype;
};
using ByteRows = ByteRowsOf<std::byte>;
using ConstByteRows = ByteRowsOf<const std::byte>;

// A table of sources is part of a kernel's parameters, and a launch copies all of them: 32 bytes a
// source. Short lists have a short table.
constexpr int kShortTable = 16;

template <typename Byte>
__device__ __forceinline__ Byte* row_at(const ByteRowsOf<Byte>& rows, int64_t row) {
  // Contiguous leading dimensions have one level, and most tensors do: no division then.
  const auto m = static_cast<uint32_t>(row);
  if (m < rows.inner) return rows.data + m * rows.inner_bytes;
  return rows.data + (m / rows.inner) * rows.outer_bytes + (m % rows.inner) * rows.inner_bytes;
}

// Of rows or a vector, as kernels get it: what is there has one, kernels count on that.
template <typename Tensor>
DType dtype_of(const Tensor& tensor) {
  if (tensor.data != nullptr && tensor.dtype == DType::kNone) no_such_dtype();
  return tensor.dtype;
}

// On the host, for `num_tokens` < 2^31 rows.
template <typename Byte, typename Void>
ByteRowsOf<Byte> byte_rows(const RowsOf<Void>& rows, int64_t num_tokens) {
  if (rows.data == nullptr) return {};
  const int64_t size = size_of(rows.dtype);
  // Rows evenly spaced over both levels need only one.
  const bool one_level =
      rows.inner >= num_tokens || rows.outer_stride == rows.inner * rows.inner_stride;
  return {static_cast<Byte*>(rows.data), rows.outer_stride * size, rows.inner_stride * size,
          static_cast<uint32_t>(one_level ? num_tokens : rows.inner), rows.dtype};
}

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}
template <typename Void>
bool is_aligned(const RowsOf<Void>& rows, int64_t bytes) {
  if (rows.data == nullptr) return true;
  const int64_t size = size_of(rows.dtype);
  return is_aligned(rows.data, bytes) && rows.outer_stride * size % bytes == 0 &&
         rows.inner_stride * size % bytes == 0;
}

// Bytes of a value of rows, or 0 where they are absent.
template <typename Void>
int64_t value_bytes(const RowsOf<Void>& rows) {
  return rows.data == nullptr ? 0 : size_of(rows.dtype);
}

// Bytes of a value of the widest of an operator's sources.
template <typename Params>
int64_t widest_source(const Params& p) {
  int64_t widest = 0;
  for (int i = 0; i < p.num_sources; ++i) widest = std::max(widest, value_bytes(p.sources[i]));
  return widest;
}

}  // namespace attnres::cuda::inline ATTNRES_CUDA_SET
