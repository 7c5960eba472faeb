// Decode attention, shapes: a CTA and its shared memory, a work tile's query rows, and the keys that they see.
#pragma once

#include "cuda/arch.h"
#include "cuda/attention/softmax.cuh"
#include "heuristics/attention.h"
#include "params.h"

namespace flashdecpp {

using arch::kTilesOf16;
using arch::TileA;
using arch::TileB;
using arch::TileC;

struct AttentionLaunch {
  AttentionParams p;
  // Clusters that share a work tile leave their partials in slots. A slot is ready once its flag equals the nonce,
  // which no other launch uses, so the previous contents of the memory do not matter.
  float* partial_out;            // [slots, slot_rows, head_dim]
  SoftmaxState* partial_states;  // [slots, slot_rows]
  uint64_t* ready;               // [slots]
  uint64_t nonce;
  int32_t cluster_size_log2;  // CTAs per cluster
  int32_t min_kv_tiles_log2;  // KV tiles per cluster of a split work tile, at least
  // The split is uniform unless `streams` is not 0 and the sequences differ in length or hold fewer than
  // min_uniform_keys keys in all; then it is stream-K.
  int32_t uniform_splits;  // clusters per work tile, at most
  float min_uniform_keys;
  uint32_t streams, max_streams;  // number that fills the device; upper limit
  // A kernel spends its first microseconds fetching instructions, and a division is 30 of them. So row / group is
  // row * group_reciprocal >> 16, which is exact for rows below 256.
  int32_t group, group_reciprocal;  // query heads per KV head
  int32_t query_tiles, slot_rows;   // query tiles per KV head; rows of each, and so of a slot

  void set_query_tiles(int tile_rows) {
    group = p.group();
    group_reciprocal = ((1 << 16) + group - 1) / group;
    query_tiles = (rows() + tile_rows - 1) / tile_rows;
    slot_rows = query_tiles > 1 ? tile_rows : rows();
  }
  __host__ __device__ int rows() const { return p.q_len * group; }
  __host__ __device__ int work_tiles_per_sequence() const { return p.kv_heads * query_tiles; }
};

// The shape of a CTA, chosen by measurement.
template <int kWarps_, int kStages_, int kCtasPerSm_, int kScratchRows_>
struct CtaShape {
  static constexpr int kWarps = kWarps_, kStages = kStages_;
  static constexpr int kScratchRows = kScratchRows_;  // rows that the warps combine at a time
  static constexpr int kCtasPerSm = kCtasPerSm_;      // resident at a time
};

// Shapes of one configuration: queries and products in T, a cache of KV, head_dim up to kDims.
template <class T_, class KV_, int kDims_, class Shape_>
struct AttentionTile {
  using T = T_;
  using KV = KV_;
  using Shape = Shape_;
  static constexpr int kDims = kDims_, kRows = 16;
  static constexpr bool kWiden = sizeof(KV) != sizeof(T);  // float8
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * arch::kWarpSize, kCtasPerSm = Shape::kCtasPerSm;
  static constexpr int kStages = Shape::kStages;
  static constexpr int kColumnTiles = kDims / arch::kTileN;
  static constexpr bool kQueryInRegisters = kDims <= arch::AttentionTuning::kQueryColumns;
  static constexpr int kAhead = arch::AttentionTuning::kAhead, kInterleave = arch::AttentionTuning::interleave(kDims);
  static_assert(kAhead % kInterleave == 0);
  static constexpr int kQStride = kDims + 8;
  static constexpr int kScratchRows = Shape::kScratchRows, kScratchStride = kDims + 8;

