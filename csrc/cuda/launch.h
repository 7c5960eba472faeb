// The host's way to a launch: guard the device, find the stream, launch, check.
#pragma once

#include <type_traits>

#include "cuda/device_cache.h"

namespace flashdecpp {

// One op's call on one device: the device is current while this lives, and work goes to torch's current stream there.
class Launcher {
 public:
  Launcher(const char* op, Device device)
      : op_(op), guard_(device.index), device_(device.index), properties_(DeviceCache::properties(device.index)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }
  const DeviceProperties& properties() const { return properties_; }
  int32_t warp_size() const { return properties_.warp_size; }

  template <auto kernel>
  void allow_shared_memory(int32_t bytes) const {
    if (bytes <= 32 * 1024) return;  // 48 KiB, static shared memory included, need no permission
    check_cuda(op_, DeviceCache::set<kernel, cudaFuncAttributeMaxDynamicSharedMemorySize>(device_, bytes),
               "asking for shared memory");
  }

  // For kernels that load straight into registers: every load in flight occupies an L1 line, so request the smallest
  // carveout that holds shared_bytes, what all resident CTAs need. Without the hint, under programmatic dependent
  // launch, the SM keeps the previous kernel's carveout where it suits both.
  template <auto kernel>
  void keep_l1(size_t shared_bytes) const {
    const int32_t percent = arch::carveout(shared_bytes, properties_);
    if (percent < 0) return;
    check_cuda(op_, DeviceCache::set<kernel, cudaFuncAttributePreferredSharedMemoryCarveout>(device_, percent),
               "asking for L1");
  }

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) const {
    kernel<<<grid, block, shared_bytes, stream_>>>(std::forward<Args>(args)...);
    check_cuda(op_, cudaGetLastError(), "the launch");
  }

  // The kernel may start before the stream's previous kernel has ended, and must call wait_for_previous_kernel() before
  // it writes anything or reads what a kernel may have written.
  template <class... Params, class... Args>
  void overlapping(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) const {
    overlapping_clusters(kernel, 1, grid, block, shared_bytes, std::forward<Args>(args)...);
  }

  // The same in clusters: every `cluster` consecutive CTAs of a one-dimensional grid.
  template <class... Params, class... Args>
  void overlapping_clusters(void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                            Args&&... args) const {
    check_cuda(op_,
               arch::launch_overlapping(kernel, cluster, grid, block, shared_bytes, stream_, properties_.has_pdl,
                                        std::forward<Args>(args)...),
               "the launch");
  }

 private:
  const char* op_;
  DeviceGuard guard_;
  int32_t device_;
  const DeviceProperties& properties_;
  cudaStream_t stream_ = nullptr;
};

// f(std::true_type) or f(std::false_type).
template <class F>
void with_bool(bool value, F f) {
  value ? f(std::true_type()) : f(std::false_type());
}

}  // namespace flashdecpp
