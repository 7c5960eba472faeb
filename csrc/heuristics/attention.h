// Host-side choices of decode_attention as pure functions of shapes and device properties: no torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flashdecpp {

// ---- decode attention: how many blocks, and how many parts of units they may leave ---------------------------------
struct AttentionGrid {
  int64_t uniform_splits;        // of each unit, where the work is cut by unit
  int64_t min_uniform_tiles;     // groups of all sequences; with fewer it is cut by line
  int64_t streams, max_streams;  // of the line: those that fill the machine, and the limit; 0: always by unit
  int64_t blocks, slots;
};

// Teams, clusters of so many blocks, that run at once where `resident` blocks do. A cluster stays within one part of
// the machine, which leaves a tenth of it over: an H100 that has room for 132 blocks takes 66 clusters of 2, 30 of 4
// and 15 of 8.
inline int64_t resident_clusters(int64_t resident, int64_t cluster) {
  return (cluster <= 2 ? resident : 9 * resident / 10) / cluster;
}

// Blocks of a team that streams a unit: a power of two up to `most`, of which the splits that the caller wants, if any,
// are a multiple; else the largest of which there can be one for each unit in nine tenths of the machine.
inline int64_t choose_attention_cluster(int64_t resident, int64_t work_tiles, int64_t num_splits, int64_t most) {
  const auto fits = [&](int64_t cluster) {
    return num_splits > 0 ? num_splits % cluster == 0 : 10 * cluster * work_tiles <= 9 * resident;
  };
  int64_t cluster = 1;
  while (2 * cluster <= most && fits(2 * cluster)) cluster *= 2;
  return cluster;
}

// `Blocks` are teams where there are clusters. Every sequence has work_tiles_per_sequence units, `groups` is what one
// holds if the sequence fills the cache, `resident` the blocks that run at once. No more blocks than min_kv_tiles make
// sense for, and no more parts than the workspace holds.
//
// By unit, every unit has num_splits blocks, each of which leaves a part: what the caller wants, else as many as fill
// the machine; but half of them, if they are still min_ctas, are about as fast at reading, and merge half as many
// parts: which counts more is a matter of how much there is to read. A single sequence is cut so, and sequences of one
// length: if there are more units than blocks that run at once, however, then only where a unit is much longer than a
// block takes to start.
//
// By line, sequences of different lengths lie on one line, whose streams have a block for each unit. A share begins
// and ends inside of sequences, so a block leaves up to two parts. A few streams less than fill the machine are used,
// if then a sequence has a whole number of them or a share of sequences; and more, if all are long: SMs are not equally
// fast.
inline AttentionGrid choose_attention_grid(int64_t resident, int64_t batch, int64_t work_tiles_per_sequence,
                                           int64_t num_splits, int64_t kv_tiles, int64_t min_kv_tiles, int64_t min_ctas,
                                           int64_t max_slots) {
  constexpr int64_t part_worth = 1536;  // groups that all units may hold for a part of each to be saved
  constexpr int64_t long_enough = 64;   // groups of a unit
  constexpr double enough = 0.95;       // of the machine
  const int64_t work_tiles = batch * work_tiles_per_sequence, worth = (kv_tiles + min_kv_tiles - 1) / min_kv_tiles;
  const auto at_least_one = [](int64_t x) { return std::max<int64_t>(x, 1); };
  const bool fixed = num_splits > 0;
  if (!fixed) {
    num_splits = resident / work_tiles;
    const int64_t saved = num_splits == 2 ? 2 : num_splits / 2;  // parts; without a second one there is no merge at all
    const bool little = work_tiles * kv_tiles < 2 * part_worth * saved;
    if (num_splits > 1 && little && num_splits / 2 * work_tiles >= min_ctas) num_splits /= 2;
    num_splits = at_least_one(std::min({num_splits, worth, max_slots / work_tiles}));
  }
  const int64_t uniform_splits = work_tiles * num_splits, unit_slots = num_splits > 1 ? uniform_splits : 0;
  if (fixed || batch == 1) return {num_splits, 0, 0, 0, uniform_splits, unit_slots};

  const int64_t limit = at_least_one(resident / work_tiles_per_sequence);
  const int64_t most = at_least_one(max_slots / 2 / work_tiles_per_sequence);
  int64_t streams = limit;
  while (streams >= limit * enough && batch % streams != 0 && streams % batch != 0) --streams;
  if (streams < limit * enough) streams = limit;
  streams = at_least_one(std::min({streams, batch * worth, most}));
  const int64_t blocks = std::max(uniform_splits, streams * work_tiles_per_sequence);
  const int64_t max_streams = std::min(blocks / work_tiles_per_sequence, most);
  const int64_t min_uniform_tiles = uniform_splits > resident ? batch * long_enough : 0;
  return {num_splits, min_uniform_tiles,
          streams,    max_streams,
          blocks,     std::max(unit_slots, max_streams > 1 ? 2 * max_streams * work_tiles_per_sequence : 0)};
}

}  // namespace flashdecpp
