// Every kernel for what every CPU of the architecture has (SSE2, NEON). CMakeLists.txt gives this file its own flags.
#define FLASHDECPP_ISA baseline
#include "kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kBaselineKernels = baseline::kernel_table("baseline");
}  // namespace flashdecpp::cpu
