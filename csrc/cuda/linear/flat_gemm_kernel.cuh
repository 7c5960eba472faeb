// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to about a hundred rows of x, on the tensor cores.
//
// The weight is the A operand: its rows fill the long side of the 16 x kTileN x 16 MMA tile, so x, the B operand, is
// padded to a multiple of kTileN rows only. A CTA computes block_m x block_n outputs and walks along K
// (kFlatTiles in heuristics/linear.h), with asynchronous copies `stages` - 1 tiles ahead of the MMAs. If N yields too
// few CTAs, K is split: every split but the last writes a float32 partial to the workspace and raises a flag; the last
// adds the partials to its own in a fixed order. It waits only for CTAs with smaller indices, which start before it.
//
// Tile 8 x 32 x 128 to 128 x 128 x 64, 3 to 6 stages, 64 to 108 KiB of shared memory: two or three CTAs per SM of an
// H100, 64 to 120 KiB of weight in flight. Floor: the bytes of the weight over the memory bandwidth.
#pragma once

#include "cuda/linear/epilogue.cuh"
#include "heuristics/linear.h"

namespace flashdecpp {

struct SplitK {
  float* partials;  // [tiles, splits - 1, block_m, block_n]; null if there is one split
  uint64_t* ready;  // [tiles, splits - 1]: flags of the partials, reset to zero once they are added
  uint64_t nonce;   // value of a raised flag; unique to the launch, so stale workspace contents never match
  int32_t splits, k_tiles_per_split;
};

template <class T, int tile_index>
struct FlatGemm {
  static constexpr FlatTile kTile = kFlatTiles[tile_index];
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kBlockK = kTile.block_k;
  static constexpr int kFittingStages = kTile.stages_within(arch::kBlockSharedBytes);
  static constexpr int kStages = kFittingStages < arch::kMaxStages ? kFittingStages : arch::kMaxStages;
  static constexpr int kThreads = kTile.warps_m * kTile.warps_n * arch::kWarpSize;
  static constexpr int kStride = kBlockK + FlatTile::kPadding;  // elements per row in shared memory
  static constexpr int kStageElements = (kBlockM + kBlockN) * kStride;
  static constexpr int kSharedBytes = kStages * kTile.stage_bytes();
  static constexpr int kWarpM = kBlockM / kTile.warps_m, kWarpN = kBlockN / kTile.warps_n;
  static constexpr int kTilesM = kWarpM / arch::kTileN, kTilesN = kWarpN / 16;
  static constexpr int kOutStride = kBlockN + 4;  // floats per output row in shared memory
  static_assert(kBlockM * kOutStride * 4 <= kSharedBytes);

  // Issues the copies of `rows` rows of a K tile, starting at `source`; zero-fills beyond valid_rows and valid_k.
  template <int rows>
  static __device__ __forceinline__ void load_rows(T* shared, const T* source, int64_t stride, int64_t valid_rows,
                                                   int64_t valid_k) {
    constexpr int row_chunks = kBlockK / 8;  // 16-byte chunks per row
#pragma unroll
    for (int first = 0; first < rows * row_chunks; first += kThreads) {
      const int i = first + threadIdx.x;
      if (rows * row_chunks % kThreads != 0 && i >= rows * row_chunks) break;
      const int row = i / row_chunks, k = i % row_chunks * 8;
      arch::copy_async(shared + row * kStride + k, source + row * stride + k, row < valid_rows && k < valid_k, source);
    }
  }

  // Adds this warp's products over one K tile; `weight` and `x` are the warp's first rows of the stage.
  static __device__ __forceinline__ void multiply_tile(arch::TileC (&sums)[kTilesN][kTilesM], const T* weight,
                                                       const T* x) {
#pragma unroll
    for (int k = 0; k < kBlockK; k += 16) {
      arch::TileA<T> a[kTilesN];
      arch::TileB<T> b[kTilesM];
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) arch::load_a(a[i], weight + i * 16 * kStride + k, kStride);
#pragma unroll
      for (int j = 0; j < kTilesM; ++j) arch::load_b(b[j], x + j * arch::kTileN * kStride + k, kStride);
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesM; ++j) arch::mma(sums[i][j], a[i], b[j]);
      }
    }
  }
};

