// The host's choices for decode_attention on a GPU, as pure functions of the problem and the device: how K and V are
// loaded, the shape of a CTA, and how the work is split. No torch, no CUDA; the kernels read the constants.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "heuristics/device.h"
#include "op_limits.h"

namespace flashdecpp {

// ---- constants that host and kernels share -------------------------------------------------------------------------
inline constexpr int kKvTile = 16;            // keys that a warp processes at a time
inline constexpr int kQueryTileRows = 16;     // query rows of a work tile
inline constexpr int kMaxClusterSize = 8;     // CTAs; larger clusters are not portable
inline constexpr unsigned kMinKvTiles = 8;    // fewer KV tiles are not worth a CTA
inline constexpr unsigned kLongKvTiles = 96;  // stream-K: KV tiles per warp that are worth another stream

inline constexpr int64_t kWorkspaceBytes = 16 << 20;   // for partials; an explicit num_splits may exceed it
inline constexpr int64_t kBytesInFlight = 6 << 20;     // enough to saturate the memory of any GPU we target
inline constexpr int64_t kMinKvTilesPerCluster = 128;  // of a work tile, before another cluster pays for its merge
inline constexpr int64_t kLongCacheTiles = 1024;       // KV tiles per sequence that want every SM's bandwidth
inline constexpr int64_t kSoftmaxStateBytes = 16;      // sizeof(SoftmaxState)

// ---- how a CTA is shaped: found by measurement ---------------------------------------------------------------------
enum class LoadPath : int8_t { kCpAsync, kTma, kRegister };  // global to shared memory; kRegister: AMD

inline const char* name(LoadPath path) {
  switch (path) {
    case LoadPath::kCpAsync: return "cp.async";
    case LoadPath::kTma: return "TMA";
    case LoadPath::kRegister: return "register loads";
  }
  return "";
}

struct AttentionShape {
  int warps, stages, ctas_per_sm, scratch_rows;
  bool clusters;  // merge through distributed shared memory

