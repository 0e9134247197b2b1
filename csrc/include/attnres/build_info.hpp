// Facts about the running library.
#pragma once

namespace attnres {

// The CPU kernels in use: the widest that the processor supports, or what the environment variable
// ATTNRES_CPU asks for.
const char* cpu_instruction_set();

}  // namespace attnres
