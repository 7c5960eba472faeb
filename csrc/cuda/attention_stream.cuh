// Decode attention, the way of the data: from the cache, paged or not, into a ring of tiles in shared memory.
#pragma once

#include "attention_tile.cuh"

namespace flashdecpp {

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

}  // namespace flashdecpp
