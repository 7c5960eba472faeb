// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to 128 rows of x on Hopper: TMA and wgmma.
//
// The weight is the 64-row A operand of wgmma; x, padded to 8, 16, ... 128 rows, is B. A CTA walks along K: one
// producer thread loads boxes of 64 rows x 128 bytes, a consumer warpgroup multiplies, and two rings of shared memory
// lie between them, a deep one for the weight and a shallow one for x, which comes from L2. If N yields too few CTAs to
// fill the GPU, the CTAs of a cluster split a tile along K and add their partials through distributed shared memory, in
// the order of K: no workspace, and bitwise-repeatable. Rows beyond M are not copied; the stale shared memory reaches
// only accumulators that are never stored.
//
// Tile 64 rows of the weight x 128 of K (64 of K for 128 rows of x); 4 to 7 weight stages, 2 or 3 x stages, 96 to
// 108 KiB of shared memory. Floor: the bytes of the weight over the memory bandwidth. Two CTAs fit on an SM, each with
// 56 to 96 KiB of weight in flight, so a CTA of the next linear fills its weight ring before this one ends: the weight
// does not depend on the preceding kernel, only x waits for it. A CTA lets the next kernel start once it has requested
// nearly all of its weights; any earlier, the next kernel's loads would only compete with its own.
#pragma once

#include "cuda/linear/epilogue.cuh"
#include "cuda/nvidia/linear_arch.cuh"

