// Decode attention, the way of the data. Every warp has a ring of stages in shared memory, the K rows and V rows of one
// group each, and fills it for itself: no warp waits for another. A ring is a way to copy a group (staged copies here,
// tensor copies in attention_ring_sm90.cuh, through registers in csrc/hip/attention_ring_amd.h); the stream decides
// which groups, unit after unit. A ring that has another address than its stages for what it fills fills early: a group
// is on its way while the one before it is consumed. Blocks come in teams where a ring says kUsesClusters.
#pragma once

#include <climits>

#include "cuda/attention/scheduler.cuh"

namespace flashdecpp {

// Where a key lies in the cache: of a paged one first the entry of the table, then the block that it names, to be
// looked at as late as possible.
struct KvAddress {
  int block = 0, within = 0;

  __device__ __forceinline__ void locate(const AttentionParams& p, int batch, int key) {
    block = batch;
    within = key;
    if (p.block_table) {
      block = key / static_cast<unsigned>(p.block_size);
      within = key - block * p.block_size;
    }
  }
  __device__ __forceinline__ void resolve(const AttentionParams& p, int batch) {
    if (p.block_table) block = arch::load_fresh(p.block_table + batch * p.table_stride + block);
  }
  // A contiguous cache has a block a sequence. A table may say anything.
  __device__ __forceinline__ int checked_block(const AttentionParams& p) const {
    return min(max(block, 0), p.num_blocks - 1);
  }
};

// Copies of 16 bytes (8 where the rows of a float8 cache allow no more), by all lanes.
template <class Tile>
class CpAsyncStages {
  using KV = typename Tile::KV;

 public:
  // 16 bytes of padding a row: the rows that a tile load touches at once start in different banks.
  static constexpr int kStride = Tile::kDims + 16 / sizeof(KV);
  static constexpr int kTileBytes = kKvTile * kStride * sizeof(KV), kStageBytes = 2 * kTileBytes;
  static constexpr int kBarrierBytes = 0;
  static constexpr bool kAvailable = true, kPrefetchesTable = false;  // what is copied depends on the length
  static constexpr bool kFillsEarly = false, kUsesClusters = false;
  using Rows = arch::PlainRows<KV, kStride>;
  struct Source {};  // all is in AttentionParams

  // What a lane knows of a group before it copies it: where a row of it lies, and which rows are seen. In a cache whose
  // blocks hold whole groups that is row 0, else the row of this lane.
  struct Next {
    KvAddress address;
    int kv_head, begin, end;
    bool used = false;
  };

  __device__ CpAsyncStages(unsigned char* stages, unsigned char*, const AttentionParams& p, const Source&)
      : p_(p), stages_(stages), whole_tiles_(!p.block_table || p.block_size % kKvTile == 0) {
    if (Tile::kWiden) {
      const uint64_t steps = p.k.block_stride | p.k.token_stride | p.k.head_stride | p.v.block_stride |
                             p.v.token_stride | p.v.head_stride | reinterpret_cast<uint64_t>(p.k_cache) |
                             reinterpret_cast<uint64_t>(p.v_cache) | p.head_dim;
      narrow_ = steps % 16 != 0;
    }
    if (p.head_dim < Tile::kDims) {  // zeros in the columns that no copy writes
      for (int at = arch::lane() * 16; at < Tile::kStages * kStageBytes; at += arch::kWarpSize * 16) {
        *reinterpret_cast<uint4*>(stages + at) = make_uint4(0, 0, 0, 0);
      }
    }
    arch::warp_sync();
  }

  __device__ __forceinline__ void resolve(const Segment& segment, int kv_tile, Next& next) const {
    const int first = (segment.sequence.first_kv_tile + kv_tile) * kKvTile;
    next.kv_head = segment.kv_head;
    next.begin = segment.sequence.key_begin - first;
    next.end = segment.sequence.length - first;
    const int row = whole_tiles_ ? 0 : arch::lane() % kKvTile;
    if (whole_tiles_ ? next.end > 0 : row >= next.begin && row < next.end) {
      next.address.locate(p_, segment.batch, first + row);
      next.address.resolve(p_, segment.batch);
    }
  }

  // One group of copies, also where there is nothing to copy: so many may be pending at every wait.
  __device__ __forceinline__ void fill(int stage, const Next& next) {
    if (next.used) {
      unsigned char* to = stages_ + stage * kStageBytes;
      copy(to, p_.k_cache, p_.k, next);
      copy(to + kTileBytes, p_.v_cache, p_.v, next);
    }
    arch::copy_commit();
  }

  // Until the stage has arrived; rows outside of [begin, end) are zeros.
  __device__ __forceinline__ void wait(int /*stage*/, int /*begin*/, int /*end*/) {
    arch::copy_wait<Tile::kStages - 1>();
    arch::warp_sync();
  }

  __device__ __forceinline__ Rows keys(int stage) const { return {stages_ + stage * kStageBytes}; }
  __device__ __forceinline__ Rows values(int stage) const { return {stages_ + stage * kStageBytes + kTileBytes}; }

  // Copies that this thread began itself, before its last `fills`, have arrived.
  __device__ __forceinline__ void wait_for_queries(int fills) {
    if (fills >= Tile::kStages - 1) {
      arch::copy_wait<Tile::kStages - 1>();
    } else {
      arch::copy_wait<0>();
    }
  }

