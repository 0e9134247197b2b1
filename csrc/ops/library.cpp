// The namespace of the operators. Each operator's file adds its own schemas to it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(attnres, m) { (void)m; }
