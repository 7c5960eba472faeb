// The kernel table for AVX-512 F, BW, VL and DQ; CMakeLists.txt sets the flags.
#define FLASHDECPP_ISA avx512
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kAvx512Kernels = avx512::kernel_table("avx512");
}  // namespace flashdecpp::cpu