 private:
  __device__ __forceinline__ void copy(unsigned char* to, const void* cache, const CacheLayout& layout,
                                       const Next& next) {
    const KV* from = static_cast<const KV*>(cache) + next.address.checked_block(p_) * layout.block_stride +
                     next.address.within * layout.token_stride + next.kv_head * layout.head_stride;
    if (Tile::kWiden && narrow_) {
      copy_rows<8>(to, from, layout.token_stride, next);
    } else {
      copy_rows<16>(to, from, layout.token_stride, next);
    }
  }

  template <int bytes>
  __device__ __forceinline__ void copy_rows(unsigned char* to, const KV* from, int64_t stride, const Next& next) {
    constexpr int kChunks = Tile::kDims * sizeof(KV) / bytes;
#pragma unroll
    for (int i = 0; i < kKvTile * kChunks / arch::kWarpSize; ++i) {
      const int index = i * arch::kWarpSize + arch::lane(), row = index / kChunks, at = index % kChunks * bytes;
      const bool seen = row >= next.begin && row < next.end;
      const KV* p = whole_tiles_ ? from + row * stride : arch::shfl(from, row);
      if (at >= p_.head_dim * static_cast<int>(sizeof(KV))) continue;
      arch::copy_async<bytes>(to + row * (kStride * static_cast<int>(sizeof(KV))) + at,
                              seen ? static_cast<const void*>(p + at / sizeof(KV)) : p_.k_cache, seen);
    }
  }

  const AttentionParams& p_;
  unsigned char* stages_;
  bool whole_tiles_, narrow_ = false;
};

// The groups of one warp in the order in which it consumes them: of every segment of the block, each step-th.
template <class Tile, class Stages>
class KvPipeline {
 public:
  __device__ __forceinline__ KvPipeline(const AttentionLaunch& launch, Stages& stages)
      : launch_(launch), p_(launch.p), stages_(stages) {}

  // Looks up the first groups as if the work were cut by unit and the sequence as long as can be, in two steps: where
  // in the table, which needs nothing from memory, and what is there. Nothing is copied yet.
  __device__ __forceinline__ void locate(const Schedule& schedule) {
    if constexpr (Stages::kPrefetchesTable) {
      segment_ = schedule.first;
      segment_.sequence = Sequence(p_, INT_MAX);
      prefetched_ = p_.window == 0 && segment_.batch < p_.batch && segment_.sequence.length > 0;
      step_ = schedule.step;
#pragma unroll
      for (int i = 0; i <= Tile::kStages; ++i) {
        const int kv_tile = segment_.begin + warp() + i * step_;
        stages_.locate(segment_, min(kv_tile, segment_.sequence.kv_tiles - 1), i < Tile::kStages ? begin_[i] : next_);
      }
    }
  }
  __device__ __forceinline__ void prefetch_table() {
    if (!prefetched_) return;
#pragma unroll
    for (int i = 0; i <= Tile::kStages; ++i) {
      (i < Tile::kStages ? begin_[i] : next_).address.resolve(p_, segment_.batch);
    }
  }

  // Looks up what was not, or not rightly: all of it before the first copy, not to have to wait behind that.
  __device__ __forceinline__ void resolve(const Schedule& schedule) {
    prefetched_ = prefetched_ && schedule.is_uniform() && step_ == schedule.step;
    segment_ = schedule.first;
    step_ = schedule.step;
    left_ = schedule.kv_tiles;
    kv_tile_ = segment_.begin + warp() - step_;
#pragma unroll
    for (int i = 0; i <= Tile::kStages; ++i) {
      typename Stages::Next& next = i < Tile::kStages ? begin_[i] : next_;
      prefetched_ = prefetched_ && kv_tile_ + step_ < segment_.end;
      if (prefetched_) {
        kv_tile_ += step_;
        next.used = true;
      } else {
        advance(next);
      }
    }
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < Tile::kStages; ++i) stages_.fill(i, begin_[i]);
  }

  // The next group is in the ring's stage() until release(); values outside of rows [begin, end) are zeros.
  __device__ __forceinline__ void acquire(int begin, int end) {
    stages_.wait(stage_, begin, end);
    if constexpr (Stages::kFillsEarly) fill_next(stage_);
  }
  __device__ __forceinline__ int stage() const { return stage_; }

  __device__ __forceinline__ void release() {
    arch::warp_sync();
    if constexpr (!Stages::kFillsEarly) fill_next(stage_);
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }

 private:
  // The look-up after next is under way before the next is needed.
  __device__ __forceinline__ void fill_next(int stage) {
    const typename Stages::Next now = next_;
    advance(next_);
    stages_.fill(stage, now);
  }

  // Assigns what is looked up and no more: to choose between values would be to wait for them.
  __device__ __forceinline__ void advance(typename Stages::Next& next) {
    kv_tile_ += step_;
    while (alive_ && kv_tile_ >= segment_.end) {
      alive_ = segment_.next(p_, left_);
      kv_tile_ = segment_.begin + warp();
    }
    next.used = alive_;
    if (alive_) stages_.resolve(segment_, kv_tile_, next);
  }

  __device__ __forceinline__ int warp() const { return warp_in_cluster(launch_, Tile::kWarps); }

  const AttentionLaunch& launch_;
  const AttentionParams& p_;
  Stages& stages_;
  Segment segment_;
  int left_, step_, kv_tile_;
  bool alive_ = true, prefetched_ = false;
  typename Stages::Next begin_[Tile::kStages], next_;
  int stage_ = 0;
};

}  // namespace flashdecpp
