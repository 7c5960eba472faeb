// Decode attention, the way of the data. Every wave has a ring of stages in shared memory, the K rows and V rows of one
// group each, and fills it for itself: no wave waits for another. A ring is a way to copy a group (staged copies here,
// tensor copies in attention_ring_sm90.cuh); the stream decides which groups, unit after unit.
#pragma once

#include "attention_schedule.cuh"

namespace flashdecpp {

// Where in a paged cache a key lies; a contiguous one has a block a sequence.
struct Place {
  int block, within;
};

__device__ __forceinline__ Place place_of(const AttentionParams& p, int batch, int key) {
  if (!p.block_table) return {batch, key};
  const int index = key / static_cast<unsigned>(p.block_size);
  const int block = arch::load_fresh(p.block_table + batch * p.table_stride + index);
  return {min(max(block, 0), p.num_blocks - 1), key - index * p.block_size};
}

// Copies of 16 bytes (8 where the rows of a float8 cache allow no more), by all lanes.
template <class Tile>
class StagedRing {
  using KV = typename Tile::KV;

 public:
  // 16 bytes of padding a row: the rows that a tile load touches at once start in different banks.
  static constexpr int kStride = Tile::kDims + 16 / sizeof(KV);
  static constexpr int kGroupBytes = kGroup * kStride * sizeof(KV), kStageBytes = 2 * kGroupBytes;
  static constexpr int kBarrierBytes = 0;
  static constexpr bool kAvailable = true;
  using Rows = arch::PlainRows<KV, kStride>;
  struct Source {};  // all is in AttentionParams

  // What a lane knows of a group before it copies it: where a row of it lies, and which rows are seen. In a cache whose
  // blocks hold whole groups that is row 0, else the row of this lane.
  struct Next {
    const KV *k, *v;
    int begin, end;
    bool used;
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

  __device__ __forceinline__ Next look_up(const Segment& segment, int kv_head, int group) const {
    const int first = (segment.sequence.first_group + group) * kGroup;
    Next next{nullptr, nullptr, segment.sequence.key_begin - first, segment.sequence.length - first, true};
    const int row = whole_groups_ ? 0 : arch::lane() % kGroup;
    if (whole_groups_ ? next.end > 0 : row >= next.begin && row < next.end) {
      const Place place = place_of(p_, segment.batch, first + row);
      next.k = static_cast<const KV*>(p_.k_cache) + place.block * p_.k.block_stride +
               place.within * p_.k.token_stride + kv_head * p_.k.head_stride;
      next.v = static_cast<const KV*>(p_.v_cache) + place.block * p_.v.block_stride +
               place.within * p_.v.token_stride + kv_head * p_.v.head_stride;
    }
    return next;
  }

  __device__ __forceinline__ void prefetch(const Next&) const {}

  // One group of copies, also where there is nothing to copy: so many may be pending at every wait.
  __device__ __forceinline__ void fill(int stage, const Next& next) {
    if (next.used) {
      unsigned char* to = stages_ + stage * kStageBytes;
      if (Tile::kWiden && narrow_) {
        copy<8>(to, next.k, p_.k.token_stride, next);
        copy<8>(to + kGroupBytes, next.v, p_.v.token_stride, next);
      } else {
        copy<16>(to, next.k, p_.k.token_stride, next);
        copy<16>(to + kGroupBytes, next.v, p_.v.token_stride, next);
      }
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
  template <int bytes>
  __device__ __forceinline__ void copy(unsigned char* to, const KV* from, int64_t stride, const Next& next) {
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

// The groups of one wave in the order in which it consumes them, for every pass over the rows of every segment of the
// block: all of its own KV head's, or each kWaves-th of the one that the waves share.
template <class Tile, class Ring>
class KeyValueStream {
 public:
  __device__ KeyValueStream(const AttentionLaunch& launch, const Schedule& schedule, int passes)
      : launch_(launch), segment_(schedule.first), left_(schedule.groups), passes_(passes) {
    group_ = first_group();
    skip_empty();
  }

  __device__ __forceinline__ void start(Ring& ring) {
    typename Ring::Next first[Tile::kStages];
#pragma unroll
    for (int i = 0; i < Tile::kStages; ++i) first[i] = take(ring);
#pragma unroll
    for (int i = 0; i < Tile::kStages; ++i) ring.fill(i, first[i]);
    next_ = take(ring);
  }

  // The next group is in the ring's stage() until release(); values outside of rows [begin, end) are zeros.
  __device__ __forceinline__ void acquire(Ring& ring, int begin, int end) { ring.wait(stage_, begin, end); }
  __device__ __forceinline__ int stage() const { return stage_; }

  __device__ __forceinline__ void release(Ring& ring) {
    arch::wave_sync();
    ring.fill(stage_, next_);
    next_ = take(ring);
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }

  // Hints for the first groups. What they are derived from may be about to change: then they were of no use.
  __device__ __forceinline__ void prefetch(const Ring& ring, int groups) {
    for (int i = 0; i < groups && alive_; ++i) ring.prefetch(take(ring));
  }

 private:
  __device__ __forceinline__ bool shared() const { return launch_.block_heads == 1; }
  __device__ __forceinline__ int first_group() const { return segment_.begin + (shared() ? arch::wave() : 0); }

  __device__ __forceinline__ typename Ring::Next take(const Ring& ring) {
    if (!alive_) return {};
    const int kv_head = segment_.head_set * launch_.block_heads + (shared() ? 0 : arch::wave());
    const typename Ring::Next next = ring.look_up(segment_, kv_head, group_);
    group_ += shared() ? Tile::kWaves : 1;
    skip_empty();
    return next;
  }

  __device__ __forceinline__ void skip_empty() {
    while (alive_ && group_ >= segment_.end) {
      if (++pass_ == passes_) {
        pass_ = 0;
        alive_ = Schedule::next(launch_, segment_, left_);
      }
      group_ = first_group();
    }
  }

  const AttentionLaunch& launch_;
  Segment segment_;
  int left_, passes_, pass_ = 0, group_;
  bool alive_ = true;
  typename Ring::Next next_;
  int stage_ = 0;
};

}  // namespace flashdecpp
