// Decode attention, work distribution: which cluster processes which KV tiles of which work tiles. CTAs that run at the
// same time process the work tiles of one sequence: keys of neighboring KV heads are neighbors in memory, and keys
// that CTAs of further query tiles read again are still in L2.
//
// The warps of a cluster stride through the KV tiles of its segment, and its CTAs combine their partials in each
// other's shared memory. Without hardware clusters, and where work tiles alone fill the device, a cluster is one CTA.
//
// Uniform split    Every work tile has up to uniform_splits clusters, whose warps take its KV tiles in turn. Used if
//                  the caller fixes num_splits, for a single sequence, and for sequences of about the same length.
//                  No cut is wasted, and the block-table entries of the first KV tiles can be looked up before the
//                  length is known.
// Stream-K split   Otherwise, the KV tiles of all sequences are concatenated and cut into equal streams, with one
//                  cluster per stream and work tile of a sequence. A long sequence among short ones is spread over as
//                  many clusters as its fraction of all keys. A cluster finishes the work tiles that lie within its
//                  stream and leaves a partial of one that begins before its stream or ends after it.
//
// Every warp derives the schedule for itself from seq_lens on the device. The cluster with a work tile's last KV tiles
// combines the partials, in order, after finishing everything else. It waits only for clusters with smaller indices,
// which start before it.
#pragma once

#include "cuda/attention/tile.cuh"

namespace flashdecpp {

inline constexpr unsigned kMinKvTiles = 8;    // per CTA: fewer are not worth another one
inline constexpr unsigned kLongKvTiles = 96;  // per warp: more are worth streams beyond those that fill the device

// The index of this CTA in its cluster, and of this warp, in CTAs of `cta_warps` warps.
__device__ __forceinline__ int cluster_rank(const AttentionLaunch& launch) {
  return blockIdx.x & ((1 << launch.cluster_size_log2) - 1);
}
__device__ __forceinline__ int warp_in_cluster(const AttentionLaunch& launch, int cta_warps) {
  return cluster_rank(launch) * cta_warps + arch::warp();
}

// The KV tiles of one work tile that one cluster processes.
struct Segment {
  int batch, kv_head;
  int row_begin;   // first query row of the work tile
  int begin, end;  // KV tiles, counted from the first of the work tile
  bool complete;   // no other cluster has KV tiles of the work tile
  Sequence sequence;

  __device__ __forceinline__ void set_work_tile(const AttentionLaunch& launch, int work_tile) {
    kv_head = work_tile;
    row_begin = 0;
    if (launch.query_tiles > 1) {
      kv_head = work_tile / static_cast<unsigned>(launch.query_tiles);
      row_begin = (work_tile - kv_head * launch.query_tiles) * launch.slot_rows;
    }
  }

  __device__ __forceinline__ QueryTile queries(const AttentionLaunch& launch) const {
    return {batch, kv_head, row_begin, min(launch.slot_rows, launch.rows() - row_begin), sequence.length};
  }

  // Moves to the stream's next segment, if any. `remaining` counts the stream's KV tiles from this segment on.
  __device__ __forceinline__ bool advance(const AttentionParams& p, int& remaining) {
    remaining -= end - begin;
    if (remaining <= 0) return false;
    sequence = {p, arch::uniform(Sequence::load_length(p, ++batch))};
    begin = 0;
    end = min(sequence.kv_tiles, remaining);
    complete = end == sequence.kv_tiles;
    return true;
  }
};

// The slots of one work tile's partials, in order of their keys.
struct PartialSlots {
  int first, second, step, count;
  __device__ int operator[](int i) const { return i == 0 ? first : second + (i - 1) * step; }
};

// `total` KV tiles cut into `count` streams whose lengths differ by at most one.
struct StreamSplit {
  unsigned length, num_longer;  // the first `num_longer` have one more

