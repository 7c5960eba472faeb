// Decode attention, who does what. A unit is one KV head of one sequence; its keys come in groups of kGroup. All units'
// groups lie behind each other on one line, in the order of (sequence, KV head).
//
//   num_splits 0   the line is cut into shares, a block each: a long sequence among short ones is spread over as many
//                  blocks as its share of all keys. The blocks that fill the machine take three quarters of the line in
//                  equal shares; multiprocessors do not get equal shares of the memory's bandwidth, so the rest is left
//                  to small blocks that start where others have ended. A block finishes the units that lie inside its
//                  share; of a unit that begins before it or ends after it, it leaves a part. Everything is derived
//                  from seq_lens on the device, by every block for itself.
//   num_splits n   every unit is cut into n pieces (fewer where it has fewer groups), a block each: the pieces depend
//                  on nothing else in the batch.
//
// The block with the last piece of a unit merges its parts, in their order, when it is done with all else. It waits
// for blocks with smaller numbers only, which are started before it.
#pragma once

#include "attention_tile.cuh"

namespace flashdecpp {

inline constexpr unsigned kMinGroups = 8;  // that a block is worth, as choose_attention_grid has it

// A run of groups of one unit.
struct Segment {
  int batch, kv_head;
  int begin, end;  // groups, counted in the unit
  Sequence sequence;

  __device__ bool whole() const { return begin == 0 && end == sequence.groups; }

  // Moves on; `left` are the groups that remain, this segment's included.
  __device__ __forceinline__ bool next(const AttentionParams& p, int& left) {
    left -= end - begin;
    if (left <= 0) return false;
    if (++kv_head == p.kv_heads) {
      kv_head = 0;
      sequence = Sequence(p, ++batch);
    }
    begin = 0;
    end = min(sequence.groups, left);
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

// The line of `total` groups in shares for `blocks` blocks, of which a part fills the machine.
struct LineShares {
  unsigned blocks, large;  // all, and those with the large shares
  unsigned rest_begin;     // where the small shares begin
  Shares first, rest;

  // `filling` blocks of the grid fill the machine.
  __device__ LineShares(unsigned total, unsigned filling, unsigned grid)
      : blocks(max(min(total / kMinGroups, grid), 1u)),
        large(blocks < grid ? blocks : filling),
        rest_begin(large == blocks ? total : total - total / 4),
        first(rest_begin, large),
        rest(total - rest_begin, max(blocks - large, 1u)) {}

  __device__ unsigned begin(unsigned i) const {
    return i < large ? first.begin(i) : rest_begin + rest.begin(i - large);
  }
  __device__ unsigned holder(unsigned at) const {
    return at < rest_begin ? first.holder(at) : large + rest.holder(at - rest_begin);
  }
};

template <int kThreads>
struct ScheduleMemory {
  int groups[kThreads];
  Segment start;
};

struct Schedule {
  Segment first;
  int groups = 0;  // of this block
  int first_slot;  // of a part of the first segment; that of a later segment is the next
  Slots merge;     // of the unit that this block merges, which is the first segment's; count 0: none

  template <int kThreads>
  __device__ __forceinline__ Schedule(const AttentionLaunch& launch, ScheduleMemory<kThreads>& memory) {
    const AttentionParams& p = launch.p;
    merge.count = 0;
    if (p.num_splits > 0) {
      cut_unit(p);
    } else {
      cut_line(launch, memory);
    }
    first.end = min(first.sequence.groups, first.begin + groups);
  }

 private:
  __device__ __forceinline__ void cut_unit(const AttentionParams& p) {
    const unsigned unit = blockIdx.x / static_cast<unsigned>(p.num_splits), base = unit * p.num_splits;
    const unsigned split = blockIdx.x - base;
    first.batch = unit / static_cast<unsigned>(p.kv_heads);
    first.kv_head = unit - first.batch * p.kv_heads;
    first.sequence = Sequence(p, first.batch);
    const unsigned splits = min(p.num_splits, first.sequence.groups);
    first_slot = blockIdx.x;
    if (split >= splits) return;
    const Shares shares(first.sequence.groups, splits);
    first.begin = shares.begin(split);
    groups = shares.begin(split + 1) - first.begin;
    if (split == splits - 1 && splits > 1)
      merge = {static_cast<int>(base), static_cast<int>(base) + 1, 1, static_cast<int>(splits)};
  }

  template <int kThreads>
  __device__ __forceinline__ void cut_line(const AttentionLaunch& launch, ScheduleMemory<kThreads>& memory) {
    const AttentionParams& p = launch.p;
    const int per_thread = (p.batch + kThreads - 1) / kThreads;
    const int batch_begin = threadIdx.x * per_thread, batch_end = min(batch_begin + per_thread, p.batch);
    Sequence sequence;  // the last of this thread's
    int own = 0;
#pragma unroll 1
    for (int b = batch_begin; b < batch_end; ++b) {
      sequence = Sequence(p, b);
      own += sequence.groups;
    }
    memory.groups[threadIdx.x] = own;
    __syncthreads();
    unsigned before = 0, total = 0;
#pragma unroll 4
    for (int t = 0; t < min(kThreads, p.batch); ++t) {
      if (t == static_cast<int>(threadIdx.x)) before = total;
      total += memory.groups[t];
    }
    before *= p.kv_heads;
    total *= p.kv_heads;

    const unsigned block = blockIdx.x;
    const LineShares shares(total, launch.filling_blocks, gridDim.x);
    first_slot = 2 * block;
    if (block >= shares.blocks) return;
    const unsigned begin = shares.begin(block);
    groups = shares.begin(block + 1) - begin;

    unsigned in_own = begin - before;  // wraps around where the share begins before this thread's sequences
    if (in_own < static_cast<unsigned>(own) * p.kv_heads) {
      int b = batch_begin;
      if (per_thread > 1) {
#pragma unroll 1
        for (sequence = Sequence(p, b); in_own >= static_cast<unsigned>(sequence.groups) * p.kv_heads;) {
          in_own -= sequence.groups * p.kv_heads;
          sequence = Sequence(p, ++b);
        }
      }
      const int head = in_own / sequence.groups;
      memory.start = {b, head, static_cast<int>(in_own) - head * sequence.groups, 0, sequence};
    }
    __syncthreads();
    first = memory.start;

    // The unit that began in an earlier block's share is merged here if it ends here.
    if (first.begin > 0 && first.begin + groups >= first.sequence.groups) {
      const unsigned unit_begin = begin - first.begin, from = shares.holder(unit_begin);
      merge = {static_cast<int>(2 * from + (unit_begin > shares.begin(from))), static_cast<int>(2 * (from + 1)), 2,
               static_cast<int>(block - from + 1)};
    }
  }
};

}  // namespace flashdecpp
