#include "checks.hpp"

#include <cmath>
#include <utility>

namespace attnres::ops {
namespace {

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "device type " + std::to_string(static_cast<int>(tensor.device().type()));
}

const char* dtype_name(const Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

// First and one past the last byte that a tensor's elements occupy.
struct Extent {
  const char* begin;
  const char* end;

  explicit Extent(const Tensor& tensor) {
    begin = static_cast<const char*>(tensor.const_data_ptr());
    int64_t last = 0;
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    end = tensor.numel() == 0 ? begin
                              : begin + (last + 1) * static_cast<int64_t>(tensor.element_size());
  }
};

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu() : a.is_cuda() == b.is_cuda() && a.get_device() == b.get_device();
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes();
  const auto right = b.sizes();
  if (left.size() != right.size()) return false;
  for (size_t d = 0; d < left.size(); ++d) {
    if (left[d] != right[d]) return false;
  }
  return true;
}

}  // namespace

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t d = 0; d < shape.size(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(shape[d]);
  return text + "]";
}

std::string Argument::text() const {
  std::string text = std::string(op) + ": " + name;
  return index < 0 ? text : text + "[" + std::to_string(index) + "]";
}

void check_floating(const Argument& argument, const Tensor& tensor) {
  // None in the place of a tensor arrives as one that is not defined.
  ATTNRES_CHECK(tensor.defined(), argument.text(), " is None, expected a tensor");
  ATTNRES_CHECK(supported_dtype(tensor).has_value(), argument.text(), " has dtype ",
                dtype_name(tensor), ", expected float32, float64, bfloat16 or float16");
}

void check_device(const Argument& argument, const Tensor& tensor, const Tensor& like,
                  const char* like_name) {
  ATTNRES_CHECK(same_device(tensor, like), argument.text(), " is on ", device_name(tensor),
                ", expected ", device_name(like), " like ", like_name,
                "; move all tensors to one device");
}

void check_shape(const Argument& argument, const Tensor& tensor, const Shape& wanted,
                 const char* why) {
  ATTNRES_CHECK(shape_of(tensor) == wanted, argument.text(), " has shape ",
                to_string(shape_of(tensor)), ", expected ", to_string(wanted), " ", why);
}

void check_hidden(const Argument& argument, const Tensor& tensor) {
  ATTNRES_CHECK(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) >= 1, argument.text(),
                " has shape ", to_string(shape_of(tensor)),
                ", expected [..., D] with a hidden size D of at least 1");
}

void check_sources(const char* op, const char* name, const std::vector<Tensor>& sources,
                   size_t at_least) {
  ATTNRES_CHECK(sources.size() >= at_least, op, ": ", name, " is an empty list, expected at least ",
                at_least, " tensor");
  ATTNRES_CHECK(sources.size() <= static_cast<size_t>(kMaxSources), op, ": ", name, " has ",
                sources.size(), " tensors, expected at most ", kMaxSources);
  for (size_t i = 0; i < sources.size(); ++i) {
    const Argument argument{op, name, static_cast<int64_t>(i)};
    check_floating(argument, sources[i]);
    if (i == 0) {
      check_hidden(argument, sources[0]);
      continue;
    }
    if (!same_sizes(sources[i], sources[0])) {
      check_shape(argument, sources[i], shape_of(sources[0]),
                  (std::string("like ") + name + "[0]").c_str());
    }
    if (!same_device(sources[i], sources[0])) {
      check_device(argument, sources[i], sources[0], (std::string(name) + "[0]").c_str());
    }
  }
}

void check_like(const Argument& argument, const Tensor& tensor, const Tensor& like,
                const char* like_name) {
  check_floating(argument, tensor);
  if (!same_sizes(tensor, like)) {
    check_shape(argument, tensor, shape_of(like), (std::string("like ") + like_name).c_str());
  }
  check_device(argument, tensor, like, like_name);
}

void check_query(const char* op, const Tensor& query, const Tensor& source) {
  const Argument argument{op, "query"};
  const int64_t hidden = source.size(source.dim() - 1);
  check_floating(argument, query);
  const int64_t dims = query.dim();
  const bool fits = query.numel() == hidden &&
                    (dims == 1 || (dims == 2 && (query.size(0) == 1 || query.size(1) == 1)));
  ATTNRES_CHECK(fits, argument.text(), " has shape ", to_string(shape_of(query)), ", expected [",
                hidden, "], [1, ", hidden, "] or [", hidden, ", 1] for sources of hidden size ",
                hidden);
  check_device(argument, query, source, "the sources");
}

void check_gain(const Argument& argument, const OptionalTensor& gain, const Tensor& source) {
  if (!gain.has_value()) return;
  check_floating(argument, *gain);
  check_shape(argument, *gain, {source.size(source.dim() - 1)}, "for sources of that hidden size");
  check_device(argument, *gain, source, "the sources");
}

void check_eps(const char* op, double eps, double out_eps) {
  const auto check = [op](const char* name, double value) {
    ATTNRES_CHECK(std::isfinite(value) && value >= 0, op, ": ", name, " is ", value,
                  ", expected a finite number of at least 0");
  };
  check("eps", eps);
  check("out_eps", out_eps);
}

void check_scale(const char* op, double scale) {
  ATTNRES_CHECK(std::isfinite(scale), op, ": scale is ", scale, ", expected a finite number");
}

void check_needs(const char* op, const std::vector<bool>& needs, size_t wanted) {
  ATTNRES_CHECK(needs.size() == wanted, op, ": needs has ", needs.size(), " flags, expected ",
                wanted);
}

Rows check_output(const Argument& argument, const Tensor& output) {
  check_floating(argument, output);
  const auto rows = addressable_rows(output);
  ATTNRES_CHECK(rows.has_value(), argument.text(),
                " is written in place and must have contiguous columns and at most two "
                "strides over its leading dimensions; call .contiguous() on it first");
  // The two strides must not make rows overlap one another, as those of an expanded tensor do.
  const int64_t hidden = output.size(output.dim() - 1), count = num_rows(output);
  int64_t sizes[2] = {rows->inner, count / rows->inner},
          strides[2] = {rows->inner_stride, rows->outer_stride};
  if (strides[1] < strides[0] && sizes[1] > 1) {
    std::swap(sizes[0], sizes[1]);
    std::swap(strides[0], strides[1]);
  }
  const int64_t span = sizes[0] > 1 ? (sizes[0] - 1) * strides[0] + hidden : hidden;
  const bool apart =
      (sizes[0] <= 1 || strides[0] >= hidden) && (sizes[1] <= 1 || strides[1] >= span);
  ATTNRES_CHECK(apart, argument.text(),
                " has rows that share memory with one another, expected a tensor that is not "
                "expanded: it is written in place");
  return *rows;
}

bool same_memory(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || !same_sizes(a, b)) return false;
  const auto left = a.strides();
  const auto right = b.strides();
  for (size_t d = 0; d < left.size(); ++d) {
    if (left[d] != right[d]) return false;
  }
  return true;
}

void check_no_overlap(const Argument& argument, const Tensor& output, const Tensor& input,
                      const std::string& input_name) {
  const Extent written(output), read(input);
  const bool overlap = written.begin < read.end && read.begin < written.end;
  ATTNRES_CHECK(!overlap, argument.text(), " shares memory with ", input_name,
                ", expected a tensor of its own: it is written while ", input_name, " is read");
}

}  // namespace attnres::ops
