// AMD's definitions of the names in launch_arch.h, which includes this file once it is hipified.
#pragma once

#include <utility>

namespace flashdecpp::arch {

inline constexpr bool kAmd = true;

// LDS is a memory of its own.
inline int32_t carveout(size_t /*shared_bytes*/, const DeviceProperties& /*properties*/) { return -1; }

template <class... Params, class... Args>
hipError_t launch_overlapping(void (*kernel)(Params...), int /*cluster*/, dim3 grid, dim3 block, size_t shared_bytes,
                              hipStream_t stream, bool /*pdl*/, Args&&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Args>(args)...);
  return hipGetLastError();
}

}  // namespace flashdecpp::arch
