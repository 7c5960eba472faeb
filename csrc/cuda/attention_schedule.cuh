// Decode attention, who does what. A unit is one KV head of one sequence and up to kRows of the query rows that share
// it; its keys come in groups of kGroup. The units of a sequence are taken by blocks that run side by side: keys of
// neighbouring KV heads are neighbours in memory, and what blocks of further query rows read again is still in L2.
//
// A team is a power of two of blocks that run side by side, in a cluster: what takes a unit's groups in turn are all of
// its waves. Its blocks merge what they have in each other's shared memory. Where there are no clusters, and where
// there are units enough for all of the machine, it is one block.
//
// By unit      every unit has up to unit_teams teams, which take its groups in turn, one for each of their waves at a
//              time: where the caller wants so many splits, where a sequence is alone, and where all sequences are
//              about as long. Nothing is cut in vain, and where the first groups lie can be looked up before the length
//              is known.
// By line      else: all sequences' groups lie behind each other on one line, which is cut into equal shares, with a
//              team for each unit of each share: a long sequence among short ones is spread over as many teams as its
//              share of all keys. A team finishes the units that lie inside its share; of a unit that begins
//              before it or ends after it, it leaves a part.
//
// Everything is derived from seq_lens on the device, by every wave for itself. The team with the last piece of a unit
// merges its parts, in their order, when it is done with all else. It waits for teams with smaller numbers only, which
// are started before it.
#pragma once

#include "attention_tile.cuh"

namespace flashdecpp {

inline constexpr unsigned kMinGroups = 8;    // that a block is worth, as choose_attention_grid has it
inline constexpr unsigned kLongGroups = 96;  // of a wave, that are worth another team

// This block's number in its team, and this wave's, of blocks of so many waves.
__device__ __forceinline__ int rank_in_team(const AttentionLaunch& launch) {
  return blockIdx.x & ((1 << launch.team_log2) - 1);
}
__device__ __forceinline__ int wave_in_team(const AttentionLaunch& launch, int block_waves) {
  return rank_in_team(launch) * block_waves + arch::wave();
}

// A run of groups of one unit.
struct Segment {
  int batch, kv_head;
  int row_begin;   // query row
  int begin, end;  // groups, counted in the unit
  bool whole;      // nobody else has groups of the unit
  Sequence sequence;

  __device__ __forceinline__ void set_unit(const AttentionLaunch& launch, int unit) {
    kv_head = unit;
    row_begin = 0;
    if (launch.row_blocks > 1) {
      kv_head = unit / static_cast<unsigned>(launch.row_blocks);
      row_begin = (unit - kv_head * launch.row_blocks) * launch.slot_rows;
    }
  }

  __device__ __forceinline__ RowBlock rows(const AttentionLaunch& launch) const {
    return {batch, kv_head, row_begin, min(launch.slot_rows, launch.rows() - row_begin), sequence.length};
  }

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
    }
    return own_;
  }
  // The difference wraps around where this lane's begin after it.
  __device__ bool holds(unsigned at) const { return at - scan_.before < own_; }

  const AttentionParams& p_;
  int run_;  // sequences
  Sequence sequence_;
  unsigned own_;
  arch::WaveScan scan_;
};

// What a block does. The constructor needs nothing from memory: it says where the block's team begins if the work is
// cut by unit, and what is its step if all teams of the unit take part. load() asks for the first length, and with
// finish() all is known.
class Schedule {
 public:
  Segment first;
  int groups = 0;  // of this team, or of the unit that it shares; none: nothing to do
  int step;        // from a wave's group to its next
  int first_slot;  // of a part of the first segment; that of a later segment is the next
  Slots merge{};   // of the unit that this team merges, which is the first segment's; count 0: none

