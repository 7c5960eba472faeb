// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to 16 rows of x, on the matrix units, straight from memory.
//
// A lane loads 16 bytes of a row: eight neighbours along K. Taken as they come, four lanes' loads are the fragments of
// two 16 x 8 x 16 products whose k is permuted; x is loaded with the same permutation, so the sums are the same. So a
// weight goes from memory to the matrix unit without a conversion or a pass through shared memory, and arithmetic does
// not grow with the rows of x as on the CUDA cores.
//
// A block holds 16 * kTiles rows of the weight; its waves share K and add their sums in the end, in the order of the
// waves. kLoads * 2 * kTiles loads are in flight a lane: 64 KiB a block, 128 KiB a multiprocessor. The first of them
// are asked for before the kernel ahead has ended: weights do not depend on it.
#pragma once

#include "linear_arch_sm90.cuh"
#include "linear_epilogue.cuh"
#include "linear_prologue.cuh"

namespace flashdecpp {

template <int row_tiles, int tiles, int loads>
struct TensorGemv {
  static constexpr int kRowTiles = row_tiles;  // of 8 rows of x
  static constexpr int kTiles = tiles;         // of 16 rows of the weight
  static constexpr int kLoads = loads;         // steps of 32 along K that are in flight
  static constexpr int kWaves = 8, kThreads = kWaves * arch::kWaveSize;
  static constexpr int kMaxRows = row_tiles * arch::kTileN, kBlockN = 16 * tiles;
};

template <class T, class G, bool fused>
__global__ void __launch_bounds__(G::kThreads, 2) tensor_gemv_kernel(LinearParams p) {
  using namespace arch;
  constexpr int row_tiles = G::kRowTiles, tiles = G::kTiles, loads = G::kLoads;
  allow_next_kernel();

  const int row = lane() / 4, column = lane() % 4 * 8;  // in a tile and a step
  const int64_t first_n = blockIdx.x * int64_t{G::kBlockN};
  const int k = static_cast<int>(p.k);
  const T* const x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight[tiles][2];
#pragma unroll
  for (int i = 0; i < tiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = weight_row<fused>(p, first_n, i, half, row);
      weight[i][half] = static_cast<const T*>(p.weight) + n * p.weight_stride;
    }
  }

  TileC sums[tiles][row_tiles];
  float factors[row_tiles];
  const bool norm = fused && p.fusion.norm_weight;
  bool waited = false;
  int base = wave() * loads * 32;
  do {  // once at least: all waves wait
    uint4 w[loads][tiles][2];
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      const int at = base + u * 32 + column;
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          w[u][i][half] = at < k ? load_weight(weight[i][half] + at) : make_uint4(0, 0, 0, 0);
        }
      }
    }
    if (!waited) {
      wait_for_previous_kernel();
      if (norm) column_factors<T, G>(p, factors);
    }
    waited = true;
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      const int at = base + u * 32 + column;
#pragma unroll
      for (int j = 0; j < row_tiles; ++j) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (j * 8 + row < p.m && at < k) {
          v = *reinterpret_cast<const uint4*>(x + j * 8 * p.x_stride + at);
          if (norm) v = normalised<T>(p, v, factors[j], at);
        }
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          const uint4 &low = w[u][i][0], &high = w[u][i][1];
          mma(sums[i][j], TileA<T>{{low.x, high.x, low.y, high.y}}, TileB<T>{{v.x, v.y}});
          mma(sums[i][j], TileA<T>{{low.z, high.z, low.w, high.w}}, TileB<T>{{v.z, v.w}});
        }
      }
    }
    base += G::kWaves * loads * 32;
  } while (base < k);

  write_wave_sums<T, G, fused>(p, sums, first_n);
}

}  // namespace flashdecpp
