// The kernel table for AVX-512 with bfloat16 dot products; CMakeLists.txt sets the flags.
#define FLASHDECPP_ISA avx512_bf16
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kAvx512Bf16Kernels = avx512_bf16::kernel_table("avx512_bf16");
}  // namespace flashdecpp::cpu
