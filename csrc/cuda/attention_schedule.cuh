// Decode attention, who does what. A unit is a set of block_heads KV heads of one sequence; its keys come in groups of
// kGroup. All units' groups lie behind each other on one line, in the order of (sequence, head set).
//
//   num_splits 0   the line is cut into equal shares, one for each block of a grid that fills the machine: a long
//                  sequence among short ones is spread over as many blocks as its share of all keys. A block finishes
//                  the units that lie inside its share; of a unit that begins before it or ends after it, it leaves a
//                  part. Everything is derived from seq_lens on the device, by every block for itself.
//   num_splits n   every unit is cut into n pieces (fewer where it has fewer groups), a block each: the pieces depend
//                  on nothing else in the batch.
//
// The block with the last piece of a unit merges its parts, in their order, when it is done with all else. It waits
// for blocks with smaller numbers only, which are started before it.
#pragma once

#include "attention_tile.cuh"

namespace flashdecpp {

inline constexpr int kMinGroups = 8;  // that a block is worth, as choose_attention_grid has it

// A run of groups of one unit.
struct Segment {
  int batch, head_set;
  int begin, end;  // groups, counted in the unit
  Sequence sequence;

  __device__ bool whole() const { return begin == 0 && end == sequence.groups; }
};

// The slots of one unit's parts, in order.
struct Slots {
  int first, second, step, count;
  __device__ int operator[](int i) const { return i == 0 ? first : second + (i - 1) * step; }
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
  __device__ Schedule(const AttentionLaunch& launch, ScheduleMemory<kThreads>& memory) {
    merge.count = 0;
    if (launch.p.num_splits > 0) {
      cut_unit(launch);
    } else {
      cut_line(launch, memory);
    }
    first.end = min(first.sequence.groups, first.begin + groups);
  }

  // Moves on; `left` are the groups that remain, this segment's included.
  static __device__ __forceinline__ bool next(const AttentionLaunch& launch, Segment& segment, int& left) {
    left -= segment.end - segment.begin;
    if (left <= 0) return false;
    if (++segment.head_set == launch.head_sets()) {
      segment.head_set = 0;
      segment.sequence = Sequence(launch.p, ++segment.batch);
    }
    segment.begin = 0;
    segment.end = min(segment.sequence.groups, left);
    return true;
  }

 private:
  __device__ void cut_unit(const AttentionLaunch& launch) {
    const AttentionParams& p = launch.p;
    const int unit = blockIdx.x / p.num_splits, split = blockIdx.x % p.num_splits;
    first.batch = unit / launch.head_sets();
    first.head_set = unit % launch.head_sets();
    first.sequence = Sequence(p, first.batch);
    const int64_t all = first.sequence.groups;
    const int splits = static_cast<int>(min(static_cast<int64_t>(p.num_splits), all));
    first_slot = blockIdx.x;
    if (split >= splits) return;
    first.begin = static_cast<int>(all * split / splits);
    groups = static_cast<int>(all * (split + 1) / splits) - first.begin;
    const int base = unit * p.num_splits;
    if (split == splits - 1 && splits > 1) merge = {base, base + 1, 1, splits};
  }

  template <int kThreads>
  __device__ void cut_line(const AttentionLaunch& launch, ScheduleMemory<kThreads>& memory) {
    const AttentionParams& p = launch.p;
    const int sets = launch.head_sets();
    const int per_thread = (p.batch + kThreads - 1) / kThreads;
    const int batch_begin = threadIdx.x * per_thread, batch_end = min(batch_begin + per_thread, p.batch);
    Sequence sequence;  // the last of this thread's
    int own = 0;
    for (int b = batch_begin; b < batch_end; ++b) {
      sequence = Sequence(p, b);
      own += sequence.groups;
    }
    memory.groups[threadIdx.x] = own;
    __syncthreads();
    int before = 0, total = 0;
    for (int t = 0; t < min(kThreads, p.batch); ++t) {
      if (t == static_cast<int>(threadIdx.x)) before = total;
      total += memory.groups[t];
    }
    before *= sets;
    total *= sets;

    const int blocks = max(min(total / kMinGroups, static_cast<int>(gridDim.x)), 1), block = blockIdx.x;
    const int share = total / blocks, longer = total % blocks;  // the first `longer` blocks take one group more
    const auto share_begin = [&](int i) { return i * share + min(i, longer); };
    const int begin = share_begin(block);
    first_slot = 2 * block;
    if (block >= blocks) return;
    groups = share_begin(block + 1) - begin;

    if (begin >= before && begin < before + own * sets) {
      int at = before;
      for (int b = batch_begin; b < batch_end; ++b) {
        if (per_thread > 1) sequence = Sequence(p, b);
        if (begin < at + sequence.groups * sets) {
          memory.start = {b, (begin - at) / sequence.groups, (begin - at) % sequence.groups, 0, sequence};
          break;
        }
        at += sequence.groups * sets;
      }
    }
    __syncthreads();
    first = memory.start;

    // The unit that began in an earlier block's share is merged here if it ends here.
    if (first.begin > 0 && first.begin + groups >= first.sequence.groups) {
      const int unit_begin = begin - first.begin;
      const int with_longer = longer * (share + 1);
      const int from = unit_begin < with_longer ? unit_begin / (share + 1) : longer + (unit_begin - with_longer) / share;
      merge = {2 * from + (unit_begin > share_begin(from)), 2 * (from + 1), 2, block - from + 1};
    }
  }
};

}  // namespace flashdecpp
