// The kernel table for NEON, which every 64-bit ARM CPU has.
#define FLASHDECPP_ISA neon
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kNeonKernels = neon::kernel_table("neon");
}  // namespace flashdecpp::cpu
