// What the heuristics know about a GPU. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace flashdecpp {

// What the code that the library holds for a device was compiled for: less than the device can do where it was compiled
// from the PTX of an older architecture, or for sm_90 instead of sm_90a.
struct CompiledFor {
  bool sm_90 = true;   // TMA, clusters and programmatic dependent launch
  bool sm_90a = true;  // wgmma
};

struct DeviceProperties {
  std::string name;                  // the name under which tuning tables know the device
  int32_t arch = 0;                  // compute capability times ten (80, 90, 120); AMD: 0x90a for gfx90a, 0x1100
  int32_t num_sms = 0;               // 132 on an H100 SXM; AMD: compute units
  int32_t warp_size = 32;            // 64 on CDNA
  int32_t shared_bytes_per_cta = 0;  // the most that a CTA can opt in to
  int32_t shared_bytes_per_sm = 0;   // for all resident CTAs, including 1 KiB that the hardware reserves for each
  bool has_tma = false;              // TMA and mbarriers: capability 9.0 and later
  bool has_clusters = false;         // clusters and distributed shared memory: 9.0 and later
  bool has_wgmma = false;            // 9.0 alone
  bool has_pdl = false;              // programmatic dependent launch: 9.0 and later
  bool prefers_mma_gemv = false;     // the GEMV on tensor cores; it needs no more than 8.0, but is unmeasured on 8.x

  bool amd() const { return arch >= 0x900; }
  int32_t mma_n() const { return amd() ? 16 : 8; }  // columns of one matrix instruction
  // The shared memory that the generic kernels are written for: 160 of an A100's 163 KiB, AMD's 64 KiB of LDS.
  int32_t generic_shared_bytes() const { return std::min((amd() ? 64 : 160) * 1024, shared_bytes_per_cta); }

  // Such as "NVIDIA H100 80GB HBM3 (132 SMs, sm_90: TMA, clusters, wgmma)".
  std::string str() const {
    if (amd()) return name + " (" + std::to_string(num_sms) + " compute units)";
    std::string text = name + " (" + std::to_string(num_sms) + " SMs, sm_" + std::to_string(arch);
    const char* separator = ": ";
    const auto add = [&](bool present, const char* what) {
      if (!present) return;
      text += separator + std::string(what);
      separator = ", ";
    };
    add(has_tma, "TMA");
    add(has_clusters, "clusters");
    add(has_wgmma, "wgmma");
    return text + ")";
  }
};

// An NVIDIA GPU of compute capability arch / 10. `generic` (FLASHDECPP_GPU_KERNELS=generic) chooses kernels as for
// capability 8.0, to test and compare them; launches still overlap.
inline DeviceProperties nvidia_device(std::string name, int32_t arch, int32_t num_sms, int32_t shared_bytes_per_cta,
                                      int32_t shared_bytes_per_sm, bool generic = false, CompiledFor compiled = {}) {
  DeviceProperties device{std::move(name), arch, num_sms, 32, shared_bytes_per_cta, shared_bytes_per_sm};
  const bool sm_90 = arch >= 90 && compiled.sm_90;
  device.has_tma = device.has_clusters = device.prefers_mma_gemv = sm_90 && !generic;
  device.has_wgmma = arch / 10 == 9 && compiled.sm_90a && !generic;
  device.has_pdl = sm_90;
  return device;
}

// An AMD GPU by its target, 0x90a for gfx90a.
inline DeviceProperties amd_device(std::string name, int32_t target, int32_t num_cus, int32_t warp_size) {
  constexpr int32_t lds_bytes = 64 * 1024;
  return {std::move(name), target, num_cus, warp_size, lds_bytes, lds_bytes};
}

}  // namespace flashdecpp
