// What an NVIDIA GPU can do, and what the library holds for it.
#include <cstdlib>
#include <cstring>

#include "cuda/launch_arch.h"
#include "cuda/nvidia/linear_arch.cuh"

namespace flashdecpp::arch {
namespace {

// Says which code the driver picked for a device: the launch bound is compiled into it and can be asked for, while the
// device's capability says nothing about PTX of an older architecture, nor about sm_90 in place of sm_90a.
constexpr int kBoundSm80 = 32, kBoundSm90 = 64, kBoundSm90a = 96;
__global__ void __launch_bounds__(kHasWgmma ? kBoundSm90a : kHasTma ? kBoundSm90 : kBoundSm80) compiled_for_kernel() {}

CompiledFor compiled_for(const cudaDeviceProp& properties) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, compiled_for_kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // not for whoever asks next
    const std::string capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    fault("the library was not compiled for ", properties.name, ", compute capability ", capability,
          ": reinstall flashdecpp with TORCH_CUDA_ARCH_LIST=", capability);
  }
  check_cuda("devices", error, "reading what the library was compiled for");
  return {attributes.maxThreadsPerBlock >= kBoundSm90, attributes.maxThreadsPerBlock >= kBoundSm90a};
}

}  // namespace

DeviceProperties read_properties(int32_t device) {
  cudaDeviceProp p;
  check_cuda("devices", cudaGetDeviceProperties(&p, device), "reading the device's properties");
  const char* kernels = std::getenv("FLASHDECPP_GPU_KERNELS");
  const bool generic = kernels && std::strcmp(kernels, "generic") == 0;
  return nvidia_device(p.name, 10 * p.major + p.minor, p.multiProcessorCount,
                       static_cast<int32_t>(p.sharedMemPerBlockOptin),
                       static_cast<int32_t>(p.sharedMemPerMultiprocessor), generic, compiled_for(p));
}

}  // namespace flashdecpp::arch

#if defined(FLASHDECPP_TIMELINE)
// Kernels launched from now on add their records to `buffer`, which is on the current device; null: they stop.
extern "C" __attribute__((visibility("default"))) int flashdecpp_set_timeline(void* buffer) {
  for (const auto set : flashdecpp::timeline_setters()) {
    if (const cudaError_t error = set(static_cast<flashdecpp::TimelineBuffer*>(buffer))) return error;
  }
  return 0;
}
#endif
