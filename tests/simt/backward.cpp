#include "cases.hpp"
#include "depth_attention/backward_launch.cuh"

namespace simt {

void run_backward(File& cases, File& results) {
  const Run run = Run::take(cases);
  DepthAttentionBackward p;
  take_sizes(cases, p);
  p.num_parts = cases.take<int64_t>();
  take_config(cases);

  const auto count = static_cast<size_t>(p.num_sources);
  std::vector<Buffer> inputs;
  std::vector<ConstRows> sources(count), bases(count);
  std::vector<int64_t> base_kinds;
  for (ConstRows& source : sources) inputs.push_back(take_rows(cases, source, false));
  for (ConstRows& base : bases) {
    base_kinds.push_back(cases.take<int64_t>());
    inputs.push_back(take_rows(cases, base, false));
  }
  for (ConstVector* gain : {&p.query, &p.key_weight, &p.out_weight}) {
    ConstRows rows;
    inputs.push_back(take_rows(cases, rows, false));
    *gain = {rows.data, rows.dtype};
  }
  ConstRows first_logit, grad_weights, stats;
  for (ConstRows* rows : {&p.grad_out, &p.mix, &first_logit, &grad_weights, &stats}) {
    inputs.push_back(take_rows(cases, *rows, false));
  }
  p.first_logit = first_logit.data;
  p.grad_weights = grad_weights.data;
  p.stats = stats.data;

  std::vector<Buffer> outputs;
  std::vector<Rows> grads(count);
  Rows grad_first_logit, parts, vectors[3];
  for (Rows& grad : grads) outputs.push_back(take_rows(cases, grad, true));
  for (Rows* rows : {&grad_first_logit, &vectors[0], &vectors[1], &vectors[2], &parts}) {
    outputs.push_back(take_rows(cases, *rows, true));
  }
  p.grad_first_logit = grad_first_logit.data;
  p.grad_query = {vectors[0].data, vectors[0].dtype};
  p.grad_key_weight = {vectors[1].data, vectors[1].dtype};
  p.grad_out_weight = {vectors[2].data, vectors[2].dtype};
  p.parts = parts.data;

  place_bases(base_kinds, p.num_tokens, p.hidden, grads, bases);
  p.sources = sources.data();
  p.grad_sources = grads.data();
  p.grad_base = bases.data();

  Report report;
  const Launch launch = {run, report, {&inputs, &outputs}};
  if (run.bulk_ring) {
    cuda::launch_depth_attention_backward<cuda::BulkRing, cuda::CtaCluster>(p, run.limits, launch);
  } else {
    cuda::launch_depth_attention_backward<cuda::CpAsyncRing, cuda::OneCta>(p, run.limits, launch);
  }
  put_results(results, report, outputs);
}

}  // namespace simt
