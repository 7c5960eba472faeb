// Decode attention, loads. Every warp owns stages in shared memory, each with the K rows and V rows of one KV tile, and
// fills them itself, so no warp waits for another. A Stages class is one way to copy a KV tile: cp.async here, TMA in
// nvidia/attention_pipeline_tma.cuh, through registers in hip/attention_pipeline_amd.h. KvPipeline decides which KV
// tiles, segment after segment.
//
//   Fetch                         a lane's description of a KV tile to copy
//   locate(segment, kv_tile, f)   computes its address up to the block table; only where kPrefetchesTable
//   resolve(segment, kv_tile, f)  computes its address, reading the block table
//   kSplitsStages                 K and V of a stage are copied and awaited separately, so that the next K is under way
//                                 while V is multiplied
//   fill(stage, f)                starts the copies; also fill_keys() and fill_values() if kSplitsStages
//   wait(stage, begin, end)       waits for the stage's oldest copies; V is zero outside of rows [begin, end). If
//                                 kSplitsStages, wait_keys(stage), then wait_values(stage, begin, end) instead
//   keys(stage), values(stage)    the rows that arrived
//   wait_for_queries(fills)       waits for this thread's copies from before its last `fills` calls of fill()
//   kFillsEarly                   fill() buffers the tile in registers, so it is called before the current tile is
//                                 consumed, not after
//   kUsesClusters                 CTAs may form clusters
#pragma once

#include <climits>

#include "cuda/attention/scheduler.cuh"

namespace flashdecpp {

// Where a key lies in the cache. For a paged cache, locate() sets `block` to the index of the block-table entry, and
// resolve() replaces it by the entry, which should be used as late as possible.
struct KvAddress {
  int block = 0, offset = 0;

  __device__ __forceinline__ void locate(const AttentionParams& p, int batch, int key) {
    block = batch;
    offset = key;
    if (p.block_table) {
      block = key / static_cast<unsigned>(p.block_size);
      offset = key - block * p.block_size;
    }
  }
  __device__ __forceinline__ void resolve(const AttentionParams& p, int batch) {
    if (p.block_table) block = arch::load_fresh(p.block_table + batch * p.table_stride + block);
  }
  // A contiguous cache has one block per sequence. Entries of a block table are clamped, as they may be out of range.
  __device__ __forceinline__ int checked_block(const AttentionParams& p) const {
    return min(max(block, 0), p.num_blocks - 1);
  }
};

// All lanes copy 16 bytes each, or 8 where the rows of a float8 cache are not aligned to 16.
template <class Tile>
class CpAsyncStages {
  using KV = typename Tile::KV;

 public:
  // 16 bytes of padding per row, so that the rows that one ldmatrix reads start in different banks.
  static constexpr int kStride = Tile::kDims + 16 / sizeof(KV);
  static constexpr int kTileBytes = kKvTile * kStride * sizeof(KV), kStageBytes = 2 * kTileBytes;
  static constexpr int kBarrierBytes = 0;
  static constexpr bool kAvailable = true, kPrefetchesTable = false;  // the rows to copy depend on the length
  static constexpr bool kFillsEarly = false, kSplitsStages = false, kUsesClusters = false;
  using Rows = arch::PlainRows<KV, kStride>;
  struct Source {};  // AttentionParams suffice

  // `address` is that of row 0 if each KV tile lies in one cache block, else of row lane % 16. Rows [begin, end) are
  // visible.
  struct Fetch {
    KvAddress address;
    int kv_head, begin, end;
    bool valid = false;
  };

  __device__ CpAsyncStages(unsigned char* stages, unsigned char*, const AttentionParams& p, const Source&)
      : p_(p), stages_(stages), one_block_per_tile_(!p.block_table || p.block_size % kKvTile == 0) {
    if (Tile::kWiden) {
      const uint64_t alignment = p.k.block_stride | p.k.token_stride | p.k.head_stride | p.v.block_stride |
                                 p.v.token_stride | p.v.head_stride | reinterpret_cast<uint64_t>(p.k_cache) |
                                 reinterpret_cast<uint64_t>(p.v_cache) | p.head_dim;
      copy_8_bytes_ = alignment % 16 != 0;
    }
    if (p.head_dim < Tile::kDims) {  // zeroes the columns that no copy writes
      for (int at = arch::lane() * 16; at < Tile::kStages * kStageBytes; at += arch::kWarpSize * 16) {
        *reinterpret_cast<uint4*>(stages + at) = make_uint4(0, 0, 0, 0);
      }
    }
    arch::warp_sync();
  }

