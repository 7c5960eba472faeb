// Decode attention, what a block is: the shapes of its tiles, its rows, and the keys that they see.
#pragma once

#include "cuda/attention/softmax.cuh"
#include "cuda/numeric.cuh"
#include "heuristics/attention.h"
#include "params.h"

namespace flashdecpp {

using arch::kTilesOf16;
using arch::TileA;
using arch::TileB;
using arch::TileC;

struct AttentionLaunch {
  AttentionParams p;
  // Of a unit that several teams share, each leaves its part in a slot. A slot is ready once its flag is the nonce: a
  // number that no other launch uses, so that what the memory held before does not matter.
  float* partial_out;            // [slots, slot_rows, head_dim]
  SoftmaxState* partial_states;  // [slots, slot_rows]
  uint64_t* ready;               // [slots]
  uint64_t nonce;
  int32_t cluster_size_log2;  // blocks of a team
  int32_t min_kv_tiles_log2;  // groups of a unit that are worth a team
  // The work is cut by unit, up to so many teams each; or, if `streams` is not 0 and the sequences are of different
  // lengths or hold fewer keys than min_uniform_tiles, by line.
  int32_t uniform_splits;
  float min_uniform_tiles;
  uint32_t streams, max_streams;
  // A kernel's first microseconds go into fetching its instructions: a division is 30 of them. row / group is
  // row * group_reciprocal >> 16, exactly for the 256 rows that there may be.
  int32_t group, group_reciprocal;
  int32_t query_tiles, slot_rows;  // units of a KV head; rows of each, and so of a slot

  void set_query_tiles(int tile_rows) {
    group = p.group();
    group_reciprocal = ((1 << 16) + group - 1) / group;
    query_tiles = (rows() + tile_rows - 1) / tile_rows;
    slot_rows = query_tiles > 1 ? tile_rows : rows();
  }
  __host__ __device__ int rows() const { return p.q_len * group; }
  __host__ __device__ int work_tiles_per_sequence() const { return p.kv_heads * query_tiles; }
};

// How blocks are cut: chosen by measurement.
template <int kWarps_, int kStages_, int kBlocks_, int kMergeRows_>
struct CtaShape {
  static constexpr int kWarps = kWarps_, kStages = kStages_;
  static constexpr int kMergeRows = kMergeRows_;  // rows that the warps merge at a time
  static constexpr int kCtasPerSm = kBlocks_;     // at once on a SM
};

// Shapes of one configuration. T computes, the cache holds KV; head_dim up to kDims.
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
  static constexpr int kAhead = arch::AttentionTuning::kAhead, kRun = arch::AttentionTuning::run(kDims);
  static_assert(kAhead % kRun == 0);
  static constexpr int kQStride = kDims + 8;
  static constexpr int kMergeRows = Shape::kMergeRows, kScratchStride = kDims + 8;

  // The column of the cache that value i of column tile n stands for.
  static __device__ __forceinline__ int column(int n, int i) {
    if constexpr (kRun > 1) {
      return arch::run_column<kRun>(n, TileC::col(i));
    } else if constexpr (kWiden) {
      return n / kTilesOf16 * 16 + arch::widened_column(n % kTilesOf16, TileC::col(i));
    } else {
      return n * arch::kTileN + TileC::col(i);
    }
  }
};

// The shared memory of a block: of every warp the ring, the queries of a unit, and room to merge.
template <class Tile, class Stages>
struct SharedMemory {
  static constexpr int kStagesBytes = Tile::kStages * Stages::kStageBytes;
  static constexpr int kQBytes = Tile::kRows * Tile::kQStride * 2;
  static constexpr int kScratchBytes = Tile::kMergeRows * Tile::kScratchStride * 4;
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

// The keys of one sequence that some row sees, and the groups that hold them.
struct Sequence {
  int length;                   // keys, new tokens included
  int key_begin;                // the first that a row sees
  int first_kv_tile, kv_tiles;  // at least one group, also where there is no key: a block must write the outputs

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

  __device__ __forceinline__ Sequence shfl(int source) const {
    Sequence s;
    s.length = arch::uniform(arch::shfl(length, source));
    s.key_begin = arch::uniform(arch::shfl(key_begin, source));
    s.first_kv_tile = arch::uniform(arch::shfl(first_kv_tile, source));
    s.kv_tiles = arch::uniform(arch::shfl(kv_tiles, source));
    return s;
  }

  // First key that a row at `position` sees.
  static __device__ __forceinline__ int window_begin(const AttentionParams& p, int position) {
    return p.window > 0 ? max(position - p.window + 1, 0) : 0;
  }
};

// The rows of a unit: up to kRows of the q_len * group query rows that share a KV head, token by token.
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