  bool operator==(const AttentionShape&) const = default;
};

// The head dims that kernels are compiled for; others are padded to the next.
constexpr int attention_dims(int64_t head_dim) {
  for (const int dims : {64, 96, 128, 192}) {
    if (head_dim <= dims) return dims;
  }
  return 256;
}

// cp.async must do with the 99 KiB per CTA of the smallest NVIDIA GPUs since Ampere, register loads with 64 KiB of LDS.
// With TMA, two CTAs per SM hide each other's prologue and epilogue; with few work tiles (`latency`), one CTA of twice
// the warps finishes each work tile sooner. Rows wider than 128 leave no registers for either.
constexpr AttentionShape attention_shape(LoadPath path, int kv_bytes, int dims, bool latency) {
  const bool narrow = dims <= 128;
  switch (path) {
    case LoadPath::kCpAsync: return {narrow ? 4 : 2, 2, 1, 4, false};
    case LoadPath::kRegister: return {narrow ? 4 : 2, 1, 1, 4, false};
    case LoadPath::kTma: break;
  }
  const int stages = narrow ? (kv_bytes == 1 ? 3 : dims <= 64 ? 4 : 2) : dims <= 192 ? 3 : 2;
  if (!narrow) return {4, stages, 1, 8, false};
  return {latency ? 8 : 4, stages, latency ? 1 : 2, 8, true};
}

// One stage: K and V of a KV tile, in TMA boxes of 128 bytes per row, else with 16 bytes of padding per row.
constexpr int64_t attention_stage_bytes(LoadPath path, int kv_bytes, int dims) {
  const int64_t row_bytes = int64_t{dims} * kv_bytes;
  return 2 * kKvTile * (path == LoadPath::kTma ? (row_bytes + 127) / 128 * 128 : row_bytes + 16);
}

// Everything that a CTA has in shared memory: per warp its stages, queries and scratch; the CTA's partial, the warps'
// states and factors; mbarriers; and 1 KiB of alignment slack.
constexpr int64_t attention_shared_bytes(LoadPath path, int kv_bytes, int dims, const AttentionShape& shape) {
  const int64_t stages = shape.stages * attention_stage_bytes(path, kv_bytes, dims);
  const int64_t queries = kQueryTileRows * (dims + 8) * 2, scratch = shape.scratch_rows * (dims + 8) * 4;
  const int64_t partial = shape.clusters ? kQueryTileRows * (dims * 4 + kSoftmaxStateBytes) : 16;
  const int64_t merge = kQueryTileRows * (shape.warps * (kSoftmaxStateBytes + 4) + kSoftmaxStateBytes);
  const int64_t barriers = path == LoadPath::kTma ? shape.warps * shape.stages * (shape.ctas_per_sm == 1 ? 16 : 8) : 0;
  return shape.warps * (stages + queries + scratch) + partial + merge + barriers + 1024;
}

inline bool fits(const DeviceProperties& device, LoadPath path, int kv_bytes, int dims) {
  constexpr int64_t reserved = 1024;  // by the hardware, per CTA
  for (const bool latency : {false, true}) {
    const AttentionShape shape = attention_shape(path, kv_bytes, dims, latency);
    const int64_t bytes = attention_shared_bytes(path, kv_bytes, dims, shape);
    if (bytes > device.shared_bytes_per_cta) return false;
    if (shape.ctas_per_sm * (bytes + reserved) > device.shared_bytes_per_sm) return false;
  }
  return true;
}

// ---- clusters ------------------------------------------------------------------------------------------------------
// Clusters that are resident where `resident` CTAs are. A cluster stays within one GPC, which strands about a tenth of
// the SMs: an H100 holds 132 CTAs, but 66 clusters of 2, 30 of 4 and 15 of 8.
inline int64_t resident_clusters(int64_t resident, int64_t cluster) {
  return (cluster <= 2 ? resident : 9 * resident / 10) / cluster;
}

// The largest power of two up to max_cluster that divides num_splits if the caller fixed it; otherwise such that one
// cluster per work tile fits in 90% of the resident CTAs. Not two, measured on an H200: three or four CTAs per work
// tile that merge through slots leave fewer SMs idle. There an SM reads 45 GB/s, a hundredth of what the memory has, so
// that in a long cache clusters must be small enough to occupy most SMs; on an H100 half of them would do.
inline int64_t choose_attention_cluster(int64_t resident, int64_t work_tiles, int64_t num_splits, int64_t max_cluster,
                                        bool long_cache) {
  constexpr double most = 0.7;
  const auto suits = [&](int64_t cluster) {
    return num_splits > 0 ? num_splits % cluster == 0 : 10 * cluster * work_tiles <= 9 * resident;
  };
  const auto occupied = [&](int64_t cluster) {
    return static_cast<double>(resident_clusters(resident, cluster) / work_tiles * work_tiles * cluster);
  };
  int64_t cluster = 1;
  while (2 * cluster <= max_cluster && suits(2 * cluster)) cluster *= 2;
  if (num_splits > 0) return cluster;
  while (long_cache && cluster > 2 && occupied(cluster) < most * static_cast<double>(resident)) cluster /= 2;
  return cluster > 2 ? cluster : 1;
}

// ---- the grid: uniform or stream-K splits --------------------------------------------------------------------------
struct AttentionGridProblem {
  int64_t resident;  // clusters (CTAs where there are none) that run at once
  int64_t batch;
  int64_t work_tiles_per_sequence;  // KV heads times query tiles
  int64_t num_splits;               // of a work tile, in clusters; 0: chosen here
  int64_t kv_tiles;                 // of a work tile whose sequence fills the cache
  int64_t min_kv_tiles;             // fewer are not worth a cluster
  int64_t min_ctas;                 // clusters that saturate the memory
  int64_t max_slots;                // partials that the workspace holds
};

struct AttentionGrid {
  int64_t uniform_splits;        // clusters per work tile in a uniform split
  int64_t min_uniform_tiles;     // KV tiles of the whole batch below which the split is stream-K
  int64_t streams, max_streams;  // stream-K: streams that fill the GPU, and the limit; 0: the split is always uniform
  int64_t blocks, slots;         // clusters to launch, slots for partials

