// Which linear `auto` runs on a CPU: the library's own kernel, or torch's BLAS.
#pragma once

#include <cstdint>

#include "params.h"

namespace flashdecpp::cpu {

// Measured on 2 cores of an AMD EPYC (Zen 5), torch 2.13 with MKL and oneDNN, for [N, K] = [3072, 576], [576, 1536],
// [49152, 576] and [4096, 4096]; arithmetic rates in GFLOP/s, own kernel : torch.
//   float32   M = 8 160-250 : 50-70,   M = 32 210-290 : 95-140,  M = 512 230-340 : 175-185   own, always
//   float16   M = 8 300-350 : 45-55,   M = 32 330-385 : 45-55,   M = 512 350-400 : 45-55     own, always
//   bfloat16  M = 8 350-480 : 180-240, M = 32 530-660 : 410-540, M = 512 460-590 : 810-840
//             equal at M = 64 to 96 for K up to 1536, at M = 32 for K = 4096
// Without instructions for products of bfloat16, torch has to convert as this kernel does; own, always.
inline bool linear_prefers_blas(DType dtype, int64_t m, int64_t k, bool bfloat16_dot) {
  return dtype == DType::kBFloat16 && bfloat16_dot && m > (k < 2048 ? 64 : 32);
}

}  // namespace flashdecpp::cpu
