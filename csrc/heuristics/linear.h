// Host-side choices of the linear ops as pure functions of shapes and device properties: no torch, no CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "heuristics/device.h"

namespace flashdecpp {

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

  LinearImpl choose(int64_t m) const {
    if (m < m1) return LinearImpl::kGemv;
    return m < m2 ? LinearImpl::kFlatGemm : LinearImpl::kBlas;
  }
};

// The rule for a shape that nobody has profiled, or not with so many rows.
// Hopper, measured on an H100 (bench/results/linear_h100.json): the GEMV is ahead of cuBLAS on every shape for up to 8
// rows, which are one tile of its matrix products; the flat GEMM is up to 64 rows, but for weights that are small.
// AMD, not measured here: up to 16 rows are one matrix tile of the GEMV. The flat GEMM lives from loads that go on
// while it multiplies, and these machines have none: double buffering does not pay on an MI210, with its 16 KB of L1
// (the paper). So what is more is the BLAS's, until `flashdecpp tune` finds another answer. Older NVIDIA machines: the
// paper's range for an A100 (section 5: m1 of 2 to 3, m2 of 8 to 17), not measured here.
inline InflectionPoints default_inflection_points(const DeviceProperties& device) {
  if (device.amd()) return {17, 17};
  return device.arch == 90 ? InflectionPoints{9, 65} : InflectionPoints{3, 9};
}

inline LinearImpl choose_linear(InflectionPoints points, int64_t m, int64_t k) {
  return k % 8 == 0 ? points.choose(m) : LinearImpl::kBlas;  // rows that 16-byte loads cannot start on
}

// ---- GEMV: how many warps share a row of the weight ----------------------------------------------------------------
// A few warps that walk along a row side by side read longer runs of memory than one, and were faster on an H100, as
// long as each has some loads to make; with many rows of x, adding up their sums costs more. More warps still where the
// rows alone leave SMs idle.
inline int32_t choose_gemv_warps(const DeviceProperties& device, int64_t m, int64_t row_groups,
                                 int64_t loads_per_lane) {
  constexpr int32_t wanted_per_sm = 8, wanted_loads = 4, block_warps = 8;
  int32_t warps = m == 1 ? 4 : 2;
  while (warps > 1 && loads_per_lane < warps * wanted_loads) warps /= 2;
  while (warps < block_warps && row_groups * warps < int64_t{device.num_sms} * wanted_per_sm &&
         loads_per_lane > warps) {
    warps *= 2;
  }
  return warps;
}

// ---- flat GEMM: which tile, and how often K is split ---------------------------------------------------------------
// A block multiplies block_n rows of the weight by block_m rows of x, block_k at a time through `stages` buffers in
// shared memory, by warps_n x warps_m warps. By itself it loads at `rate` times a SM's even share of the
// memory bandwidth (measured on an H100): what its buffers hide of the latency.
struct FlatTile {
  int32_t block_m, block_n, block_k, warps_m, warps_n, stages;
  double rate;

  static constexpr int32_t kPadding = 8;  // elements after each row: rows 16 bytes apart modulo 128 share no bank
  constexpr int32_t stage_bytes() const { return (block_m + block_n) * (block_k + kPadding) * 2; }
  // As many stages as fit; fewer than two cannot overlap a load with a multiply.
  constexpr int32_t stages_within(int32_t shared_bytes) const { return std::min(stages, shared_bytes / stage_bytes()); }
};

// About the fastest of 28 tiles, with 1 to 12 splits of K, on an H100 over six shapes from [1536, 1536] to [22016,
// 4096], among those that leave room for two blocks a SM. With 64 rows of x and more, block_n is larger: x
// comes from L2 once a block, and would otherwise take as much of its bandwidth as the weight.
inline constexpr FlatTile kFlatTiles[] = {
    {8, 32, 128, 1, 2, 6, 1.5},   {16, 32, 128, 1, 2, 5, 1.5},  {32, 64, 128, 1, 4, 3, 1.2},
    {64, 128, 64, 2, 4, 3, 0.95}, {128, 128, 64, 2, 4, 3, 0.7},
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

// Time is counted in KiB of weight that a SM loads at its even share of the bandwidth: 23 in a microsecond
// of an H100. Rounds of blocks take what the bandwidth allows, but no less than one block after the other needs at its
// own rate. Filling the buffers and ending a block costs `start`; a split waits for the others'
// parts, which costs `reduce`, and its parts pass through L2 twice. Another split must win by more than the model is
// worth.
inline int32_t choose_k_splits(const DeviceProperties& device, const FlatTile& tile, int64_t tiles, int64_t k_tiles) {
  constexpr double blocks_per_sm = 2, start = 58, reduce = 90, margin = 0.97;
  constexpr int64_t max_splits = 16, min_k_tiles = 3;
  const double k_tile_kib = tile.block_n * tile.block_k * 2 / 1024.0;
  const double part_kib = tile.block_m * tile.block_n * 4 / 1024.0;
  const double slots = device.num_sms * blocks_per_sm;
  int32_t best = 1;
  double best_time = 0;
  for (int64_t splits = 1; splits <= std::clamp<int64_t>(k_tiles / min_k_tiles, 1, max_splits); ++splits) {
    const double blocks = static_cast<double>(tiles * splits);
    const double block_kib = k_tile_kib * static_cast<double>((k_tiles + splits - 1) / splits);
    const double rounds = std::ceil(blocks / slots);
    double time = std::max(blocks * block_kib / device.num_sms, rounds * block_kib / tile.rate) + rounds * start;
    if (splits > 1) time += reduce + 2 * blocks * part_kib / device.num_sms;
    if (splits == 1 || time < margin * best_time) {
      best = static_cast<int32_t>(splits);
      best_time = time;
    }
  }
  return best;
}

// ---- flat GEMM on Hopper: how many blocks of a cluster share a tile along K ----------------------------------------
// Time is counted in microseconds of an H100: what all SMs load together, what one block loads by itself,
// and what adding up the parts costs, which grows with their number.
inline int32_t choose_flat_cluster(const DeviceProperties& device, int64_t n, int64_t k) {
  constexpr int64_t block_n = 64, stage_k = 128;
  constexpr double machine_kib = 23.0, block_kib = 40.0;  // in a microsecond: of one SM's share, of a block
  const int64_t tiles = (n + block_n - 1) / block_n;
  const double tile_kib = static_cast<double>(k) * block_n * 2 / 1024;
  int32_t best = 1;
  double best_time = 0;
  for (const int32_t cluster : {1, 2, 4, 8}) {
    if (cluster > 1 && (tiles * cluster > device.num_sms || k < cluster * stage_k)) break;
    double time = std::max(static_cast<double>(tiles) * tile_kib / (machine_kib * device.num_sms),
                           tile_kib / cluster / block_kib);
    if (cluster > 1) time += 2.0 + 0.25 * cluster;
    if (cluster == 1 || time < best_time) {
      best = cluster;
      best_time = time;
    }
  }
  return best;
}

// ---- quantized weights: how many tiles of 16 rows a block holds ----------------------------------------------------
// Two where that still makes a few blocks for every SM: fewer, longer blocks then cost less to start.
inline int32_t choose_quantized_tiles(const DeviceProperties& device, int64_t n) {
  constexpr int64_t blocks_per_sm = 2;
  return n >= 32 * blocks_per_sm * device.num_sms ? 2 : 1;
}

}  // namespace flashdecpp
