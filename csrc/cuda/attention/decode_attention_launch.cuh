// From an AttentionLaunch to the one kernel that serves it.
#pragma once

#include <bit>

#include "cuda/attention/decode_attention.h"
#include "cuda/attention/decode_attention_kernel.cuh"
#include "cuda/nonce.h"
#include "heuristics/attention.h"

namespace flashdecpp {

constexpr int64_t kWorkspaceBytes = 16 << 20;   // an explicit number of splits may exceed it
constexpr int64_t kBytesInFlight = 6 << 20;     // that keep the memory of any machine busy
constexpr int64_t kMinKvTilesPerCluster = 256;  // of a unit, that make it worth to merge another team's part

// The ring and the blocks that go with a way of copying: Shape for many units, LatencyShape for no more units than
// SMs, and the shared memory of a SM. Here those of staged copies, which must do with the 99
// KiB of a block on the smallest NVIDIA machine from Ampere on; decode_attention_tensor.cuh and
// csrc/hip/decode_attention_amd.h have the others.
template <LoadPath kind, class KV, int dims>
struct AttentionConfig;
template <class KV, int dims>
struct AttentionConfig<LoadPath::kCpAsync, KV, dims> {
  template <class Tile>
  using Stages = CpAsyncStages<Tile>;
  using Shape = CtaShape<(dims <= 128 ? 4 : 2), 2, 1, 4>;
  using LatencyShape = Shape;
  static constexpr int kSharedBytes = 99 * 1024;
};

template <class Tile>
typename CpAsyncStages<Tile>::Source stages_source(const AttentionParams&, CpAsyncStages<Tile>*) {
  return {};
}

template <class M, class Tile, class Policy>
void launch_kernel(const Launcher& launcher, AttentionLaunch launch, Device device) {
  using Stages = typename M::template Stages<Tile>;
  const AttentionParams& p = launch.p;
  using Shared = SharedMemory<Tile, Stages>;
  const int64_t work_tiles = int64_t{p.batch} * launch.work_tiles_per_sequence();
  const int64_t slot_bytes = launch.slot_rows * (p.head_dim * sizeof(float) + sizeof(SoftmaxState)) + sizeof(uint64_t);
  // More splits than there are groups for would not change a bit of the result.
  const int64_t kv_tiles = std::max<int64_t>(p.num_blocks > 0 ? (p.capacity() + kKvTile - 1) / kKvTile : 0, 1);
  int64_t resident = int64_t{launcher.properties().num_sms} * Tile::kCtasPerSm;
  // What further row blocks read comes from L2, which wants all of the machine.
  int64_t enough = launch.query_tiles > 1 ? resident : kBytesInFlight / (Tile::kWarps * Shared::kStagesBytes);
  const int64_t max_cluster =
      p.num_splits > 0 ? kMaxClusterSize : std::min<int64_t>(kMaxClusterSize, kv_tiles / Tile::kWarps);
  const int64_t cluster =
      Stages::kUsesClusters ? choose_attention_cluster(resident, work_tiles, p.num_splits, max_cluster) : 1;
  static_assert(kMaxClusterSize * Tile::kWarps <= kMinKvTilesPerCluster);  // so that every warp of a team has a group
  const int64_t worth = cluster > 1 ? kMinKvTilesPerCluster : Tile::kWarps;
  resident = resident_clusters(resident, cluster);
  enough = (enough + cluster - 1) / cluster;
  launch.p.num_splits = static_cast<int32_t>(std::min(p.num_splits / cluster, (kv_tiles + worth - 1) / worth));
  const AttentionGrid grid =
      choose_attention_grid(resident, p.batch, launch.work_tiles_per_sequence(), launch.p.num_splits, kv_tiles,
                            kMinKvTiles * cluster, enough, kWorkspaceBytes / slot_bytes);
  const int64_t blocks = grid.blocks * cluster;
  FLASHDECPP_REQUIRE(std::max(blocks, work_tiles * kv_tiles) <= INT32_MAX, "decode_attention",
                     "q, k_cache and block_table must have batch * work_tiles * max_len / 16 and batch * work_tiles * ",
                     "num_splits below 2^31, where work_tiles is kv_heads * ceil(q_len * q_heads / kv_heads / ",
                     Tile::kRows, "); got ", p.batch, " * ", launch.work_tiles_per_sequence(), " * ", p.capacity(),
                     " / 16 and ", p.num_splits, " splits");

  launch.cluster_size_log2 = std::bit_width(static_cast<uint64_t>(cluster)) - 1;
  launch.min_kv_tiles_log2 = std::bit_width(static_cast<uint64_t>(worth)) - 1;
  launch.uniform_splits = static_cast<int32_t>(grid.uniform_splits);
  launch.streams = static_cast<uint32_t>(grid.streams);
  launch.max_streams = static_cast<uint32_t>(grid.max_streams);
  launch.min_uniform_keys = static_cast<float>(grid.min_uniform_tiles) * kKvTile;
  Tensor workspace;
  if (grid.slots > 0) {
    workspace = new_tensor({(grid.slots * slot_bytes + 16 + 3) / 4}, DType::kFloat32, device);
    launch.ready = static_cast<uint64_t*>(View(workspace).data);
    launch.partial_out = reinterpret_cast<float*>(launch.ready + (grid.slots + 1) / 2 * 2);  // 16-byte aligned
    launch.partial_states =
        reinterpret_cast<SoftmaxState*>(launch.partial_out + grid.slots * launch.slot_rows * p.head_dim);
    launch.nonce = new_nonce(launch.ready);
  }
  // And 1 KiB to start on a multiple of that, and between two blocks one of the machine's own.
  constexpr int kBlockBytes = Shared::kBytes + sizeof(CombineMemory<Tile, Stages>) + Stages::kBarrierBytes + 1024;
  static_assert(Tile::kCtasPerSm * (kBlockBytes + 1024) - 1024 <= M::kSharedBytes);
  const auto kernel = decode_attention_kernel<Tile, Policy, Stages>;
  launcher.allow_shared_memory(kernel, Shared::kBytes);
  launcher.overlapping_clusters(kernel, static_cast<int>(cluster), dim3(static_cast<unsigned>(blocks)),
                                dim3(Tile::kWarps * launcher.warp_size()), Shared::kBytes, launch,
                                stages_source(p, static_cast<Stages*>(nullptr)));
}

template <class M, class Tile>
void launch_policy(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  if (launch.p.phi) {
    launch_kernel<M, Tile, UnifiedMax<typename Tile::T>>(launcher, launch, device);
  } else {
    launch_kernel<M, Tile, OnlineMax>(launcher, launch, device);
  }
}

// A fixed number of splits is to give the same bits in any batch, and so takes the same shape.
template <class T, class KV, int dims, LoadPath kind>
void launch_shape(const Launcher& launcher, AttentionLaunch launch, Device device) {
  using M = AttentionConfig<kind, KV, dims>;
  using Tile = AttentionTile<T, KV, dims, typename M::Shape>;
  launch.set_query_tiles(Tile::kRows);
  if constexpr (!std::is_same_v<typename M::Shape, typename M::LatencyShape>) {
    const int64_t work_tiles = int64_t{launch.p.batch} * launch.work_tiles_per_sequence();
    if (launch.p.num_splits == 0 && work_tiles <= launcher.properties().num_sms) {
      using LatencyTile = AttentionTile<T, KV, dims, typename M::LatencyShape>;
      return launch_policy<M, LatencyTile>(launcher, launch, device);
    }
  }
  launch_policy<M, Tile>(launcher, launch, device);
}

template <class T, class KV, LoadPath kind>
void launch_dims(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  const int dims = launch.p.head_dim;
  if (dims <= 64) return launch_shape<T, KV, 64, kind>(launcher, launch, device);
  if (dims <= 96) return launch_shape<T, KV, 96, kind>(launcher, launch, device);
  if (dims <= 128) return launch_shape<T, KV, 128, kind>(launcher, launch, device);
  if (dims <= 192) return launch_shape<T, KV, 192, kind>(launcher, launch, device);
  return launch_shape<T, KV, 256, kind>(launcher, launch, device);
}

template <class T, LoadPath kind>
void launch_decode_attention(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  if (launch.p.kv_dtype == DType::kFloat8E4M3) return launch_dims<T, arch::float8, kind>(launcher, launch, device);
  return launch_dims<T, T, kind>(launcher, launch, device);
}

}  // namespace flashdecpp
