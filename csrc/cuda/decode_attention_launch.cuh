// From an AttentionLaunch to the one kernel that serves it.
#pragma once

#include <bit>

#include "decode_attention.h"
#include "decode_attention_kernel.cuh"
#include "nonce.h"

namespace flashdecpp {

constexpr int64_t kWorkspaceBytes = 16 << 20;  // an explicit number of splits may exceed it
constexpr int64_t kBytesUnderWay = 6 << 20;    // that keep the memory of any machine busy
constexpr int64_t kWorthGroups = 256;          // of a unit, that make it worth to merge another team's part

// The ring and the blocks that go with a way of copying: Shape for many units, ShapeOfFew for no more units than
// multiprocessors, and the shared memory of a multiprocessor. Here those of staged copies, which must do with the 99
// KiB of a block on the smallest NVIDIA machine from Ampere on; decode_attention_tensor.cuh and
// csrc/hip/decode_attention_amd.h have the others.
template <CopyKind kind, class KV, int dims>
struct Machine;
template <class KV, int dims>
struct Machine<CopyKind::kStaged, KV, dims> {
  template <class Tile>
  using Ring = StagedRing<Tile>;
  using Shape = BlockShape<(dims <= 128 ? 4 : 2), 2, 1, 4>;
  using ShapeOfFew = Shape;
  static constexpr int kSharedBytes = 99 * 1024;
};

template <class Tile>
typename StagedRing<Tile>::Source ring_source(const AttentionParams&, StagedRing<Tile>*) {
  return {};
}

template <class M, class Tile, class Policy>
void launch_kernel(const Launcher& launcher, AttentionLaunch launch, Device device) {
  using Ring = typename M::template Ring<Tile>;
  const AttentionParams& p = launch.p;
  using Shared = SharedMemory<Tile, Ring>;
  const int64_t units = int64_t{p.batch} * launch.sequence_units();
  const int64_t slot_bytes = launch.slot_rows * (p.head_dim * sizeof(float) + sizeof(RowPart)) + sizeof(uint64_t);
  // More splits than there are groups for would not change a bit of the result.
  const int64_t groups = std::max<int64_t>(p.num_blocks > 0 ? (p.capacity() + kGroup - 1) / kGroup : 0, 1);
  int64_t resident = int64_t{launcher.properties().multiprocessors} * Tile::kBlocks;
  // What further row blocks read comes from L2, which wants all of the machine.
  int64_t enough = launch.row_blocks > 1 ? resident : kBytesUnderWay / (Tile::kWaves * Shared::kRingBytes);
  const int64_t most_team = p.num_splits > 0 ? kMostTeam : std::min<int64_t>(kMostTeam, groups / Tile::kWaves);
  const int64_t team = Ring::kTeams ? choose_attention_team(resident, units, p.num_splits, most_team) : 1;
  static_assert(kMostTeam * Tile::kWaves <= kWorthGroups);  // so that every wave of a team has a group
  const int64_t worth = team > 1 ? kWorthGroups : Tile::kWaves;
  resident = resident_teams(resident, team);
  enough = (enough + team - 1) / team;
  launch.p.num_splits = static_cast<int32_t>(std::min(p.num_splits / team, (groups + worth - 1) / worth));
  const AttentionGrid grid = choose_attention_grid(resident, p.batch, launch.sequence_units(), launch.p.num_splits,
                                                   groups, kMinGroups * team, enough, kWorkspaceBytes / slot_bytes);
  const int64_t blocks = grid.blocks * team;
  FLASHDECPP_REQUIRE(std::max(blocks, units * groups) <= INT32_MAX, "decode_attention",
                     "q, k_cache and block_table must have batch * units * max_len / 16 and batch * units * ",
                     "num_splits below 2^31, where units is kv_heads * ceil(q_len * q_heads / kv_heads / ", Tile::kRows,
                     "); got ", p.batch, " * ", launch.sequence_units(), " * ", p.capacity(), " / 16 and ",
                     p.num_splits, " splits");

  launch.team_log2 = std::bit_width(static_cast<uint64_t>(team)) - 1;
  launch.worth_log2 = std::bit_width(static_cast<uint64_t>(worth)) - 1;
  launch.unit_teams = static_cast<int32_t>(grid.unit_blocks);
  launch.shares = static_cast<uint32_t>(grid.shares);
  launch.most_shares = static_cast<uint32_t>(grid.most_shares);
  launch.least_by_unit = static_cast<float>(grid.least_by_unit) * kGroup;
  Tensor workspace;
  if (grid.slots > 0) {
    workspace = new_tensor({(grid.slots * slot_bytes + 16 + 3) / 4}, DType::kFloat32, device);
    launch.ready = static_cast<uint64_t*>(View(workspace).data);
    launch.part_out = reinterpret_cast<float*>(launch.ready + (grid.slots + 1) / 2 * 2);  // 16-byte aligned
    launch.part_state = reinterpret_cast<RowPart*>(launch.part_out + grid.slots * launch.slot_rows * p.head_dim);
    launch.nonce = new_nonce(launch.ready);
  }
  // And 1 KiB to start on a multiple of that, and between two blocks one of the machine's own.
  constexpr int kBlockBytes = Shared::kBytes + sizeof(MergeMemory<Tile, Ring>) + Ring::kBarrierBytes + 1024;
  static_assert(Tile::kBlocks * (kBlockBytes + 1024) - 1024 <= M::kSharedBytes);
  const auto kernel = decode_attention_kernel<Tile, Policy, Ring>;
  launcher.allow_shared_memory(kernel, Shared::kBytes);
  launcher.overlapping_clusters(kernel, static_cast<int>(team), dim3(static_cast<unsigned>(blocks)),
                                dim3(Tile::kWaves * launcher.wave_size()), Shared::kBytes, launch,
                                ring_source(p, static_cast<Ring*>(nullptr)));
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
template <class T, class KV, int dims, CopyKind kind>
void launch_shape(const Launcher& launcher, AttentionLaunch launch, Device device) {
  using M = Machine<kind, KV, dims>;
  using Tile = AttentionTile<T, KV, dims, typename M::Shape>;
  launch.cut_rows(Tile::kRows);
  if constexpr (!std::is_same_v<typename M::Shape, typename M::ShapeOfFew>) {
    const int64_t units = int64_t{launch.p.batch} * launch.sequence_units();
    if (launch.p.num_splits == 0 && units <= launcher.properties().multiprocessors) {
      using TileOfFew = AttentionTile<T, KV, dims, typename M::ShapeOfFew>;
      return launch_policy<M, TileOfFew>(launcher, launch, device);
    }
  }
  launch_policy<M, Tile>(launcher, launch, device);
}

template <class T, class KV, CopyKind kind>
void launch_dims(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  const int dims = launch.p.head_dim;
  if (dims <= 64) return launch_shape<T, KV, 64, kind>(launcher, launch, device);
  if (dims <= 96) return launch_shape<T, KV, 96, kind>(launcher, launch, device);
  if (dims <= 128) return launch_shape<T, KV, 128, kind>(launcher, launch, device);
  if (dims <= 192) return launch_shape<T, KV, 192, kind>(launcher, launch, device);
  return launch_shape<T, KV, 256, kind>(launcher, launch, device);
}

template <class T, CopyKind kind>
void launch_decode_attention(const Launcher& launcher, const AttentionLaunch& launch, Device device) {
  if (launch.p.kv_dtype == DType::kFloat8E4M3) return launch_dims<T, arch::float8, kind>(launcher, launch, device);
  return launch_dims<T, T, kind>(launcher, launch, device);
}

}  // namespace flashdecpp
