// Decode attention, loads by TMA: one lane requests a KV tile in boxes of 16 rows of 128 bytes, and one mbarrier per
// stage counts the bytes. For caches in which every KV tile lies in one block. A Stages class of
// attention/pipeline.cuh.
#pragma once

#include "cuda/attention/pipeline.cuh"

namespace flashdecpp {

// The cache as [head_dim, block_size, kv_heads, num_blocks], innermost first. Columns and rows outside of it read as
// zeros.
struct CacheMaps {
  CUtensorMap k, v;
};

template <class Tile>
class TmaStages {
  using KV = typename Tile::KV;

 public:
  static constexpr int kBoxColumns = 128 / sizeof(KV), kBoxes = (Tile::kDims + kBoxColumns - 1) / kBoxColumns;
  static constexpr int kBoxBytes = 128 * kKvTile, kTileBytes = kBoxes * kBoxBytes, kStageBytes = 2 * kTileBytes;
  static constexpr int kBarrierBytes = Tile::kWarps * Tile::kStages * sizeof(arch::TmaBarrier);
  static constexpr bool kAvailable = arch::kHasTma, kPrefetchesTable = true, kFillsEarly = false;
  static constexpr bool kUsesClusters = Tile::kDims <= 128;  // wider rows leave too few registers
  using Rows = arch::SwizzledRows<KV, kKvTile>;
  using Source = CacheMaps;

  struct Fetch {
    KvAddress address;
    int kv_head;
    bool valid = false;
  };

  __device__ TmaStages(unsigned char* stages, unsigned char* barriers, const AttentionParams& p, const Source& source)
      : p_(p),
        source_(source),
        stages_(stages),
        barriers_(reinterpret_cast<arch::TmaBarrier*>(barriers) + arch::warp() * Tile::kStages) {
    if (arch::lane() == 0) {
      arch::prefetch_map(source.k);
      arch::prefetch_map(source.v);
    }
    if (arch::lane() < Tile::kStages) barriers_[arch::lane()].init();
    arch::fence_proxy_async();
    arch::warp_sync();
  }

  __device__ __forceinline__ void locate(const Segment& segment, int kv_tile, Fetch& fetch) const {
    fetch.kv_head = segment.kv_head;
    fetch.address.locate(p_, segment.batch, (segment.sequence.first_kv_tile + kv_tile) * kKvTile);
  }
  __device__ __forceinline__ void resolve(const Segment& segment, int kv_tile, Fetch& fetch) const {
    if (segment.sequence.length == 0) {  // its only tile may hold anything
      fetch = {KvAddress(), segment.kv_head, fetch.valid};
    } else {
      locate(segment, kv_tile, fetch);
      fetch.address.resolve(p_, segment.batch);
    }
  }

  __device__ __forceinline__ void fill(int stage, const Fetch& fetch) {
    if (arch::lane() != 0 || !fetch.valid) return;
    unsigned char* to = stages_ + stage * kStageBytes;
    arch::TmaBarrier& barrier = barriers_[stage];
    const int block = fetch.address.checked_block(p_);
    barrier.expect(kStageBytes);
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      arch::tma_load(to + b * kBoxBytes, source_.k, b * kBoxColumns, fetch.address.offset, fetch.kv_head, block,
                     barrier);
    }
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      arch::tma_load(to + kTileBytes + b * kBoxBytes, source_.v, b * kBoxColumns, fetch.address.offset, fetch.kv_head,
                     block, barrier);
    }
  }

  // TMA copied all 16 rows, so V is zeroed here outside of [begin, end).
  __device__ __forceinline__ void wait(int stage, int begin, int end) {
    barriers_[stage].wait(parity_ >> stage & 1);
    parity_ ^= 1u << stage;
    if (begin > 0 || end < kKvTile) {
      unsigned char* values = stages_ + stage * kStageBytes + kTileBytes;
      for (int i = arch::lane(); i < kTileBytes / 16; i += arch::kWarpSize) {
        const int row = i / 8 % kKvTile;
        if (row < begin || row >= end) *reinterpret_cast<uint4*>(values + i * 16) = make_uint4(0, 0, 0, 0);
      }
      release_writes();
    }
  }

  __device__ __forceinline__ Rows keys(int stage) const { return {stages_ + stage * kStageBytes}; }
  __device__ __forceinline__ Rows values(int stage) const { return {stages_ + stage * kStageBytes + kTileBytes}; }

  __device__ __forceinline__ void release_writes() const {
    arch::fence_proxy_async();
    arch::warp_sync();
  }

  __device__ __forceinline__ void wait_for_queries(int /*fills*/) { arch::copy_wait<0>(); }

 private:
  const AttentionParams& p_;
  const Source& source_;
  unsigned char* stages_;
  arch::TmaBarrier* barriers_;
  unsigned parity_ = 0;
};

}  // namespace flashdecpp
