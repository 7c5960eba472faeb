// The names of launch_arch.h on NVIDIA GPUs.
#pragma once

#include <algorithm>
#include <utility>

namespace flashdecpp::arch {

inline constexpr bool kAmd = false;

inline int32_t carveout(size_t shared_bytes, const DeviceProperties& properties) {
  const auto all = static_cast<size_t>(properties.shared_bytes_per_sm);
  return static_cast<int32_t>(std::min<size_t>((100 * shared_bytes + all - 1) / all, 100));
}

// Programmatic dependent launch: the kernel must call wait_for_previous_kernel() before it writes anything or reads
// what a kernel may have written.
template <class... Params, class... Args>
cudaError_t launch_overlapping(void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, bool pdl, Args&&... args) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (pdl) {
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