  __device__ StreamSplit(unsigned total, unsigned count) : length(total / count), num_longer(total - length * count) {}
  __device__ unsigned begin(unsigned i) const { return i * length + min(i, num_longer); }
  __device__ unsigned stream_of(unsigned tile) const {
    const unsigned longer_end = num_longer * (length + 1);
    return tile < longer_end ? tile / (length + 1) : num_longer + (tile - longer_end) / length;
  }
};

// Finds the sequence that holds a KV tile of the concatenation, every warp for itself. A lane first counts the tiles of
// a run of consecutive sequences; within the run that holds the tile, of one sequence.
class SequenceFinder {
 public:
  __device__ __forceinline__ explicit SequenceFinder(const AttentionParams& p)
      : p_(p), run_((p.batch + arch::kWarpSize - 1) / arch::kWarpSize), scan_(count_tiles()) {}

  __device__ unsigned total() const { return scan_.total; }

  // The sequence of KV tile `tile`, which must be below total(); `begin` of the result is the tile's index in it.
  __device__ __forceinline__ Segment find(unsigned tile) {
    int batch = arch::lane() * run_;
    if (run_ > 1) {
      const int run = arch::first_lane(contains(tile));
      tile -= arch::shfl(static_cast<int>(scan_.before), run);
      for (batch = run * run_ + arch::lane();; batch += arch::kWarpSize) {
        tiles_ = 0;
        if (batch < p_.batch) {
          sequence_ = Sequence::load(p_, batch);
          tiles_ = sequence_.kv_tiles;
        }
        scan_ = arch::WarpScan(tiles_);
        if (arch::warp_any(contains(tile))) break;
        tile -= scan_.total;
      }
    }
    const int lane = arch::first_lane(contains(tile));
    Segment found;
    found.batch = arch::uniform(arch::shfl(batch, lane));
    found.sequence = sequence_.shfl(lane);
    found.begin = tile - arch::uniform(arch::shfl(static_cast<int>(scan_.before), lane));
    return found;
  }

 private:
  __device__ __forceinline__ unsigned count_tiles() {
    tiles_ = 0;
    const int begin = arch::lane() * run_, end = min(begin + run_, p_.batch);
#pragma unroll 4
    for (int batch = begin; batch < end; ++batch) {
      sequence_ = Sequence::load(p_, batch);
      tiles_ += sequence_.kv_tiles;
    }
    return tiles_;
  }
  // Unsigned: wraps to a large value if this lane's tiles start after `tile`.
  __device__ bool contains(unsigned tile) const { return tile - scan_.before < tiles_; }

  const AttentionParams& p_;
  int run_;  // sequences per lane
  Sequence sequence_;
  unsigned tiles_;
  arch::WarpScan scan_;
};

// The work of one CTA. The constructor reads no memory: it gives the cluster's first segment and its step for a uniform
// split in which all splits of the work tile have keys. load() requests the first length, and finish() completes it.
class Schedule {
 public:
  Segment first;
  int kv_tiles = 0;         // of the cluster's stream, or of its work tile from first.begin on; 0: nothing to do
  int step;                 // from one KV tile of a warp to its next
  int first_slot;           // of the first segment's partial; a later segment uses the one after it
  PartialSlots partials{};  // to be combined here, of the first segment's work tile; count 0: none

  __device__ __forceinline__ Schedule(const AttentionLaunch& launch, int cta_warps)
      : step((cta_warps << launch.cluster_size_log2) * launch.uniform_splits),
        cluster_(blockIdx.x >> launch.cluster_size_log2),
        cluster_warps_(cta_warps << launch.cluster_size_log2) {
    const unsigned work_tiles = launch.work_tiles_per_sequence(),
                   clusters_per_sequence = launch.uniform_splits * work_tiles;
    first.batch = cluster_ / clusters_per_sequence;
    const unsigned index_in_sequence = cluster_ - first.batch * clusters_per_sequence;
    split_ = index_in_sequence / work_tiles;
    first.set_work_tile(launch, index_in_sequence - split_ * work_tiles);
    first.begin = split_ * cluster_warps_;
  }

  __device__ __forceinline__ void load(const AttentionLaunch& launch) {
    if (first.batch < launch.p.batch) length_ = arch::uniform(Sequence::load_length(launch.p, first.batch));
  }

