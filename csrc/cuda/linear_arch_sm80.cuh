// What the linear kernels use of Ampere and later machines beyond arch_sm80.cuh.
#pragma once

#include "arch.h"

#if defined(FLASHDECPP_SIMULATED)
#include "linear_arch_simulated.h"
#else

namespace flashdecpp::arch {

// The 2 bytes at p, or the 4 where they are `wide`, which is the same for the whole wave. Nothing waits for the load
// here, as it would for a conversion or for a choice between two loads.
__device__ __forceinline__ uint32_t load_2_or_4_bytes(const void* p, bool wide) {
  uint32_t bits;
  asm volatile(
      "{\n"
      ".reg .pred wide;\n"
      "setp.ne.s32 wide, %2, 0;\n"
      "@wide ld.global.nc.u32 %0, [%1];\n"
      "@!wide ld.global.nc.u16 %0, [%1];\n"
      "}\n"
      : "=r"(bits)
      : "l"(p), "r"(static_cast<int>(wide)));
  return bits;
}

__device__ __forceinline__ float from_lane(float value, int source) { return __shfl_sync(0xffffffffu, value, source); }

}  // namespace flashdecpp::arch

#endif
