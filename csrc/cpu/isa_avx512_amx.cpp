// The kernel table for AVX-512 with bfloat16 dot products and AMX tiles; CMakeLists.txt sets the flags.
#define FLASHDECPP_ISA avx512_amx
#include "cpu/kernel_table.h"

namespace flashdecpp::cpu {
const Kernels kAvx512AmxKernels = avx512_amx::kernel_table("avx512_amx");
}  // namespace flashdecpp::cpu
