// What an operator hands to a kernel: plain structs, no torch, no CUDA. Sizes are M tokens, D
// hidden, N sources, S queries; strides count elements. A null `data` means "absent".
#pragma once

#include <cstdint>

// The CPU kernels are compiled for several instruction sets, and a linker must find nothing of
// theirs to merge.
#define ATTNRES_ALWAYS_INLINE __attribute__((always_inline)) constexpr

namespace attnres {

// kNone is the dtype of what is absent. Every switch names all of them and has no default, so that
// a new one does not compile before each of them knows it; asking for the dtype of what is absent
// is a mistake in this library, which must not pass for a dtype.
enum class DType : int8_t { kNone, kFloat32, kFloat64, kBFloat16, kFloat16 };

// Ends the program: nothing sensible can follow.
[[noreturn]] __attribute__((always_inline)) inline void no_such_dtype() { __builtin_trap(); }

// Bytes of a value.
ATTNRES_ALWAYS_INLINE int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kNone:
      break;
  }
  no_such_dtype();
}

// Whether a computation, which is in float32 or float64, is in float64.
ATTNRES_ALWAYS_INLINE bool is_double(DType compute) {
  switch (compute) {
    case DType::kFloat64:
      return true;
    case DType::kFloat32:
      return false;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kNone:
      break;
  }
  no_such_dtype();
}

// Longest list of sources an operator takes: the table of a CUDA kernel's parameters holds this
// many rows.
constexpr int kMaxSources = 256;

// [M, D] rows with contiguous columns. Two levels of stride address any slice of a [B, T, D] tensor
// without a copy: row m starts at (m / inner) * outer_stride + (m % inner) * inner_stride.
template <typename Void>
struct RowsOf {
  Void* data = nullptr;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  DType dtype = DType::kNone;

  ATTNRES_ALWAYS_INLINE int64_t offset(int64_t m) const {
    return (m / inner) * outer_stride + (m % inner) * inner_stride;
  }
};
using Rows = RowsOf<void>;
using ConstRows = RowsOf<const void>;

// [D] contiguous values.
template <typename Void>
struct VectorOf {
  Void* data = nullptr;
  DType dtype = DType::kNone;
};
using Vector = VectorOf<void>;
using ConstVector = VectorOf<const void>;

// The dtype that all rows added so far have which are there; kNone where they differ, or where none
// is there.
class SharedDType {
 public:
  template <typename Void>
  ATTNRES_ALWAYS_INLINE void add(const RowsOf<Void>& rows) {
    if (rows.data == nullptr) return;
    dtype_ = is_first_ || dtype_ == rows.dtype ? rows.dtype : DType::kNone;
    is_first_ = false;
  }
  template <typename Void>
  ATTNRES_ALWAYS_INLINE void add(const RowsOf<Void>* rows, int count) {
    for (int i = 0; i < count; ++i) add(rows[i]);
  }
  ATTNRES_ALWAYS_INLINE DType get() const { return dtype_; }

 private:
  DType dtype_ = DType::kNone;
  bool is_first_ = true;
};

// out = softmax-weighted mix of N sources, optionally RMS-normalised.
//
// The same struct serves every operator that reads N sources once:
// - Block summation: `delta` is added to the last source first; the sum is rounded to
//   `new_partial`'s dtype, stored there, and that rounded value is scored and mixed. A last source
//   without data counts as zero.
// - Merging a state: `first_logit` is the log-sum-exp that belongs to source 0, an already mixed
//   value that is not scored.
// - Block cache: `known_rstd` holds 1/rms of the first `num_known_rstd` sources.
struct DepthAttentionForward {
  const char* op = "";  // the operator that was called, for error messages
  int64_t num_tokens = 0;
  int64_t hidden = 0;
  int num_sources = 0;
  DType compute = DType::kNone;  // kFloat32 or kFloat64: dtype of logits, sums, weights and stats

  const ConstRows* sources = nullptr;  // [N] on the host
  ConstVector query;                   // [D]
  ConstVector key_weight;              // [D] or absent: ones
  ConstVector out_weight;              // [D] or absent: no output norm
  double eps = 0;
  double out_eps = 0;
  double scale = 1;

