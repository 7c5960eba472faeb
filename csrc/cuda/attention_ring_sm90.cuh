// The ring of attention_ring.cuh with tensor copies: one lane asks for a group in boxes of 16 rows of 128 bytes, and a
// barrier a stage counts the bytes. For caches whose blocks hold whole groups.
#pragma once

#include "attention_ring.cuh"

namespace flashdecpp {

// The cache as [head_dim, block_size, kv_heads, num_blocks], nearest first. Columns and rows beyond it read as zeros.
struct CacheMaps {
  CUtensorMap k, v;
};

template <class Tile>
class TensorRing {
  using KV = typename Tile::KV;

 public:
  static constexpr int kBoxColumns = 128 / sizeof(KV), kBoxes = (Tile::kDims + kBoxColumns - 1) / kBoxColumns;
  static constexpr int kBoxBytes = 128 * kGroup, kGroupBytes = kBoxes * kBoxBytes, kStageBytes = 2 * kGroupBytes;
  static constexpr int kBarrierBytes = Tile::kWaves * Tile::kStages * sizeof(arch::CopyBarrier);
  static constexpr bool kAvailable = arch::kHasTensorCopies, kPreviews = true, kFillsEarly = false;
  static constexpr bool kTeams = Tile::kDims <= 128;  // wider rows leave no registers for it
  using Rows = arch::SwizzledRows<KV, kGroup>;
  using Source = CacheMaps;

  struct Next {
    Place place;
    int kv_head;
    bool used = false;
  };

  __device__ TensorRing(unsigned char* stages, unsigned char* barriers, const AttentionParams& p, const Source& source)
      : p_(p),
        source_(source),
        stages_(stages),
        barriers_(reinterpret_cast<arch::CopyBarrier*>(barriers) + arch::wave() * Tile::kStages) {
    if (arch::lane() == 0) {
      arch::prefetch_map(source.k);
      arch::prefetch_map(source.v);
    }
    if (arch::lane() < Tile::kStages) barriers_[arch::lane()].init();
    arch::order_before_copies();
    arch::wave_sync();
  }

  __device__ __forceinline__ void aim(const Segment& segment, int group, Next& next) const {
    next.kv_head = segment.kv_head;
    next.place.aim(p_, segment.batch, (segment.sequence.first_group + group) * kGroup);
  }
  __device__ __forceinline__ void look_up(const Segment& segment, int group, Next& next) const {
    if (segment.sequence.length == 0) {  // its only group is filled with anything
      next = {Place(), segment.kv_head, next.used};
    } else {
      aim(segment, group, next);
      next.place.look_up(p_, segment.batch);
    }
  }

  __device__ __forceinline__ void fill(int stage, const Next& next) {
    if (arch::lane() != 0 || !next.used) return;
    unsigned char* to = stages_ + stage * kStageBytes;
    arch::CopyBarrier& barrier = barriers_[stage];
    const int block = next.place.checked_block(p_);
    barrier.expect(kStageBytes);
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      arch::copy_tensor(to + b * kBoxBytes, source_.k, b * kBoxColumns, next.place.within, next.kv_head, block,
                        barrier);
    }
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      arch::copy_tensor(to + kGroupBytes + b * kBoxBytes, source_.v, b * kBoxColumns, next.place.within, next.kv_head,
                        block, barrier);
    }
  }

  // The copies brought whole groups: what is not seen is taken out here.
  __device__ __forceinline__ void wait(int stage, int begin, int end) {
    barriers_[stage].wait(parity_ >> stage & 1);
    parity_ ^= 1u << stage;
    if (begin > 0 || end < kGroup) {
      unsigned char* values = stages_ + stage * kStageBytes + kGroupBytes;
      for (int i = arch::lane(); i < kGroupBytes / 16; i += arch::kWaveSize) {
        const int row = i / 8 % kGroup;
        if (row < begin || row >= end) *reinterpret_cast<uint4*>(values + i * 16) = make_uint4(0, 0, 0, 0);
      }
      arch::order_before_copies();
      arch::wave_sync();
    }
  }

  __device__ __forceinline__ Rows keys(int stage) const { return {stages_ + stage * kStageBytes}; }
  __device__ __forceinline__ Rows values(int stage) const { return {stages_ + stage * kStageBytes + kGroupBytes}; }

  __device__ __forceinline__ void wait_for_others(int /*fills*/) { arch::copy_wait<0>(); }

 private:
  const AttentionParams& p_;
  const Source& source_;
  unsigned char* stages_;
  arch::CopyBarrier* barriers_;
  unsigned parity_ = 0;
};

}  // namespace flashdecpp
