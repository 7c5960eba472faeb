// Decode attention, the way of the data on AMD machines, where nothing copies to shared memory by itself: a group's
// loads go to registers, all of them before anything waits for one, and from there to shared memory when the warp is
// through with the group before. In address of CpAsyncStages in csrc/cuda/attention_ring.cuh, which is hipified beside
// this.
#pragma once

#include "cuda/attention/pipeline.cuh"

namespace flashdecpp {

template <class Tile>
class RegisterStages {
  using KV = typename Tile::KV;

 public:
  static constexpr int kStride = Tile::kDims + 16 / sizeof(KV);  // as in CpAsyncStages
  static constexpr int kTileBytes = kKvTile * kStride * sizeof(KV), kStageBytes = 2 * kTileBytes;
  static constexpr int kBarrierBytes = 0;
  static constexpr bool kAvailable = true, kPrefetchesTable = false, kUsesClusters = false;
  // A warp of 32 has no registers for a second group: it loads while other warps multiply.
  static constexpr bool kFillsEarly = arch::kWarpSize == 64;
  static_assert(Tile::kStages == 1);  // the registers are the other
  using Rows = arch::PlainRows<KV, kStride>;
  struct Source {};

  // Where row 0 of a group lies, or, in a cache whose blocks hold no whole groups, the row of this lane; and which rows
  // are seen.
  struct Next {
    KvAddress address;
    int kv_head, begin, end;
    bool used = false;
  };

  __device__ RegisterStages(unsigned char* stages, unsigned char*, const AttentionParams& p, const Source&)
      : p_(p), stages_(stages), width_(p.head_dim * static_cast<int>(sizeof(KV))) {
    // Offsets within a group are of 32 bits.
    constexpr int64_t most = INT32_MAX / (kKvTile * static_cast<int64_t>(sizeof(KV)));
    whole_tiles_ =
        (!p.block_table || p.block_size % kKvTile == 0) && p.k.token_stride < most && p.v.token_stride < most;
    if (Tile::kWiden) {
      const uint64_t steps = p.k.block_stride | p.k.token_stride | p.k.head_stride | p.v.block_stride |
                             p.v.token_stride | p.v.head_stride | reinterpret_cast<uint64_t>(p.k_cache) |
                             reinterpret_cast<uint64_t>(p.v_cache) | p.head_dim;
      narrow_ = steps % 16 != 0;
    }
  }

  __device__ __forceinline__ void resolve(const Segment& segment, int kv_tile, Next& next) const {
    const int first = (segment.sequence.first_kv_tile + kv_tile) * kKvTile;
    next.kv_head = segment.kv_head;
    next.begin = max(segment.sequence.key_begin - first, 0);
    next.end = min(segment.sequence.length - first, kKvTile);
    const int row = whole_tiles_ ? 0 : arch::lane() % kKvTile;
    if (whole_tiles_ ? next.end > 0 : row >= next.begin && row < next.end) {
      next.address.locate(p_, segment.batch, first + row);
      next.address.resolve(p_, segment.batch);
    }
  }

  __device__ __forceinline__ void fill(int /*stage*/, const Next& next) {
    if (!next.used) return;
    held_next_ = next;
    if constexpr (kFillsEarly) load<0>();
  }

  __device__ __forceinline__ void wait(int /*stage*/, int /*begin*/, int /*end*/) {
    if constexpr (kFillsEarly) store<0>();
    load_and_store<kFillsEarly ? kHeld : 0>();
    arch::warp_sync();
  }

  __device__ __forceinline__ Rows keys(int) const { return {stages_}; }
  __device__ __forceinline__ Rows values(int) const { return {stages_ + kTileBytes}; }
  __device__ __forceinline__ void wait_for_queries(int) {}  // other copies are made at once

 private:
  // Of 16 bytes a lane, K's before V's. Those of a group that registers cannot hold ahead are loaded when the group is
  // wanted, as many at a time.
  static constexpr int kRowChunks = Tile::kDims * sizeof(KV) / 16, kRowBytes = kStride * sizeof(KV);
  static constexpr int kHalf = (kKvTile * kRowChunks + arch::kWarpSize - 1) / arch::kWarpSize, kCopies = 2 * kHalf;
  static constexpr int kMost = arch::kWarpSize == 64 ? 12 : 8;
  static constexpr int kHeld = kCopies <= kMost ? kCopies : kHalf <= kMost ? kHalf : kHalf / 2;
  static_assert(kCopies % kHeld == 0 && kHeld <= kMost);