  // Such as "2 uniform splits, or 16 to 64 streams where lengths differ".
  std::string str() const {
    std::string text = std::to_string(uniform_splits) + (uniform_splits == 1 ? " uniform split" : " uniform splits");
    if (streams == 0) return text;
    text += ", or " + std::to_string(streams);
    if (max_streams != streams) text += " to " + std::to_string(max_streams);
    text += max_streams == 1 ? " stream where lengths differ" : " streams where lengths differ";
    if (min_uniform_tiles > 0) text += " or hold fewer than " + std::to_string(min_uniform_tiles) + " KV tiles";
    return text;
  }
};

// Uniform split: every work tile has uniform_splits clusters, each of which leaves a partial. Without num_splits that
// is as many as fill the GPU, or half of them if those still saturate the memory and there is little to read: they
// read about as fast and merge half as many partials. Single sequences are split so, and batches of about one length;
// with more clusters than are resident only where a work tile is much longer than a CTA takes to start.
//
// Stream-K: the KV tiles of all sequences lie on one line, cut into equal streams with one cluster per work tile. A
// stream begins and ends within sequences, so a cluster leaves up to two partials. Slightly fewer streams than fill the
// GPU are used where each sequence then has a whole number of streams or each stream a whole number of sequences; more
// where all sequences are long, because SMs are not equally fast.
//
// In no case more clusters than min_kv_tiles are worth, nor more partials than the workspace holds.
inline AttentionGrid choose_attention_grid(const AttentionGridProblem& p) {
  constexpr int64_t tiles_per_partial = 1536;  // KV tiles of the whole batch that are worth another partial
  constexpr int64_t long_work_tile = 64;       // KV tiles
  constexpr double nearly_full = 0.95;         // of the GPU
  const int64_t work_tiles = p.batch * p.work_tiles_per_sequence;
  const int64_t max_splits = (p.kv_tiles + p.min_kv_tiles - 1) / p.min_kv_tiles;
  const auto at_least_one = [](int64_t x) { return std::max<int64_t>(x, 1); };
  const bool fixed = p.num_splits > 0;
  int64_t num_splits = p.num_splits;
  if (!fixed) {
    num_splits = p.resident / work_tiles;
    const int64_t saved = num_splits == 2 ? 2 : num_splits / 2;  // partials: without a second one nothing is merged
    const bool little = work_tiles * p.kv_tiles < 2 * tiles_per_partial * saved;
    if (num_splits > 1 && little && num_splits / 2 * work_tiles >= p.min_ctas) num_splits /= 2;
    num_splits = at_least_one(std::min({num_splits, max_splits, p.max_slots / work_tiles}));
  }
  const int64_t uniform_blocks = work_tiles * num_splits, uniform_slots = num_splits > 1 ? uniform_blocks : 0;
  if (fixed || p.batch == 1) return {num_splits, 0, 0, 0, uniform_blocks, uniform_slots};

  const int64_t full = at_least_one(p.resident / p.work_tiles_per_sequence);
  const int64_t slot_limit = at_least_one(p.max_slots / 2 / p.work_tiles_per_sequence);
  int64_t streams = full;
  while (streams >= full * nearly_full && p.batch % streams != 0 && streams % p.batch != 0) --streams;
  if (streams < full * nearly_full) streams = full;
  streams = at_least_one(std::min({streams, p.batch * max_splits, slot_limit}));
  const int64_t blocks = std::max(uniform_blocks, streams * p.work_tiles_per_sequence);
  const int64_t max_streams = std::min(blocks / p.work_tiles_per_sequence, slot_limit);
  const int64_t min_uniform_tiles = uniform_blocks > p.resident ? p.batch * long_work_tile : 0;
  const int64_t stream_slots = max_streams > 1 ? 2 * max_streams * p.work_tiles_per_sequence : 0;
  return {num_splits, min_uniform_tiles, streams, max_streams, blocks, std::max(uniform_slots, stream_slots)};
}

// ---- the whole choice ----------------------------------------------------------------------------------------------
struct AttentionProblem {
  int64_t batch, q_len, q_heads, kv_heads, head_dim;
  int64_t capacity;        // keys per sequence that the cache has room for
  int64_t block_size = 0;  // of a paged cache; 0: contiguous
  int64_t num_splits = 0;  // 0: chosen here
  int64_t kv_bytes = 2;    // per element: 1 for fp8
  bool suits_tma = true;   // addresses and strides of K and V are such that a tensor map can describe them

  int64_t rows() const { return q_len * (q_heads / kv_heads); }
  int64_t query_tiles() const { return (rows() + kQueryTileRows - 1) / kQueryTileRows; }
  int64_t work_tiles() const { return batch * kv_heads * query_tiles(); }
  int64_t kv_tiles() const { return std::max<int64_t>((capacity + kKvTile - 1) / kKvTile, 1); }
  int64_t slot_rows() const { return query_tiles() > 1 ? kQueryTileRows : rows(); }
  // A partial in the workspace: output, softmax state, flag.
  int64_t slot_bytes() const {
    return slot_rows() * (head_dim * int64_t{sizeof(float)} + kSoftmaxStateBytes) + int64_t{sizeof(uint64_t)};
  }

  // Such as "8 x 1, 32/8 heads, d128, room for 1024 keys, paged by 16".
  std::string str() const {
    std::string text = std::to_string(batch) + " x " + std::to_string(q_len) + ", " + std::to_string(q_heads) + "/" +
                       std::to_string(kv_heads) + " heads, d" + std::to_string(head_dim) + ", room for " +
                       std::to_string(capacity) + " keys, ";
    text += block_size > 0 ? "paged by " + std::to_string(block_size) : "contiguous";
    if (kv_bytes == 1) text += ", fp8 cache";
    if (num_splits > 0) text += ", num_splits " + std::to_string(num_splits);
    return text;
  }
};

struct AttentionConfig {
  LoadPath path;
  const char* why_path;
  int dims;      // head_dim that the kernel is compiled for
  bool latency;  // the shape for few work tiles
  AttentionShape shape;
  int64_t work_tiles;             // of the batch
  int64_t cluster;                // CTAs
  int64_t min_tiles_per_cluster;  // KV tiles of a work tile that are worth another cluster; a power of two
  AttentionGrid grid;             // in clusters

