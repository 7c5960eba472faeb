// Decode attention, loads on AMD GPUs, which have no asynchronous copies to shared memory: all loads of a KV tile are
// issued to registers before anything waits for one, and stored to shared memory once the warp is done with the
// previous tile. A Stages class of cuda/attention/pipeline.cuh, in place of CpAsyncStages.
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
  static constexpr bool kAvailable = true, kPrefetchesTable = false, kUsesClusters = false, kSplitsStages = false;
  // Warps of 32 have no registers for a second tile: they load while other warps multiply.
  static constexpr bool kFillsEarly = arch::kWarpSize == 64;
  static_assert(Tile::kStages == 1);  // registers hold the second tile
  using Rows = arch::PlainRows<KV, kStride>;
  struct Source {};

  // `address` is that of row 0 if each KV tile lies in one cache block, else of row lane % 16. Rows [begin, end) are
  // visible.
  struct Fetch {
    KvAddress address;
    int kv_head, begin, end;
    bool valid = false;
  };

  __device__ RegisterStages(unsigned char* stages, unsigned char*, const AttentionParams& p, const Source&)
      : p_(p), stages_(stages), width_(p.head_dim * static_cast<int>(sizeof(KV))) {
    // Offsets within a tile are 32-bit.
    constexpr int64_t max_stride = INT32_MAX / (kKvTile * static_cast<int64_t>(sizeof(KV)));
    one_block_per_tile_ = (!p.block_table || p.block_size % kKvTile == 0) && p.k.token_stride < max_stride &&
                          p.v.token_stride < max_stride;
    if (Tile::kWiden) {
      const uint64_t alignment = p.k.block_stride | p.k.token_stride | p.k.head_stride | p.v.block_stride |
                                 p.v.token_stride | p.v.head_stride | reinterpret_cast<uint64_t>(p.k_cache) |
                                 reinterpret_cast<uint64_t>(p.v_cache) | p.head_dim;
      copy_8_bytes_ = alignment % 16 != 0;
    }
  }

  __device__ __forceinline__ void resolve(const Segment& segment, int kv_tile, Fetch& fetch) const {
    const int first_key = (segment.sequence.first_kv_tile + kv_tile) * kKvTile;
    fetch.kv_head = segment.kv_head;
    fetch.begin = max(segment.sequence.key_begin - first_key, 0);
    fetch.end = min(segment.sequence.length - first_key, kKvTile);
    const int row = one_block_per_tile_ ? 0 : arch::lane() % kKvTile;
    if (one_block_per_tile_ ? fetch.end > 0 : row >= fetch.begin && row < fetch.end) {
      fetch.address.locate(p_, segment.batch, first_key + row);
      fetch.address.resolve(p_, segment.batch);
    }
  }

  __device__ __forceinline__ void fill(int /*stage*/, const Fetch& fetch) {
    if (!fetch.valid) return;
    held_fetch_ = fetch;
    if constexpr (kFillsEarly) load<0>();
  }

  __device__ __forceinline__ void wait(int /*stage*/, int /*begin*/, int /*end*/) {
    if constexpr (kFillsEarly) store<0>();
    load_and_store<kFillsEarly ? kHeld : 0>();
    arch::warp_sync();
  }

  __device__ __forceinline__ Rows keys(int) const { return {stages_}; }
  __device__ __forceinline__ Rows values(int) const { return {stages_ + kTileBytes}; }
  __device__ __forceinline__ void wait_for_queries(int) {}  // copy_async is synchronous

 private:
  // Copies are 16 bytes per lane, K before V. If registers cannot hold all copies of a tile, the first kHeld are issued
  // early and the others, kHeld at a time, when the tile is needed.
  static constexpr int kRowChunks = Tile::kDims * sizeof(KV) / 16, kRowBytes = kStride * sizeof(KV);
  static constexpr int kCopiesOfK = (kKvTile * kRowChunks + arch::kWarpSize - 1) / arch::kWarpSize,
                       kCopies = 2 * kCopiesOfK;
  static constexpr int kMaxHeld = arch::kWarpSize == 64 ? 12 : 8;
  static constexpr int kHeld = kCopies <= kMaxHeld ? kCopies : kCopiesOfK <= kMaxHeld ? kCopiesOfK : kCopiesOfK / 2;
  static_assert(kCopies % kHeld == 0 && kHeld <= kMaxHeld);

  struct Copy {
    int row, at;  // row of the tile, byte within it; some lanes of the last copy may be past the last row
    bool value;   // of V, not of K

    __device__ __forceinline__ explicit Copy(int i, int lane)
        : row((i % kCopiesOfK * arch::kWarpSize + lane) / kRowChunks),
          at((i % kCopiesOfK * arch::kWarpSize + lane) % kRowChunks * 16),
          value(i >= kCopiesOfK) {}
  };

  template <int first>
  __device__ __forceinline__ void load() {
    if (held_fetch_.begin >= held_fetch_.end) return;  // no row is visible, and the cache may be empty
    if (one_block_per_tile_) {
      copy_8_bytes_ ? load<first, true, true>() : load<first, true, false>();
    } else {
      copy_8_bytes_ ? load<first, false, true>() : load<first, false, false>();
    }
  }

  // Rows and bytes out of range are replaced by some that are in range, as conditional loads are waited for one by one.
  template <int first, bool one_block, bool by_8_bytes>
  __device__ __forceinline__ void load() {
    if constexpr (!by_8_bytes || Tile::kWiden) {
      const Fetch& fetch = held_fetch_;
      const int block = fetch.address.checked_block(p_), lane = arch::rematerialize(arch::lane());
      const auto start = [&](const void* cache, const CacheLayout& layout) {
        if constexpr (one_block) {
          return static_cast<const KV*>(cache) + arch::uniform(block) * layout.block_stride +
                 arch::uniform(fetch.address.offset) * layout.token_stride + fetch.kv_head * layout.head_stride;
        } else {
          return static_cast<const KV*>(cache) + block * layout.block_stride +
                 fetch.address.offset * layout.token_stride + fetch.kv_head * layout.head_stride;
        }
      };
      const KV* const k = start(p_.k_cache, p_.k);
      const KV* const v = start(p_.v_cache, p_.v);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const Copy copy(first + i, lane);
        const int row = min(max(copy.row, fetch.begin), fetch.end - 1), at = copy.at < width_ ? copy.at : 0;
        const auto* from = reinterpret_cast<const unsigned char*>(copy.value ? v : k);
        int offset = at;
        if constexpr (one_block) {
          offset += row * static_cast<int>((copy.value ? p_.v : p_.k).token_stride * static_cast<int>(sizeof(KV)));
        } else {
          from = arch::shfl(from, row);
        }
        if constexpr (by_8_bytes) {
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
      const bool visible = copy.row >= held_fetch_.begin && copy.row < held_fetch_.end && copy.at < width_;
      const bool upper_half = visible && (!Tile::kWiden || copy.at + 8 < width_);
      const uint4 bits = make_uint4(visible ? held_[i].x : 0, visible ? held_[i].y : 0, upper_half ? held_[i].z : 0,
                                    upper_half ? held_[i].w : 0);
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
  bool one_block_per_tile_, copy_8_bytes_ = false;
  Fetch held_fetch_;
  uint4 held_[kHeld];
};

}  // namespace flashdecpp
