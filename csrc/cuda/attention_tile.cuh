// Decode attention, what a block is: the shapes of its tiles, its rows, and the keys that they see.
#pragma once

#include "../params.h"
#include "numeric.cuh"
#include "softmax.cuh"

namespace flashdecpp {

using arch::kTilesOf16;
using arch::TileA;
using arch::TileB;
using arch::TileC;

inline constexpr int kGroup = 16;    // keys that a wave takes at a time
inline constexpr int kMostTeam = 8;  // blocks: clusters of more are not portable

struct AttentionLaunch {
  AttentionParams p;
  // Of a unit that several teams share, each leaves its part in a slot. A slot is ready once its flag is the nonce: a
  // number that no other launch uses, so that what the memory held before does not matter.
  float* part_out;      // [slots, slot_rows, head_dim]
  RowPart* part_state;  // [slots, slot_rows]
  uint64_t* ready;      // [slots]
  uint64_t nonce;
  int32_t team_log2;   // blocks of a team
  int32_t worth_log2;  // groups of a unit that are worth a team
  // The work is cut by unit, up to so many teams each; or, if `shares` is not 0 and the sequences are of different
  // lengths or hold fewer keys than least_by_unit, by line.
  int32_t unit_teams;
  float least_by_unit;
  uint32_t shares, most_shares;
  // A kernel's first microseconds go into fetching its instructions: a division is 30 of them. row / group is
  // row * group_reciprocal >> 16, exactly for the 256 rows that there may be.
  int32_t group, group_reciprocal;
  int32_t row_blocks, slot_rows;  // units of a KV head; rows of each, and so of a slot

  void cut_rows(int tile_rows) {
    group = p.group();
    group_reciprocal = ((1 << 16) + group - 1) / group;
    row_blocks = (rows() + tile_rows - 1) / tile_rows;
    slot_rows = row_blocks > 1 ? tile_rows : rows();
  }
  __host__ __device__ int rows() const { return p.q_len * group; }
  __host__ __device__ int sequence_units() const { return p.kv_heads * row_blocks; }
};

// How blocks are cut: chosen by measurement.
template <int kWaves_, int kStages_, int kBlocks_, int kMergeRows_>
struct BlockShape {
  static constexpr int kWaves = kWaves_, kStages = kStages_;
  static constexpr int kMergeRows = kMergeRows_;  // rows that the waves merge at a time
  static constexpr int kBlocks = kBlocks_;        // at once on a multiprocessor
};

// Shapes of one configuration. T computes, the cache holds KV; head_dim up to kDims.
template <class T_, class KV_, int kDims_, class Shape_>
struct AttentionTile {
  using T = T_;
  using KV = KV_;
  using Shape = Shape_;
  static constexpr int kDims = kDims_, kRows = 16;
  static constexpr bool kWiden = sizeof(KV) != sizeof(T);  // float8
  static constexpr int kWaves = Shape::kWaves, kThreads = kWaves * arch::kWaveSize, kBlocks = Shape::kBlocks;
  static constexpr int kStages = Shape::kStages;
  static constexpr int kColumnTiles = kDims / arch::kTileN;
  static constexpr bool kQueryInRegisters = kDims <= arch::Walk::kQueryColumns;
  static constexpr int kAhead = arch::Walk::kAhead, kRun = arch::Walk::run(kDims);
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

// The shared memory of a block: of every wave the ring, the queries of a unit, and room to merge.
template <class Tile, class Ring>
struct SharedMemory {
  static constexpr int kRingBytes = Tile::kStages * Ring::kStageBytes;
  static constexpr int kQBytes = Tile::kRows * Tile::kQStride * 2;
  static constexpr int kScratchBytes = Tile::kMergeRows * Tile::kScratchStride * 4;
  static constexpr int kBytes = Tile::kWaves * (kRingBytes + kQBytes + kScratchBytes);
  static_assert(kScratchBytes >= 16 * kGroup * 2);

  unsigned char* data;

  __device__ unsigned char* ring(int wave) const { return data + wave * kRingBytes; }
  __device__ typename Tile::T* q(int wave) const {
    return reinterpret_cast<typename Tile::T*>(data + Tile::kWaves * kRingBytes + wave * kQBytes);
  }
  __device__ float* scratch(int wave) const {
    return reinterpret_cast<float*>(data + Tile::kWaves * (kRingBytes + kQBytes) + wave * kScratchBytes);
  }
};

// The keys of one sequence that some row sees, and the groups that hold them.
struct Sequence {
  int length;               // keys, new tokens included
  int key_begin;            // the first that a row sees
  int first_group, groups;  // at least one group, also where there is no key: a block must write the outputs

  Sequence() = default;
  __device__ Sequence(const AttentionParams& p, int loaded_length) {
    const int64_t capacity = p.num_blocks > 0 ? p.capacity() : 0;
    length = static_cast<int>(min(static_cast<int64_t>(max(loaded_length, 0)), capacity));
    key_begin = window_begin(p, max(length - p.q_len, 0));
    first_group = key_begin / kGroup;
    groups = max((length + kGroup - 1) / kGroup - first_group, 1);
  }

  static __device__ __forceinline__ int load_length(const AttentionParams& p, int batch) {
    return arch::load_fresh(p.seq_lens + batch);
  }
  static __device__ __forceinline__ Sequence load(const AttentionParams& p, int batch) {
    return {p, load_length(p, batch)};
  }

  __device__ __forceinline__ Sequence from_lane(int source) const {
    Sequence s;
    s.length = arch::uniform(arch::from_lane(length, source));
    s.key_begin = arch::uniform(arch::from_lane(key_begin, source));
    s.first_group = arch::uniform(arch::from_lane(first_group, source));
    s.groups = arch::uniform(arch::from_lane(groups, source));
    return s;
  }

  // First key that a row at `position` sees.
  static __device__ __forceinline__ int window_begin(const AttentionParams& p, int position) {
    return p.window > 0 ? max(position - p.window + 1, 0) : 0;
  }
};

// The rows of a unit: up to kRows of the q_len * group query rows that share a KV head, token by token.
struct RowBlock {
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
