// Decode attention, who does what. A unit is one KV head of one sequence and up to kRows of the query rows that share
// it; its keys come in groups of kKvTile. The units of a sequence are taken by blocks that run side by side: keys of
// neighboring KV heads are neighbors in memory, and what blocks of further query rows read again is still in L2.
//
// A team is a power of two of blocks that run side by side, in a cluster: what takes a unit's groups in turn are all of
// its warps. Its blocks merge what they have in each other's shared memory. Where there are no clusters, and where
// there are units enough for all of the machine, it is one block.
//
// By unit      every unit has up to uniform_splits teams, which take its groups in turn, one for each of their warps at
// a
//              time: where the caller wants so many splits, where a sequence is alone, and where all sequences are
//              about as long. Nothing is cut in vain, and where the first groups lie can be looked up before the length
//              is known.
// By line      else: all sequences' groups lie behind each other on one line, which is cut into equal streams, with a
//              team for each unit of each share: a long sequence among short ones is spread over as many teams as its
//              share of all keys. A team finishes the units that lie inside its share; of a unit that begins
//              before it or ends after it, it leaves a part.
//
// Everything is derived from seq_lens on the device, by every warp for itself. The team with the last piece of a unit
// merges its parts, in their order, when it is done with all else. It waits for teams with smaller numbers only, which
// are started before it.
#pragma once

#include "cuda/attention/tile.cuh"

namespace flashdecpp {

// This block's number in its team, and this warp's, of blocks of so many warps.
__device__ __forceinline__ int cluster_rank(const AttentionLaunch& launch) {
  return blockIdx.x & ((1 << launch.cluster_size_log2) - 1);
}
__device__ __forceinline__ int warp_in_cluster(const AttentionLaunch& launch, int block_warps) {
  return cluster_rank(launch) * block_warps + arch::warp();
}

// A run of groups of one unit.
struct Segment {
  int batch, kv_head;
  int row_begin;   // query row
  int begin, end;  // groups, rescale_or_one in the unit
  bool whole;      // nobody else has groups of the unit
  Sequence sequence;

  __device__ __forceinline__ void set_work_tile(const AttentionLaunch& launch, int work_tile) {
    kv_head = work_tile;
    row_begin = 0;
    if (launch.query_tiles > 1) {
      kv_head = work_tile / static_cast<unsigned>(launch.query_tiles);
      row_begin = (work_tile - kv_head * launch.query_tiles) * launch.slot_rows;
    }
  }

  __device__ __forceinline__ QueryTile rows(const AttentionLaunch& launch) const {
    return {batch, kv_head, row_begin, min(launch.slot_rows, launch.rows() - row_begin), sequence.length};
  }

  // Moves on; `left` are the groups that remain, this segment's included.
  __device__ __forceinline__ bool next(const AttentionParams& p, int& left) {
    left -= end - begin;
    if (left <= 0) return false;
    sequence = {p, arch::uniform(Sequence::load_length(p, ++batch))};
    begin = 0;
    end = min(sequence.kv_tiles, left);
    whole = end == sequence.kv_tiles;
    return true;
  }
};

// The slots of one unit's parts, in order.
struct Slots {
  int first, second, step, count;
  __device__ int operator[](int i) const { return i == 0 ? first : second + (i - 1) * step; }
};

// `total` cut into `count` streams that differ by one at most.
struct StreamSplit {
  unsigned length, longer;  // the first `longer` of them have one more

  __device__ StreamSplit(unsigned total, unsigned count) : length(total / count), longer(total - length * count) {}
  __device__ unsigned begin(unsigned i) const { return i * length + min(i, longer); }
  __device__ unsigned stream_of(unsigned at) const {
    const unsigned with_longer = longer * (length + 1);
    return at < with_longer ? at / (length + 1) : longer + (at - with_longer) / length;
  }
};

// Looks for sequences by their groups' place on the line, every warp for itself: a lane holds a run of sequences, or,
// of that run, one.
class SequenceFinder {
 public:
  __device__ __forceinline__ explicit SequenceFinder(const AttentionParams& p)
      : p_(p), run_((p.batch + arch::kWarpSize - 1) / arch::kWarpSize), scan_(own_kv_tiles()) {}

  __device__ unsigned total() const { return scan_.total; }

  // The sequence that group `at` of the line is in, which there must be; begin is `at` in its own count.
  __device__ __forceinline__ Segment find(unsigned at) {
    int batch = arch::lane() * run_;
    if (run_ > 1) {
      const int run = arch::first_lane(holds(at));
      at -= arch::shfl(static_cast<int>(scan_.before), run);
      for (batch = run * run_ + arch::lane();; batch += arch::kWarpSize) {
        own_ = 0;
        if (batch < p_.batch) {
          sequence_ = Sequence::load(p_, batch);
          own_ = sequence_.kv_tiles;
        }
        scan_ = arch::WarpScan(own_);
        if (arch::warp_any(holds(at))) break;
        at -= scan_.total;
      }
    }
    const int source = arch::first_lane(holds(at));
    Segment found;
    found.batch = arch::uniform(arch::shfl(batch, source));
    found.sequence = sequence_.shfl(source);
    found.begin = at - arch::uniform(arch::shfl(static_cast<int>(scan_.before), source));
    return found;
  }

