// How large a launch is.
#pragma once

namespace attnres::cuda {

struct LaunchShape {
  int num_ctas;
  int num_threads;           // of a CTA
  int shared_bytes;          // of a CTA, dynamic
  bool fills_shared_memory;  // counts on as many CTAs as shared memory holds; else the memory is
                             // better used as cache
  int cluster_size = 0;      // CTAs that run together; 0: the kernel knows no clusters
};

}  // namespace attnres::cuda
