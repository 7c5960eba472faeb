// Decode attention, who does what. A unit is one KV head of one sequence; its keys come in groups of kGroup. The KV
// heads of a sequence, whose keys lie side by side in memory, are read by blocks that run side by side.
//
// By unit      every unit has unit_blocks blocks, which take its groups in turn, a group for each of their waves at a
//              time: where the caller wants so many splits, where a sequence is alone, and where all sequences are
//              about as long. Nothing is cut in vain, and where the first groups lie can be looked up before the length
//              is known.
// By line      else: all sequences' groups lie behind each other on one line, which is cut into equal shares, with a
//              block for each KV head of each share: a long sequence among short ones is spread over as many blocks as
//              its share of all keys. A block finishes the units that lie inside its share; of a unit that begins
//              before it or ends after it, it leaves a part.
//
// Everything is derived from seq_lens on the device, by every wave for itself. The block with the last piece of a unit
// merges its parts, in their order, when it is done with all else. It waits for blocks with smaller numbers only, which
// are started before it.
#pragma once

#include "attention_tile.cuh"

namespace flashdecpp {

inline constexpr unsigned kMinGroups = 8;     // that a block is worth, as choose_attention_grid has it
inline constexpr unsigned kLongGroups = 768;  // of a block, that are worth another one

// A run of groups of one unit.
struct Segment {
  int batch, kv_head;
  int begin, end;  // groups, counted in the unit
  bool whole;      // nobody else has groups of the unit
  Sequence sequence;

  // Moves on; `left` are the groups that remain, this segment's included.
  __device__ __forceinline__ bool next(const AttentionParams& p, int& left) {
    left -= end - begin;
    if (left <= 0) return false;
    sequence = {p, arch::uniform(Sequence::load_length(p, ++batch))};
    begin = 0;
    end = min(sequence.groups, left);
    whole = end == sequence.groups;
    return true;
  }
};

// The slots of one unit's parts, in order.
struct Slots {
  int first, second, step, count;
  __device__ int operator[](int i) const { return i == 0 ? first : second + (i - 1) * step; }
};

// `total` cut into `count` shares that differ by one at most.
struct Shares {
  unsigned share, longer;  // the first `longer` of them have one more

  __device__ Shares(unsigned total, unsigned count) : share(total / count), longer(total - share * count) {}
  __device__ unsigned begin(unsigned i) const { return i * share + min(i, longer); }
  __device__ unsigned holder(unsigned at) const {
    const unsigned with_longer = longer * (share + 1);
    return at < with_longer ? at / (share + 1) : longer + (at - with_longer) / share;
  }
};

// Looks for sequences by their groups' place on the line, every wave for itself: a lane holds a run of sequences, or,
// of that run, one.
class SequenceFinder {
 public:
  __device__ __forceinline__ explicit SequenceFinder(const AttentionParams& p)
      : p_(p), run_((p.batch + arch::kWaveSize - 1) / arch::kWaveSize), scan_(own_groups()) {}

  __device__ unsigned total() const { return scan_.total; }
  // Whether no sequence is much longer than the average.
  __device__ bool even() const {
    return !arch::wave_any(longest_ * static_cast<float>(p_.batch) > 1.25f * static_cast<float>(total()));
  }

  // The sequence that group `at` of the line is in, which there must be; begin is `at` in its own count.
  __device__ __forceinline__ Segment find(unsigned at) {
    int batch = arch::lane() * run_;
    if (run_ > 1) {
      const int run = arch::first_lane(holds(at));
      at -= arch::from_lane(static_cast<int>(scan_.before), run);
      for (batch = run * run_ + arch::lane();; batch += arch::kWaveSize) {
        own_ = 0;
        if (batch < p_.batch) {
          sequence_ = Sequence::load(p_, batch);
          own_ = sequence_.groups;
        }
        scan_ = arch::WaveScan(own_);
        if (arch::wave_any(holds(at))) break;
        at -= scan_.total;
      }
    }
    const int source = arch::first_lane(holds(at));
    Segment found;
    found.batch = arch::uniform(arch::from_lane(batch, source));
    found.sequence = sequence_.from_lane(source);
    found.begin = at - arch::uniform(arch::from_lane(static_cast<int>(scan_.before), source));
    return found;
  }

