// The host's choices for the linear ops on a GPU, as pure functions of the problem and the device: which kernel, its
// shape, and how the work is split. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "heuristics/device.h"
#include "op_limits.h"

namespace flashdecpp {

struct LinearProblem {
  int64_t m, n, k;        // x [m, k], weight [n, k]; n counts gate and up rows alike
  bool vectors = true;    // 16-bit, and every row of the weight starts on a multiple of 16 bytes
  bool residual = false;  // the result is added to a residual

  // Such as "8 x 4096 by [11008, 4096]".
  std::string str() const {
    const std::string columns = std::to_string(k);
    return std::to_string(m) + " x " + columns + " by [" + std::to_string(n) + ", " + columns + "]" +
           (residual ? " + residual" : "") + (vectors ? "" : ", no vector loads");
  }
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

  LinearImpl choose(int64_t m) const {
    if (m < m1) return LinearImpl::kGemv;
    return m < m2 ? LinearImpl::kFlatGemm : LinearImpl::kBlas;
  }
};

// The rule for shapes that nobody has profiled, or not with so many rows.
// Hopper, measured on one H100 (bench/results/linear_h100.json): the GEMV beats cuBLAS on every shape for up to 8 rows,
// one tile of its matrix instruction; the flat GEMM does up to 64 rows, except on small weights.
// Later NVIDIA GPUs have the same GEMV without wgmma's flat GEMM. Older ones: the paper's range for an A100 (section 5:
// m1 of 2 to 3, m2 of 8 to 17). Neither is measured here.
// AMD, not measured here: up to 16 rows are one matrix tile of the GEMV. The flat GEMM depends on loads that proceed
// while it multiplies, which these GPUs lack: double buffering does not pay on an MI210 with its 16 KB of L1 (the
// paper). So larger M goes to the BLAS until `flashdecpp tune` finds otherwise.
inline InflectionPoints default_inflection_points(const DeviceProperties& device) {
  if (device.amd()) return {17, 17};
  if (device.has_wgmma) return {9, 65};
  return device.prefers_mma_gemv ? InflectionPoints{9, 17} : InflectionPoints{3, 9};
}

struct LinearConfig {
  LinearImpl impl;
  InflectionPoints points;
  bool measured;         // points come from a table
  const char* excluded;  // why only the BLAS can run this, or null

  // Such as "gemv: M below 9 (the default rule)".
  std::string str() const {
    const std::string text = name(impl);
    if (excluded) return text + ": " + excluded;
    const std::string m1 = std::to_string(points.m1), m2 = std::to_string(points.m2);
    const std::string range = impl == LinearImpl::kGemv       ? "M below " + m1
                              : impl == LinearImpl::kFlatGemm ? "M from " + m1 + " to below " + m2
                                                              : "M of " + m2 + " or more";
    return text + ": " + range + (measured ? " (measured)" : " (the default rule)");
  }
};

// `measured`: the inflection points of a tuning table, if it has the shape.
inline LinearConfig choose_linear(const LinearProblem& p, const DeviceProperties& device,
                                  std::optional<InflectionPoints> measured = std::nullopt) {
  const InflectionPoints points = measured ? *measured : default_inflection_points(device);
  LinearConfig config{LinearImpl::kBlas, points, measured.has_value(), nullptr};
  if (!p.vectors) {
    config.excluded = "float32, or weight rows that do not start on multiples of 16 bytes";
  } else if (p.k % 8 != 0) {
    config.excluded = "K is not a multiple of 8, so 16-byte loads cannot start on every row";
  } else {
    config.impl = points.choose(p.m);
  }
  return config;
}

// ---- GEMV ----------------------------------------------------------------------------------------------------------
enum class GemvKernel : int8_t { kCudaCores, kMma, kStream };

inline const char* name(GemvKernel kernel) {
  switch (kernel) {
    case GemvKernel::kCudaCores: return "CUDA cores";
    case GemvKernel::kMma: return "tensor cores";
    case GemvKernel::kStream: return "matrix cores, streamed";
  }
  return "";
}

struct GemvConfig {
  GemvKernel kernel;
  int64_t max_rows;  // rows of x per launch

