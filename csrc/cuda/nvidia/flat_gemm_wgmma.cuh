// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to 128 rows of x on Hopper: tensor copies and wgmma.
//
// 64 rows of the weight are the long side of a product, x padded to 8, 16, ... 128 rows is its other operand. A block
// walks along K: one thread asks for boxes of 64 rows and 128 bytes, four warps multiply, two rings of shared memory
// between them, a deep one for the weight and a shallow one for x, which comes from L2. Where the rows of the weight
// are too few to occupy the machine, the blocks of a cluster share a tile along K and add their parts through
// distributed shared memory, in the order of K: no workspace, and the same bits every time. Rows that x does not have
// are not copied either: whatever lies there meets no sum but its own, which nobody reads.
//
// Floor: the bytes of the weight over the memory bandwidth. Two blocks fit into a SM, 64 to 96 KiB of
// weight in flight each, so that a block of the next linear has its ring full before this one has ended: the weight
// does not depend on the kernel ahead, and only x waits for it. The next kernel may start when a block has asked for
// nearly all of its weights: earlier, its loads would only take bandwidth from this one's.
#pragma once

#include "cuda/linear/epilogue.cuh"
#include "cuda/nvidia/linear_arch.cuh"

namespace flashdecpp {

template <int rows>
struct FlatGemmWgmma {
  static constexpr bool kAvailable = arch::kHasWgmma;
  static constexpr int kRows = rows;                 // of x, padded
  static constexpr int kBlockN = 64;                 // rows of the weight
  static constexpr int kBoxes = rows <= 64 ? 2 : 1;  // of 64 columns of K, a stage
  static constexpr int kStageK = 64 * kBoxes;
  static constexpr int kStagesX = rows == 64 ? 2 : 3;
  static constexpr int kBoxBytesW = kBlockN * 128, kBoxBytesX = rows * 128;
  static constexpr int kStageBytesW = kBoxes * kBoxBytesW, kStageBytesX = kBoxes * kBoxBytesX;
  static constexpr int kTotalBytes = 109 * 1024;  // with barriers and what the system takes, half a SM's
  static constexpr int kStagesW = (kTotalBytes - kStagesX * kStageBytesX) / kStageBytesW;
  static constexpr int kRingBytesW = kStagesW * kStageBytesW;
  static constexpr int kSharedBytes = kRingBytesW + kStagesX * kStageBytesX;
  static constexpr int kThreads = arch::kWarpgroup + arch::kWarpSize;  // consumers, then the producer's warp
  static constexpr int kSumStride = kBlockN + 4;  // of a row of sums in shared memory: no two lanes share a bank
  static_assert(kStagesW >= 2 && kStagesW <= arch::kWarpSize && rows * kSumStride * 4 <= kRingBytesW);
};

struct FlatLaunch {
  int32_t cluster;      // blocks that share a tile
  int32_t late_stages;  // left to ask for when the next kernel may start
};

struct FlatRingBarriers {
  arch::ConsumerBarrier full, empty;
};

template <class T, class R, bool fused>
__device__ __forceinline__ void flat_gemm_wgmma(const LinearParams& p, const CUtensorMap& weight_map,
                                                const CUtensorMap& x_map, FlatLaunch launch) {
  using namespace arch;
  const int cluster = launch.cluster;
  unsigned char* const ring_w = dynamic_shared();
  unsigned char* const ring_x = ring_w + R::kRingBytesW;
  __shared__ FlatRingBarriers bars_w[R::kStagesW], bars_x[R::kStagesX];

  const int rank = blockIdx.x % cluster;
  const bool gated = is_gated<fused>(p);  // half of a tile are gates, half what goes up with them
  const int n = blockIdx.x / cluster * R::kBlockN / (gated ? 2 : 1);
  const int all_steps = static_cast<int>((p.k + R::kStageK - 1) / R::kStageK);
  const int first = static_cast<int>(int64_t{all_steps} * rank / cluster);
  const int steps = static_cast<int>(int64_t{all_steps} * (rank + 1) / cluster) - first;

  const bool producer = threadIdx.x == kWarpgroup;
  const auto load_weight_stage = [&](int step) {
    const int stage = step % R::kStagesW;
    bars_w[stage].full.expect(R::kStageBytesW);
#pragma unroll
    for (int box = 0; box < R::kBoxes; ++box) {
      unsigned char* const to = ring_w + stage * R::kStageBytesW + box * R::kBoxBytesW;
      const int k = (first + step) * R::kStageK + box * 64;
      tma_load(to, weight_map, k, n, bars_w[stage].full, L2Hint::kEvictFirst);
      if (gated) {  // boxes of half as many rows
        tma_load(to + R::kBoxBytesW / 2, weight_map, k, static_cast<int>(p.n) + n, bars_w[stage].full,
                 L2Hint::kEvictFirst);
      }
    }
    if (step == max(steps - launch.late_stages, 0)) allow_next_kernel();
  };
  if (threadIdx.x >= kWarpgroup) {
    if (producer) {
      prefetch_map(weight_map);
      prefetch_map(x_map);
    }
    const int i = lane();  // every lane makes one barrier of a kind
    if (i < R::kStagesW) bars_w[i].full.init(), bars_w[i].empty.init();
    if (i < R::kStagesX) bars_x[i].full.init(), bars_x[i].empty.init();
    warp_sync();
    if (producer) {
      for (int step = 0; step < min(steps, R::kStagesW); ++step) load_weight_stage(step);
    }
  }
  __syncthreads();

  if (threadIdx.x >= kWarpgroup) {
    if (producer) {
      const auto load_x_stage = [&](int step) {
        const int stage = step % R::kStagesX;
        bars_x[stage].full.expect(R::kBoxes * static_cast<int>(p.m) * 128);  // of rows that there are
#pragma unroll
        for (int box = 0; box < R::kBoxes; ++box) {
          tma_load(ring_x + stage * R::kStageBytesX + box * R::kBoxBytesX, x_map,
                   (first + step) * R::kStageK + box * 64, 0, bars_x[stage].full, L2Hint::kLong);
        }
      };
      wait_for_previous_kernel();
      for (int step = 0; step < min(steps, R::kStagesX); ++step) load_x_stage(step);
      // A stage that has been multiplied is filled again: x's and the weight's at the same time.
      for (int done = 0; done < steps; ++done) {
        const int next_x = done + R::kStagesX, next_w = done + R::kStagesW;
        if (next_x >= steps && next_w >= steps) break;
        bars_x[done % R::kStagesX].empty.wait(done / R::kStagesX & 1);
        if (next_x < steps) load_x_stage(next_x);
        if (next_w < steps) {
          bars_w[done % R::kStagesW].empty.wait(done / R::kStagesW & 1);
          load_weight_stage(next_w);
        }
      }
    }
    warp_sync();
    if (cluster > 1) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  float sums[R::kRows / 2] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage_w = step % R::kStagesW, stage_x = step % R::kStagesX;
    bars_w[stage_w].full.wait(step / R::kStagesW & 1);
    bars_x[stage_x].full.wait(step / R::kStagesX & 1);
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < R::kBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply<T, R::kRows>(sums, smem_descriptor(ring_w + stage_w * R::kStageBytesW + box * R::kBoxBytesW, i),
                              smem_descriptor(ring_x + stage_x * R::kStageBytesX + box * R::kBoxBytesX, i));
      }
    }
    wgmma_commit_wait();
    if (threadIdx.x == 0) {
      bars_x[stage_x].empty.arrive();
      bars_w[stage_w].empty.arrive();
    }
  }
  wait_for_previous_kernel();
  warp_group_sync();

  // This block's part, where the weights were.
  float* const part = reinterpret_cast<float*>(ring_w);