  ConstRows delta;
  Rows new_partial;                   // may be the last source itself
  const void* first_logit = nullptr;  // [M], compute dtype
  const void* known_rstd = nullptr;   // [num_known_rstd, M], compute dtype
  int num_known_rstd = 0;

  Rows out;
  Rows mix;                 // the mix before the output norm, compute dtype; optional
  void* weights = nullptr;  // [N, M], compute dtype; optional
  void* stats =
      nullptr;  // [2N + 1, M], compute dtype: N rows of 1/rms, N of logits, one of lse; optional
  void* last_rstd = nullptr;  // [M] 1/rms of the last source, compute dtype; optional
};

struct DepthAttentionBackward {
  const char* op = "";  // the operator that was called, for error messages
  int64_t num_tokens = 0;
  int64_t hidden = 0;
  int num_sources = 0;
  DType compute = DType::kNone;

  const ConstRows* sources =
      nullptr;  // [N]; block summation has been done: the last one is the new partial
  ConstVector query;
  ConstVector key_weight;
  ConstVector out_weight;
  double eps = 0;
  double out_eps = 0;
  double scale = 1;
  const void* first_logit = nullptr;  // [M]

  ConstRows grad_out;
  const void* grad_weights = nullptr;  // [N, M], compute dtype; optional
  const void* stats = nullptr;         // as saved by the forward; absent: recomputed
  ConstRows mix;  // as saved by the forward; absent: recomputed when an output norm needs it

  const Rows* grad_sources = nullptr;  // [N]; a source without data wants no gradient
  const ConstRows* grad_base =
      nullptr;  // [N]; what the gradient is added to: absent, the same rows, or others
  void* grad_first_logit = nullptr;  // [M], compute dtype; optional

  Vector grad_query;  // [D] each; optional
  Vector grad_key_weight;
  Vector grad_out_weight;
  void* parts = nullptr;  // [num_parts, 2, D] compute dtype: per-part sums of the weight gradients
  int64_t num_parts = 0;
};

// Phase 1: S queries against N finished blocks.
struct InterBlockForward {
  const char* op = "";  // the operator that was called, for error messages
  int64_t num_tokens = 0;
  int64_t hidden = 0;
  int num_sources = 0;
  int64_t num_queries = 0;
  DType compute = DType::kNone;

  const ConstRows* sources = nullptr;  // [N]
  ConstRows queries;                   // [S, D]
  ConstRows key_weights;               // [S, D] or absent: ones
  double eps = 0;
  double scale = 1;
  const void* known_rstd = nullptr;  // [N, M], compute dtype; optional

  Rows out;             // [S * M, D]
  void* lse = nullptr;  // [S, M], compute dtype
  void* stats =
      nullptr;  // [N + S * N, M], compute dtype: N rows of 1/rms, then logits [S, N]; optional
};

struct InterBlockBackward {
  const char* op = "";  // the operator that was called, for error messages
  int64_t num_tokens = 0;
  int64_t hidden = 0;
  int num_sources = 0;
  int64_t num_queries = 0;
  DType compute = DType::kNone;

  const ConstRows* sources = nullptr;  // [N]
  ConstRows queries;                   // [S, D]
  ConstRows key_weights;               // [S, D] or absent
  double eps = 0;
  double scale = 1;

  ConstRows grad_out;              // [S * M, D]; absent: zero
  const void* grad_lse = nullptr;  // [S, M], compute dtype; optional
  const void* stats = nullptr;     // as saved by the forward; absent: recomputed

  const Rows* grad_sources = nullptr;    // [N]
  const ConstRows* grad_base = nullptr;  // [N]

  Rows grad_queries;  // [S, D]; optional
  Rows grad_key_weights;
  void* parts = nullptr;  // [num_parts, S, D] compute dtype
  int64_t num_parts = 0;
};

// slot = add ? round(slot + delta) : delta, and the 1/rms of the result.
struct BlockCacheWrite {
  const char* op = "";  // the operator that was called, for error messages
  int64_t num_tokens = 0;
  int64_t hidden = 0;
  DType compute = DType::kNone;
  ConstRows delta;
  Rows slot;
  bool add = false;
  double eps = 0;
  void* rstd = nullptr;  // [M], compute dtype of the slot
};

}  // namespace attnres
