// The host's side of the seam; the device's is arch.h. A vendor is one file that defines
//
//   arch::kAmd                      whether the library is for AMD GPUs
//   arch::read_properties(device)   DeviceProperties of the current device, by calls that take long
//   arch::carveout(shared_bytes, properties)
//                                   percent of the memory that L1 and shared memory have in common; -1: they have none
//   arch::launch_overlapping(kernel, cluster, grid, block, shared_bytes, stream, pdl, args...)
//                                   a launch in clusters of so many CTAs that, under `pdl`, may begin before the
//                                   stream's previous kernel has ended
#pragma once

#include <cuda_runtime.h>

#include "heuristics/device.h"
#include "torch_api.h"

namespace flashdecpp {

inline void check_cuda(const char* op, cudaError_t error, const char* what) {
  if (error != cudaSuccess) fault(op, ": ", what, " failed: ", cudaGetErrorString(error));
}

namespace arch {
DeviceProperties read_properties(int32_t device);
}

}  // namespace flashdecpp

#if defined(USE_ROCM)
#include "hip/launch_amd.h"
#else
#include "cuda/nvidia/launch_nvidia.h"
#endif
