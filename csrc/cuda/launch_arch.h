// The host's side of the seam; the device's is arch.h. A machine is one file that defines
//
//   arch::kHasHopperKernels         whether the library has them (what the device can, Launcher::hopper_kernels says)
//   arch::kCopiesGoThroughRegisters to shared memory: there is no copy that goes on by itself
//   arch::number(device)            what DeviceProperties::arch says of a device
//   arch::name_in_tables(device)    the name that tables of inflection points know a device by
//   arch::prefer_l1(kernel, shared_bytes, device)   of the memory that L1 and shared memory have in common
//   arch::launch_overlapping(kernel, cluster, grid, block, shared_bytes, stream, device, args...)
//                                   a launch that may begin before what the stream runs ahead of it has ended, where
//                                   there is such a thing, in clusters of so many blocks
#pragma once

#include <cuda_runtime.h>

#include "torch_api.h"

namespace flashdecpp {

inline void check_cuda(const char* op, cudaError_t error, const char* what) {
  if (error != cudaSuccess) fault(op, ": ", what, " failed: ", cudaGetErrorString(error));
}

// f(properties) of every device; once, for it takes long.
template <class F>
auto of_every_device(F f) {
  constexpr const char* what = "reading the devices' properties";
  int count = 0;
  check_cuda("devices", cudaGetDeviceCount(&count), what);
  std::vector<decltype(f(cudaDeviceProp{}))> found;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check_cuda("devices", cudaGetDeviceProperties(&properties, device), what);
    found.push_back(f(properties));
  }
  return found;
}

}  // namespace flashdecpp

#if defined(USE_ROCM)
#include "hip/launch_amd.h"
#else
#include "cuda/nvidia/launch_nvidia.h"
#endif
