// How the linear kernels end: sums, bias, gate or residual, rounding, store. `fused`: p.fusion is looked at.
#pragma once

#include "cuda/elementwise/activation.cuh"

namespace flashdecpp {

template <bool fused>
__device__ __forceinline__ bool is_gated(const LinearParams& p) {
  return fused && p.fusion.gated;
}

// The row of the weight that one row of a tile of 16 stands for, `half` saying which eight: rows of the weight in
// order, or eight gates and the eight that go up with them. `first` is the block's first row of all. Rows that there
// are not are another's: nobody reads what becomes of them.
template <bool fused>
__device__ __forceinline__ int64_t weight_row(const LinearParams& p, int64_t first, int tile, int half, int row) {
  if (is_gated<fused>(p)) return min(first / 2 + tile * 8 + row, p.n - 1) + half * p.n;
  return min(first + tile * 16 + half * 8 + row, p.n - 1);
}

// One output: what the product came to, and with a gate what goes up with it; bias, what it is added to; rounded. A
// gate is computed in loops that are not unrolled: instructions that run once cost as much as they are long.
template <class T, bool fused>
__device__ __forceinline__ void write_output(const LinearParams& p, int64_t m, int64_t n, float value, float up = 0.f) {
  const T* const bias = static_cast<const T*>(p.bias);
  T* const out = static_cast<T*>(p.out) + m * p.n + n;
  if (bias) value += arch::to_float(bias[n]);
  if (is_gated<fused>(p)) {
    if (bias) up += arch::to_float(bias[p.n + n]);
    value = activate(p.fusion.activation, value) * up;
  }
  if (fused && p.fusion.add) value += arch::to_float(*out);
  *out = arch::from_float<T>(value);
}

// The same of eight neighbors of one output row, those that exist.
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
    if (fused && p.fusion.add) {
      float before[8];
      arch::load_vector(before, out);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] += before[e];
    }
    arch::store_vector(out, v);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e >= count) continue;
      if (fused && p.fusion.add) v[e] += arch::to_float(out[e]);
      out[e] = arch::from_float<T>(v[e]);
    }
  }
}

// The outputs that a thread of a block writes in the end, where there is no gate, and what is added to them. That is
// asked for early: in the end, while memory is busy with the weights of other blocks, it would be waited for.
template <class T, class G, bool fused>
struct Addends {
  static constexpr int kCount = (G::kMaxRows * G::kBlockN + G::kThreads - 1) / G::kThreads;
  T bias[kCount], before[kCount];

  static __device__ __forceinline__ int row(int i) { return (threadIdx.x + i * G::kThreads) / G::kBlockN; }
  static __device__ __forceinline__ int column(int i) { return (threadIdx.x + i * G::kThreads) % G::kBlockN; }
  static __device__ __forceinline__ bool exists(const LinearParams& p, int64_t first, int i) {
    return row(i) < p.m && first + column(i) < p.n && !is_gated<fused>(p);
  }

  // `first` is the block's first row, as for weight_row. Bias depends on no kernel.
  __device__ __forceinline__ Addends(const LinearParams& p, int64_t first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bias[i] = before[i] = arch::from_float<T>(0.f);
      if (p.bias && exists(p, first, i)) bias[i] = static_cast<const T*>(p.bias)[first + column(i)];
    }
  }

  __device__ __forceinline__ void load_before(const LinearParams& p, int64_t first) {
    if constexpr (fused) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!p.fusion.add || !exists(p, first, i)) continue;
        before[i] = static_cast<const T*>(p.out)[row(i) * p.n + first + column(i)];
      }
    }
  }

  // total(m, column) of the block.
  template <class Total>
  __device__ __forceinline__ void write(const LinearParams& p, int64_t first, Total total) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!exists(p, first, i)) continue;
      const float value = total(row(i), column(i)) + arch::to_float(bias[i]) + arch::to_float(before[i]);
      static_cast<T*>(p.out)[row(i) * p.n + first + column(i)] = arch::from_float<T>(value);
    }
  }
};

// Shared memory of a block whose warps add their sums, beside what its launch names, and what the system takes.
template <class G>
inline constexpr int kWarpSumsBytes = G::kWarps * G::kMaxRows * (G::kBlockN + 1) * 4 + 1024;

struct NoFactor {
  __device__ __forceinline__ float operator()(int) const { return 1.f; }
};

// Adds what every warp of a block has of the same sums, in the order of the warps, then ends the outputs; all threads
// call it. `first` is the block's first row, as for weight_row. factor(m), of a row of x, is called behind a barrier.
template <class T, class G, bool fused, class Factor = NoFactor>
__device__ __forceinline__ void write_warp_sums(const LinearParams& p,
                                                const arch::TileC (&sums)[G::kTiles][G::kRowTiles], int64_t first,
                                                const Addends<T, G, fused>& addends, Factor factor = {}) {
  __shared__ float parts[G::kWarps][G::kMaxRows][G::kBlockN];
#pragma unroll
  for (int i = 0; i < G::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < G::kRowTiles; ++j) {
#pragma unroll
      for (int e = 0; e < arch::TileC::kValues; ++e) {
        parts[arch::warp()][j * arch::kTileN + arch::TileC::col(e)][i * 16 + arch::TileC::row(e)] = sums[i][j].v[e];
      }
    }
  }
  __syncthreads();
  const auto total = [&](int m, int column) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < G::kWarps; ++w) sum += parts[w][m][column];
    return std::is_same_v<Factor, NoFactor> ? sum : sum * factor(m);
  };
  if (is_gated<fused>(p)) {
    constexpr int columns = G::kBlockN / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.m * columns; i += G::kThreads) {
      const int m = i / columns, column = i % columns, place = column / 8 * 16 + column % 8;
      const int64_t n = first / 2 + column;
      if (n < p.n) write_output<T, fused>(p, m, n, total(m, place), total(m, place + 8));
    }
    return;
  }
  addends.write(p, first, total);
}

}  // namespace flashdecpp
