// Decode attention: a few new tokens a sequence over a long KV cache. Every byte of K and V is read once, so memory is
// the floor: 2 * keys * kv_heads * head_dim * sizeof(element) over the read bandwidth. Arithmetic is far below it.
//
// A block is (row tile of one KV head of one sequence, split). The q_len * group rows that share the KV head are
// packed, token by token, into tiles of 16: one side of the matrix tile. The split walks over its key tiles.
//   tile          64 keys, 32 where head_dim is above 128; K and V tiles are the items of one ring in shared memory
//   stages        what kSharedBudget holds, up to 6; head_dim 128 in half: 4 of 17 KiB, 3 of them in flight
//   shared        78.5 KiB at head_dim 128: two blocks a multiprocessor, 96 KiB of K and V in flight on it
//   S = Q K^T     each wave takes some of the keys; the policy of softmax.cuh turns S into P
//   O += P V      each wave takes some of the columns; P comes through shared memory
// Two barriers a tile with the unified maximum, three with the online one. The splits of a row tile are merged, in a
// fixed order, by the last of them to arrive; rows whose maximum phi did not fit are recomputed there.
//
// What is never read: keys that no row of the tile sees, and so anything beyond seq_len; their place holds zeros. A
// key that some rows see and others do not (new tokens among themselves, the edge of the window) is in the tile for
// all of them: its logit is set aside for the others, and where its V is not finite, so that 0 * V would be NaN, the
// product with V is taken key by key.
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

// Part of the first group of copies.
template <class Tile>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const Work& work, unsigned char* shared) {
  using T = typename Tile::T;
  constexpr int kChunks = Tile::kDims / 8;
  for (int index = threadIdx.x; index < kTileRows * kChunks; index += Tile::kThreads) {
    const int row = index / kChunks, dim = index % kChunks * 8;
    const bool valid = row < work.rows && dim < p.head_dim;
    const int64_t offset = valid ? work.batch * p.q_batch_stride + work.token(p, row) * p.q_token_stride +
                                       work.head(p, row) * p.q_head_stride + dim
                                 : 0;
    arch::copy_async(Tile::q(shared) + row * Tile::kStride + dim, static_cast<const T*>(p.q) + offset, valid);
  }
}

// The ring of K and V tiles: K of the first tile, V of it, K of the second, ... Every fill is one group of copies,
// also an empty one, so the number of groups that may be pending is the same at every wait.
template <class Tile>
class KeyValueStream {
  using T = typename Tile::T;
  using KV = typename Tile::KV;

