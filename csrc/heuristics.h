// Every choice that the host makes before a launch, as pure functions of shapes and device properties: no torch, no
// CUDA, tested without a GPU and shown by `flashdecpp info`.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flashdecpp {

struct DeviceProperties {
  int32_t multiprocessors;  // 132 on an H100 SXM
  int32_t arch;             // 80, 86, 89, 90: compute capability times ten
};

// ---- which linear --------------------------------------------------------------------------------------------------
enum class LinearImpl : int8_t { kGemv, kFlatGemm, kBlas };

inline const char* name(LinearImpl impl) {
  switch (impl) {
    case LinearImpl::kGemv: return "gemv";
    case LinearImpl::kFlatGemm: return "flat_gemm";
    case LinearImpl::kBlas: return "blas";
  }
  return "blas";
}

// Inflection points of the paper's third idea (FlashDecoding++ section 5): gemv below m1, flat GEMM from m1 to m2, blas
// above.
struct InflectionPoints {
  int64_t m1, m2;
};

// The rule for a shape that nobody has profiled. The GEMV reads every weight once whatever M is, on CUDA cores: four
// rows of x cost 4 fused multiply-adds a weight, about what one multiprocessor issues in the time memory delivers it.
// The flat GEMM pads M to 8 and stays bound by the weight bytes until the tensor cores' tile of 64 rows is full.
inline InflectionPoints default_inflection_points(const DeviceProperties&) { return {5, 65}; }

inline LinearImpl choose_linear(InflectionPoints points, int64_t m, int64_t k) {
  if (k % 8 != 0) return LinearImpl::kBlas;  // rows that 16-byte loads cannot start on
  if (m < points.m1) return LinearImpl::kGemv;
  return m < points.m2 ? LinearImpl::kFlatGemm : LinearImpl::kBlas;
}

// ---- GEMV: how many waves share a row of the weight ----------------------------------------------------------------
// One, unless the rows alone leave multiprocessors idle (small N) and K is long enough for every wave to have a full
// set of loads in flight.
inline int32_t choose_gemv_waves(const DeviceProperties& device, int64_t row_groups, int64_t loads_per_lane,
                                 int64_t loads_in_flight) {
  constexpr int32_t wanted_per_multiprocessor = 16, block_waves = 8;
  int32_t waves = 1;
  while (waves < block_waves && row_groups * waves < int64_t{device.multiprocessors} * wanted_per_multiprocessor &&
         loads_per_lane > waves * loads_in_flight) {
    waves *= 2;
  }
  return waves;
}

// ---- flat GEMM: which tile, and how often K is split ---------------------------------------------------------------
// A block multiplies block_n rows of the weight by block_m rows of x, block_k at a time through `stages` buffers in
// shared memory, by waves_n x waves_m waves.
struct FlatTile {
  int32_t block_m, block_n, block_k, waves_m, waves_n, stages;

  static constexpr int32_t kPadding = 8;  // elements after each row: rows 16 bytes apart modulo 128 share no bank
  constexpr int32_t stage_bytes() const { return (block_m + block_n) * (block_k + kPadding) * 2; }
  // As many stages as fit; fewer than two cannot overlap a load with a multiply.
  constexpr int32_t stages_within(int32_t shared_bytes) const { return std::min(stages, shared_bytes / stage_bytes()); }
};

// Two blocks share a multiprocessor of an H100 (228 KiB), so 96 KiB of weights are in flight there. From 32 rows of x
// on the tile doubles block_n: x comes from L2 once a block, and would otherwise take as much of its bandwidth as the
// weights.
inline constexpr FlatTile kFlatTiles[] = {
    {8, 64, 128, 1, 4, 4},  {16, 64, 128, 1, 4, 4},  {32, 128, 64, 1, 4, 4},
    {64, 128, 64, 2, 4, 3}, {128, 128, 64, 2, 4, 3},
};
inline constexpr int32_t kNumFlatTiles = sizeof(kFlatTiles) / sizeof(kFlatTiles[0]);

// The smallest tile that holds m rows, or the largest that the machine can hold (its block_m is then looped over).
// tile_n is the narrowest tile of the machine's matrix instruction.
inline int32_t choose_flat_tile(int64_t m, int32_t shared_bytes, int32_t tile_n) {
  int32_t chosen = 0;
  for (int32_t i = 0; i < kNumFlatTiles; ++i) {
    if (kFlatTiles[i].block_m % tile_n != 0 || kFlatTiles[i].stages_within(shared_bytes) < 2) continue;
    chosen = i;
    if (kFlatTiles[i].block_m >= m) break;
  }
  return chosen;
}

// Time is counted in loads of one k tile at a multiprocessor's even share of the bandwidth. A round of blocks takes
// what the bandwidth allows, but never less than one block needs by itself: its buffers hide so much latency that it
// could take in alone_rate times that share. Filling the buffers and ending a block costs `start`; summing the parts of
// K costs `reduce`.
inline int32_t choose_k_splits(const DeviceProperties& device, int64_t tiles, int64_t k_tiles) {
  constexpr double blocks_per_multiprocessor = 2, alone_rate = 2.5, start = 1.5, reduce = 3, reduce_part = 0.25;
  constexpr int64_t max_splits = 16, min_k_tiles = 4;
  const double slots = device.multiprocessors * blocks_per_multiprocessor;
  int32_t best = 1;
  double best_time = 0;
  for (int64_t splits = 1; splits <= std::clamp<int64_t>(k_tiles / min_k_tiles, 1, max_splits); ++splits) {
    const double depth = static_cast<double>((k_tiles + splits - 1) / splits);
    const auto round = [&](double blocks) {
      return std::max(blocks * depth / device.multiprocessors, depth / alone_rate) + start;
    };
    const double blocks = static_cast<double>(tiles * splits);
    const double full = static_cast<double>(static_cast<int64_t>(blocks / slots));
    double time = full * round(slots);
    if (blocks > full * slots) time += round(blocks - full * slots);
    if (splits > 1) time += reduce + reduce_part * static_cast<double>(splits);
    if (splits == 1 || time < best_time) {
      best = static_cast<int32_t>(splits);
      best_time = time;
    }
  }
  return best;
}

// ---- how many KV splits --------------------------------------------------------------------------------------------
// Lengths live on the device, so the choice is made from the capacity of the cache, as if every sequence filled it.
// `independent_blocks` is what there is without splitting: batch * kv_heads * row tiles. Time is counted in keys that
// one block walks over: the machine takes the blocks in waves of `resident`, each wave as long as its split, plus a
// block's fixed cost (filling its pipeline), plus the merge, which reads every split's partial output. The smallest
// total wins, of equal ones the one with fewer splits.
inline int32_t choose_num_splits(const DeviceProperties& device, int64_t independent_blocks, int64_t capacity) {
  constexpr int64_t blocks_per_multiprocessor = 2, tile = 64, fixed = 64, merge = 4, max_splits = 128;
  const int64_t resident = std::max<int64_t>(1, device.multiprocessors * blocks_per_multiprocessor);
  const int64_t blocks = std::max<int64_t>(1, independent_blocks);
  const int64_t tiles = std::max<int64_t>(1, (capacity + tile - 1) / tile);
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min(tiles, max_splits); ++splits) {
    const int64_t waves = (blocks * splits + resident - 1) / resident;
    const int64_t keys = (tiles + splits - 1) / splits * tile;
    const int64_t cost = waves * (keys + fixed) + (splits > 1 ? merge * splits : 0);
    if (cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return static_cast<int32_t>(best);
}

}  // namespace flashdecpp
