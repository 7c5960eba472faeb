// Decode attention, loads by TMA: one lane requests a KV tile in boxes of 16 rows of 128 bytes, and an mbarrier per
// stage, or one for its K and one for its V, counts the bytes. For caches in which every KV tile lies in one block. A
// Stages class of attention/pipeline.cuh.
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
  static constexpr bool kSplitsStages = Tile::kCtasPerSm == 1;  // two CTAs per SM fill each other's gaps
  static constexpr int kBarriersPerStage = kSplitsStages ? 2 : 1;
  static constexpr int kBarrierBytes = Tile::kWarps * Tile::kStages * kBarriersPerStage * sizeof(arch::TmaBarrier);
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
        barriers_(reinterpret_cast<arch::TmaBarrier*>(barriers) + arch::warp() * Tile::kStages * kBarriersPerStage) {
    if (arch::lane() == 0) {
      arch::prefetch_map(source.k);
      arch::prefetch_map(source.v);
    }
    static_assert(Tile::kStages * kBarriersPerStage <= arch::kWarpSize);
    if (arch::lane() < Tile::kStages * kBarriersPerStage) barriers_[arch::lane()].init();
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
    if constexpr (kSplitsStages) {
      fill_keys(stage, fetch);
      fill_values(stage, fetch);
    } else if (arch::lane() == 0 && fetch.valid) {
      barriers_[stage].expect(kStageBytes);
      copy(keys_at(stage), source_.k, fetch, barriers_[stage]);
      copy(values_at(stage), source_.v, fetch, barriers_[stage]);
    }
  }
  __device__ __forceinline__ void fill_keys(int stage, const Fetch& fetch) {
    if (arch::lane() != 0 || !fetch.valid) return;
    barriers_[2 * stage].expect(kTileBytes);
    copy(keys_at(stage), source_.k, fetch, barriers_[2 * stage]);
  }
  __device__ __forceinline__ void fill_values(int stage, const Fetch& fetch) {
    if (arch::lane() != 0 || !fetch.valid) return;
    barriers_[2 * stage + 1].expect(kTileBytes);
    copy(values_at(stage), source_.v, fetch, barriers_[2 * stage + 1]);
  }

  __device__ __forceinline__ void wait(int stage, int begin, int end) { finish(stage, barriers_[stage], begin, end); }
  __device__ __forceinline__ void wait_keys(int stage) { barriers_[2 * stage].wait(parity_ >> stage & 1); }
  __device__ __forceinline__ void wait_values(int stage, int begin, int end) {
    finish(stage, barriers_[2 * stage + 1], begin, end);
  }

  __device__ __forceinline__ Rows keys(int stage) const { return {keys_at(stage)}; }
  __device__ __forceinline__ Rows values(int stage) const { return {values_at(stage)}; }

  __device__ __forceinline__ void wait_for_queries(int /*fills*/) { arch::copy_wait<0>(); }

 private:
  __device__ __forceinline__ unsigned char* keys_at(int stage) const { return stages_ + stage * kStageBytes; }
  __device__ __forceinline__ unsigned char* values_at(int stage) const { return keys_at(stage) + kTileBytes; }

  __device__ __forceinline__ void copy(unsigned char* to, const CUtensorMap& map, const Fetch& fetch,
                                       arch::TmaBarrier& barrier) {
    const int block = fetch.address.checked_block(p_);
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      arch::tma_load(to + b * kBoxBytes, map, b * kBoxColumns, fetch.address.offset, fetch.kv_head, block, barrier);
    }
  }

  // Waits for the stage's last copies. TMA copied all 16 rows, so V is zeroed here outside of [begin, end).
  __device__ __forceinline__ void finish(int stage, arch::TmaBarrier& barrier, int begin, int end) {
    barrier.wait(parity_ >> stage & 1);
    parity_ ^= 1u << stage;
    if (begin > 0 || end < kKvTile) {
      unsigned char* values = values_at(stage);
      for (int i = arch::lane(); i < kTileBytes / 16; i += arch::kWarpSize) {
        const int row = i / 8 % kKvTile;
        if (row < begin || row >= end) *reinterpret_cast<uint4*>(values + i * 16) = make_uint4(0, 0, 0, 0);
      }
      arch::fence_proxy_async();
      arch::warp_sync();
    }
  }

  const AttentionParams& p_;
  const Source& source_;
  unsigned char* stages_;
  arch::TmaBarrier* barriers_;
  unsigned parity_ = 0;
};

}  // namespace flashdecpp