 private:
  __device__ __forceinline__ unsigned own_kv_tiles() {
    own_ = 0;
    const int begin = arch::lane() * run_, end = min(begin + run_, p_.batch);
#pragma unroll 4
    for (int batch = begin; batch < end; ++batch) {
      sequence_ = Sequence::load(p_, batch);
      own_ += sequence_.kv_tiles;
    }
    return own_;
  }
  // The difference wraps around where this lane's begin after it.
  __device__ bool holds(unsigned at) const { return at - scan_.before < own_; }

  const AttentionParams& p_;
  int run_;  // sequences
  Sequence sequence_;
  unsigned own_;
  arch::WarpScan scan_;
};

// What a block does. The constructor needs nothing from memory: it says where the block's team begins if the work is
// cut by unit, and what is its step if all teams of the unit take part. load() asks for the first length, and with
// finish() all is known.
class Schedule {
 public:
  Segment first;
  int kv_tiles = 0;  // of this team, or of the unit that it streams; none: nothing to do
  int step;          // from a warp's group to its next
  int first_slot;    // of a part of the first segment; that of a later segment is the next
  Slots merge{};     // of the unit that this team merges, which is the first segment's; count 0: none

  __device__ __forceinline__ Schedule(const AttentionLaunch& launch, int block_warps)
      : step((block_warps << launch.cluster_size_log2) * launch.uniform_splits),
        cluster_(blockIdx.x >> launch.cluster_size_log2),
        warps_(block_warps << launch.cluster_size_log2) {
    const unsigned work_tiles = launch.work_tiles_per_sequence(), clusters = launch.uniform_splits * work_tiles;
    first.batch = cluster_ / clusters;
    const unsigned in_sequence = cluster_ - first.batch * clusters;
    split_ = in_sequence / work_tiles;
    first.set_work_tile(launch, in_sequence - split_ * work_tiles);
    first.begin = split_ * warps_;
  }

  __device__ __forceinline__ void load(const AttentionLaunch& launch) {
    if (first.batch < launch.p.batch) length_ = arch::uniform(Sequence::load_length(launch.p, first.batch));
  }

  __device__ bool is_uniform() const { return uniform_; }

  __device__ __forceinline__ void finish(const AttentionLaunch& launch) {
    if (launch.streams == 0) return split_uniformly(launch);
    if (even(launch)) {
      if (first.batch < launch.p.batch) split_uniformly(launch);
    } else {
      split_stream_k(launch);
    }
  }

 private:
  // Whether no sequence is much longer than the average, and all together are long enough to go by unit. This stands
  // between every launch and its first load, hence no more is asked than the lengths.
  static __device__ __forceinline__ bool even(const AttentionLaunch& launch) {
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
    return longest * static_cast<float>(launch.p.batch) <= 1.25f * total && total >= launch.min_uniform_tiles;
  }

  __device__ __forceinline__ void split_uniformly(const AttentionLaunch& launch) {
    first.sequence = Sequence(launch.p, length_);
    first.end = first.sequence.kv_tiles;
    first_slot = cluster_;
    const int parts = min(launch.uniform_splits, ((first.end - 1) >> launch.min_kv_tiles_log2) + 1);
    step = warps_ * parts;
    if (split_ < parts) kv_tiles = first.end - first.begin;
    first.whole = parts == 1;
    if (split_ == parts - 1 && parts > 1) {
      const int work_tiles = launch.work_tiles_per_sequence(), begin = first_slot - split_ * work_tiles;
      merge = {begin, begin + work_tiles, work_tiles, parts};
    }
  }

  __device__ __forceinline__ void split_stream_k(const AttentionLaunch& launch) {
    SequenceFinder sequences(launch.p);
    const unsigned work_tiles = launch.work_tiles_per_sequence(), stream = cluster_ / work_tiles,
                   work_tile = cluster_ - stream * work_tiles;
    const unsigned total = sequences.total();
    const unsigned few = min(max((total >> launch.cluster_size_log2) / kMinKvTiles, 1u), launch.streams);
    const unsigned count = min(max(total / (kLongKvTiles * warps_), few), launch.max_streams);
    if (stream >= count) return;
    const StreamSplit streams(total, count);
    const unsigned begin = streams.begin(stream);
    kv_tiles = streams.begin(stream + 1) - begin;
    uniform_ = false;
    step = warps_;
    first = sequences.find(begin);
    first.set_work_tile(launch, work_tile);
    first.end = min(first.sequence.kv_tiles, first.begin + kv_tiles);
    first.whole = first.end - first.begin == first.sequence.kv_tiles;
    first_slot = 2 * cluster_;

    // The unit that began in an earlier share is merged here if it ends here.
    if (first.begin > 0 && first.begin + kv_tiles >= first.sequence.kv_tiles) {
      const unsigned tile_begin = begin - first.begin, from = streams.stream_of(tile_begin), slots = 2 * work_tiles;
      const int slot = from * slots + 2 * work_tile + (tile_begin > streams.begin(from)),
                second = (from + 1) * slots + 2 * work_tile;
      merge = {slot, second, static_cast<int>(slots), static_cast<int>(stream - from + 1)};
    }
  }

  unsigned cluster_;
  int warps_, split_, length_;
  bool uniform_ = true;
};

}  // namespace flashdecpp
