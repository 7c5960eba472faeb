// AMD's definitions of the names in launch_arch.h, which includes this file once it is hipified.
#pragma once

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace flashdecpp::arch {

inline constexpr bool kHasHopperKernels = false, kCopiesGoThroughRegisters = true;

// The target without its features: "gfx90a" for "gfx90a:sramecc+:xnack-".
inline const std::string& name_in_tables(int32_t device) {
  static const auto targets = of_every_device([](const hipDeviceProp_t& p) {
    const std::string name = p.gcnArchName;
    return name.substr(0, name.find(':'));
  });
  return targets.at(device);
}

// The target's digits as a hexadecimal number: 0x90a, 0x942, 0x1100. Larger than any NVIDIA compute capability times
// ten.
inline int32_t number(int32_t device) {
  return static_cast<int32_t>(std::strtol(name_in_tables(device).c_str() + 3, nullptr, 16));
}

// Nothing to ask for: LDS and L1 are separate memories.
inline hipError_t prefer_l1(const void* /*kernel*/, size_t /*shared_bytes*/, int32_t /*device*/) { return hipSuccess; }

template <class... Params, class... Args>
hipError_t launch_overlapping(void (*kernel)(Params...), int /*cluster*/, dim3 grid, dim3 block, size_t shared_bytes,
                              hipStream_t stream, int32_t /*device*/, Args&&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Args>(args)...);
  return hipGetLastError();
}

}  // namespace flashdecpp::arch