  struct Copy {
    int row, at;  // the row in its group, bytes within it; of a few lanes a row beyond
    bool value;   // of V

    __device__ __forceinline__ explicit Copy(int i, int lane)
        : row((i % kHalf * arch::kWarpSize + lane) / kRowChunks),
          at((i % kHalf * arch::kWarpSize + lane) % kRowChunks * 16),
          value(i >= kHalf) {}
  };

  template <int first>
  __device__ __forceinline__ void load() {
    if (held_next_.begin >= held_next_.end) return;  // no row is seen: there may be no cache
    if (whole_tiles_) {
      narrow_ ? load<first, true, true>() : load<first, true, false>();
    } else {
      narrow_ ? load<first, false, true>() : load<first, false, false>();
    }
  }

  // In address of what is not seen, something that is: loads under a condition would be waited for one by one.
  template <int first, bool whole, bool narrow>
  __device__ __forceinline__ void load() {
    if constexpr (!narrow || Tile::kWiden) {
      const Next& next = held_next_;
      const int block = next.address.checked_block(p_), lane = arch::rematerialize(arch::lane());
      const auto start = [&](const void* cache, const CacheLayout& layout) {
        if constexpr (whole) {
          return static_cast<const KV*>(cache) + arch::uniform(block) * layout.block_stride +
                 arch::uniform(next.address.within) * layout.token_stride + next.kv_head * layout.head_stride;
        } else {
          return static_cast<const KV*>(cache) + block * layout.block_stride +
                 next.address.within * layout.token_stride + next.kv_head * layout.head_stride;
        }
      };
      const KV* const k = start(p_.k_cache, p_.k);
      const KV* const v = start(p_.v_cache, p_.v);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const Copy copy(first + i, lane);
        const int row = min(max(copy.row, next.begin), next.end - 1), at = copy.at < width_ ? copy.at : 0;
        const auto* from = reinterpret_cast<const unsigned char*>(copy.value ? v : k);
        int offset = at;
        if constexpr (whole) {
          offset += row * static_cast<int>((copy.value ? p_.v : p_.k).token_stride * static_cast<int>(sizeof(KV)));
        } else {
          from = arch::shfl(from, row);
        }
        if constexpr (narrow) {
          const uint2 low = *reinterpret_cast<const uint2*>(from + offset);
          const uint2 high = *reinterpret_cast<const uint2*>(from + offset + (at + 8 < width_ ? 8 : 0));
          held_[i] = make_uint4(low.x, low.y, high.x, high.y);
        } else {
          held_[i] = *reinterpret_cast<const uint4*>(from + offset);
        }
      }
    }
  }

  template <int first>
  __device__ __forceinline__ void store() {
    const int lane = arch::rematerialize(arch::lane());
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const Copy copy(first + i, lane);
      const bool seen = copy.row >= held_next_.begin && copy.row < held_next_.end && copy.at < width_;
      const bool whole = seen && (!Tile::kWiden || copy.at + 8 < width_);
      const uint4 bits =
          make_uint4(seen ? held_[i].x : 0, seen ? held_[i].y : 0, whole ? held_[i].z : 0, whole ? held_[i].w : 0);
      if (kKvTile * kRowChunks % arch::kWarpSize != 0 && copy.row >= kKvTile) continue;
      *reinterpret_cast<uint4*>(stages_ + (copy.value ? kTileBytes : 0) + copy.row * kRowBytes + copy.at) = bits;
    }
  }

  template <int first>
  __device__ __forceinline__ void load_and_store() {
    if constexpr (first < kCopies) {
      load<first>();
      store<first>();
      load_and_store<first + kHeld>();
    }
  }

  const AttentionParams& p_;
  unsigned char* stages_;
  int width_;  // bytes of a row
  bool whole_tiles_, narrow_ = false;
  Next held_next_;
  uint4 held_[kHeld];
};

}  // namespace flashdecpp
