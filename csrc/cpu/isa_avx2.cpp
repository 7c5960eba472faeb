// The kernel table for AVX2, FMA and F16C; CMakeLists.txt sets the flags.
#define FLASHDECPP_ISA avx2
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kAvx2Kernels = avx2::kernel_table("avx2");
}  // namespace flashdecpp::cpu
