// Every kernel for NEON, which every 64-bit ARM has. CMakeLists.txt gives this file its own flags.
#define FLASHDECPP_ISA neon
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kNeonKernels = neon::kernel_table("neon");
}  // namespace flashdecpp::cpu
