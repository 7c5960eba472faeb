// The host's choices for the linear ops on a CPU: the library's own kernels, or torch's BLAS. No torch.
#pragma once

#include <cstdint>
#include <string>

#include "heuristics/linear.h"
#include "params.h"

namespace flashdecpp::cpu {

// Measured on 2 cores of an AMD EPYC (Zen 5), torch 2.13 with MKL and oneDNN, for [N, K] = [3072, 576], [576, 1536],
// [49152, 576] and [4096, 4096]; arithmetic rates in GFLOP/s, own kernel : torch.
//   float32   M = 8 160-250 : 50-70,   M = 32 210-290 : 95-140,  M = 512 230-340 : 175-185   own, always
//   float16   M = 8 300-350 : 45-55,   M = 32 330-385 : 45-55,   M = 512 350-400 : 45-55     own, always
//   bfloat16  M = 8 350-480 : 180-240, M = 32 530-660 : 410-540, M = 512 460-590 : 810-840
//             equal at M = 64 to 96 for K up to 1536, at M = 32 for K = 4096
// Without bfloat16 dot product instructions torch converts as this kernel does; own, always.
struct LinearConfig {
  LinearImpl impl;  // gemv and flat_gemm are one kernel here
  bool measured;    // by a tuning table

  std::string str() const {
    const char* kernel = impl == LinearImpl::kBlas ? "blas" : "own kernel";
    return std::string(kernel) + (measured ? " (measured)" : " (the default rule)");
  }
};

inline LinearConfig choose_linear(DType dtype, int64_t m, int64_t k, bool bfloat16_dot,
                                  std::optional<InflectionPoints> measured = std::nullopt) {
  if (measured) return {measured->choose(m), true};
  const bool blas = dtype == DType::kBFloat16 && bfloat16_dot && m > (k < 2048 ? 64 : 32);
  return {blas ? LinearImpl::kBlas : LinearImpl::kGemv, false};
}

enum class QuantizedImpl : int8_t { kStreamed, kStrips, kBlas };

struct QuantizedLinearConfig {
  QuantizedImpl impl;

  std::string str() const {
    switch (impl) {
      case QuantizedImpl::kStreamed: return "decoded in registers";
      case QuantizedImpl::kStrips: return "dequantized in strips";
      case QuantizedImpl::kBlas: return "dequantized, then blas";
    }
    return "";
  }
};

// From 32 rows on, dequantizing a strip of the weight once costs less than decoding it for every 8 of them. Where a
// dense weight would go to the BLAS, so does this one: it is worth its memory for the length of the call.
inline QuantizedLinearConfig choose_quantized_linear(DType dtype, int64_t m, int64_t k, bool bfloat16_dot) {
  constexpr int64_t min_strip_rows = 32;
  if (choose_linear(dtype, m, k, bfloat16_dot).impl == LinearImpl::kBlas) return {QuantizedImpl::kBlas};
  return {m < min_strip_rows ? QuantizedImpl::kStreamed : QuantizedImpl::kStrips};
}

}  // namespace flashdecpp::cpu
