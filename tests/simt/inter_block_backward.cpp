#include "cases.hpp"
#include "inter_block_attention/backward_launch.cuh"

namespace simt {

void run_inter_block_backward(File& cases, File& results) {
  const Run run = Run::take(cases);
  InterBlockBackward p;
  take_sizes(cases, p);
  p.num_queries = cases.take<int64_t>();
  p.num_parts = cases.take<int64_t>();
  take_config(cases);

  const auto count = static_cast<size_t>(p.num_sources);
  std::vector<Buffer> inputs;
  std::vector<ConstRows> sources(count), bases(count);
  for (ConstRows& source : sources) inputs.push_back(take_rows(cases, source, false));
  for (ConstRows* rows : {&p.queries, &p.key_weights}) {
    inputs.push_back(take_rows(cases, *rows, false));
  }
  std::vector<int64_t> base_kinds;
  for (ConstRows& base : bases) {
    base_kinds.push_back(cases.take<int64_t>());
    inputs.push_back(take_rows(cases, base, false));
  }
  ConstRows grad_lse, stats;
  for (ConstRows* rows : {&p.grad_out, &grad_lse, &stats}) {
    inputs.push_back(take_rows(cases, *rows, false));
  }
  p.grad_lse = grad_lse.data;
  p.stats = stats.data;

  std::vector<Buffer> outputs;
  std::vector<Rows> grads(count);
  Rows parts;
  for (Rows& grad : grads) outputs.push_back(take_rows(cases, grad, true));
  for (Rows* rows : {&p.grad_queries, &p.grad_key_weights, &parts}) {
    outputs.push_back(take_rows(cases, *rows, true));
  }
  p.parts = parts.data;
  place_bases(base_kinds, p.num_tokens, p.hidden, grads, bases);
  p.sources = sources.data();
  p.grad_sources = grads.data();
  p.grad_base = bases.data();

  Report report;
  const Launch launch = {run, report, {&inputs, &outputs}};
  if (run.bulk_ring) {
    cuda::launch_inter_block_attention_backward<cuda::BulkTiles, cuda::CtaCluster>(p, run.limits,
                                                                                   launch);
  } else {
    cuda::launch_inter_block_attention_backward<cuda::CpAsyncTiles, cuda::OneCta>(p, run.limits,
                                                                                  launch);
  }
  put_results(results, report, outputs);
}

}  // namespace simt