 public:
  __device__ KeyValueStream(const AttentionLaunch& launch, const Work& work, unsigned char* shared, int tile_begin,
                            int tile_end)
      : launch_(launch), work_(work), shared_(shared), tile_end_(tile_end) {
    int blocks[Tile::kAhead];
#pragma unroll
    for (int i = 0; i < Tile::kAhead; ++i) blocks[i] = look_up(tile_begin + i);
#pragma unroll
    for (int i = 0; i < Tile::kAhead; ++i) place(tile_begin + i, blocks[i]);
    next_block_ = look_up(tile_begin + Tile::kAhead);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (i % 2 == 0) {
        fill<false>(tile_begin + i / 2);
      } else {
        fill<true>(tile_begin + i / 2);
      }
    }
  }

  // The K tile, for all threads to read until values() is called.
  __device__ __forceinline__ const T* keys(int tile) {
    const unsigned char* stage = landed();
    place(tile + Tile::kAhead, next_block_);
    next_block_ = look_up(tile + Tile::kAhead + 1);
    fill<(Tile::kStages - 1) % 2 == 1>(tile + (Tile::kStages - 1) / 2);
    return readable(stage);
  }

  // The V tile, for all threads to read until keys() is called for the next tile. A barrier for the block.
  __device__ __forceinline__ const T* values(int tile) {
    const unsigned char* stage = landed();
    fill<Tile::kStages % 2 == 1>(tile + Tile::kStages / 2);
    return readable(stage);
  }

 private:
  // The oldest item in flight has arrived, and every thread is done with the one before it.
  __device__ __forceinline__ const unsigned char* landed() {
    arch::copy_wait<Tile::kStages - 2>();
    __syncthreads();
    const unsigned char* stage = Tile::stage(shared_, reading_);
    reading_ = reading_ + 1 == Tile::kStages ? 0 : reading_ + 1;
    return stage;
  }

  __device__ __forceinline__ const T* readable(const unsigned char* stage) {
    if constexpr (!Tile::kWiden) {
      return reinterpret_cast<const T*>(stage);
    } else {
      constexpr int kEights = Tile::kDims / 8;
      T* wide = Tile::wide(shared_);
#pragma unroll
      for (int i = 0; i < Tile::kKeys * kEights / Tile::kThreads; ++i) {
        const int index = threadIdx.x + i * Tile::kThreads;
        const uint2 raw = *reinterpret_cast<const uint2*>(stage + index * 8);
        *reinterpret_cast<uint4*>(wide + index / kEights * Tile::kStride + index % kEights * 8) =
            arch::widen_e4m3<T>(raw);
      }
      __syncthreads();
      return wide;
    }
  }

  // The cache block of this thread's key of a tile; -1 where no row sees the key.
  __device__ __forceinline__ int look_up(int tile) const {
    const AttentionParams& p = launch_.p;
    if (threadIdx.x >= Tile::kKeys || tile >= tile_end_) return -1;
    const int key = tile * Tile::kKeys + threadIdx.x;
    if (key < work_.key_begin || key >= work_.key_end) return -1;
    if (!p.block_table) return work_.batch;
    const int block = p.block_table[work_.batch * p.table_stride + key / static_cast<unsigned>(p.block_size)];
    return min(max(block, 0), p.num_blocks - 1);
  }

  __device__ __forceinline__ void place(int tile, int block) {
    const AttentionParams& p = launch_.p;
    if (threadIdx.x >= Tile::kKeys) return;
    int64_t* places = Tile::places(shared_, tile) + threadIdx.x;
    int64_t k = -1, v = -1;
    if (block >= 0) {
      const int64_t within = (tile * Tile::kKeys + threadIdx.x) % static_cast<unsigned>(p.block_size);
      k = block * p.k.block_stride + within * p.k.token_stride + work_.kv_head * p.k.head_stride;
      v = block * p.v.block_stride + within * p.v.token_stride + work_.kv_head * p.v.head_stride;
    }
    places[0] = k;
    places[Tile::kKeys] = v;
  }

  template <bool kValues>
  __device__ __forceinline__ void fill(int tile) {
    const AttentionParams& p = launch_.p;
    if (tile < tile_end_) {
      const KV* cache = static_cast<const KV*>(kValues ? p.v_cache : p.k_cache);
      const int64_t* places = Tile::places(shared_, tile) + (kValues ? Tile::kKeys : 0);
      unsigned char* stage = Tile::stage(shared_, filling_);
#pragma unroll
      for (int i = 0; i < Tile::kCopies; ++i) {
        const int index = threadIdx.x + i * Tile::kThreads;
        const int row = index / Tile::kChunks, dim = index % Tile::kChunks * Tile::kChunk;
        const int64_t place = places[row];
        unsigned char* to = stage + row * Tile::kRowBytes + dim * sizeof(KV);
        const auto inside = [&](int at) { return place >= 0 && at < p.head_dim; };
        if (!Tile::kWiden || launch_.aligned16) {
          arch::copy_async(to, cache + (inside(dim) ? place + dim : 0), inside(dim));
        } else {
          arch::copy_async<8>(to, cache + (inside(dim) ? place + dim : 0), inside(dim));
          arch::copy_async<8>(to + 8, cache + (inside(dim + 8) ? place + dim + 8 : 0), inside(dim + 8));
        }
      }
    }
    arch::copy_commit();
    filling_ = filling_ + 1 == Tile::kStages ? 0 : filling_ + 1;
  }

  const AttentionLaunch& launch_;
  const Work& work_;
  unsigned char* shared_;
  int tile_end_;
  int next_block_;
  int filling_ = 0, reading_ = 0;
};

__device__ __forceinline__ float logit(const AttentionParams& p, float scale, float product, float slope,
                                       int distance) {
  float x = product * scale;
  if (p.softcap > 0.f) x = p.softcap * tanhf(x / p.softcap);
  if (p.alibi_slopes) x -= slope * static_cast<float>(distance);
  return is_finite(x) ? x : kNaN;
}

