// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to 16 rows of x, on the tensor cores (mma.sync), with weights
// loaded straight from global memory into fragments.
//
// A lane loads 16 bytes of a weight row, eight neighbors along K. As they are, the loads of four lanes are the A
// fragments of two m16n8k16 products whose k is permuted; x is loaded with the same permutation, so the sums are the
// same. Weights need no conversion and no pass through shared memory, and arithmetic does not grow with m as it does on
// the CUDA cores.
//
// Tile: 16 * kTiles rows of the weight per CTA of 8 warps, which split K and add their sums at the end, in the order of
// the warps. A lane keeps kLoads * 2 * kTiles loads in flight: 64 KiB per CTA, 128 KiB per SM. The first are issued
// before the preceding kernel has finished: weights do not depend on it. Shared memory: 8 warps * 8 or
// 16 rows of x * kBlockN sums, 4 to 16 KiB.
// Floor: the bytes of the weight over the memory bandwidth.
#pragma once

#include "cuda/linear/epilogue.cuh"
#include "cuda/nvidia/linear_arch.cuh"

namespace flashdecpp {

template <int row_tiles, int tiles, int loads>
struct MmaGemv {
  static constexpr int kRowTiles = row_tiles;  // 8 rows of x each
  static constexpr int kTiles = tiles;         // 16 rows of the weight each
  static constexpr int kLoads = loads;         // steps of 32 along K in flight
  static constexpr int kWarps = 8, kThreads = kWarps * arch::kWarpSize;
  static constexpr int kMaxRows = row_tiles * arch::kTileN, kBlockN = 16 * tiles;
};

template <class T, class G, bool fused>
__global__ void __launch_bounds__(G::kThreads, 2) mma_gemv_kernel(LinearParams p) {
  using namespace arch;
  constexpr int row_tiles = G::kRowTiles, tiles = G::kTiles, loads = G::kLoads;
  Timeline timeline(TimelineOf::kGemv);
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

  EpilogueOperands<T, G, fused> operands(p, first_n);
  TileC sums[tiles][row_tiles];
  bool waited = false;
  for (int base = warp() * loads * 32; base < k; base += G::kWarps * loads * 32) {
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
      timeline.mark();
      wait_for_previous_kernel();
      timeline.mark();
      operands.load_residual(p, first_n);
    }
    waited = true;
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      const int at = base + u * 32 + column;
#pragma unroll
      for (int j = 0; j < row_tiles; ++j) {
        const uint4 v = j * 8 + row < p.m && at < k ? *reinterpret_cast<const uint4*>(x + j * 8 * p.x_stride + at)
                                                    : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          const uint4 &low = w[u][i][0], &high = w[u][i][1];
          mma(sums[i][j], TileA<T>{{low.x, high.x, low.y, high.y}}, TileB<T>{{v.x, v.y}});
          mma(sums[i][j], TileA<T>{{low.z, high.z, low.w, high.w}}, TileB<T>{{v.z, v.w}});
        }
      }
    }
  }
  if (!waited) {  // a warp without columns of K
    wait_for_previous_kernel();
    operands.load_residual(p, first_n);
  }
  write_warp_sums<T, G, fused>(p, sums, first_n, operands);
}

}  // namespace flashdecpp
