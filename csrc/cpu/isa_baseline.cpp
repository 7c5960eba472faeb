// Every kernel in what any compiler makes of plain vectors. CMakeLists.txt gives this file its own flags.
#define FLASHDECPP_PORTABLE
#define FLASHDECPP_ISA baseline
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kBaselineKernels = baseline::kernel_table("baseline");
}  // namespace flashdecpp::cpu