// Grid: (m tiles * n tiles, splits). The m tiles of one n tile are neighbors, so they share its weights in L2.
template <class T, int tile_index, bool fused = false>
__global__ void __launch_bounds__((FlatGemm<T, tile_index>::kThreads), 2)
    flat_gemm_kernel(LinearParams p, SplitK split) {
  using namespace arch;
  using G = FlatGemm<T, tile_index>;
  T* const shared = reinterpret_cast<T*>(dynamic_shared());

  const int m_tiles = static_cast<int>((p.m + G::kBlockM - 1) / G::kBlockM);
  const int64_t first_m = blockIdx.x % m_tiles * int64_t{G::kBlockM};
  const bool gated = is_gated<fused>(p);  // a tile then holds block_n / 2 gate rows and the matching up rows
  const int64_t first_n = blockIdx.x / m_tiles * int64_t{G::kBlockN} / (gated ? 2 : 1);
  const int k_tiles = static_cast<int>((p.k + G::kBlockK - 1) / G::kBlockK);
  const int first_tile = blockIdx.y * split.k_tiles_per_split;
  const int tiles = min(split.k_tiles_per_split, k_tiles - first_tile);

  const T* const weight = static_cast<const T*>(p.weight) + first_n * p.weight_stride;
  const T* const x = static_cast<const T*>(p.x) + first_m * p.x_stride;
  const auto load_stage = [&](int tile) {
    T* const stage = shared + tile % G::kStages * G::kStageElements;
    const int64_t k = (first_tile + tile) * int64_t{G::kBlockK};
    if (gated) {
      constexpr int half = G::kBlockN / 2;
      G::template load_rows<half>(stage, weight + k, p.weight_stride, p.n - first_n, p.k - k);
      G::template load_rows<half>(stage + half * G::kStride, weight + p.n * p.weight_stride + k, p.weight_stride,
                                  p.n - first_n, p.k - k);
    } else {
      G::template load_rows<G::kBlockN>(stage, weight + k, p.weight_stride, p.n - first_n, p.k - k);
    }
    G::template load_rows<G::kBlockM>(stage + G::kBlockN * G::kStride, x + k, p.x_stride, p.m - first_m, p.k - k);
  };

#pragma unroll
  for (int tile = 0; tile < G::kStages - 1; ++tile) {
    if (tile < tiles) load_stage(tile);
    copy_commit();
  }

  TileC sums[G::kTilesN][G::kTilesM];
  const int warp_n = warp() / G::kTile.warps_m * G::kWarpN, warp_m = warp() % G::kTile.warps_m * G::kWarpM;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_wait<G::kStages - 2>();
    __syncthreads();  // the tile has arrived, and no warp still reads the stage to be refilled
    if (tile + G::kStages - 1 < tiles) load_stage(tile + G::kStages - 1);
    copy_commit();
    const T* const stage = shared + tile % G::kStages * G::kStageElements;
    G::multiply_tile(sums, stage + warp_n * G::kStride, stage + (G::kBlockN + warp_m) * G::kStride);
  }
  copy_wait<0>();
  __syncthreads();

  // Transpose through shared memory so that stores are contiguous along N.
  float* const outputs = reinterpret_cast<float*>(dynamic_shared());  // [block_m][kOutStride]
#pragma unroll
  for (int i = 0; i < G::kTilesN; ++i) {
#pragma unroll
    for (int j = 0; j < G::kTilesM; ++j) {
#pragma unroll
      for (int v = 0; v < TileC::kValues; ++v) {
        const int n = warp_n + i * 16 + TileC::row(v), m = warp_m + j * kTileN + TileC::col(v);
        outputs[m * G::kOutStride + n] = sums[i][j].v[v];
      }
    }
  }
  __syncthreads();

  // Each thread holds vectors of eight outputs; their loads are in flight together.
  constexpr int row_vectors = G::kBlockN / 8;
  constexpr int vectors = (G::kBlockM * row_vectors + G::kThreads - 1) / G::kThreads;
  const int count = static_cast<int>(min(p.m - first_m, int64_t{G::kBlockM})) * row_vectors;
  float v[vectors][8];
#pragma unroll
  for (int j = 0; j < vectors; ++j) {
    const int i = j * G::kThreads + threadIdx.x;
    if (i < count) load_vector(v[j], outputs + i / row_vectors * G::kOutStride + i % row_vectors * 8);
  }
  if (split.partials) {
    constexpr int64_t partial_stride = G::kBlockM * G::kBlockN;
    const int num_partials = split.splits - 1;
    float* const partials = split.partials + blockIdx.x * (num_partials * partial_stride);
    uint64_t* const ready = split.ready + blockIdx.x * int64_t{num_partials};
    const int rank = static_cast<int>(blockIdx.y);
    if (rank < num_partials) {
#pragma unroll
      for (int j = 0; j < vectors; ++j) {
        const int i = j * G::kThreads + threadIdx.x;
        if (i < count) store_vector(partials + rank * partial_stride + i * 8, v[j]);
      }
      __syncthreads();
      if (threadIdx.x == 0) publish(ready + rank, split.nonce);
      return;
    }
    if (threadIdx.x < num_partials) {
      await(ready + threadIdx.x, split.nonce);
      ready[threadIdx.x] = 0;  // a CUDA graph replays this launch with the same nonce
    }
    __syncthreads();
    for (int s = 0; s < num_partials; ++s) {
#pragma unroll
      for (int j = 0; j < vectors; ++j) {
        const int i = j * G::kThreads + threadIdx.x;
        if (i >= count) continue;
        float partial[8];
        load_vector(partial, partials + s * partial_stride + i * 8);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[j][e] += partial[e];
      }
    }
  }
  if (fused && p.fusion.activates()) {  // output by output: different threads hold a gate and its up value
    if (split.partials) {
#pragma unroll
      for (int j = 0; j < vectors; ++j) {
        const int i = j * G::kThreads + threadIdx.x;
        if (i < count) store_vector(outputs + i / row_vectors * G::kOutStride + i % row_vectors * 8, v[j]);
      }
      __syncthreads();
    }
    const int columns = gated ? G::kBlockN / 2 : G::kBlockN;
#pragma unroll 1
    for (int i = threadIdx.x; i < count / row_vectors * columns; i += G::kThreads) {
      const int m = i / columns, column = i % columns;
      const float* const value = outputs + m * G::kOutStride + column;
      const float up = gated ? value[G::kBlockN / 2] : 0.f;
      if (first_n + column < p.n) write_output<T, fused>(p, first_m + m, first_n + column, *value, up);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < vectors; ++j) {
    const int i = j * G::kThreads + threadIdx.x;
    const int64_t n = first_n + i % row_vectors * 8;
    if (i < count && n < p.n) write_outputs<T, fused>(p, first_m + i / row_vectors, n, v[j]);
  }
}

}  // namespace flashdecpp
