// How large a launch is.
#pragma once

namespace attnres::cuda {

struct LaunchShape {
  int num_ctas;
  int num_threads;   // of a CTA
  int shared_bytes;  // of a CTA, dynamic
};

}  // namespace attnres::cuda
