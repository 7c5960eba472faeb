// The parts of HIP and of clang's AMDGPU builtins that csrc/hip/arch_amd.h uses, on the simulated GPU, so that AMD's
// side of the seam is tested too, with the documented layouts of the matrix instructions.
#pragma once

#include "../simulated_gpu.h"

#define HIP_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(simulated::aligned_shared())

using __half = _Float16;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
inline unsigned short __half_as_ushort(__half x) {
  unsigned short bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct __hip_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__hip_bfloat16 x) { return simulated::from_bfloat16_bits(x.bits); }
inline __hip_bfloat16 __float2bfloat16(float x) { return {simulated::to_bfloat16_bits(x)}; }

namespace simulated {

// C += A B for 16 x 16 x 16. A lane holds `inner` neighbors along K of A and B, and of C four consecutive rows (MFMA)
// or every second row (WMMA).
template <class Factor, class Sums, class Widen>
Sums multiply(const Factor& a, const Factor& b, Sums c, Widen widen, const char* name) {
  constexpr int inner = kWarp == 64 ? 4 : 16;
  struct Factors {
    Factor a, b;
  };
  const auto* lanes = gpu().exchange(Factors{a, b}, name);
  const int col = lane() % 16;
  for (int i = 0; i < 256 / kWarp; ++i) {
    const int row = kWarp == 64 ? lane() / 16 * 4 + i : 2 * i + lane() / 16;
    for (int k = 0; k < 16; ++k) {
      const int from_k = kWarp == 64 ? k / 4 * 16 : 0;
      c[i] += widen(lane_value<Factors>(lanes, from_k + row).a[k % inner]) *
              widen(lane_value<Factors>(lanes, from_k + col).b[k % inner]);
    }
  }
  return c;
}

}  // namespace simulated

template <class T>
T __shfl(T value, int source, int = simulated::kWarp) {
  return simulated::shuffle(value, source % simulated::kWarp, "__shfl");
}
template <class T>
T __shfl_xor(T value, int mask, int = simulated::kWarp) {
  return simulated::shuffle(value, simulated::lane() ^ mask, "__shfl_xor");
}
inline int __builtin_amdgcn_readfirstlane(int value) { return value; }  // callers pass warp-uniform values
inline unsigned long long __ballot(bool value) {
  const auto* lanes = simulated::gpu().exchange(value, "__ballot");
  unsigned long long ballot = 0;
  for (int i = 0; i < simulated::kWarp; ++i)
    ballot |= static_cast<unsigned long long>(simulated::lane_value<bool>(lanes, i)) << i;
  return ballot;
}
inline int __ffsll(unsigned long long bits) { return bits == 0 ? 0 : __builtin_ctzll(bits) + 1; }

#define __builtin_amdgcn_fence(...) static_cast<void>(0)
#define __builtin_amdgcn_wave_barrier() static_cast<void>(simulated::gpu().exchange(0, "wave_barrier"))
#define __builtin_amdgcn_sched_barrier(...) static_cast<void>(0)
// Selectors 0 to 3 are bytes of `low`, 4 to 7 of `high`.
inline unsigned __builtin_amdgcn_perm(unsigned high, unsigned low, unsigned selectors) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selectors >> 8 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
#define __builtin_amdgcn_s_sleep(...) simulated::gpu().wait("await")
#define __builtin_amdgcn_exp2f(x) std::exp2(x)
#define __builtin_nontemporal_load(p) (*(p))
#define __HIP_MEMORY_SCOPE_AGENT 0
#define __hip_atomic_load(p, ...) (*(p))
#define __hip_atomic_store(p, value, ...) static_cast<void>(*(p) = (value))
#define __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, c, ...) \
  simulated::multiply(a, b, c, [](float x) { return x; }, "mfma")
#define __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, c, ...) \
  simulated::multiply(a, b, c, [](short x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }, "mfma")
#define __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, c) \
  simulated::multiply(a, b, c, [](float x) { return x; }, "wmma")
#define __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(a, b, c) \
  simulated::multiply(a, b, c, [](short x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }, "wmma")