  std::string str() const {
    return std::string(name(kernel)) + ", up to " + std::to_string(max_rows) + " rows per launch";
  }
};

// AMD: from 3 rows of x on, the vector units' arithmetic, which grows with the rows, would be the bottleneck of the
// generic kernel (docs/amd.md). The streaming one has no epilogue, so `fused` calls stay with the generic.
inline GemvConfig choose_gemv(const DeviceProperties& device, int64_t m, bool fused) {
  constexpr int64_t min_stream_rows = 3;
  if (device.prefers_mma_gemv) return {GemvKernel::kMma, 16};
  if (device.amd() && m >= min_stream_rows && !fused) return {GemvKernel::kStream, 16};
  return {GemvKernel::kCudaCores, 8};
}

// The GEMV on tensor cores for up to 16 rows: tiles of 8 rows of x, tiles of 16 rows of the weight, and steps of 32
// columns that each of a CTA's 8 warps has in flight: 1024 or 2048 columns of K, the smaller where K is no larger.
struct MmaGemvShape {
  int row_tiles, tiles, loads;

  bool operator==(const MmaGemvShape&) const = default;
};

inline constexpr MmaGemvShape kMmaGemvShapes[] = {{1, 2, 4}, {1, 1, 8}, {2, 2, 4}, {2, 1, 8}};
inline constexpr int kNumMmaGemvShapes = sizeof(kMmaGemvShapes) / sizeof(kMmaGemvShapes[0]);

inline MmaGemvShape choose_mma_gemv_shape(int64_t m, int64_t k) {
  return kMmaGemvShapes[(m <= 8 ? 0 : 2) + (k <= 1024 ? 0 : 1)];
}

// Generic GEMV: how many warps share a row of the weight. A few warps side by side along a row read longer runs of
// memory than one and were faster on an H100, as long as each has several loads to make; with many rows of x, adding up
// their sums costs more. More warps where the rows alone would leave SMs idle.
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
// A CTA multiplies block_n rows of the weight by block_m rows of x, block_k at a time through `stages` buffers in
// shared memory, with warps_n x warps_m warps. Alone on an SM it loads at `rate` times the SM's even share of the
// memory bandwidth (measured on an H100), which is how much of the latency its buffers hide.
struct FlatTile {
  int32_t block_m, block_n, block_k, warps_m, warps_n, stages;
  double rate;

  static constexpr int32_t kPadding = 8;  // elements after each row: rows 16 bytes apart modulo 128 share no bank
  constexpr int32_t stage_bytes() const { return (block_m + block_n) * (block_k + kPadding) * 2; }
  // As many stages as fit; fewer than two cannot overlap a load with a multiply.
  constexpr int32_t stages_within(int32_t shared_bytes) const { return std::min(stages, shared_bytes / stage_bytes()); }
};

// Close to the fastest of 28 tiles, with 1 to 12 splits of K, on an H100 over six shapes from [1536, 1536] to [22016,
// 4096], among those that leave room for two CTAs per SM. From 64 rows of x on, block_n is larger: every CTA reads x
// from L2, and would otherwise use as much of its bandwidth as the weight does.
inline constexpr FlatTile kFlatTiles[] = {
    {8, 32, 128, 1, 2, 6, 1.5},   {16, 32, 128, 1, 2, 5, 1.5},  {32, 64, 128, 1, 4, 3, 1.2},
    {64, 128, 64, 2, 4, 3, 0.95}, {128, 128, 64, 2, 4, 3, 0.7},
};
inline constexpr int32_t kNumFlatTiles = sizeof(kFlatTiles) / sizeof(kFlatTiles[0]);

// The smallest tile that holds m rows, or the largest that the device can hold (its block_m is then looped over).
inline int32_t choose_flat_tile(const DeviceProperties& device, int64_t m) {
  int32_t chosen = 0;
  for (int32_t i = 0; i < kNumFlatTiles; ++i) {
    const FlatTile& tile = kFlatTiles[i];
    if (tile.block_m % device.mma_n() != 0 || tile.stages_within(device.generic_shared_bytes()) < 2) continue;
    chosen = i;
    if (tile.block_m >= m) break;
  }
  return chosen;
}

// Cost in KiB of weight that an SM loads at its even share of the bandwidth: 23 per microsecond on an H100. Rounds of
// CTAs take what the bandwidth allows, but no less than one CTA after another needs at its own rate. Filling the
// buffers and ending a CTA costs `start`; a split waits for the others' partials, which costs `reduce`, and its
// partials pass through L2 twice. Another split must win by more than the model's error.
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

// wgmma: how many CTAs of a cluster share a tile along K. Cost in microseconds of an H100: what all SMs load together,
// what one CTA loads by itself, and adding up the partials, which grows with their number.
inline int32_t choose_flat_cluster(const DeviceProperties& device, int64_t n, int64_t k) {
  constexpr int64_t block_n = 64, stage_k = 128;
  constexpr double sm_kib = 23.0, block_kib = 40.0;  // per microsecond: an SM's even share, a CTA by itself
  const int64_t tiles = (n + block_n - 1) / block_n;
  const double tile_kib = static_cast<double>(k) * block_n * 2 / 1024;
  int32_t best = 1;
  double best_time = 0;
  for (const int32_t cluster : {1, 2, 4, 8}) {
    if (cluster > 1 && (tiles * cluster > device.num_sms || k < cluster * stage_k)) break;
    double time =
        std::max(static_cast<double>(tiles) * tile_kib / (sm_kib * device.num_sms), tile_kib / cluster / block_kib);
    if (cluster > 1) time += 2.0 + 0.25 * cluster;
    if (cluster == 1 || time < best_time) {
      best = cluster;
      best_time = time;
    }
  }
  return best;
}

struct FlatGemmConfig {
  bool wgmma;
  // wgmma
  int64_t max_rows;     // rows of x per launch
  int32_t cluster;      // CTAs that share a tile along K
  int32_t late_stages;  // stages still to be loaded when the next kernel may start; INT32_MAX: it may at once
  // generic
  int32_t tile;      // of kFlatTiles
  int32_t k_splits;  // none of them empty
  int32_t k_tiles_per_split;

