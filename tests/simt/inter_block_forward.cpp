#include "cases.hpp"
#include "inter_block_attention/forward_launch.cuh"

namespace simt {

void run_inter_block_forward(File& cases, File& results) {
  const Run run = Run::take(cases);
  InterBlockForward p;
  take_sizes(cases, p);
  p.num_queries = cases.take<int64_t>();
  take_config(cases);

  std::vector<Buffer> inputs;
  std::vector<ConstRows> sources(static_cast<size_t>(p.num_sources));
  for (ConstRows& source : sources) inputs.push_back(take_rows(cases, source, false));
  p.sources = sources.data();
  ConstRows known_rstd;
  for (ConstRows* rows : {&p.queries, &p.key_weights, &known_rstd}) {
    inputs.push_back(take_rows(cases, *rows, false));
  }
  p.known_rstd = known_rstd.data;
  Rows lse, stats;
  std::vector<Buffer> outputs;
  for (Rows* rows : {&p.out, &lse, &stats}) outputs.push_back(take_rows(cases, *rows, true));
  p.lse = lse.data;
  p.stats = stats.data;

  Report report;
  const Launch launch = {run, report, {&inputs, &outputs}};
  if (run.bulk_ring) {
    cuda::launch_inter_block_attention_forward<cuda::BulkTiles, cuda::CtaCluster>(p, run.limits,
                                                                                  launch);
  } else {
    cuda::launch_inter_block_attention_forward<cuda::CpAsyncTiles, cuda::OneCta>(p, run.limits,
                                                                                 launch);
  }
  put_results(results, report, outputs);
}

}  // namespace simt
