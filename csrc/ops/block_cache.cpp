// The block cache: slots [capacity, M, D] of which the open one is the running partial sum, and
// 1/rms [capacity, M] of each in the slots' compute dtype. Inference only: everything is written in
// place, nothing is allocated, so that a step can be captured in a CUDA graph.
#include "checks.hpp"
#include "depth_read.hpp"

namespace attnres::ops {
namespace {

// The slot `index` of slots [capacity, M, D].
Rows slot_rows(const Tensor& slots, int64_t index) {
  Rows rows;
  rows.dtype = dtype_of(slots);
  rows.data =
      static_cast<char*>(slots.mutable_data_ptr()) + index * slots.stride(0) * size_of(rows.dtype);
  rows.inner = slots.size(1) > 0 ? slots.size(1) : 1;
  rows.inner_stride = slots.stride(1);
  return rows;
}

ConstRows as_const(const Rows& rows) {
  return {rows.data, rows.inner, rows.outer_stride, rows.inner_stride, rows.dtype};
}

void check_cache(const char* op, const Tensor& slots, const Tensor& rstd) {
  const Argument argument{op, "slots"};
  check_floating(argument, slots);
  ATTNRES_CHECK(slots.dim() == 3, argument.text(), " has shape ", to_string(shape_of(slots)),
                ", expected [capacity, M, D]");
  check_hidden(argument, slots);
  ATTNRES_CHECK(slots.stride(2) == 1 || slots.size(2) == 1, argument.text(),
                " has a column stride of ", slots.stride(2), ", expected 1");
  const bool apart = (slots.size(1) <= 1 || slots.stride(1) >= slots.size(2)) &&
                     (slots.size(0) <= 1 ||
                      slots.stride(0) >= (slots.size(1) - 1) * slots.stride(1) + slots.size(2));
  ATTNRES_CHECK(apart, argument.text(),
                " has rows that share memory with one another, expected slots that follow one "
                "another in memory");
  ATTNRES_CHECK(slots.size(0) <= kMaxSources, argument.text(), " has a capacity of ", slots.size(0),
                ", expected at most ", kMaxSources);
  const Argument rms{op, "rstd"};
  const ScalarType wanted = scalar_type_of(compute_dtype(dtype_of(slots)));
  ATTNRES_CHECK(rstd.scalar_type() == wanted && rstd.is_contiguous(), rms.text(),
                " must be a contiguous ", torch::headeronly::toString(wanted), " tensor for slots ",
                "of ", torch::headeronly::toString(slots.scalar_type()));
  check_shape(rms, rstd, {slots.size(0), slots.size(1)}, "for these slots");
  check_device(rms, rstd, slots, "slots");
}

void check_slot(const char* op, const Tensor& slots, int64_t slot) {
  ATTNRES_CHECK(slot >= 0 && slot < slots.size(0), op, ": slot is ", slot, ", expected 0 to ",
                slots.size(0) - 1, " for a capacity of ", slots.size(0));
}

// Tokens may come with any leading dimensions: M rows in all.
void check_tokens(const Argument& argument, const Tensor& tensor, const Tensor& slots) {
  check_floating(argument, tensor);
  check_hidden(argument, tensor);
  const bool fits =
      tensor.size(tensor.dim() - 1) == slots.size(2) && num_rows(tensor) == slots.size(1);
  ATTNRES_CHECK(fits, argument.text(), " has shape ", to_string(shape_of(tensor)),
                ", expected [..., ", slots.size(2), "] with ", slots.size(1),
                " tokens in all, like the slots");
  check_device(argument, tensor, slots, "slots");
}

// A slot's 1/rms [M].
void* rstd_of(const Tensor& rstd, int64_t slot) {
  return static_cast<char*>(rstd.mutable_data_ptr()) +
         slot * rstd.size(1) * size_of(dtype_of(rstd));
}

// What is added to a slot, or merged with one, is computed with in the slots' compute dtype, which
// is that of their 1/rms.
void check_summand(const Argument& argument, const Tensor& tensor, const Tensor& slots) {
  check_tokens(argument, tensor, slots);
  const bool fits = compute_dtype(dtype_of(tensor)) == DType::kFloat32 ||
                    compute_dtype(dtype_of(slots)) == DType::kFloat64;
  ATTNRES_CHECK(fits, argument.text(), " has dtype ",
                torch::headeronly::toString(tensor.scalar_type()),
                ", expected one that is no wider than float32, for slots of ",
                torch::headeronly::toString(slots.scalar_type()));
}

void block_cache_write(const Tensor& slots, const Tensor& rstd, const Tensor& delta, int64_t slot,
                       bool add, double eps) {
  constexpr const char* kName = "block_cache_write";
  check_cache(kName, slots, rstd);
  check_slot(kName, slots, slot);
  check_summand({kName, "delta"}, delta, slots);
  check_no_overlap({kName, "slots"}, slots, delta, "delta");
  check_eps(kName, eps, eps);
  Inputs inputs;
  BlockCacheWrite p;
  p.op = kName;
  p.num_tokens = slots.size(1);
  p.hidden = slots.size(2);
  p.delta = inputs.rows(delta);
  p.slot = slot_rows(slots, slot);
  p.compute = compute_dtype(p.slot.dtype, p.delta.dtype);
  p.add = add;
  p.eps = eps;
  p.rstd = rstd_of(rstd, slot);
  const auto kernel = kernel_of(kName, slots, &Backend::block_cache_write);
  if (p.num_tokens > 0) kernel(p, slots.get_device_index());
}

// Adds `delta` to slot `slot` (or starts the slot with it) and keeps the slot's 1/rms.
void open_slot(DepthAttentionForward& p, Inputs& inputs, std::vector<ConstRows>& rows,
               const Tensor& slots, const Tensor& rstd, const Tensor& delta, int64_t slot,
               bool add) {
  const Rows open = slot_rows(slots, slot);
  ConstRows partial = as_const(open);
  if (!add) partial.data = nullptr;
  rows.push_back(partial);
  p.delta = inputs.rows(delta);
  p.new_partial = open;
  p.last_rstd = rstd_of(rstd, slot);
}

void block_cache_attend(const Tensor& slots, const Tensor& rstd, const OptionalTensor& delta,
                        int64_t slot, bool add, const Tensor& query,
                        const OptionalTensor& key_weight, const OptionalTensor& out_weight,
                        double eps, std::optional<double> out_eps, double scale,
                        const Tensor& out) {
  constexpr const char* kName = "block_cache_attend";
  check_cache(kName, slots, rstd);
  check_slot(kName, slots, slot);
  if (delta.has_value()) {
    check_summand({kName, "delta"}, *delta, slots);
    check_no_overlap({kName, "slots"}, slots, *delta, "delta");
    check_no_overlap({kName, "out"}, out, *delta, "delta");
  }
  check_tokens({kName, "out"}, out, slots);
  check_no_overlap({kName, "out"}, out, slots, "slots");
  Inputs inputs;
  DepthAttentionForward p =
      prepare_read(kName, inputs, slots, query, key_weight, out_weight, eps, out_eps, scale);
  p.num_tokens = slots.size(1);
  std::vector<ConstRows> rows;
  for (int64_t i = 0; i < slot; ++i) rows.push_back(as_const(slot_rows(slots, i)));
  if (delta.has_value()) {
    open_slot(p, inputs, rows, slots, rstd, *delta, slot, add);
  } else {
    rows.push_back(as_const(slot_rows(slots, slot)));
  }
  p.sources = rows.data();
  p.num_sources = static_cast<int>(rows.size());
  p.known_rstd = rstd.const_data_ptr();
  p.num_known_rstd = static_cast<int>(delta.has_value() ? slot : slot + 1);
  p.compute = compute_dtype(dtype_of(slots));
  p.out = check_output({kName, "out"}, out);
  run_forward(kName, p, slots);
}

void block_cache_inter(const Tensor& slots, const Tensor& rstd, int64_t count,
                       const Tensor& queries, const OptionalTensor& key_weights, double scale,
                       const Tensor& out, const Tensor& lse) {
  constexpr const char* kName = "block_cache_inter";
  check_cache(kName, slots, rstd);
  ATTNRES_CHECK(count >= 1 && count <= slots.size(0), kName, ": count is ", count,
                ", expected 1 to ", slots.size(0), " finished blocks");
  const Argument argument{kName, "queries"};
  check_floating(argument, queries);
  ATTNRES_CHECK(queries.dim() == 2 && queries.size(0) >= 1 && queries.size(1) == slots.size(2),
                argument.text(), " has shape ", to_string(shape_of(queries)), ", expected [S, ",
                slots.size(2), "]");
  check_device(argument, queries, slots, "slots");
  if (key_weights.has_value()) check_like({kName, "key_weights"}, *key_weights, queries, "queries");
  check_scale(kName, scale);
  const int64_t num_queries = queries.size(0);
  check_floating({kName, "out"}, out);
  ATTNRES_CHECK(out.is_contiguous() && out.numel() == num_queries * slots.size(1) * slots.size(2) &&
                    out.dim() >= 1 && out.size(out.dim() - 1) == slots.size(2),
                kName, ": out has shape ", to_string(shape_of(out)), ", expected contiguous [",
                num_queries, ", ", slots.size(1), ", ", slots.size(2), "]");
  check_device({kName, "out"}, out, slots, "slots");
  check_no_overlap({kName, "out"}, out, slots, "slots");
  const DType compute = compute_dtype(dtype_of(slots));
  ATTNRES_CHECK(lse.is_contiguous() && lse.scalar_type() == scalar_type_of(compute) &&
                    lse.numel() == num_queries * slots.size(1),
                kName, ": lse has shape ", to_string(shape_of(lse)), ", expected contiguous [",
                num_queries, ", ", slots.size(1), "] of ",
                torch::headeronly::toString(scalar_type_of(compute)));
  check_device({kName, "lse"}, lse, slots, "slots");

  Inputs inputs;
  std::vector<ConstRows> rows;
  for (int64_t i = 0; i < count; ++i) rows.push_back(as_const(slot_rows(slots, i)));
  InterBlockForward p;
  p.op = kName;
  p.num_tokens = slots.size(1);
  p.hidden = slots.size(2);
  p.num_sources = static_cast<int>(count);
  p.num_queries = num_queries;
  p.compute = compute;
  p.sources = rows.data();
  p.queries = inputs.vectors(queries);
  if (key_weights.has_value()) p.key_weights = inputs.vectors(*key_weights);
  p.scale = scale;
  p.known_rstd = rstd.const_data_ptr();
  p.out = rows_of_new(out);
  p.lse = lse.mutable_data_ptr();
  const auto kernel = kernel_of(kName, slots, &Backend::inter_block_forward);
  if (p.num_tokens > 0) kernel(p, slots.get_device_index());
}

void block_cache_merge(const Tensor& slots, const Tensor& rstd, const Tensor& out,
                       const Tensor& lse, const Tensor& delta, int64_t slot, bool add,
                       const Tensor& query, const OptionalTensor& key_weight,
                       const OptionalTensor& out_weight, double eps, std::optional<double> out_eps,
                       double scale, const Tensor& hidden) {
  constexpr const char* kName = "block_cache_merge";
  check_cache(kName, slots, rstd);
  check_slot(kName, slots, slot);
  check_summand({kName, "out"}, out, slots);
  check_summand({kName, "delta"}, delta, slots);
  check_tokens({kName, "hidden"}, hidden, slots);
  check_no_overlap({kName, "slots"}, slots, delta, "delta");
  check_no_overlap({kName, "slots"}, slots, out, "out");
  check_no_overlap({kName, "hidden"}, hidden, slots, "slots");
  check_no_overlap({kName, "hidden"}, hidden, out, "out");
  check_no_overlap({kName, "hidden"}, hidden, delta, "delta");
  check_floating({kName, "lse"}, lse);
  check_device({kName, "lse"}, lse, slots, "slots");
  ATTNRES_CHECK(lse.numel() == slots.size(1), kName, ": lse has shape ", to_string(shape_of(lse)),
                ", expected ", slots.size(1), " values, one a token");
  Inputs inputs;
  DepthAttentionForward p =
      prepare_read(kName, inputs, slots, query, key_weight, out_weight, eps, out_eps, scale);
  p.num_tokens = slots.size(1);
  std::vector<ConstRows> rows{inputs.rows(out)};
  open_slot(p, inputs, rows, slots, rstd, delta, slot, add);
  p.compute = compute_dtype(dtype_of(slots));
  p.sources = rows.data();
  p.num_sources = static_cast<int>(rows.size());
  p.first_logit = inputs.values(lse, p.compute);
  p.out = check_output({kName, "hidden"}, hidden);
  run_forward(kName, p, slots);
}

STABLE_TORCH_LIBRARY_FRAGMENT(attnres, m) {
  // slots[slot] = add ? round(slots[slot] + delta) : delta; rstd[slot] = its 1/rms.
  m.def(
      "block_cache_write(Tensor(a!) slots, Tensor(b!) rstd, Tensor delta, int slot, bool add, "
      "float eps=1e-6) -> ()");
  // The same, then attention over slots[0 .. slot] into `out`. Without a delta nothing is written
  // but `out`.
  m.def(
      "block_cache_attend(Tensor(a!) slots, Tensor(b!) rstd, Tensor? delta, int slot, bool add, "
      "Tensor query, "
      "Tensor? key_weight, Tensor? out_weight, float eps, float? out_eps, float scale, Tensor(c!) "
      "out) -> ()");
  // Phase 1 over slots[0 .. count - 1] into out [S, M, D] and lse [S, M].
  m.def(
      "block_cache_inter(Tensor slots, Tensor rstd, int count, Tensor queries, Tensor? "
      "key_weights, float scale, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  // Phase 2: the write, then `hidden` from phase 1's out [M, D] and lse [M] and the open slot.
  m.def(
      "block_cache_merge(Tensor(a!) slots, Tensor(b!) rstd, Tensor out, Tensor lse, Tensor delta, "
      "int slot, bool add, "
      "Tensor query, Tensor? key_weight, Tensor? out_weight, float eps, float? out_eps, float "
      "scale, Tensor(c!) hidden) "
      "-> ()");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("block_cache_write", TORCH_BOX(&block_cache_write));
  m.impl("block_cache_attend", TORCH_BOX(&block_cache_attend));
  m.impl("block_cache_inter", TORCH_BOX(&block_cache_inter));
  m.impl("block_cache_merge", TORCH_BOX(&block_cache_merge));
}

STABLE_TORCH_LIBRARY_IMPL(attnres, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(attnres, CUDA, m) { implement(m); }

}  // namespace
}  // namespace attnres::ops