  // Such as "wgmma, clusters of 2" or "mma.sync, tile 16 x 32 x 128, 3 K splits".
  std::string str() const {
    if (wgmma) return "wgmma" + (cluster > 1 ? ", clusters of " + std::to_string(cluster) : std::string());
    const FlatTile& t = kFlatTiles[tile];
    return "mma.sync, tile " + std::to_string(t.block_m) + " x " + std::to_string(t.block_n) + " x " +
           std::to_string(t.block_k) + ", " + std::to_string(k_splits) + (k_splits == 1 ? " K split" : " K splits");
  }
};

// `suits_tma`: tensor maps can describe x and the weight.
// wgmma lets the next kernel start once all but two stages have been requested: earlier, its loads would only take
// bandwidth from this one's. It may start at once where this grid fills the SMs anyway, and after a residual sum, where
// it is a norm: a small kernel that should be resident when its x is ready.
inline FlatGemmConfig choose_flat_gemm(const LinearProblem& p, const DeviceProperties& device, bool suits_tma) {
  FlatGemmConfig config{};
  config.wgmma = device.has_wgmma && suits_tma;
  if (config.wgmma) {
    constexpr int32_t late_stages = 2;
    config.max_rows = 128;
    config.cluster = choose_flat_cluster(device, p.n, p.k);
    const bool fills = (p.n + 63) / 64 * config.cluster > device.num_sms;
    config.late_stages = fills || p.residual ? INT32_MAX : late_stages;
    return config;
  }
  config.tile = choose_flat_tile(device, p.m);
  const FlatTile& tile = kFlatTiles[config.tile];
  const int64_t tiles = (p.m + tile.block_m - 1) / tile.block_m * ((p.n + tile.block_n - 1) / tile.block_n);
  const int64_t k_tiles = (p.k + tile.block_k - 1) / tile.block_k;
  const int64_t wanted = choose_k_splits(device, tile, tiles, k_tiles);
  config.k_tiles_per_split = static_cast<int32_t>((k_tiles + wanted - 1) / wanted);
  config.k_splits = static_cast<int32_t>((k_tiles + config.k_tiles_per_split - 1) / config.k_tiles_per_split);
  return config;
}

// ---- quantized weights ---------------------------------------------------------------------------------------------
struct QuantizedLinearConfig {
  bool streams;      // else the weight is dequantized for the BLAS
  int64_t max_rows;  // rows of x per launch
  int32_t tiles;     // of 16 rows of the weight, per CTA

  std::string str() const {
    if (!streams) return "dequantized, then blas";
    return "streamed, " + std::to_string(16 * tiles) + " weight rows per CTA";
  }
};

// Two tiles per CTA where that still makes a few CTAs for every SM: fewer, longer CTAs then cost less to start. AMD's
// kernel has no epilogue, so `fused` calls do not stream there.
inline QuantizedLinearConfig choose_quantized_linear(const LinearProblem& p, const DeviceProperties& device,
                                                     bool fused) {
  constexpr int64_t ctas_per_sm = 2;
  const bool streams = p.vectors && p.m <= kMaxStreamedRows && p.k % 16 == 0 && !(device.amd() && fused);
  return {streams, 16, p.n >= 32 * ctas_per_sm * device.num_sms ? 2 : 1};
}

}  // namespace flashdecpp
