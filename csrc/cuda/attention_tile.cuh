// Decode attention, what a block is: the shapes of its tiles, its rows, and the keys that they see.
#pragma once

#include "../params.h"
#include "numeric.cuh"
#include "softmax.cuh"

namespace flashdecpp {

using arch::TileA;
using arch::TileB;
using arch::TileC;

struct AttentionLaunch {
  AttentionParams p;
  // null where num_splits is 1
  unsigned int* arrivals;   // [batch, kv_heads, row_tiles], zeros
  float* part_out;          // [batch, kv_heads, num_splits, q_len * group, head_dim]
  SoftmaxPart* part_state;  // [batch, kv_heads, num_splits, q_len * group]
  int32_t row_tiles;
  bool aligned16;  // every 16 bytes of a cache row start on a multiple of 16 and are inside the row
};

inline constexpr int kTileRows = 16;

// Shapes and the shared memory of one configuration. T computes, the cache holds KV; head_dim up to kDims.
template <class T_, class KV_, int kDims_>
struct AttentionTile {
  using T = T_;
  using KV = KV_;
  static constexpr int kDims = kDims_;
  static constexpr bool kWiden = sizeof(KV) != sizeof(T);  // float8 arrives raw and is widened in a tile of its own
  static constexpr int kKeys = kDims <= 128 ? 64 : 32;
  static constexpr int kThreads = 128;

  // 16 bytes of padding a row: the rows that a tile load touches at once start in different banks.
  static constexpr int kStride = kDims + 8, kPStride = kKeys + 8;
  static constexpr int kRowBytes = kWiden ? kDims : kStride * 2;
  static constexpr int kStageBytes = kKeys * kRowBytes;
  static constexpr int kWideBytes = kWiden ? kKeys * kStride * 2 : 0;
  static constexpr int kQBytes = kTileRows * kStride * 2;
  static constexpr int kPBytes = kTileRows * kPStride * 2;
  static constexpr int kPlaceBytes = kKeys * 2 * 8;  // where the keys of one tile lie: element offsets in K and V

  static constexpr int kMaxStages = 6, kMaxPlaces = 4;
  static constexpr int kFixedBytes = kQBytes + kPBytes + kMaxPlaces * kPlaceBytes + kWideBytes;
  static constexpr int kFit = (arch::kSharedBudget - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
  static_assert(kStages >= 2);
  // Places are written this many tiles before the tile is multiplied, and looked up one tile earlier still.
  static constexpr int kAhead = (kStages - 1) / 2 + 1;
  static constexpr int kPlaces = kAhead + 1;
  static_assert(kPlaces <= kMaxPlaces);
  static constexpr int kSharedBytes = kFixedBytes + kStages * kStageBytes;

  static constexpr int kChunk = 16 / sizeof(KV);  // elements of one copy
  static constexpr int kChunks = kDims / kChunk;  // copies of one row
  static constexpr int kCopies = kKeys * kChunks / kThreads;
  static_assert(kCopies * kThreads == kKeys * kChunks);

  static __device__ T* q(unsigned char* shared) { return reinterpret_cast<T*>(shared); }
  static __device__ T* p(unsigned char* shared) { return reinterpret_cast<T*>(shared + kQBytes); }
  static __device__ int64_t* places(unsigned char* shared, int tile) {
    return reinterpret_cast<int64_t*>(shared + kQBytes + kPBytes + tile % kPlaces * kPlaceBytes);
  }
  static __device__ T* wide(unsigned char* shared) { return reinterpret_cast<T*>(shared + kFixedBytes - kWideBytes); }
  static __device__ unsigned char* stage(unsigned char* shared, int index) {
    return shared + kFixedBytes + index * kStageBytes;
  }
};

// Device constants of a configuration: what depends on the machine's wave.
template <class Tile>
struct Waves {
  static constexpr int kWaves = Tile::kThreads / arch::kWaveSize;
  static constexpr int kKeyTiles = Tile::kKeys / arch::kTileN;
  static constexpr int kColumnTiles = Tile::kDims / arch::kTileN;
  static constexpr int kScores = (kKeyTiles + kWaves - 1) / kWaves;   // key tiles of one wave
  static constexpr int kOuts = (kColumnTiles + kWaves - 1) / kWaves;  // column tiles of one wave
  // Tile n of this wave, and whether there is one.
  static __device__ __forceinline__ int tile(int n) { return arch::wave() + n * kWaves; }
  static __device__ __forceinline__ bool has_scores(int n) { return kKeyTiles % kWaves == 0 || tile(n) < kKeyTiles; }
  static __device__ __forceinline__ bool has_outs(int n) {
    return kColumnTiles % kWaves == 0 || tile(n) < kColumnTiles;
  }
};

// What the rows of the block need beside matrices, in shared memory.
template <int kWaves>
struct Rows {
  int first[kTileRows], last[kTileRows];  // the keys that a row sees
  float phi[kTileRows], slope[kTileRows];
  float wave_max[kWaves][kTileRows], wave_sum[kWaves][kTileRows];
  float max[kTileRows], sum[kTileRows];
  float factor[kTileRows];  // output = factor * O
  int redo[kTileRows];      // to be recomputed with the online softmax
};

// The block's rows and the keys they see.
struct Work {
  int unit, batch, kv_head, row_begin, rows;
  int key_begin, key_end;        // seen by some row
  int common_begin, common_end;  // seen by every row; may be empty
  int tile_begin, tile_count;    // key tiles with a key that is seen
  int length;