// O += P V, key by key and row by row, for a tile with a V that is not finite and that not all rows see.
template <class Tile>
__device__ __forceinline__ void add_values_selected(const typename Tile::T* p, const typename Tile::T* v, int key_begin,
                                                    const int (&first)[TileC::kRowSlots],
                                                    const int (&last)[TileC::kRowSlots],
                                                    TileC (&o)[Waves<Tile>::kOuts]) {
#pragma unroll 1
  for (int j = 0; j < Tile::kKeys; ++j) {
#pragma unroll
    for (int i = 0; i < TileC::kValues; ++i) {
      const int slot = TileC::slot(i);
      if (key_begin + j < first[slot] || key_begin + j > last[slot]) continue;
      const float weight = arch::to_float(p[TileC::row(i) * Tile::kPStride + j]);
#pragma unroll
      for (int n = 0; n < Waves<Tile>::kOuts; ++n) {
        if (!Waves<Tile>::has_outs(n)) continue;
        const int column = Waves<Tile>::tile(n) * arch::kTileN + TileC::col(i);
        o[n].v[i] += weight * arch::to_float(v[j * Tile::kStride + column]);
      }
    }
  }
}

template <class Tile>
__device__ __forceinline__ bool all_finite(const typename Tile::T* v) {
  bool finite = true;
  for (int index = threadIdx.x; index < Tile::kKeys * Tile::kDims; index += Tile::kThreads) {
    finite &= is_finite(arch::to_float(v[index / Tile::kDims * Tile::kStride + index % Tile::kDims]));
  }
  return !__syncthreads_or(!finite);
}

// The attention of the block's rows to key tiles tile_begin .. tile_end: O in o, and maximum and sum in rows.
template <class Tile, class Policy>
__device__ __forceinline__ void attend(const AttentionLaunch& launch, const Work& work, unsigned char* shared,
                                       Rows<Waves<Tile>::kWaves>& rows, int tile_begin, int tile_end,
                                       TileC (&o)[Waves<Tile>::kOuts]) {
  using T = typename Tile::T;
  using W = Waves<Tile>;
  const AttentionParams& p = launch.p;
  const float scale = p.scale * (p.k_scale ? p.k_scale[work.kv_head] : 1.f);
  const auto maximum = [](float a, float b) { return fmaxf(a, b); };
  const auto plus = [](float a, float b) { return a + b; };

  KeyValueStream<Tile> stream(launch, work, shared, tile_begin, tile_end);

  int first[TileC::kRowSlots], last[TileC::kRowSlots];
  float slope[TileC::kRowSlots];
  Policy state[TileC::kRowSlots];
#pragma unroll
  for (int s = 0; s < TileC::kRowSlots; ++s) {
    const int row = TileC::slot_row(s);
    first[s] = rows.first[row];
    last[s] = rows.last[row];
    slope[s] = rows.slope[row];
    state[s] = Policy(rows.phi[row]);
  }
#pragma unroll
  for (int n = 0; n < W::kOuts; ++n) o[n] = TileC();

  TileA<T> q[Tile::kDims / 16];
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int key_begin = tile * Tile::kKeys;

    // S = Q K^T, the logits of this wave's keys.
    const T* keys = stream.keys(tile);
    if (tile == tile_begin) {
#pragma unroll
      for (int k = 0; k < Tile::kDims / 16; ++k) arch::load_a(q[k], Tile::q(shared) + k * 16, Tile::kStride);
    }
    TileC scores[W::kScores];
#pragma unroll
    for (int k = 0; k < Tile::kDims / 16; ++k) {
#pragma unroll
      for (int n = 0; n < W::kScores; ++n) {
        if (!W::has_scores(n)) continue;
        TileB<T> b;
        arch::load_b(b, keys + W::tile(n) * arch::kTileN * Tile::kStride + k * 16, Tile::kStride);
        arch::mma(scores[n], q[k], b);
      }
    }
#pragma unroll
    for (int n = 0; n < W::kScores; ++n) {
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) {
        const int s = TileC::slot(i);
        const int key = key_begin + W::tile(n) * arch::kTileN + TileC::col(i);
        const bool visible = key >= first[s] && key <= last[s] && W::has_scores(n);
        const float x = logit(p, scale, scores[n].v[i], slope[s], last[s] - key);
        scores[n].v[i] = visible ? x : -kInfinity;
      }
    }

    // The online maximum: of the tile over all waves, before any weight.
    if constexpr (!Policy::kUnified) {
      float top[TileC::kRowSlots];
#pragma unroll
      for (int s = 0; s < TileC::kRowSlots; ++s) {
        top[s] = -kInfinity;
#pragma unroll
        for (int n = 0; n < W::kScores; ++n) {
#pragma unroll
          for (int i = 0; i < TileC::kValues; ++i) {
            if (TileC::slot(i) == s) top[s] = fmaxf(top[s], scores[n].v[i]);
          }
        }
        top[s] = arch::row_reduce(top[s], maximum);
        if (arch::lane() % TileC::kRowLanes == 0) rows.wave_max[arch::wave()][TileC::slot_row(s)] = top[s];
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < TileC::kRowSlots; ++s) {
#pragma unroll
        for (int w = 0; w < W::kWaves; ++w) top[s] = fmaxf(top[s], rows.wave_max[w][TileC::slot_row(s)]);
        const float shrink = state[s].raise(top[s]);
#pragma unroll
        for (int n = 0; n < W::kOuts; ++n) {
#pragma unroll
          for (int i = 0; i < TileC::kValues; ++i) {
            if (TileC::slot(i) == s) o[n].v[i] *= shrink;
          }
        }
      }
    }

    // P, through shared memory to all waves.
