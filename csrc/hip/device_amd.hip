// What an AMD GPU is. It is known by its target, "gfx90a" of "gfx90a:sramecc+:xnack-", also as the hexadecimal number
// 0x90a, which no compute capability times ten reaches.
#include <cstdlib>

#include "cuda/launch_arch.h"

namespace flashdecpp::arch {

DeviceProperties read_properties(int32_t device) {
  hipDeviceProp_t p;
  check_cuda("devices", hipGetDeviceProperties(&p, device), "reading the device's properties");
  const std::string full = p.gcnArchName, target = full.substr(0, full.find(':'));
  const auto number = static_cast<int32_t>(std::strtol(target.c_str() + 3, nullptr, 16));
  return amd_device(target, number, p.multiProcessorCount, p.warpSize);
}

}  // namespace flashdecpp::arch
