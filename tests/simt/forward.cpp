#include "cases.hpp"
#include "depth_attention/forward_launch.cuh"

namespace simt {

void run_forward(File& cases, File& results) {
  const Run run = Run::take(cases);
  DepthAttentionForward p;
  take_sizes(cases, p);
  p.num_known_rstd = static_cast<int>(cases.take<int64_t>());
  const auto partial_is_source = cases.take<int64_t>() != 0;
  take_config(cases);

  std::vector<Buffer> inputs;
  std::vector<ConstRows> sources(static_cast<size_t>(p.num_sources));
  for (ConstRows& source : sources) inputs.push_back(take_rows(cases, source, false));
  p.sources = sources.data();
  for (ConstVector* gain : {&p.query, &p.key_weight, &p.out_weight}) {
    ConstRows rows;
    inputs.push_back(take_rows(cases, rows, false));
    *gain = {rows.data, rows.dtype};
  }
  ConstRows first_logit, known_rstd;
  for (ConstRows* rows : {&p.delta, &first_logit, &known_rstd}) {
    inputs.push_back(take_rows(cases, *rows, false));
  }
  p.first_logit = first_logit.data;
  p.known_rstd = known_rstd.data;
  Rows weights, stats, last_rstd;
  std::vector<Buffer> outputs;
  for (Rows* rows : {&p.out, &p.mix, &weights, &stats, &p.new_partial, &last_rstd}) {
    outputs.push_back(take_rows(cases, *rows, true));
  }
  p.weights = weights.data;
  p.stats = stats.data;
  p.last_rstd = last_rstd.data;
  if (partial_is_source) {
    // In place: what the sum is given is where it goes.
    const ConstRows& last = sources.back();
    copy_rows(last, p.new_partial, p.num_tokens, p.hidden);
    sources.back() = as_const(p.new_partial);
  }

  Report report;
  const Launch launch = {run, report, {&inputs, &outputs}};
  if (run.bulk_ring) {
    cuda::launch_depth_attention_forward<cuda::BulkRing, cuda::CtaCluster>(p, run.limits, launch);
  } else {
    cuda::launch_depth_attention_forward<cuda::CpAsyncRing, cuda::OneCta>(p, run.limits, launch);
  }
  put_results(results, report, outputs);
}

}  // namespace simt
