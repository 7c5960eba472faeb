// Decode attention, the way of the data. Every wave has a ring of stages in shared memory, the K rows and V rows of one
// group each, and fills it for itself: no wave waits for another. A ring is a way to copy a group (staged copies here,
// tensor copies in attention_ring_sm90.cuh, through registers in csrc/hip/attention_ring_amd.h); the stream decides
// which groups, unit after unit. A ring that has another place than its stages for what it fills fills early: a group
// is on its way while the one before it is consumed. Blocks come in teams where a ring says kTeams.
#pragma once

#include <climits>

#include "attention_schedule.cuh"

namespace flashdecpp {

// Where a key lies in the cache: of a paged one first the entry of the table, then the block that it names, to be
// looked at as late as possible.
struct Place {
  int block = 0, within = 0;

  __device__ __forceinline__ void aim(const AttentionParams& p, int batch, int key) {
    block = batch;
    within = key;
    if (p.block_table) {
      block = key / static_cast<unsigned>(p.block_size);
      within = key - block * p.block_size;
    }
  }
  __device__ __forceinline__ void look_up(const AttentionParams& p, int batch) {
    if (p.block_table) block = arch::load_fresh(p.block_table + batch * p.table_stride + block);
  }
  // A contiguous cache has a block a sequence. A table may say anything.
  __device__ __forceinline__ int checked_block(const AttentionParams& p) const {
    return min(max(block, 0), p.num_blocks - 1);
  }
};

// Copies of 16 bytes (8 where the rows of a float8 cache allow no more), by all lanes.
template <class Tile>
class StagedRing {
  using KV = typename Tile::KV;

 public:
  // 16 bytes of padding a row: the rows that a tile load touches at once start in different banks.
  static constexpr int kStride = Tile::kDims + 16 / sizeof(KV);
  static constexpr int kGroupBytes = kGroup * kStride * sizeof(KV), kStageBytes = 2 * kGroupBytes;
  static constexpr int kBarrierBytes = 0;
  static constexpr bool kAvailable = true, kPreviews = false;  // what is copied depends on the length
  static constexpr bool kFillsEarly = false, kTeams = false;
  using Rows = arch::PlainRows<KV, kStride>;
  struct Source {};  // all is in AttentionParams

  // What a lane knows of a group before it copies it: where a row of it lies, and which rows are seen. In a cache whose
  // blocks hold whole groups that is row 0, else the row of this lane.
  struct Next {
    Place place;
    int kv_head, begin, end;
    bool used = false;
  };

  __device__ StagedRing(unsigned char* stages, unsigned char*, const AttentionParams& p, const Source&)
      : p_(p), stages_(stages), whole_groups_(!p.block_table || p.block_size % kGroup == 0) {
    if (Tile::kWiden) {
      const uint64_t steps = p.k.block_stride | p.k.token_stride | p.k.head_stride | p.v.block_stride |
                             p.v.token_stride | p.v.head_stride | reinterpret_cast<uint64_t>(p.k_cache) |
                             reinterpret_cast<uint64_t>(p.v_cache) | p.head_dim;
      narrow_ = steps % 16 != 0;
    }
    if (p.head_dim < Tile::kDims) {  // zeros in the columns that no copy writes
      for (int at = arch::lane() * 16; at < Tile::kStages * kStageBytes; at += arch::kWaveSize * 16) {
        *reinterpret_cast<uint4*>(stages + at) = make_uint4(0, 0, 0, 0);
      }
    }
    arch::wave_sync();
  }

  __device__ __forceinline__ void look_up(const Segment& segment, int group, Next& next) const {
    const int first = (segment.sequence.first_group + group) * kGroup;
    next.kv_head = segment.kv_head;
    next.begin = segment.sequence.key_begin - first;
    next.end = segment.sequence.length - first;
    const int row = whole_groups_ ? 0 : arch::lane() % kGroup;
    if (whole_groups_ ? next.end > 0 : row >= next.begin && row < next.end) {
      next.place.aim(p_, segment.batch, first + row);
      next.place.look_up(p_, segment.batch);
    }
  }

  // One group of copies, also where there is nothing to copy: so many may be pending at every wait.
  __device__ __forceinline__ void fill(int stage, const Next& next) {
    if (next.used) {
      unsigned char* to = stages_ + stage * kStageBytes;
      copy(to, p_.k_cache, p_.k, next);
      copy(to + kGroupBytes, p_.v_cache, p_.v, next);
    }
    arch::copy_commit();
  }

  // Until the stage has arrived; rows outside of [begin, end) are zeros.
  __device__ __forceinline__ void wait(int /*stage*/, int /*begin*/, int /*end*/) {
    arch::copy_wait<Tile::kStages - 1>();
    arch::wave_sync();
  }

  __device__ __forceinline__ Rows keys(int stage) const { return {stages_ + stage * kStageBytes}; }
  __device__ __forceinline__ Rows values(int stage) const { return {stages_ + stage * kStageBytes + kGroupBytes}; }

