// Decode attention. Every byte of K and V is read once, so memory is the floor: 2 * keys * kv_heads * head_dim *
// sizeof(element) over the read bandwidth. Arithmetic is far below it.
//
// The q_len * group query rows that share a KV head are packed, token by token, into tiles of 16: one side of the
// matrix tile. A warp takes 16 keys at a time, from Q K^T over the softmax to P V, in its own registers and out of its
// own ring of stages: warps meet only when a unit (16 rows of a KV head of a sequence) is done.
//   tile          16 rows x 16 keys x head_dim a warp
//   stages        K and V of 16 keys each, as many as the shared memory of CtaShape holds
//   shared        head_dim 128 in half on Hopper: 4 warps of 2 stages of 8 KiB, each with 8.5 KiB of queries and
//                 scratch, and 8.5 KiB for the block's part; two such blocks a SM, or one of 8 warps
//   S = Q K^T     to the softmax policy in registers, whose result is the left factor of
//   O += P V      without a way through shared memory
// attention_schedule.cuh cuts the work for a grid that fills the machine. Blocks that share a unit do so in a cluster,
// and merge through its shared memory; where a unit goes beyond a cluster, parts are left in global memory and who has
// the unit's end merges them, in order, in this launch.
//
// What is never read: keys that no row sees, and so anything beyond seq_len; their place holds zeros. A key that some
// rows see and others do not (new tokens among themselves, the edge of the window) is in the tile for all of them: its
// logit is set aside for the others, and where its V is not finite, so that 0 * V would be NaN, the product with V is
// taken key by key.
//
// Under programmatic dependent launch the block starts while the previous kernel is still running. Until that one is
// done nothing is read but the descriptions of the cache, lengths and block tables: where to begin is known by then.
//
// attention_tile.cuh (what a block is), attention_schedule.cuh (who does what), attention_ring.cuh (loads),
// attention_walk.cuh (arithmetic) and attention_merge.cuh (parts and output) hold the steps; here they become the
// kernel.
#pragma once

#include "cuda/attention/combine.cuh"

namespace flashdecpp {

// Zeros in the place of queries that there are not, in all units of a block the same.
template <class Tile>
__device__ __forceinline__ void clear_queries(int count, typename Tile::T* q) {
  constexpr int kChunks = Tile::kDims / 8;
#pragma unroll 1
  for (int index = count * kChunks + arch::lane(); index < Tile::kRows * kChunks; index += arch::kWarpSize) {
    *reinterpret_cast<uint4*>(q + index / kChunks * Tile::kQStride + index % kChunks * 8) = make_uint4(0, 0, 0, 0);
  }
}

// A warp's queries of a unit, zeros for columns that there are not; one group of copies. In a float8 cache's order of
// columns where K is widened.
template <class Tile>
__device__ __forceinline__ void load_queries(const AttentionLaunch& launch, const QueryTile& rows,
                                             typename Tile::T* q) {
  using T = typename Tile::T;
  const AttentionParams& p = launch.p;
  constexpr int kChunks = Tile::kDims / 8;
#pragma unroll 1
  for (int index = arch::rematerialize(arch::lane()); index < rows.count * kChunks; index += arch::kWarpSize) {
    const int row = index / kChunks, dim = index % kChunks * 8;
    const bool valid = dim < p.head_dim;
    const int64_t offset = valid ? rows.batch * p.q_batch_stride + rows.token(launch, row) * p.q_token_stride +
                                       rows.head(launch, row) * p.q_head_stride + dim
                                 : 0;
    const T* from = static_cast<const T*>(p.q) + offset;
    T* to = q + row * Tile::kQStride;
    if constexpr (!Tile::kWiden || arch::kWidenedInOrder) {
      arch::copy_async(to + dim, from, valid);
    } else {
      const uint4 bits = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const int column = arch::widened_k(k) - dim % 16;
        if (column >= 0 && column < 8) to[dim / 16 * 16 + k] = values[column];
      }
    }
  }
  arch::copy_commit();
}

template <class Tile, class Policy, class Stages>
__device__ __forceinline__ void attend(const AttentionLaunch& launch, const typename Stages::Source& source) {
  __shared__ CombineMemory<Tile, Stages> combine_memory;
  __shared__ uint64_t barriers[Stages::kBarrierBytes / 8 + 1];
  const SharedMemory<Tile, Stages> shared{arch::dynamic_shared()};
  const AttentionParams& p = launch.p;

  arch::allow_next_kernel();
  Stages stages(shared.stages(arch::warp()), reinterpret_cast<unsigned char*>(barriers), p, source);
  typename Tile::T* q = shared.q(arch::warp());
  Schedule schedule(launch, Tile::kWarps);
  clear_queries<Tile>(schedule.first.rows(launch).count, q);
  KvPipeline<Tile, Stages> pipeline(launch, stages);
  pipeline.locate(schedule);
  schedule.load(launch);
  pipeline.prefetch_table();
  schedule.finish(launch);
  if (schedule.kv_tiles == 0) return;
  pipeline.resolve(schedule);
  arch::wait_for_previous_kernel();

  Segment next = schedule.first;
  int left = schedule.kv_tiles;
  RowPhi<Tile, Policy> row_phi;
  load_queries<Tile>(launch, next.rows(launch), q);
  row_phi.load(launch, next.rows(launch));
  pipeline.start();

  int slot = schedule.first_slot, taken = Tile::kStages;
  for (bool more = true; more;) {
    const Segment segment = next;
    const QueryTile rows = segment.rows(launch);
    WarpAttention<Tile, Policy> part(launch, rows, row_phi, p.scale * (p.k_scale ? p.k_scale[rows.kv_head] : 1.f));
    stages.wait_for_queries(taken);
    arch::warp_sync();
    part.set_queries(q);
    more = next.next(p, left);
    if (more) row_phi.load(launch, next.rows(launch));
    if (Tile::kQueryInRegisters && more) {
      arch::warp_sync();
      load_queries<Tile>(launch, next.rows(launch), q);
    }

    taken = 0;
    for (int kv_tile = segment.begin + warp_in_cluster(launch, Tile::kWarps); kv_tile < segment.end;
         kv_tile += schedule.step, ++taken) {
      const int key_begin = (segment.sequence.first_kv_tile + kv_tile) * kKvTile;
      const int loaded_begin = segment.sequence.key_begin, loaded_end = segment.sequence.length;
      pipeline.acquire(loaded_begin - key_begin, loaded_end - key_begin);
      part.process_tile(stages.keys(pipeline.stage()), stages.values(pipeline.stage()), key_begin, loaded_begin,
                        loaded_end, shared.scratch(arch::warp()));
      pipeline.release();
    }
    if (!Tile::kQueryInRegisters && more) {
      arch::warp_sync();
      load_queries<Tile>(launch, next.rows(launch), q);
      taken = 0;
    }

    combine_cluster(launch, rows, part, shared, combine_memory, segment.whole ? kFinal : slot);
    if (!segment.whole && cluster_rank(launch) == 0 && threadIdx.x == 0) {
      arch::publish(launch.ready + slot, launch.nonce);
    }
    slot = schedule.first_slot + 1;
  }

  if (schedule.merge.count > 0 && cluster_rank(launch) == 0) {
    combine_slots<Tile, Policy>(launch, schedule.merge, schedule.first.rows(launch));
  }
}

template <class Tile, class Policy, class Stages>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    decode_attention_kernel(const __grid_constant__ AttentionLaunch launch,
                            const __grid_constant__ typename Stages::Source source) {
  if constexpr (Stages::kAvailable) attend<Tile, Policy, Stages>(launch, source);
}

}  // namespace flashdecpp
