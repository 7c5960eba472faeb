// How the linear kernels end: sums, bias, rounding, store.
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

// Adds what every wave of a block has of the same sums, in the order of the waves, then the bias; all threads call it.
template <class T, class G>
__device__ __forceinline__ void write_wave_sums(const LinearParams& p,
                                                const arch::TileC (&sums)[G::kTiles][G::kRowTiles], int64_t first_n) {
  __shared__ float parts[G::kWaves][G::kMaxRows][G::kBlockN];
#pragma unroll
  for (int i = 0; i < G::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < G::kRowTiles; ++j) {
#pragma unroll
      for (int e = 0; e < arch::TileC::kValues; ++e) {
        parts[arch::wave()][j * arch::kTileN + arch::TileC::col(e)][i * 16 + arch::TileC::row(e)] = sums[i][j].v[e];
      }
    }
  }
  __syncthreads();
  const T* const bias = static_cast<const T*>(p.bias);
  for (int i = threadIdx.x; i < p.m * G::kBlockN; i += G::kThreads) {
    const int m = i / G::kBlockN, column = i % G::kBlockN;
    const int64_t n = first_n + column;
    if (n >= p.n) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < G::kWaves; ++w) sum += parts[w][m][column];
    if (bias) sum += arch::to_float(bias[n]);
    static_cast<T*>(p.out)[m * p.n + n] = arch::from_float<T>(sum);
  }
}

}  // namespace flashdecpp
