// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for a few rows of x, on the CUDA cores.
//
// Floor: the bytes of the weight over the memory bandwidth. A few warps share 4 rows of the weight along K; a lane
// keeps rows * loads 16-byte loads in flight (64 or 128 bytes: 16 to 32 KiB a block of 256 threads, two to four blocks
// a SM), and no weight is read twice. x comes from L1: each 16 bytes of weight cost m / rows times 16 bytes
// of it. No shared memory but the sums that the warps exchange. Rows, loads and warps are the fastest of those measured
// on an H100 over six shapes from [1536, 1536] to [22016, 4096].
#pragma once

#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/prologue.cuh"

namespace flashdecpp {

inline constexpr int kGemvThreads = 256;

// Rows of the weight a warp holds, loads in flight a row, and blocks a SM, by rows of x.
constexpr int kGemvRows = 4;
constexpr int gemv_loads(int m) { return m <= 2 ? 2 : 1; }
constexpr int gemv_residency(int m, bool fused) { return (m == 1 ? 4 : m <= 4 ? 3 : 2) - (fused && m <= 4 ? 1 : 0); }

// p.m == m. warps_per_row divides the warps of a block.
template <class T, int m, bool fused = false>
__global__ void __launch_bounds__(kGemvThreads, gemv_residency(m, fused))
    gemv_kernel(LinearParams p, int warps_per_row) {
  using namespace arch;
  constexpr int rows = kGemvRows, loads = gemv_loads(m);
  constexpr int block_warps = kGemvThreads / kWarpSize;
  static_assert(m * rows <= kWarpSize);
  __shared__ float parts[block_warps][m * rows];

  const T* const x = static_cast<const T*>(p.x);
  const T* const weight = static_cast<const T*>(p.weight);
  const int part = warp() % warps_per_row;
  const int64_t block_rows = block_warps / warps_per_row * rows;
  const int chunks = static_cast<int>(p.k / 8);  // of 16 bytes
  const int step = warps_per_row * kWarpSize;
  const bool gated = is_gated<fused>(p), norm = fused && p.fusion.norm_weight;
  const int64_t all_rows = gated ? 2 * p.n : p.n;

  float factors[m];
  if (norm) {
#pragma unroll
    for (int i = 0; i < m; ++i) {
      float sum = 0.f;
      for (int c = threadIdx.x; c < chunks; c += kGemvThreads) {
        float v[8];
        load_vector(v, x + i * p.x_stride + c * int64_t{8});
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(v[e], v[e], sum);
      }
      sum = warp_sum(sum);
      if (lane() == 0) parts[warp()][i] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < m; ++i) {
      float sum = 0.f;
      for (int w = 0; w < block_warps; ++w) sum += parts[w][i];
      factors[i] = norm_factor(p, sum);
    }
  }

  // Every warp of a block goes round equally often: the block may meet at barriers.
  for (int64_t base = blockIdx.x * block_rows; base < all_rows; base += gridDim.x * block_rows) {
    const int64_t first_row = base + warp() / warps_per_row * rows;
    const T* row[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {  // gated: half of them gates, half what goes up with them
      const int64_t n =
          gated ? min(first_row / 2 + r % (rows / 2), p.n - 1) + r / (rows / 2) * p.n : min(first_row + r, p.n - 1);
      row[r] = weight + n * p.weight_stride;
    }

    float sum[m][rows] = {};
    for (int c = part * kWarpSize + lane(); c < chunks; c += loads * step) {
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
          if (norm) normalize<T>(p, v, factors[i], chunk * int64_t{8});
#pragma unroll
          for (int r = 0; r < rows; ++r) {
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[i][r] = fmaf(v[e], w[r][e], sum[i][r]);
          }
        }
      }
    }

    // Lane i * rows + r keeps the sum of row i of x and row r of the weight.
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
      if (lane() < m * rows) parts[warp()][lane()] = mine;
      __syncthreads();
      if (part == 0 && lane() < m * rows) {
        for (int other = 1; other < warps_per_row; ++other) mine += parts[warp() + other][lane()];
      }
    }
    const int r = lane() % rows;
    if (gated) {
      const float up = shfl_xor(mine, rows / 2);
      const int64_t n = first_row / 2 + r;
      if (part == 0 && lane() < m * rows && r < rows / 2 && n < p.n) {
        write_output<T, fused>(p, lane() / rows, n, mine, up);
      }
    } else if (part == 0 && lane() < m * rows && first_row + r < p.n) {
      write_output<T, fused>(p, lane() / rows, first_row + r, mine);
    }
  }
}

}  // namespace flashdecpp