  int64_t ctas() const { return grid.blocks * cluster; }

  // Such as "TMA (block_size is a multiple of 16), latency shape (8 warps x 2 stages, 1 CTA per SM), cluster of 2,
  // ...".
  std::string str() const {
    std::string text = std::string(name(path)) + " (" + why_path + "), ";
    text += latency ? "latency shape (" : "throughput shape (";
    text += std::to_string(shape.warps) + " warps x " + std::to_string(shape.stages) +
            (shape.stages == 1 ? " stage, " : " stages, ") + std::to_string(shape.ctas_per_sm) +
            (shape.ctas_per_sm == 1 ? " CTA" : " CTAs") + " per SM), ";
    text += cluster > 1 ? "clusters of " + std::to_string(cluster) + ", " : "";
    return text + grid.str() + ": " + std::to_string(work_tiles) + " work tiles, " + std::to_string(ctas()) + " CTAs";
  }
};

// A fixed num_splits promises the same bits in any batch: it fixes the shape, too.
inline AttentionConfig choose_attention(const AttentionProblem& p, const DeviceProperties& device) {
  AttentionConfig config{};
  const int kv_bytes = static_cast<int>(p.kv_bytes);
  config.dims = attention_dims(p.head_dim);
  config.path = LoadPath::kCpAsync;
  if (device.amd()) {
    config.path = LoadPath::kRegister;
    config.why_path = "AMD";
  } else if (!device.has_tma) {
    config.why_path = "no TMA";
  } else if (p.block_size % kKvTile != 0) {
    config.why_path = "TMA needs a block_size that is a multiple of 16";
  } else if (!p.suits_tma) {
    config.why_path = "TMA needs K and V whose rows start on multiples of 16 bytes";
  } else if (!fits(device, LoadPath::kTma, kv_bytes, config.dims)) {
    config.why_path = "too little shared memory for TMA's shapes";
  } else {
    config.path = LoadPath::kTma;
    config.why_path = p.block_size > 0 ? "block_size is a multiple of 16" : "contiguous";
  }

  config.work_tiles = p.work_tiles();
  config.shape = attention_shape(config.path, kv_bytes, config.dims, false);
  const AttentionShape latency = attention_shape(config.path, kv_bytes, config.dims, true);
  config.latency = latency != config.shape && p.num_splits == 0 && config.work_tiles <= device.num_sms;
  if (config.latency) config.shape = latency;
  const int64_t warps = config.shape.warps;

  const int64_t kv_tiles = p.kv_tiles();
  const int64_t resident = int64_t{device.num_sms} * config.shape.ctas_per_sm;
  const int64_t max_cluster = p.num_splits > 0 ? kMaxClusterSize : std::min<int64_t>(kMaxClusterSize, kv_tiles / warps);
  const int64_t cluster = config.shape.clusters ? choose_attention_cluster(resident, config.work_tiles, p.num_splits,
                                                                           max_cluster, kv_tiles >= kLongCacheTiles)
                                                : 1;
  config.cluster = cluster;
  config.min_tiles_per_cluster = cluster > 1 ? kMinKvTilesPerCluster : config.latency ? 2 * warps : warps;
  // Further query tiles read K and V from L2, whose bandwidth takes all SMs to use.
  const int64_t in_flight = warps * config.shape.stages * attention_stage_bytes(config.path, kv_bytes, config.dims);
  const int64_t min_ctas = p.query_tiles() > 1 ? resident : kBytesInFlight / in_flight;
  // More splits than there are KV tiles for would not change a bit of the result.
  const int64_t max_splits = (kv_tiles + config.min_tiles_per_cluster - 1) / config.min_tiles_per_cluster;
  config.grid = choose_attention_grid({.resident = resident_clusters(resident, cluster),
                                       .batch = p.batch,
                                       .work_tiles_per_sequence = p.kv_heads * p.query_tiles(),
                                       .num_splits = std::min(p.num_splits / cluster, max_splits),
                                       .kv_tiles = kv_tiles,
                                       .min_kv_tiles = kMinKvTiles * cluster,
                                       .min_ctas = (min_ctas + cluster - 1) / cluster,
                                       .max_slots = kWorkspaceBytes / p.slot_bytes()});
  return config;
}

}  // namespace flashdecpp
