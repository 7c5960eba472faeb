// The host's way to a launch: guard the device, find the stream, launch, check.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>

#include "cuda/launch_arch.h"
#include "heuristics/device.h"

namespace flashdecpp {

// One op's place on one device: the device is current while this lives, and work goes to torch's current stream there.
class Launcher {
 public:
  Launcher(const char* op, Device device) : op_(op), guard_(device.index), device_(device.index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  DeviceProperties properties() const { return {attribute(cudaDevAttrMultiProcessorCount), arch::number(device_)}; }

  // Whether to take the kernels that are written for Hopper. FLASHDECPP_GPU_KERNELS=generic takes those that Ampere
  // runs, too: to test and compare them.
  bool hopper_kernels() const {
    const char* choice = std::getenv("FLASHDECPP_GPU_KERNELS");
    return properties().arch == 90 && !(choice && std::strcmp(choice, "generic") == 0);
  }

  int32_t warp_size() const { return attribute(cudaDevAttrWarpSize); }
  int32_t shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }  // a block can ask for

  template <class Kernel>
  void allow_shared_memory(Kernel* kernel, size_t bytes) const {
    if (bytes <= 32 * 1024) return;  // 48 KiB are allowed without asking, with what the kernel has besides
    check_cuda(op_,
               cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "asking for shared memory");
  }

  // For kernels that load straight into registers: of what a SM shares out among shared memory and L1, its
  // blocks need `shared_bytes` in all, and the rest is to be L1, for a load under way takes a line of that. Unasked, a
  // SM stays with the split of the kernel ahead where the two overlap and it allows for both.
  template <class Kernel>
  void keep_l1(Kernel* kernel, size_t shared_bytes) const {
    check_cuda(op_, arch::prefer_l1(reinterpret_cast<const void*>(kernel), shared_bytes, device_), "asking for L1");
  }

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) const {
    kernel<<<grid, block, shared_bytes, stream_>>>(std::forward<Args>(args)...);
    check_cuda(op_, cudaGetLastError(), "the launch");
  }

  // The kernel may start before what the stream runs ahead of it has ended, and must call wait_for_previous_kernel()
  // before it writes anything, or reads what a kernel may have written.
  template <class... Params, class... Args>
  void overlapping(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) const {
    overlapping_clusters(kernel, 1, grid, block, shared_bytes, std::forward<Args>(args)...);
  }

  // The same, with `cluster` neighboring blocks of a grid of one dimension on one part of the machine at one time.
  template <class... Params, class... Args>
  void overlapping_clusters(void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                            Args&&... args) const {
    check_cuda(op_,
               arch::launch_overlapping(kernel, cluster, grid, block, shared_bytes, stream_, device_,
                                        std::forward<Args>(args)...),
               "the launch");
  }

 private:
  int32_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(op_, cudaDeviceGetAttribute(&value, which, device_), "reading the device's properties");
    return value;
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace flashdecpp
