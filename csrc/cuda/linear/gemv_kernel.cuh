// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to 8 rows of x, on the CUDA cores.
//
// Tile: 4 rows of the weight per group of 1 to 8 warps that split K; 2 to 32 rows per CTA of 256 threads. A lane keeps
// 4 or 8 loads of 16 bytes in flight (16 to 32 KiB per CTA, 2 to 4 CTAs per SM), and no weight is read twice. x comes
// from L1, m / 4 bytes of it per byte of weight. Shared memory: 128 bytes of sums per warp at most.
// Floor: the bytes of the weight over the memory bandwidth. Rows, loads and warps are the fastest of those measured on
// an H100 over six shapes from [1536, 1536] to [22016, 4096].
#pragma once

#include "cuda/linear/epilogue.cuh"

namespace flashdecpp {

inline constexpr int kGemvThreads = 256;

// Rows of the weight per warp, loads in flight per row, and CTAs per SM, for m rows of x.
constexpr int kGemvRows = 4;
constexpr int gemv_loads(int m) { return m <= 2 ? 2 : 1; }
constexpr int gemv_residency(int m, bool fused) { return (m == 1 ? 4 : m <= 4 ? 3 : 2) - (fused && m <= 4 ? 1 : 0); }

template <class T, int m, bool fused = false>
__global__ void __launch_bounds__(kGemvThreads, gemv_residency(m, fused))
    gemv_kernel(LinearParams p, int warps_per_row) {
  using namespace arch;
  constexpr int rows = kGemvRows, loads = gemv_loads(m);
  constexpr int block_warps = kGemvThreads / kWarpSize;
  static_assert(m * rows <= kWarpSize);
  __shared__ float partials[block_warps][m * rows];

  const T* const x = static_cast<const T*>(p.x);
  const T* const weight = static_cast<const T*>(p.weight);
  const int rank = warp() % warps_per_row;  // among the warps that share rows
  const int64_t block_rows = block_warps / warps_per_row * rows;
  const int chunks = static_cast<int>(p.k / 8);  // 16 bytes each
  const int step = warps_per_row * kWarpSize;
  const bool gated = is_gated<fused>(p);
  const int64_t all_rows = gated ? 2 * p.n : p.n;

  // All warps of a CTA make the same number of passes, since each may have barriers.
  for (int64_t base = blockIdx.x * block_rows; base < all_rows; base += gridDim.x * block_rows) {
    const int64_t first_row = base + warp() / warps_per_row * rows;
    const T* row[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {  // gated: half of them gate rows, half their up rows
      const int64_t n =
          gated ? min(first_row / 2 + r % (rows / 2), p.n - 1) + r / (rows / 2) * p.n : min(first_row + r, p.n - 1);
      row[r] = weight + n * p.weight_stride;
    }

    float sum[m][rows] = {};
    for (int c = rank * kWarpSize + lane(); c < chunks; c += loads * step) {
      uint4 bits[loads][rows];
#pragma unroll
      for (int u = 0; u < loads; ++u) {
        const int chunk = c + u * step;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          bits[u][r] = chunk < chunks ? load_stream(row[r] + chunk * int64_t{8}) : make_uint4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int u = 0; u < loads; ++u) {
        const int chunk = c + u * step;
        if (chunk >= chunks) break;
        float w[rows][8];
#pragma unroll
        for (int r = 0; r < rows; ++r) unpack<T>(w[r], bits[u][r]);
#pragma unroll
        for (int i = 0; i < m; ++i) {
          float v[8];
          load_vector(v, x + i * p.x_stride + chunk * int64_t{8});
#pragma unroll
          for (int r = 0; r < rows; ++r) {
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[i][r] = fmaf(v[e], w[r][e], sum[i][r]);
          }
        }
      }
    }

    // Lane i * rows + r keeps the output of row i of x and row r of the weight.
    float mine = 0.f;
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const float total = warp_sum(sum[i][r]);
        if (lane() == i * rows + r) mine = total;
      }
    }
    if (warps_per_row > 1) {
      __syncthreads();
      if (lane() < m * rows) partials[warp()][lane()] = mine;
      __syncthreads();
      if (rank == 0 && lane() < m * rows) {
        for (int other = 1; other < warps_per_row; ++other) mine += partials[warp() + other][lane()];
      }
    }
    const int r = lane() % rows;
    if (gated) {
      const float up = shfl_xor(mine, rows / 2);
      const int64_t n = first_row / 2 + r;
      if (rank == 0 && lane() < m * rows && r < rows / 2 && n < p.n) {
        write_output<T, fused>(p, lane() / rows, n, mine, up);
      }
    } else if (rank == 0 && lane() < m * rows && first_row + r < p.n) {
      write_output<T, fused>(p, lane() / rows, first_row + r, mine);
    }
  }
}

}  // namespace flashdecpp