  __device__ bool is_uniform() const { return uniform_; }

  __device__ __forceinline__ void finish(const AttentionLaunch& launch) {
    if (launch.streams == 0) return split_uniformly(launch);
    if (prefers_uniform(launch)) {
      if (first.batch < launch.p.batch) split_uniformly(launch);
    } else {
      split_stream_k(launch);
    }
  }

 private:
  // Whether no sequence is much longer than the average, and all together are long enough for a uniform split. Every
  // launch runs this before its first load of keys, so it reads only the lengths.
  static __device__ __forceinline__ bool prefers_uniform(const AttentionLaunch& launch) {
    const int window = launch.p.window;
    float total = 0.f, longest = 0.f;
#pragma unroll 1
    for (int batch = arch::lane(); batch < launch.p.batch; batch += arch::kWarpSize) {
      const int keys = max(Sequence::load_length(launch.p, batch), 0);
      const float length = static_cast<float>(window > 0 ? min(keys, window) : keys);
      total += length;
      longest = fmaxf(longest, length);
    }
    total = arch::lanes_reduce<arch::kWarpSize>(total, [](float a, float b) { return a + b; });
    longest = arch::lanes_reduce<arch::kWarpSize>(longest, [](float a, float b) { return fmaxf(a, b); });
    return longest * static_cast<float>(launch.p.batch) <= 1.25f * total && total >= launch.min_uniform_keys;
  }

  __device__ __forceinline__ void split_uniformly(const AttentionLaunch& launch) {
    first.sequence = Sequence(launch.p, length_);
    first.end = first.sequence.kv_tiles;
    first_slot = cluster_;
    const int splits = min(launch.uniform_splits, ((first.end - 1) >> launch.min_kv_tiles_log2) + 1);
    step = cluster_warps_ * splits;
    if (split_ < splits) kv_tiles = first.end - first.begin;
    first.complete = splits == 1;
    if (split_ == splits - 1 && splits > 1) {
      const int work_tiles = launch.work_tiles_per_sequence(), begin = first_slot - split_ * work_tiles;
      partials = {begin, begin + work_tiles, work_tiles, splits};
    }
  }

  __device__ __forceinline__ void split_stream_k(const AttentionLaunch& launch) {
    SequenceFinder sequences(launch.p);
    const unsigned work_tiles = launch.work_tiles_per_sequence(), stream = cluster_ / work_tiles,
                   work_tile = cluster_ - stream * work_tiles;
    const unsigned total = sequences.total();
    const unsigned base_streams = min(max((total >> launch.cluster_size_log2) / kMinKvTiles, 1u), launch.streams);
    const unsigned num_streams = min(max(total / (kLongKvTiles * cluster_warps_), base_streams), launch.max_streams);
    if (stream >= num_streams) return;
    const StreamSplit split(total, num_streams);
    const unsigned begin = split.begin(stream);
    kv_tiles = split.begin(stream + 1) - begin;
    uniform_ = false;
    step = cluster_warps_;
    first = sequences.find(begin);
    first.set_work_tile(launch, work_tile);
    first.end = min(first.sequence.kv_tiles, first.begin + kv_tiles);
    first.complete = first.end - first.begin == first.sequence.kv_tiles;
    first_slot = 2 * cluster_;

    // A work tile that began in an earlier stream and ends in this one is combined here.
    if (first.begin > 0 && first.begin + kv_tiles >= first.sequence.kv_tiles) {
      const unsigned sequence_begin = begin - first.begin, first_stream = split.stream_of(sequence_begin),
                     slots_per_stream = 2 * work_tiles;
      const int slot = first_stream * slots_per_stream + 2 * work_tile + (sequence_begin > split.begin(first_stream)),
                second = (first_stream + 1) * slots_per_stream + 2 * work_tile;
      partials = {slot, second, static_cast<int>(slots_per_stream), static_cast<int>(stream - first_stream + 1)};
    }
  }

  unsigned cluster_;
  int cluster_warps_, split_, length_;
  bool uniform_ = true;
};

}  // namespace flashdecpp
