// RMSNorm on the way into the GEMVs, which take x from memory themselves: every block does it again.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

__device__ __forceinline__ float norm_factor(const LinearParams& p, float squares) {
  return rsqrtf(squares / p.k + p.fusion.norm_eps);
}

// values[i], of column k + i, times its row's factor and the norm's weight, rounded as x is: what rms_norm writes.
template <class T, int n>
__device__ __forceinline__ void normalize(const LinearParams& p, float (&values)[n], float factor, int64_t k) {
  float weight[n];
  if (p.fusion.norm_dtype == DType::kFloat32) {
    arch::load_vector(weight, static_cast<const float*>(p.fusion.norm_weight) + k);
  } else {
    arch::load_vector(weight, static_cast<const T*>(p.fusion.norm_weight) + k);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = arch::to_float(arch::from_float<T>(values[i] * factor * weight[i]));
}

}  // namespace flashdecpp
