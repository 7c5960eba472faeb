// How the flat GEMMs end: bias, rounding, store.
#pragma once

#include "numeric.cuh"

namespace flashdecpp {

// Adds the bias, rounds and writes eight neighbours of one output row, those that exist.
template <class T>
__device__ __forceinline__ void write_outputs(const LinearParams& p, int64_t m, int64_t n, float (&v)[8]) {
  const T* const bias = static_cast<const T*>(p.bias);
  T* const out = static_cast<T*>(p.out) + m * p.n + n;
  const int count = static_cast<int>(min(p.n - n, int64_t{8}));
  if (bias) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] += e < count ? arch::to_float(bias[n + e]) : 0.f;
  }
  if (p.n % 8 == 0) {
    arch::store_vector(out, v);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) out[e] = arch::from_float<T>(v[e]);
    }
  }
}

}  // namespace flashdecpp
