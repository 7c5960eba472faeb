// What launches would otherwise ask of the driver or tell it every time: once per device, or per kernel and device.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "cuda/launch_arch.h"

namespace flashdecpp {

// All of the library's mutable state. Reads take no lock; threads that race to fill an entry find the same value.
class DeviceCache {
 public:
  // The properties of the current device. FLASHDECPP_GPU_KERNELS is read here: once per process and device.
  static const DeviceProperties& properties(int32_t device) {
    static std::array<std::atomic<const DeviceProperties*>, kMaxDevices> known{};
    std::atomic<const DeviceProperties*>& entry = known.at(device);
    if (const DeviceProperties* found = entry.load(std::memory_order_acquire)) return *found;
    auto fresh = std::make_unique<const DeviceProperties>(arch::read_properties(device));
    const DeviceProperties* none = nullptr;
    if (entry.compare_exchange_strong(none, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
    return *none;
  }

  // Sets an attribute of a kernel on the current device unless it has that value already.
  template <auto kernel, auto attribute>
  static cudaError_t set(int32_t device, int32_t value) {
    static std::array<std::atomic<int32_t>, kMaxDevices> last{};  // value + 1; 0: not set yet
    std::atomic<int32_t>& entry = last.at(device);
    if (entry.load(std::memory_order_relaxed) == value + 1) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
    if (error == cudaSuccess) entry.store(value + 1, std::memory_order_relaxed);
    return error;
  }

 private:
  static constexpr int32_t kMaxDevices = 64;
};

}  // namespace flashdecpp