#pragma unroll
  for (int j = 0; j < R::kRows / 8; ++j) {
#pragma unroll
    for (int e = 0; e < TileC::kValues; ++e) {
      part[(j * 8 + TileC::col(e)) * R::kSumStride + warp() * 16 + TileC::row(e)] = sums[j * 4 + e];
    }
  }
  if (cluster > 1) {
    cluster_sync();
  } else {
    warp_group_sync();
  }
  // Every CTA of the cluster adds and writes an equal part of the tile: output by output with a gate or an activation,
  // else eight neighbors at a time.
  if (fused && p.fusion.activates()) {
    const int columns = gated ? R::kBlockN / 2 : R::kBlockN;
    const int count = static_cast<int>(p.m) * columns;
#pragma unroll 1
    for (int i = count * rank / cluster + threadIdx.x; i < count * (rank + 1) / cluster; i += kWarpgroup) {
      const int m = i / columns, column = i % columns;
      const float* const mine = part + m * R::kSumStride + column;
      float value = 0.f, up = 0.f;
      for (int other = 0; other < cluster; ++other) {
        value += load_shared_cluster<float>(mine, other);
        if (gated) up += load_shared_cluster<float>(mine + R::kBlockN / 2, other);
      }
      if (n + column < p.n) write_output<T, fused>(p, m, n + column, value, up);
    }
  } else {
    const int vectors = static_cast<int>(p.m) * (R::kBlockN / 8);
    for (int i = vectors * rank / cluster + threadIdx.x; i < vectors * (rank + 1) / cluster; i += kWarpgroup) {
      const int m = i / (R::kBlockN / 8), column = i % (R::kBlockN / 8) * 8;
      const float* const mine = part + m * R::kSumStride + column;
      float v[8] = {};
      if (cluster == 1) {
        load_vector(v, mine);
      } else {
        for (int other = 0; other < cluster; ++other) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto four = load_shared_cluster<float4>(mine + half * 4, other);
            v[half * 4] += four.x;
            v[half * 4 + 1] += four.y;
            v[half * 4 + 2] += four.z;
            v[half * 4 + 3] += four.w;
          }
        }
      }
      if (n + column < p.n) write_outputs<T, fused>(p, m, n + column, v);
    }
  }
  if (cluster > 1) cluster_sync();  // until the others have read this block's part
}

// Grid: blocks of a cluster share a tile of 64 rows of the weight; p.m <= kRows. Launched on Hopper alone.
template <class T, class R, bool fused>
__global__ void __launch_bounds__(R::kThreads, 2)
    flat_gemm_wgmma_kernel(const __grid_constant__ LinearParams p, const __grid_constant__ CUtensorMap weight_map,
                           const __grid_constant__ CUtensorMap x_map, FlatLaunch launch) {
  if constexpr (R::kAvailable) {
    flat_gemm_wgmma<T, R, fused>(p, weight_map, x_map, launch);
  } else {
    __trap();
  }
}

}  // namespace flashdecpp