  __device__ Work(const AttentionLaunch& launch, int tile_keys) {
    const AttentionParams& p = launch.p;
    unit = blockIdx.x;
    const int row_tile = unit % launch.row_tiles, sequence_head = unit / launch.row_tiles;
    kv_head = sequence_head % p.kv_heads;
    batch = sequence_head / p.kv_heads;
    row_begin = row_tile * kTileRows;
    rows = min(kTileRows, p.q_len * p.group() - row_begin);
    const int64_t capacity = p.num_blocks > 0 ? p.capacity() : 0;
    length = static_cast<int>(min(static_cast<int64_t>(max(p.seq_lens[batch], 0)), capacity));

    const int first = position(p, 0), last = position(p, rows - 1);
    key_begin = window_begin(p, max(first, 0));
    key_end = last + 1;
    common_begin = window_begin(p, max(last, 0));
    common_end = first + 1;
    tile_begin = key_begin / tile_keys;
    tile_count = key_end > 0 ? (key_end - 1) / tile_keys + 1 - tile_begin : 0;
  }

  __device__ int position(const AttentionParams& p, int row) const {
    return length - p.q_len + (row_begin + row) / p.group();
  }
  __device__ int head(const AttentionParams& p, int row) const {
    return kv_head * p.group() + (row_begin + row) % p.group();
  }
  __device__ int token(const AttentionParams& p, int row) const { return (row_begin + row) / p.group(); }
  // First key that a row at `position` sees.
  static __device__ int window_begin(const AttentionParams& p, int position) {
    return p.window > 0 ? max(position - p.window + 1, 0) : 0;
  }
  // Index of a row of one split in part_state; times head_dim, in part_out.
  __device__ int64_t part(const AttentionParams& p, int split, int row) const {
    const int64_t group = int64_t{batch} * p.kv_heads + kv_head;
    return (group * gridDim.y + split) * (p.q_len * p.group()) + row_begin + row;
  }
};

template <class Tile>
__device__ __forceinline__ void describe_rows(const AttentionParams& p, const Work& work,
                                              Rows<Waves<Tile>::kWaves>& rows) {
  const int row = threadIdx.x;
  if (row >= kTileRows) return;
  const bool used = row < work.rows;
  const int position = used ? work.position(p, row) : -1;
  const int head = used ? work.head(p, row) : 0;
  rows.first[row] = position >= 0 ? Work::window_begin(p, position) : 0;
  rows.last[row] = position;
  rows.phi[row] = used && p.phi ? p.phi[work.batch * p.phi_batch_stride + head] : 0.f;
  rows.slope[row] = used && p.alibi_slopes ? p.alibi_slopes[head] : 0.f;
  rows.redo[row] = 0;
}

}  // namespace flashdecpp