#pragma unroll
    for (int n = 0; n < W::kScores; ++n) {
      if (!W::has_scores(n)) continue;
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) scores[n].v[i] = state[TileC::slot(i)].weight(scores[n].v[i]);
      arch::store(Tile::p(shared) + W::tile(n) * arch::kTileN, Tile::kPStride, scores[n]);
    }

    // O += P V, for this wave's columns.
    const T* values = stream.values(tile);
    const bool common = max(key_begin, work.key_begin) >= work.common_begin &&
                        min(key_begin + (Tile::kKeys - 1), work.key_end - 1) < work.common_end;
    if (common || all_finite<Tile>(values)) {
#pragma unroll
      for (int k = 0; k < Tile::kKeys / 16; ++k) {
        TileA<T> a;
        arch::load_a(a, Tile::p(shared) + k * 16, Tile::kPStride);
#pragma unroll
        for (int n = 0; n < W::kOuts; ++n) {
          if (!W::has_outs(n)) continue;
          TileB<T> b;
          arch::load_b_transposed(b, values + k * 16 * Tile::kStride + W::tile(n) * arch::kTileN, Tile::kStride);
          arch::mma(o[n], a, b);
        }
      }
    } else {
      add_values_selected<Tile>(Tile::p(shared), values, key_begin, first, last, o);
    }
  }
  arch::copy_wait<0>();

#pragma unroll
  for (int s = 0; s < TileC::kRowSlots; ++s) {
    const float max = Policy::kUnified ? arch::row_reduce(state[s].max, maximum) : state[s].max;
    const float sum = arch::row_reduce(state[s].sum, plus);
    if (arch::lane() % TileC::kRowLanes == 0) {
      rows.wave_max[arch::wave()][TileC::slot_row(s)] = max;
      rows.wave_sum[arch::wave()][TileC::slot_row(s)] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < kTileRows) {
    float max = -kInfinity, sum = 0.f;
    for (int w = 0; w < W::kWaves; ++w) {
      max = fmaxf(max, rows.wave_max[w][threadIdx.x]);
      sum += rows.wave_sum[w][threadIdx.x];
    }
    rows.max[threadIdx.x] = max;
    rows.sum[threadIdx.x] = sum;
  }
  __syncthreads();
}

// f(row, column, value) for every element of O that this lane holds.
template <class Tile, class Function>
__device__ __forceinline__ void for_each_out(const Work& work, int head_dim, const TileC (&o)[Waves<Tile>::kOuts],
                                             Function f) {
#pragma unroll
  for (int n = 0; n < Waves<Tile>::kOuts; ++n) {
    if (!Waves<Tile>::has_outs(n)) continue;
#pragma unroll
    for (int i = 0; i < TileC::kValues; ++i) {
      const int row = TileC::row(i), column = Waves<Tile>::tile(n) * arch::kTileN + TileC::col(i);
      if (row < work.rows && column < head_dim) f(row, column, o[n].v[i]);
    }
  }
}

// This split's part of every row, to global memory.
template <class Tile>
__device__ __forceinline__ void write_part(const AttentionLaunch& launch, const Work& work,
                                           const Rows<Waves<Tile>::kWaves>& rows,
                                           const TileC (&o)[Waves<Tile>::kOuts]) {
  const int split = blockIdx.y, head_dim = launch.p.head_dim;
  float* out = launch.part_out + work.part(launch.p, split, 0) * head_dim;
  for_each_out<Tile>(work, head_dim, o,
                     [&](int row, int column, float value) { out[row * head_dim + column] = value; });
  if (threadIdx.x < work.rows) {
    launch.part_state[work.part(launch.p, split, threadIdx.x)] = {rows.max[threadIdx.x], rows.sum[threadIdx.x]};
  }
}

