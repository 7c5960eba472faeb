// What heuristics know of a device. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace flashdecpp {

struct DeviceProperties {
  int32_t num_sms;  // 132 on an H100 SXM
  int32_t arch;     // 80, 86, 89, 90: compute capability times ten; AMD: 0x90a of gfx90a, 0x942, 0x1100

  bool amd() const { return arch >= 0x900; }
};

}  // namespace flashdecpp