namespace flashdecpp {

template <int rows>
struct FlatGemmWgmma {
  static constexpr bool kAvailable = arch::kHasWgmma;
  static constexpr int kRows = rows;                 // rows of x, padded
  static constexpr int kBlockN = 64;                 // rows of the weight
  static constexpr int kBoxes = rows <= 64 ? 2 : 1;  // boxes of 64 columns of K per stage
  static constexpr int kStageK = 64 * kBoxes;
  static constexpr int kStagesX = rows == 64 ? 2 : 3;
  static constexpr int kBoxBytesW = kBlockN * 128, kBoxBytesX = rows * 128;
  static constexpr int kStageBytesW = kBoxes * kBoxBytesW, kStageBytesX = kBoxes * kBoxBytesX;
  static constexpr int kTotalBytes = 109 * 1024;  // with barriers and the 1 KiB reserved per CTA, two CTAs fit on an SM
  static constexpr int kStagesW = (kTotalBytes - kStagesX * kStageBytesX) / kStageBytesW;
  static constexpr int kRingBytesW = kStagesW * kStageBytesW;
  static constexpr int kSharedBytes = kRingBytesW + kStagesX * kStageBytesX;
  static constexpr int kThreads = arch::kWarpgroup + arch::kWarpSize;  // the consumers, then the producer's warp
  static constexpr int kSumStride = kBlockN + 4;  // floats per row of sums in shared memory: no bank conflicts
  static_assert(kStagesW >= 2 && kStagesW <= arch::kWarpSize && rows * kSumStride * 4 <= kRingBytesW);
};

struct FlatLaunch {
  int32_t cluster;      // CTAs that split a tile along K
  int32_t late_stages;  // stages still to be requested when the next kernel may start
};

struct StageBarriers {
  arch::ConsumerBarrier full, empty;
};

template <class T, class G, bool fused>
__device__ __forceinline__ void flat_gemm_wgmma(const LinearParams& p, const CUtensorMap& weight_map,
                                                const CUtensorMap& x_map, FlatLaunch launch) {
  using namespace arch;
  const int cluster = launch.cluster;
  unsigned char* const ring_w = dynamic_shared();
  unsigned char* const ring_x = ring_w + G::kRingBytesW;
  __shared__ StageBarriers bars_w[G::kStagesW], bars_x[G::kStagesX];

  const int rank = blockIdx.x % cluster;
  const bool gated = is_gated<fused>(p);  // a tile then holds 32 gate rows and the 32 matching up rows
  const int n = blockIdx.x / cluster * G::kBlockN / (gated ? 2 : 1);
  const int all_steps = static_cast<int>((p.k + G::kStageK - 1) / G::kStageK);
  const int first = static_cast<int>(int64_t{all_steps} * rank / cluster);
  const int steps = static_cast<int>(int64_t{all_steps} * (rank + 1) / cluster) - first;

  const bool producer = threadIdx.x == kWarpgroup;
  const auto load_weight_stage = [&](int step) {
    const int stage = step % G::kStagesW;
    bars_w[stage].full.expect(G::kStageBytesW);
#pragma unroll
    for (int box = 0; box < G::kBoxes; ++box) {
      unsigned char* const to = ring_w + stage * G::kStageBytesW + box * G::kBoxBytesW;
      const int k = (first + step) * G::kStageK + box * 64;
      tma_load(to, weight_map, k, n, bars_w[stage].full, L2Hint::kEvictFirst);
      if (gated) {  // weight_map then has boxes of 32 rows
        tma_load(to + G::kBoxBytesW / 2, weight_map, k, static_cast<int>(p.n) + n, bars_w[stage].full,
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
    const int i = lane();  // each lane initializes one stage's barriers
    if (i < G::kStagesW) bars_w[i].full.init(), bars_w[i].empty.init();
    if (i < G::kStagesX) bars_x[i].full.init(), bars_x[i].empty.init();
    warp_sync();
    if (producer) {
      for (int step = 0; step < min(steps, G::kStagesW); ++step) load_weight_stage(step);
    }
  }
  __syncthreads();

  if (threadIdx.x >= kWarpgroup) {
    if (producer) {
      const auto load_x_stage = [&](int step) {
        const int stage = step % G::kStagesX;
        bars_x[stage].full.expect(G::kBoxes * static_cast<int>(p.m) * 128);  // x_map has boxes of p.m rows
#pragma unroll
        for (int box = 0; box < G::kBoxes; ++box) {
          tma_load(ring_x + stage * G::kStageBytesX + box * G::kBoxBytesX, x_map,
                   (first + step) * G::kStageK + box * 64, 0, bars_x[stage].full, L2Hint::kEvictLast);
        }
      };
      wait_for_previous_kernel();
      for (int step = 0; step < min(steps, G::kStagesX); ++step) load_x_stage(step);
      // Refill each stage of both rings as soon as the consumers have released it.
      for (int done = 0; done < steps; ++done) {
        const int next_x = done + G::kStagesX, next_w = done + G::kStagesW;
        if (next_x >= steps && next_w >= steps) break;
        bars_x[done % G::kStagesX].empty.wait(done / G::kStagesX & 1);
        if (next_x < steps) load_x_stage(next_x);
        if (next_w < steps) {
          bars_w[done % G::kStagesW].empty.wait(done / G::kStagesW & 1);
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

  float sums[G::kRows / 2] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage_w = step % G::kStagesW, stage_x = step % G::kStagesX;
    bars_w[stage_w].full.wait(step / G::kStagesW & 1);
    bars_x[stage_x].full.wait(step / G::kStagesX & 1);
    wgmma_fence();
#pragma unroll
    for (int box = 0; box < G::kBoxes; ++box) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma<T, G::kRows>(sums, smem_descriptor(ring_w + stage_w * G::kStageBytesW + box * G::kBoxBytesW, i),
                           smem_descriptor(ring_x + stage_x * G::kStageBytesX + box * G::kBoxBytesX, i));
      }
    }
    wgmma_commit_wait();
    if (threadIdx.x == 0) {
      bars_x[stage_x].empty.arrive();
      bars_w[stage_w].empty.arrive();
    }
  }
  wait_for_previous_kernel();
  warpgroup_sync();

  // This CTA's partial, in the memory of the weight ring.
  float* const partial = reinterpret_cast<float*>(ring_w);
#pragma unroll
  for (int j = 0; j < G::kRows / 8; ++j) {
#pragma unroll
    for (int e = 0; e < TileC::kValues; ++e) {
      partial[(j * 8 + TileC::col(e)) * G::kSumStride + warp() * 16 + TileC::row(e)] = sums[j * 4 + e];
    }
  }
  if (cluster > 1) {
    cluster_sync();
  } else {
    warpgroup_sync();
  }
  // Every CTA of the cluster reduces and writes its slice of the tile: one output per thread with a gate or an
  // activation, otherwise eight neighbors.
  if (fused && p.fusion.activates()) {
    const int columns = gated ? G::kBlockN / 2 : G::kBlockN;
    const int count = static_cast<int>(p.m) * columns;
#pragma unroll 1
    for (int i = count * rank / cluster + threadIdx.x; i < count * (rank + 1) / cluster; i += kWarpgroup) {
      const int m = i / columns, column = i % columns;
      const float* const mine = partial + m * G::kSumStride + column;
      float value = 0.f, up = 0.f;
      for (int other = 0; other < cluster; ++other) {
        value += load_shared_cluster<float>(mine, other);
        if (gated) up += load_shared_cluster<float>(mine + G::kBlockN / 2, other);
      }
      if (n + column < p.n) write_output<T, fused>(p, m, n + column, value, up);
    }
  } else {
    const int vectors = static_cast<int>(p.m) * (G::kBlockN / 8);
    for (int i = vectors * rank / cluster + threadIdx.x; i < vectors * (rank + 1) / cluster; i += kWarpgroup) {
      const int m = i / (G::kBlockN / 8), column = i % (G::kBlockN / 8) * 8;
      const float* const mine = partial + m * G::kSumStride + column;
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
  if (cluster > 1) cluster_sync();  // the other CTAs still read this one's partial
}

// Grid: one cluster per tile of 64 rows of the weight. Requires p.m <= kRows and an sm_90a device.
template <class T, class G, bool fused>
__global__ void __launch_bounds__(G::kThreads, 2)
    flat_gemm_wgmma_kernel(const __grid_constant__ LinearParams p, const __grid_constant__ CUtensorMap weight_map,
                           const __grid_constant__ CUtensorMap x_map, FlatLaunch launch) {
  if constexpr (G::kAvailable) {
    flat_gemm_wgmma<T, G, fused>(p, weight_map, x_map, launch);
  } else {
    __trap();
  }
}

}  // namespace flashdecpp
