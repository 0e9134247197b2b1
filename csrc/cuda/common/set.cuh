// The set of kernels that is being compiled: sm80 or sm90.
//
// Device code is instantiated once for each set, for other chips, and all sets end up in one
// library. There a linker keeps one of all that have the same name: a function that launches a
// kernel would launch the other set's, which has no code for the device. So everything in a .cuh
// lives in an inline namespace of its set, and its name says which: kernels, what starts them on
// the host, and what that remembers. Headers of type .hpp are for the host alone, and what they
// define is the same in all sets.
#pragma once

#ifndef ATTNRES_CUDA_SET
#error "ATTNRES_CUDA_SET names the set of kernels that is compiled: define it before any .cuh"
#endif
