// How the linear kernels end: sums across warps, bias, fusion, rounding, store. `fused`: p.fusion is read; otherwise
// the instantiation has no code for it.
#pragma once

#include "cuda/elementwise/activation.cuh"

namespace flashdecpp {

template <bool fused>
__device__ __forceinline__ bool is_gated(const LinearParams& p) {
  return fused && p.fusion.gates();
}

// The weight row that a row of a 16-row tile reads; `half` selects the tile's first or last eight rows. Without a gate,
// rows are in order; with one, a tile is eight gate rows and the eight up rows that belong to them. `first` is the
// CTA's first row among all weight rows. Out-of-range rows are clamped to the last row; their results are never stored.
template <bool fused>
__device__ __forceinline__ int64_t weight_row(const LinearParams& p, int64_t first, int tile, int half, int row) {
  if (is_gated<fused>(p)) return min(first / 2 + tile * 8 + row, p.n - 1) + half * p.n;
  return min(first + tile * 16 + half * 8 + row, p.n - 1);
}

// Ends one output from its product, and with a gate the product of its up row. Loops over this are not unrolled where
// an activation is computed: code that runs once per launch costs as much as it is long.
template <class T, bool fused>
__device__ __forceinline__ void write_output(const LinearParams& p, int64_t m, int64_t n, float value, float up = 0.f) {
  const T* const bias = static_cast<const T*>(p.bias);
  T* const out = static_cast<T*>(p.out) + m * p.n + n;
  if (bias) value += arch::to_float(bias[n]);
  if (fused && p.fusion.activates()) {
    value = activate(p.fusion.activation, value);
    if (p.fusion.gates()) value *= bias ? up + arch::to_float(bias[p.n + n]) : up;
  }
  if (fused && p.fusion.adds()) value += arch::to_float(*out);
  *out = arch::from_float<T>(value);
}

// Ends up to eight neighboring outputs of one row, for kNone and kResidual.
template <class T, bool fused>
__device__ __forceinline__ void write_outputs(const LinearParams& p, int64_t m, int64_t n, float (&v)[8]) {
  const T* const bias = static_cast<const T*>(p.bias);
  T* const out = static_cast<T*>(p.out) + m * p.n + n;
  const int count = static_cast<int>(min(p.n - n, int64_t{8}));
  if (bias) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] += e < count ? arch::to_float(bias[n + e]) : 0.f;
  }
  if (p.n % 8 == 0) {
    if (fused && p.fusion.adds()) {
      float residual[8];
      arch::load_vector(residual, out);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] += residual[e];
    }
    arch::store_vector(out, v);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e >= count) continue;
      if (fused && p.fusion.adds()) v[e] += arch::to_float(out[e]);
      out[e] = arch::from_float<T>(v[e]);
    }
  }
}

// Bias and residual of the outputs that a thread writes at the end, unless they are gated. Loaded early: at the end,
// with memory busy with the weights of other CTAs, the thread would wait for them.
template <class T, class G, bool fused>
struct EpilogueOperands {
  static constexpr int kCount = (G::kMaxRows * G::kBlockN + G::kThreads - 1) / G::kThreads;
  T bias[kCount], residual[kCount];

  static __device__ __forceinline__ int row(int i) { return (threadIdx.x + i * G::kThreads) / G::kBlockN; }
  static __device__ __forceinline__ int column(int i) { return (threadIdx.x + i * G::kThreads) % G::kBlockN; }
  static __device__ __forceinline__ bool exists(const LinearParams& p, int64_t first, int i) {
    return row(i) < p.m && first + column(i) < p.n && !is_gated<fused>(p);
  }

  // Loads the bias, which like a weight no preceding kernel writes. `first` is the CTA's first row, as in weight_row.
  __device__ __forceinline__ EpilogueOperands(const LinearParams& p, int64_t first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bias[i] = residual[i] = arch::from_float<T>(0.f);
      if (p.bias && exists(p, first, i)) bias[i] = static_cast<const T*>(p.bias)[first + column(i)];
    }
  }

  // Call after wait_for_previous_kernel(), which may have written the residual.
  __device__ __forceinline__ void load_residual(const LinearParams& p, int64_t first) {
    if constexpr (fused) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!p.fusion.adds() || !exists(p, first, i)) continue;
        residual[i] = static_cast<const T*>(p.out)[row(i) * p.n + first + column(i)];
      }
    }
  }

  // sum(m, column) is the product's output in the CTA's tile.
  template <class Sum>
  __device__ __forceinline__ void write(const LinearParams& p, int64_t first, Sum sum) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!exists(p, first, i)) continue;
      float value = sum(row(i), column(i)) + arch::to_float(bias[i]) + arch::to_float(residual[i]);
      if (fused && p.fusion.activates()) value = activate(p.fusion.activation, value);
      static_cast<T*>(p.out)[row(i) * p.n + first + column(i)] = arch::from_float<T>(value);
    }
  }
};

// Shared memory of a CTA that ends with write_warp_sums: the warps' sums, and 1 KiB that the hardware reserves per CTA.
template <class G>
inline constexpr int kWarpSumsBytes = G::kWarps * G::kMaxRows * (G::kBlockN + 1) * 4 + 1024;

// Adds the warps' partial sums of one tile in the order of the warps, then ends and stores its outputs. All threads of
// the CTA call it. `first` is the CTA's first row, as in weight_row.
template <class T, class G, bool fused>
__device__ __forceinline__ void write_warp_sums(const LinearParams& p,
                                                const arch::TileC (&sums)[G::kTiles][G::kRowTiles], int64_t first,
                                                const EpilogueOperands<T, G, fused>& operands) {
  __shared__ float partials[G::kWarps][G::kMaxRows][G::kBlockN];
#pragma unroll
  for (int i = 0; i < G::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < G::kRowTiles; ++j) {
#pragma unroll
      for (int e = 0; e < arch::TileC::kValues; ++e) {
        partials[arch::warp()][j * arch::kTileN + arch::TileC::col(e)][i * 16 + arch::TileC::row(e)] = sums[i][j].v[e];
      }
    }
  }
  __syncthreads();
  const auto sum = [&](int m, int column) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < G::kWarps; ++w) total += partials[w][m][column];
    return total;
  };
  if (is_gated<fused>(p)) {
    constexpr int columns = G::kBlockN / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.m * columns; i += G::kThreads) {
      const int m = i / columns, column = i % columns, gate = column / 8 * 16 + column % 8;
      const int64_t n = first / 2 + column;
      if (n < p.n) write_output<T, fused>(p, m, n, sum(m, gate), sum(m, gate + 8));
    }
    return;
  }
  operands.write(p, first, sum);
}

}  // namespace flashdecpp