 private:
  __device__ __forceinline__ unsigned own_groups() {
    own_ = 0;
    const int begin = arch::lane() * run_, end = min(begin + run_, p_.batch);
#pragma unroll 4
    for (int batch = begin; batch < end; ++batch) {
      sequence_ = Sequence::load(p_, batch);
      own_ += sequence_.groups;
      longest_ = fmaxf(longest_, static_cast<float>(sequence_.groups));
    }
    return own_;
  }
  // The difference wraps around where this lane's begin after it.
  __device__ bool holds(unsigned at) const { return at - scan_.before < own_; }

  const AttentionParams& p_;
  int run_;  // sequences
  Sequence sequence_;
  unsigned own_;
  float longest_ = 0.f;  // of the lane's
  arch::WaveScan scan_;
};

// What a block does. The constructor is quick: it says where the block begins if the work is cut by unit. With finish()
// all is known.
class Schedule {
 public:
  Segment first;
  int groups = 0;  // of this block, or of the unit that it shares; none: nothing to do
  int step;        // from a wave's group to its next
  int first_slot;  // of a part of the first segment; that of a later segment is the next
  Slots merge{};   // of the unit that this block merges, which is the first segment's; count 0: none

  __device__ __forceinline__ Schedule(const AttentionLaunch& launch, int waves)
      : step(waves * launch.unit_blocks), waves_(waves) {
    const unsigned kv_heads = launch.p.kv_heads, blocks = launch.unit_blocks * kv_heads;
    first.batch = blockIdx.x / blocks;
    const unsigned in_sequence = blockIdx.x - first.batch * blocks;
    split_ = in_sequence / kv_heads;
    first.kv_head = in_sequence - split_ * kv_heads;
    first.begin = split_ * waves;
    if (first.batch < launch.p.batch) length_ = arch::uniform(Sequence::load_length(launch.p, first.batch));
  }

  __device__ bool by_unit() const { return by_unit_; }

  __device__ __forceinline__ void finish(const AttentionLaunch& launch) {
    if (launch.shares == 0) return take_turns(launch);
    SequenceFinder sequences(launch.p);
    if (sequences.even() && sequences.total() >= launch.least_by_unit) {
      if (first.batch < launch.p.batch) take_turns(launch);
    } else {
      cut_line(launch, sequences);
    }
  }

 private:
  __device__ __forceinline__ void take_turns(const AttentionLaunch& launch) {
    first.sequence = Sequence(launch.p, length_);
    first.end = first.sequence.groups;
    first_slot = blockIdx.x;
    groups = max(first.end - first.begin, 0);
    const int parts = min(launch.unit_blocks, (first.end + waves_ - 1) / waves_);
    first.whole = parts == 1;
    if (split_ == parts - 1 && parts > 1) {
      const int kv_heads = launch.p.kv_heads, begin = first_slot - split_ * kv_heads;
      merge = {begin, begin + kv_heads, kv_heads, parts};
    }
  }

  __device__ __forceinline__ void cut_line(const AttentionLaunch& launch, SequenceFinder& sequences) {
    const unsigned kv_heads = launch.p.kv_heads, share = blockIdx.x / kv_heads, head = blockIdx.x - share * kv_heads;
    const unsigned total = sequences.total();
    const unsigned few = min(max(total / kMinGroups, 1u), launch.shares);
    const unsigned count = min(max(total / kLongGroups, few), launch.most_shares);
    if (share >= count) return;
    const Shares shares(total, count);
    const unsigned begin = shares.begin(share);
    groups = shares.begin(share + 1) - begin;
    by_unit_ = false;
    step = waves_;
    first = sequences.find(begin);
    first.kv_head = head;
    first.end = min(first.sequence.groups, first.begin + groups);
    first.whole = first.end - first.begin == first.sequence.groups;
    first_slot = 2 * blockIdx.x;

    // The unit that began in an earlier share is merged here if it ends here.
    if (first.begin > 0 && first.begin + groups >= first.sequence.groups) {
      const unsigned unit_begin = begin - first.begin, from = shares.holder(unit_begin), slots = 2 * kv_heads;
      const int slot = from * slots + 2 * head + (unit_begin > shares.begin(from)),
                second = (from + 1) * slots + 2 * head;
      merge = {slot, second, static_cast<int>(slots), static_cast<int>(share - from + 1)};
    }
  }

  int waves_, split_, length_;
  bool by_unit_ = true;
};

}  // namespace flashdecpp