  __device__ __forceinline__ Schedule(const AttentionLaunch& launch, int block_waves)
      : step((block_waves << launch.team_log2) * launch.unit_teams),
        team_(blockIdx.x >> launch.team_log2),
        waves_(block_waves << launch.team_log2) {
    const unsigned units = launch.sequence_units(), teams = launch.unit_teams * units;
    first.batch = team_ / teams;
    const unsigned in_sequence = team_ - first.batch * teams;
    split_ = in_sequence / units;
    first.set_unit(launch, in_sequence - split_ * units);
    first.begin = split_ * waves_;
  }

  __device__ __forceinline__ void load(const AttentionLaunch& launch) {
    if (first.batch < launch.p.batch) length_ = arch::uniform(Sequence::load_length(launch.p, first.batch));
  }

  __device__ bool by_unit() const { return by_unit_; }

  __device__ __forceinline__ void finish(const AttentionLaunch& launch) {
    if (launch.shares == 0) return take_turns(launch);
    if (even(launch)) {
      if (first.batch < launch.p.batch) take_turns(launch);
    } else {
      cut_line(launch);
    }
  }

 private:
  // Whether no sequence is much longer than the average, and all together are long enough to go by unit. This stands
  // between every launch and its first load, hence no more is asked than the lengths.
  static __device__ __forceinline__ bool even(const AttentionLaunch& launch) {
    const int window = launch.p.window;
    float total = 0.f, longest = 0.f;
#pragma unroll 1
    for (int batch = arch::lane(); batch < launch.p.batch; batch += arch::kWaveSize) {
      const int keys = max(Sequence::load_length(launch.p, batch), 0);
      const float length = static_cast<float>(window > 0 ? min(keys, window) : keys);
      total += length;
      longest = fmaxf(longest, length);
    }
    total = arch::neighbours_reduce<arch::kWaveSize>(total, [](float a, float b) { return a + b; });
    longest = arch::neighbours_reduce<arch::kWaveSize>(longest, [](float a, float b) { return fmaxf(a, b); });
    return longest * static_cast<float>(launch.p.batch) <= 1.25f * total && total >= launch.least_by_unit;
  }

  __device__ __forceinline__ void take_turns(const AttentionLaunch& launch) {
    first.sequence = Sequence(launch.p, length_);
    first.end = first.sequence.groups;
    first_slot = team_;
    const int parts = min(launch.unit_teams, ((first.end - 1) >> launch.worth_log2) + 1);
    step = waves_ * parts;
    if (split_ < parts) groups = first.end - first.begin;
    first.whole = parts == 1;
    if (split_ == parts - 1 && parts > 1) {
      const int units = launch.sequence_units(), begin = first_slot - split_ * units;
      merge = {begin, begin + units, units, parts};
    }
  }

  __device__ __forceinline__ void cut_line(const AttentionLaunch& launch) {
    SequenceFinder sequences(launch.p);
    const unsigned units = launch.sequence_units(), share = team_ / units, unit = team_ - share * units;
    const unsigned total = sequences.total();
    const unsigned few = min(max((total >> launch.team_log2) / kMinGroups, 1u), launch.shares);
    const unsigned count = min(max(total / (kLongGroups * waves_), few), launch.most_shares);
    if (share >= count) return;
    const Shares shares(total, count);
    const unsigned begin = shares.begin(share);
    groups = shares.begin(share + 1) - begin;
    by_unit_ = false;
    step = waves_;
    first = sequences.find(begin);
    first.set_unit(launch, unit);
    first.end = min(first.sequence.groups, first.begin + groups);
    first.whole = first.end - first.begin == first.sequence.groups;
    first_slot = 2 * team_;

    // The unit that began in an earlier share is merged here if it ends here.
    if (first.begin > 0 && first.begin + groups >= first.sequence.groups) {
      const unsigned unit_begin = begin - first.begin, from = shares.holder(unit_begin), slots = 2 * units;
      const int slot = from * slots + 2 * unit + (unit_begin > shares.begin(from)),
                second = (from + 1) * slots + 2 * unit;
      merge = {slot, second, static_cast<int>(slots), static_cast<int>(share - from + 1)};
    }
  }

  unsigned team_;
  int waves_, split_, length_;
  bool by_unit_ = true;
};

}  // namespace flashdecpp
