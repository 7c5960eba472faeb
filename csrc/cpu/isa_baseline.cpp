// The kernel table for any target, from the compiler's vector types and no special flags.
#define FLASHDECPP_PORTABLE
#define FLASHDECPP_ISA baseline
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kBaselineKernels = baseline::kernel_table("baseline");
}  // namespace flashdecpp::cpu