  __device__ __forceinline__ void resolve(const Segment& segment, int kv_tile, Fetch& fetch) const {
    const int first_key = (segment.sequence.first_kv_tile + kv_tile) * kKvTile;
    fetch.kv_head = segment.kv_head;
    fetch.begin = segment.sequence.key_begin - first_key;
    fetch.end = segment.sequence.length - first_key;
    const int row = one_block_per_tile_ ? 0 : arch::lane() % kKvTile;
    if (one_block_per_tile_ ? fetch.end > 0 : row >= fetch.begin && row < fetch.end) {
      fetch.address.locate(p_, segment.batch, first_key + row);
      fetch.address.resolve(p_, segment.batch);
    }
  }

  // Commits one cp.async group even if there is nothing to copy, so that wait() can count groups.
  __device__ __forceinline__ void fill(int stage, const Fetch& fetch) {
    if (fetch.valid) {
      unsigned char* to = stages_ + stage * kStageBytes;
      copy(to, p_.k_cache, p_.k, fetch);
      copy(to + kTileBytes, p_.v_cache, p_.v, fetch);
    }
    arch::copy_commit();
  }

  // fill() has already zeroed the rows outside of [begin, end).
  __device__ __forceinline__ void wait(int /*stage*/, int /*begin*/, int /*end*/) {
    arch::copy_wait<Tile::kStages - 1>();
    arch::warp_sync();
  }

  __device__ __forceinline__ Rows keys(int stage) const { return {stages_ + stage * kStageBytes}; }
  __device__ __forceinline__ Rows values(int stage) const { return {stages_ + stage * kStageBytes + kTileBytes}; }

  __device__ __forceinline__ void wait_for_queries(int fills) {
    if (fills >= Tile::kStages - 1) {
      arch::copy_wait<Tile::kStages - 1>();
    } else {
      arch::copy_wait<0>();
    }
  }

 private:
  __device__ __forceinline__ void copy(unsigned char* to, const void* cache, const CacheLayout& layout,
                                       const Fetch& fetch) {
    const KV* from = static_cast<const KV*>(cache) + fetch.address.checked_block(p_) * layout.block_stride +
                     fetch.address.offset * layout.token_stride + fetch.kv_head * layout.head_stride;
    if (Tile::kWiden && copy_8_bytes_) {
      copy_rows<8>(to, from, layout.token_stride, fetch);
    } else {
      copy_rows<16>(to, from, layout.token_stride, fetch);
    }
  }

  template <int bytes>
  __device__ __forceinline__ void copy_rows(unsigned char* to, const KV* from, int64_t stride, const Fetch& fetch) {
    constexpr int kChunks = Tile::kDims * sizeof(KV) / bytes;
#pragma unroll
    for (int i = 0; i < kKvTile * kChunks / arch::kWarpSize; ++i) {
      const int index = i * arch::kWarpSize + arch::lane(), row = index / kChunks, at = index % kChunks * bytes;
      const bool visible = row >= fetch.begin && row < fetch.end;
      const KV* p = one_block_per_tile_ ? from + row * stride : arch::shfl(from, row);
      if (at >= p_.head_dim * static_cast<int>(sizeof(KV))) continue;
      arch::copy_async<bytes>(to + row * (kStride * static_cast<int>(sizeof(KV))) + at,
                              visible ? static_cast<const void*>(p + at / sizeof(KV)) : p_.k_cache, visible);
    }
  }

  const AttentionParams& p_;
  unsigned char* stages_;
  bool one_block_per_tile_, copy_8_bytes_ = false;
};

// The KV tiles of one warp in the order in which it consumes them: every step-th of every segment of the cluster.
template <class Tile, class Stages>
class KvPipeline {
 public:
  __device__ __forceinline__ KvPipeline(const AttentionLaunch& launch, Stages& stages)
      : launch_(launch), p_(launch.p), stages_(stages) {}