  // The cache column of value i in column tile n of O.
  static __device__ __forceinline__ int column(int n, int i) {
    if constexpr (kInterleave > 1) {
      return arch::interleaved_column<kInterleave>(n, TileC::col(i));
    } else if constexpr (kWiden) {
      return n / kTilesOf16 * 16 + arch::widened_column(n % kTilesOf16, TileC::col(i));
    } else {
      return n * arch::kTileN + TileC::col(i);
    }
  }
};

// Dynamic shared memory of a CTA: per warp its stages, the queries of a work tile, and scratch to combine in.
template <class Tile, class Stages>
struct SharedMemory {
  static constexpr int kStagesBytes = Tile::kStages * Stages::kStageBytes;
  static constexpr int kQBytes = Tile::kRows * Tile::kQStride * 2;
  static constexpr int kScratchBytes = Tile::kScratchRows * Tile::kScratchStride * 4;
  static constexpr int kBytes = Tile::kWarps * (kStagesBytes + kQBytes + kScratchBytes);
  static_assert(kScratchBytes >= 16 * kKvTile * 2);

  unsigned char* data;

  __device__ unsigned char* stages(int warp) const { return data + warp * kStagesBytes; }
  __device__ typename Tile::T* q(int warp) const {
    return reinterpret_cast<typename Tile::T*>(data + Tile::kWarps * kStagesBytes + warp * kQBytes);
  }
  __device__ float* scratch(int warp) const {
    return reinterpret_cast<float*>(data + Tile::kWarps * (kStagesBytes + kQBytes) + warp * kScratchBytes);
  }
};

// The keys of one sequence that some row sees, and the KV tiles that hold them.
struct Sequence {
  int length;                   // keys, including the new tokens
  int key_begin;                // first key that any row sees
  int first_kv_tile, kv_tiles;  // at least one tile even if there is no key, so that the outputs are written

  Sequence() = default;
  __device__ Sequence(const AttentionParams& p, int loaded_length) {
    const int64_t capacity = p.num_blocks > 0 ? p.capacity() : 0;
    length = static_cast<int>(min(static_cast<int64_t>(max(loaded_length, 0)), capacity));
    key_begin = window_begin(p, max(length - p.q_len, 0));
    first_kv_tile = key_begin / kKvTile;
    kv_tiles = max((length + kKvTile - 1) / kKvTile - first_kv_tile, 1);
  }

  static __device__ __forceinline__ int load_length(const AttentionParams& p, int batch) {
    return arch::load_fresh(p.seq_lens + batch);
  }
  static __device__ __forceinline__ Sequence load(const AttentionParams& p, int batch) {
    return {p, load_length(p, batch)};
  }

  __device__ __forceinline__ Sequence shfl(int lane) const {
    Sequence s;
    s.length = arch::uniform(arch::shfl(length, lane));
    s.key_begin = arch::uniform(arch::shfl(key_begin, lane));
    s.first_kv_tile = arch::uniform(arch::shfl(first_kv_tile, lane));
    s.kv_tiles = arch::uniform(arch::shfl(kv_tiles, lane));
    return s;
  }

  // The first key that a row at `position` sees.
  static __device__ __forceinline__ int window_begin(const AttentionParams& p, int position) {
    return p.window > 0 ? max(position - p.window + 1, 0) : 0;
  }
};

// The rows of a work tile: up to kRows of the q_len * group query rows that share a KV head, token by token.
struct QueryTile {
  int batch, kv_head, begin, count, length;

  __device__ __forceinline__ int token(const AttentionLaunch& launch, int row) const {
    return (begin + row) * launch.group_reciprocal >> 16;
  }
  __device__ __forceinline__ int head(const AttentionLaunch& launch, int row) const {
    const int group = launch.group;
    return kv_head * group + begin + row - token(launch, row) * group;
  }
  __device__ __forceinline__ int position(const AttentionLaunch& launch, int row) const {
    return length - launch.p.q_len + token(launch, row);
  }
  __device__ __forceinline__ float phi(const AttentionLaunch& launch, int row) const {
    const AttentionParams& p = launch.p;
    return p.phi ? p.phi[batch * p.phi_batch_stride + head(launch, row)] : 0.f;
  }
};

}  // namespace flashdecpp