  // Copies that this thread began itself, before its last `fills`, have arrived.
  __device__ __forceinline__ void wait_for_others(int fills) {
    if (fills >= Tile::kStages - 1) {
      arch::copy_wait<Tile::kStages - 1>();
    } else {
      arch::copy_wait<0>();
    }
  }

 private:
  __device__ __forceinline__ void copy(unsigned char* to, const void* cache, const CacheLayout& layout,
                                       const Next& next) {
    const KV* from = static_cast<const KV*>(cache) + next.place.checked_block(p_) * layout.block_stride +
                     next.place.within * layout.token_stride + next.kv_head * layout.head_stride;
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
    for (int i = 0; i < kGroup * kChunks / arch::kWaveSize; ++i) {
      const int index = i * arch::kWaveSize + arch::lane(), row = index / kChunks, at = index % kChunks * bytes;
      const bool seen = row >= next.begin && row < next.end;
      const KV* p = whole_groups_ ? from + row * stride : arch::from_lane(from, row);
      if (at >= p_.head_dim * static_cast<int>(sizeof(KV))) continue;
      arch::copy_async<bytes>(to + row * (kStride * static_cast<int>(sizeof(KV))) + at,
                              seen ? static_cast<const void*>(p + at / sizeof(KV)) : p_.k_cache, seen);
    }
  }

  const AttentionParams& p_;
  unsigned char* stages_;
  bool whole_groups_, narrow_ = false;
};

// The groups of one wave in the order in which it consumes them: of every segment of the block, each step-th.
template <class Tile, class Ring>
class KeyValueStream {
 public:
  __device__ __forceinline__ KeyValueStream(const AttentionLaunch& launch, Ring& ring)
      : launch_(launch), p_(launch.p), ring_(ring) {}

  // Looks up the first groups as if the work were cut by unit and the sequence as long as can be, in two steps: where
  // in the table, which needs nothing from memory, and what is there. Nothing is copied yet.
  __device__ __forceinline__ void aim(const Schedule& schedule) {
    if constexpr (Ring::kPreviews) {
      segment_ = schedule.first;
      segment_.sequence = Sequence(p_, INT_MAX);
      previewed_ = p_.window == 0 && segment_.batch < p_.batch && segment_.sequence.length > 0;
      step_ = schedule.step;
#pragma unroll
      for (int i = 0; i <= Tile::kStages; ++i) {
        const int group = segment_.begin + wave() + i * step_;
        ring_.aim(segment_, min(group, segment_.sequence.groups - 1), i < Tile::kStages ? begin_[i] : next_);
      }
    }
  }
  __device__ __forceinline__ void preview() {
    if (!previewed_) return;
#pragma unroll
    for (int i = 0; i <= Tile::kStages; ++i) {
      (i < Tile::kStages ? begin_[i] : next_).place.look_up(p_, segment_.batch);
    }
  }

  // Looks up what was not, or not rightly: all of it before the first copy, not to have to wait behind that.
  __device__ __forceinline__ void look_up(const Schedule& schedule) {
    previewed_ = previewed_ && schedule.by_unit() && step_ == schedule.step;
    segment_ = schedule.first;
    step_ = schedule.step;
    left_ = schedule.groups;
    group_ = segment_.begin + wave() - step_;
#pragma unroll
    for (int i = 0; i <= Tile::kStages; ++i) {
      typename Ring::Next& next = i < Tile::kStages ? begin_[i] : next_;
      previewed_ = previewed_ && group_ + step_ < segment_.end;
      if (previewed_) {
        group_ += step_;
        next.used = true;
      } else {
        take(next);
      }
    }
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < Tile::kStages; ++i) ring_.fill(i, begin_[i]);
  }

  // The next group is in the ring's stage() until release(); values outside of rows [begin, end) are zeros.
  __device__ __forceinline__ void acquire(int begin, int end) {
    ring_.wait(stage_, begin, end);
    if constexpr (Ring::kFillsEarly) fill_next(stage_);
  }
  __device__ __forceinline__ int stage() const { return stage_; }

  __device__ __forceinline__ void release() {
    arch::wave_sync();
    if constexpr (!Ring::kFillsEarly) fill_next(stage_);
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }

 private:
  // The look-up after next is under way before the next is needed.
  __device__ __forceinline__ void fill_next(int stage) {
    const typename Ring::Next now = next_;
    take(next_);
    ring_.fill(stage, now);
  }

  // Assigns what is looked up and no more: to choose between values would be to wait for them.
  __device__ __forceinline__ void take(typename Ring::Next& next) {
    group_ += step_;
    while (alive_ && group_ >= segment_.end) {
      alive_ = segment_.next(p_, left_);
      group_ = segment_.begin + wave();
    }
    next.used = alive_;
    if (alive_) ring_.look_up(segment_, group_, next);
  }

  __device__ __forceinline__ int wave() const { return wave_in_team(launch_, Tile::kWaves); }

  const AttentionLaunch& launch_;
  const AttentionParams& p_;
  Ring& ring_;
  Segment segment_;
  int left_, step_, group_;
  bool alive_ = true, previewed_ = false;
  typename Ring::Next begin_[Tile::kStages], next_;
  int stage_ = 0;
};

}  // namespace flashdecpp