  // Looks up the first tiles on the assumption that the split is uniform and the sequence fills the cache, in two
  // steps: locate() computes the block-table indices without reading memory, prefetch_table() reads the entries.
  __device__ __forceinline__ void locate(const Schedule& schedule) {
    if constexpr (Stages::kPrefetchesTable) {
      segment_ = schedule.first;
      segment_.sequence = Sequence(p_, INT_MAX);
      prefetched_ = p_.window == 0 && segment_.batch < p_.batch && segment_.sequence.length > 0;
      step_ = schedule.step;
#pragma unroll
      for (int i = 0; i <= Tile::kStages; ++i) {
        const int kv_tile = segment_.begin + warp() + i * step_;
        stages_.locate(segment_, min(kv_tile, segment_.sequence.kv_tiles - 1), i < Tile::kStages ? first_[i] : next_);
      }
    }
  }
  __device__ __forceinline__ void prefetch_table() {
    if (!prefetched_) return;
#pragma unroll
    for (int i = 0; i <= Tile::kStages; ++i) {
      (i < Tile::kStages ? first_[i] : next_).address.resolve(p_, segment_.batch);
    }
  }

  // Resolves the block-table entries that prefetch_table() missed or guessed wrong, before any copy of K or V is
  // issued, so that they do not queue behind it.
  __device__ __forceinline__ void resolve(const Schedule& schedule) {
    prefetched_ = prefetched_ && schedule.is_uniform() && step_ == schedule.step;
    segment_ = schedule.first;
    step_ = schedule.step;
    remaining_ = schedule.kv_tiles;
    kv_tile_ = segment_.begin + warp() - step_;
#pragma unroll
    for (int i = 0; i <= Tile::kStages; ++i) {
      typename Stages::Fetch& fetch = i < Tile::kStages ? first_[i] : next_;
      prefetched_ = prefetched_ && kv_tile_ + step_ < segment_.end;
      if (prefetched_) {
        kv_tile_ += step_;
        fetch.valid = true;
      } else {
        advance(fetch);
      }
    }
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < Tile::kStages; ++i) stages_.fill(i, first_[i]);
  }

  // The K of the next KV tile is in stage() until acquire_values(), its V from then until release(). V is zero outside
  // of rows [begin, end).
  __device__ __forceinline__ void acquire_keys(int begin, int end) {
    if constexpr (Stages::kSplitsStages) {
      stages_.wait_keys(stage_);
    } else {
      stages_.wait(stage_, begin, end);
      if constexpr (Stages::kFillsEarly) stages_.fill(stage_, take_next());
    }
  }
  __device__ __forceinline__ void acquire_values(int begin, int end) {
    if constexpr (Stages::kSplitsStages) {
      arch::warp_sync();
      refill_ = take_next();
      stages_.fill_keys(stage_, refill_);
      stages_.wait_values(stage_, begin, end);
    }
  }
  __device__ __forceinline__ int stage() const { return stage_; }

  __device__ __forceinline__ void release() {
    arch::warp_sync();
    if constexpr (Stages::kSplitsStages) {
      stages_.fill_values(stage_, refill_);
    } else if constexpr (!Stages::kFillsEarly) {
      stages_.fill(stage_, take_next());
    }
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }

 private:
  // The next tile to copy, whose block-table entry has arrived by now; requests the entry of the tile after it.
  __device__ __forceinline__ typename Stages::Fetch take_next() {
    const typename Stages::Fetch next = next_;
    advance(next_);
    return next;
  }

  // Only assigns the looked-up values: selecting between them would wait for the load.
  __device__ __forceinline__ void advance(typename Stages::Fetch& fetch) {
    kv_tile_ += step_;
    while (has_tile_ && kv_tile_ >= segment_.end) {
      has_tile_ = segment_.advance(p_, remaining_);
      kv_tile_ = segment_.begin + warp();
    }
    fetch.valid = has_tile_;
    if (has_tile_) stages_.resolve(segment_, kv_tile_, fetch);
  }

  __device__ __forceinline__ int warp() const { return warp_in_cluster(launch_, Tile::kWarps); }

  const AttentionLaunch& launch_;
  const AttentionParams& p_;
  Stages& stages_;
  Segment segment_;
  int remaining_, step_, kv_tile_;
  bool has_tile_ = true, prefetched_ = false;
  typename Stages::Fetch first_[Tile::kStages], next_, refill_;
  int stage_ = 0;
};

}  // namespace flashdecpp