// Maximum and sum of every row over `splits` parts.
template <class Tile, class Policy>
__device__ __forceinline__ void merge_states(const AttentionLaunch& launch, const Work& work, int splits,
                                             Rows<Waves<Tile>::kWaves>& rows) {
  const int64_t step = work.part(launch.p, 1, 0) - work.part(launch.p, 0, 0);
  for (int row = arch::wave(); row < work.rows; row += Waves<Tile>::kWaves) {
    const SoftmaxPart* parts = launch.part_state + work.part(launch.p, 0, row);
    float max = -kInfinity;
    for (int s = arch::lane(); s < splits; s += arch::kWaveSize) max = fmaxf(max, parts[s * step].max);
    max = arch::wave_max(max);
    float sum = 0.f;
    for (int s = arch::lane(); s < splits; s += arch::kWaveSize) {
      const SoftmaxPart part = parts[s * step];
      sum += part.sum * Policy::share(part.max, max);
    }
    sum = arch::wave_sum(sum);
    if (arch::lane() == 0) {
      rows.max[row] = max;
      rows.sum[row] = sum;
    }
  }
  __syncthreads();
}

// From maximum and sum: lse, the factor that makes O the output, and whether the row must be recomputed. `again`: the
// rows that are being recomputed, and no others.
template <class Tile, class Policy>
__device__ __forceinline__ void conclude(const AttentionParams& p, const Work& work, bool again,
                                         Rows<Waves<Tile>::kWaves>& rows) {
  const int row = threadIdx.x;
  if (row < work.rows && (!again || rows.redo[row])) {
    const int head = work.head(p, row);
    Policy state(rows.phi[row]);
    state.max = rows.max[row];
    state.sum = rows.sum[row];
    float lse, factor = 1.f / state.sum;
    if (isnan(state.sum)) {
      lse = kNaN;
    } else if (state.max == -kInfinity) {  // sees no key
      lse = p.sinks ? p.sinks[head] : -kInfinity;
      factor = 0.f;
    } else {
      lse = state.log_sum();
      if constexpr (Policy::kUnified) rows.redo[row] = !state.trusted();
      if (p.sinks) {
        const float sink = p.sinks[head], distance = fabsf(lse - sink);
        factor /= 1.f + expf(sink - lse);
        lse = fmaxf(lse, sink) + log1pf(expf(-distance));
      }
      if (p.v_scale) factor *= p.v_scale[work.kv_head];
    }
    rows.factor[row] = factor;
    p.lse[(int64_t{work.batch} * p.q_heads + head) * p.q_len + work.token(p, row)] = lse;
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ T* out_row(const AttentionParams& p, const Work& work, int row) {
  const int64_t token = int64_t{work.batch} * p.q_len + work.token(p, row);
  return static_cast<T*>(p.out) + (token * p.q_heads + work.head(p, row)) * p.head_dim;
}

// O that overflowed although the weights were in range: only values near the end of bfloat16 do that.
template <class Policy, int kWaves>
__device__ __forceinline__ void watch_overflow(Rows<kWaves>& rows, int row, float value) {
  if constexpr (Policy::kUnified) {
    if constexpr (Policy::Range::kMayOverflow) {
      if (!is_finite(value) && !isnan(rows.factor[row])) rows.redo[row] = 1;
    }
  }
}

// The output from registers. `again` as in conclude.
template <class Tile, class Policy>
__device__ __forceinline__ void write_out(const AttentionParams& p, const Work& work, bool again,
                                          const TileC (&o)[Waves<Tile>::kOuts], Rows<Waves<Tile>::kWaves>& rows) {
  using T = typename Tile::T;
  for_each_out<Tile>(work, p.head_dim, o, [&](int row, int column, float value) {
    if (again && !rows.redo[row]) return;
    watch_overflow<Policy>(rows, row, value);
    out_row<T>(p, work, row)[column] = arch::from_float<T>(value * rows.factor[row]);
  });
}

// The output from the parts of all splits. A thread adds four columns of a row; where rows are few, teams of threads
// add every so many of the splits.
template <class Tile, class Policy>
__device__ __forceinline__ void merge_out(const AttentionLaunch& launch, const Work& work, int splits,
                                          unsigned char* shared, Rows<Waves<Tile>::kWaves>& rows) {
  using T = typename Tile::T;
  const AttentionParams& p = launch.p;
  const int quads = p.head_dim / 4, items = work.rows * quads;
  const int64_t step = work.part(p, 1, 0) - work.part(p, 0, 0);

  const auto add = [&](int item, int team, int teams) {
    const int row = item / quads;
    const SoftmaxPart* states = launch.part_state + work.part(p, 0, row);
    const float* outs = launch.part_out + work.part(p, 0, row) * p.head_dim + item % quads * 4;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int s = team; s < splits; s += teams) {
      const float share = Policy::share(states[s * step].max, rows.max[row]);
      const float4 part = *reinterpret_cast<const float4*>(outs + s * step * p.head_dim);
      total.x += share * part.x;
      total.y += share * part.y;
      total.z += share * part.z;
      total.w += share * part.w;
    }
    return total;
  };
  const auto write = [&](int item, float4 total) {
    const int row = item / quads;
    T* out = out_row<T>(p, work, row) + item % quads * 4;
    const float values[] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      watch_overflow<Policy>(rows, row, values[i]);
      out[i] = arch::from_float<T>(values[i] * rows.factor[row]);
    }
  };

  if (items >= Tile::kThreads) {
    for (int item = threadIdx.x; item < items; item += Tile::kThreads) write(item, add(item, 0, 1));
    return;
  }
  const int teams = Tile::kThreads / items, team = threadIdx.x / items, item = threadIdx.x % items;
  float4* totals = reinterpret_cast<float4*>(Tile::stage(shared, 0));
  if (team < teams) totals[threadIdx.x] = add(item, team, teams);
  __syncthreads();
  if (team == 0) {
    float4 total = totals[item];
    for (int t = 1; t < teams; ++t) {
      const float4 part = totals[t * items + item];
      total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
    }
    write(item, total);
  }
}

