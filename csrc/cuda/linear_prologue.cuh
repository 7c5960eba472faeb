// RMSNorm on the way into the linear kernels that take x from memory themselves: every block finds the rows' factors
// while its first weights are under way, and normalises x again each time it reads it, to the same bits as rms_norm
// writes (but for the order in which a row's squares are added).
#pragma once

#include "numeric.cuh"

namespace flashdecpp {

__device__ __forceinline__ float norm_factor(const LinearParams& p, float squares) {
  return rsqrtf(squares / p.k + p.fusion.norm_eps);
}

// values[i], of column k + i, times its row's factor and the norm's weight, rounded as x is.
template <class T, int n>
__device__ __forceinline__ void normalise(const LinearParams& p, float (&values)[n], float factor, int64_t k) {
  float weight[n];
  if (p.fusion.norm_dtype == DType::kFloat32) {
    arch::load_vector(weight, static_cast<const float*>(p.fusion.norm_weight) + k);
  } else {
    arch::load_vector(weight, static_cast<const T*>(p.fusion.norm_weight) + k);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = arch::to_float(arch::from_float<T>(values[i] * factor * weight[i]));
}

// The same of numbers as they lie in memory, 8 or 16 bytes.
template <class T, class W>
__device__ __forceinline__ W normalised(const LinearParams& p, const W& bits, float factor, int64_t k) {
  float values[sizeof(W) / 2];
  arch::unpack<T>(values, bits);
  normalise<T>(p, values, factor, k);
  return arch::pack<T, W>(values);
}

// The factors of rows lane / 4, and 8 further on, of x: the columns of a right factor that four neighbours hold. All
// threads call it. A row's squares are shared out among the waves, and within a wave among the lanes that the rows
// leave over.
template <class T, class G>
__device__ __forceinline__ void column_factors(const LinearParams& p, float (&factors)[G::kRowTiles]) {
  using namespace arch;
  __shared__ float squares[G::kWaves][G::kMaxRows];
  const int rows_shift = p.m <= 1 ? 0 : p.m <= 2 ? 1 : p.m <= 4 ? 2 : 3;
  const int group = lane() / 4, row = group & ((1 << rows_shift) - 1), part = group >> rows_shift;
  const int parts = 8 >> rows_shift, k = static_cast<int>(p.k), step = G::kWaves * parts * 32;
#pragma unroll
  for (int j = 0; j < G::kRowTiles; ++j) {
    const T* const x = static_cast<const T*>(p.x) + min(int64_t{j * 8 + row}, p.m - 1) * p.x_stride;
    float sum = 0.f;
#pragma unroll 4
    for (int at = (wave() * parts + part) * 32 + lane() % 4 * 8; at < k; at += step) {
      float v[8];
      load_vector(v, x + at);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum = fmaf(v[e], v[e], sum);
    }
#pragma unroll
    for (int mask = 1; mask < kWaveSize; mask *= 2) {
      const float other = exchange_xor(sum, mask);
      if (mask < 4 || mask >= 4 << rows_shift) sum += other;
    }
    if (lane() % 4 == 0 && part == 0) squares[wave()][j * 8 + row] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < G::kRowTiles; ++j) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < G::kWaves; ++w) sum += squares[w][min(j * 8 + group, static_cast<int>(p.m) - 1)];
    factors[j] = norm_factor(p, sum);
  }
}

}  // namespace flashdecpp
