// The names of launch_arch.h for NVIDIA machines.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace flashdecpp::arch {

inline constexpr bool kHasHopperKernels = true, kCopiesGoThroughRegisters = false;

inline int32_t attribute(int32_t device, cudaDeviceAttr which) {
  int value = 0;
  check_cuda("devices", cudaDeviceGetAttribute(&value, which, device), "reading the device's properties");
  return value;
}

// Compute capability times ten.
inline int32_t number(int32_t device) {
  return 10 * attribute(device, cudaDevAttrComputeCapabilityMajor) +
         attribute(device, cudaDevAttrComputeCapabilityMinor);
}

// As torch.cuda.get_device_name says it.
inline const std::string& name_in_tables(int32_t device) {
  static const auto names = of_every_device([](const cudaDeviceProp& p) { return std::string(p.name); });
  return names.at(device);
}

inline cudaError_t prefer_l1(const void* kernel, size_t shared_bytes, int32_t device) {
  const auto all = static_cast<size_t>(attribute(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const auto percent = static_cast<int>((100 * shared_bytes + all - 1) / all);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, std::min(percent, 100));
}

// Programmatic dependent launch: the kernel may start before what the stream runs ahead of it has ended, and must call
// wait_for_previous_kernel() before it writes anything, or reads what a kernel may have written.
template <class... Params, class... Args>
cudaError_t launch_overlapping(void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, int32_t device, Args&&... args) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (number(device) >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace flashdecpp::arch