// Rows that the unified maximum did not fit, from the first key to the last with the online softmax.
template <class Tile>
__device__ __forceinline__ void recompute(const AttentionLaunch& launch, const Work& work, unsigned char* shared,
                                          Rows<Waves<Tile>::kWaves>& rows) {
  __syncthreads();
  const int count = __syncthreads_count(threadIdx.x < work.rows && rows.redo[threadIdx.x]);
  if (count == 0) return;
  if (threadIdx.x == 0 && launch.p.fallback_count) atomicAdd(launch.p.fallback_count, count);
  TileC o[Waves<Tile>::kOuts];
  attend<Tile, OnlineMax>(launch, work, shared, rows, work.tile_begin, work.tile_begin + work.tile_count, o);
  conclude<Tile, OnlineMax>(launch.p, work, true, rows);
  write_out<Tile, OnlineMax>(launch.p, work, true, o, rows);
}

template <class Tile, class Policy>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    decode_attention_kernel(const __grid_constant__ AttentionLaunch launch) {
  __shared__ Rows<Waves<Tile>::kWaves> rows;
  unsigned char* shared = arch::dynamic_shared();
  const Work work(launch, Tile::kKeys);

  // No split is shorter than a tile; those without one have nothing to do.
  const int splits = min(static_cast<int>(gridDim.y), max(work.tile_count, 1)), split = blockIdx.y;
  if (split >= splits) return;
  const auto split_begin = [&](int s) {
    return work.tile_begin + static_cast<int>(int64_t{work.tile_count} * s / splits);
  };

  describe_rows<Tile>(launch.p, work, rows);
  load_queries<Tile>(launch.p, work, shared);
  TileC o[Waves<Tile>::kOuts];
  attend<Tile, Policy>(launch, work, shared, rows, split_begin(split), split_begin(split + 1), o);
  if (splits == 1) {
    conclude<Tile, Policy>(launch.p, work, false, rows);
    write_out<Tile, Policy>(launch.p, work, false, o, rows);
  } else {
    write_part<Tile>(launch, work, rows, o);
    if (!arch::last_block_to_arrive(launch.arrivals + work.unit, splits)) return;
    merge_states<Tile, Policy>(launch, work, splits, rows);
    conclude<Tile, Policy>(launch.p, work, false, rows);
    merge_out<Tile, Policy>(launch, work, splits, shared, rows);
  }
  if constexpr (Policy::kUnified) recompute<Tile>(launch, work, shared, rows);
}

}  // namespace flashdecpp
