// Decode attention. Every byte of K and V is read once, so memory is the floor: 2 * keys * kv_heads * head_dim *
// sizeof(element) over the read bandwidth. Arithmetic is far below it.
//
// work tile        one query tile of one KV head of one sequence: up to 16 of the q_len * group query rows that share
//                  the KV head, packed token by token
// KV tile          16 consecutive keys and their values: what a stage holds and a warp processes at a time
// cluster          1, 2, 4 or 8 CTAs whose warps stride through the KV tiles of one segment
// segment          the KV tiles of one work tile that one cluster processes
// uniform split    each work tile has up to uniform_splits clusters, whose warps take its KV tiles in turn
// stream-K split   the KV tiles of all sequences, concatenated, are cut into streams of equal length
// stream           one such cut; each work tile of a sequence has its own cluster for it
// partial          O and softmax state of a work tile over some of its keys: those of a warp, a CTA or a cluster
// slot             global memory for one cluster's partial of a work tile that several clusters share
// reference, phi   the value subtracted from a row's logits before exp; phi is a reference that the caller provides
//
//   tile           16 rows x 16 keys x head_dim per warp
//   stages         K and V of one KV tile each, CtaShape::kStages per warp
//   shared         head_dim 128 in half on Hopper: per warp 2 stages of 8 KiB and 8.5 KiB of queries and scratch, per
//                  CTA 8.5 KiB for its partial; two CTAs of 4 warps per SM, or one of 8
//   S = Q K^T      stays in registers, where the softmax policy turns it into the left factor of
//   O += P V       without a round trip through shared memory
//
// Every warp fills its own stages, so warps meet only at the end of a segment. CTAs of a cluster combine their partials
// through distributed shared memory. Clusters that share a work tile leave their partials in slots, and the cluster
// with the last KV tile combines them, in order, in the same launch.
//
// Nothing beyond seq_len and no other key that no row sees affects the result: logits of invisible keys are -infinity,
// and V rows that no row sees are zeros in shared memory. A KV tile that only some rows see in full (new tokens among
// themselves, the edge of the window) is computed for all rows. If such a tile has a V that is not finite, so that 0 *
// V would be NaN, its product with V is computed key by key.
//
// Under programmatic dependent launch a CTA starts while the previous kernel still runs. Until that kernel is done, the
// CTA reads only the tensor maps, the lengths and the block tables, which tell it where to begin.
#pragma once

#include "cuda/attention/combine.cuh"
#include "cuda/attention/compute.cuh"
#include "cuda/attention/pipeline.cuh"
#include "cuda/attention/scheduler.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/attention/tile.cuh"

namespace flashdecpp {

// Zeroes the unused query rows, which are the same in every work tile of a CTA.
template <class Tile>
__device__ __forceinline__ void zero_unused_queries(int count, typename Tile::T* q) {
  constexpr int kChunks = Tile::kDims / 8;
#pragma unroll 1
  for (int index = count * kChunks + arch::lane(); index < Tile::kRows * kChunks; index += arch::kWarpSize) {
    *reinterpret_cast<uint4*>(q + index / kChunks * Tile::kQStride + index % kChunks * 8) = make_uint4(0, 0, 0, 0);
  }
}

// Loads the queries of one work tile as one cp.async group, zero-padded to kDims columns; for a float8 cache in the
// permuted column order of widened K.
template <class Tile>
__device__ __forceinline__ void load_queries(const AttentionLaunch& launch, const QueryTile& queries,
                                             typename Tile::T* q) {
  using T = typename Tile::T;
  const AttentionParams& p = launch.p;
  constexpr int kChunks = Tile::kDims / 8;
#pragma unroll 1
  for (int index = arch::rematerialize(arch::lane()); index < queries.count * kChunks; index += arch::kWarpSize) {
    const int row = index / kChunks, dim = index % kChunks * 8;
    const bool in_row = dim < p.head_dim;
    const int64_t offset = in_row ? queries.batch * p.q_batch_stride + queries.token(launch, row) * p.q_token_stride +
                                        queries.head(launch, row) * p.q_head_stride + dim
                                  : 0;
    const T* from = static_cast<const T*>(p.q) + offset;
    T* to = q + row * Tile::kQStride;
    if constexpr (!Tile::kWiden || arch::kWidenedInOrder) {
      arch::copy_async(to + dim, from, in_row);
    } else {
      const uint4 bits = in_row ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
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

  Timeline timeline(TimelineOf::kAttention);
  arch::allow_next_kernel();
  Stages stages(shared.stages(arch::warp()), reinterpret_cast<unsigned char*>(barriers), p, source);
  typename Tile::T* q = shared.q(arch::warp());
  Schedule schedule(launch, Tile::kWarps);
  zero_unused_queries<Tile>(schedule.first.queries(launch).count, q);
  KvPipeline<Tile, Stages> pipeline(launch, stages);
  pipeline.locate(schedule);
  schedule.load(launch);
  pipeline.prefetch_table();
  schedule.finish(launch);
  if (schedule.kv_tiles == 0) return;
  pipeline.resolve(schedule);
  timeline.mark();
  arch::wait_for_previous_kernel();
  timeline.mark();

  Segment upcoming = schedule.first;
  int remaining = schedule.kv_tiles;
  RowPhi<Tile, Policy> row_phi;
  load_queries<Tile>(launch, upcoming.queries(launch), q);
  row_phi.load(launch, upcoming.queries(launch));
  pipeline.start();

  int slot = schedule.first_slot;
  int fills = Tile::kStages;  // fill() calls since the queries were requested
  for (bool has_next = true; has_next;) {
    const Segment segment = upcoming;
    const QueryTile queries = segment.queries(launch);
    WarpAttention<Tile, Policy> attention(launch, queries, row_phi,
                                          p.scale * (p.k_scale ? p.k_scale[queries.kv_head] : 1.f));
    stages.wait_for_queries(fills);
    arch::warp_sync();
    attention.set_queries(q);
    timeline.mark();
    has_next = upcoming.advance(p, remaining);
    if (has_next) row_phi.load(launch, upcoming.queries(launch));
    if (Tile::kQueryInRegisters && has_next) {
      arch::warp_sync();
      load_queries<Tile>(launch, upcoming.queries(launch), q);
    }

    fills = 0;
    for (int kv_tile = segment.begin + warp_in_cluster(launch, Tile::kWarps); kv_tile < segment.end;
         kv_tile += schedule.step, ++fills) {
      const int key_begin = (segment.sequence.first_kv_tile + kv_tile) * kKvTile;
      const int loaded_begin = segment.sequence.key_begin, loaded_end = segment.sequence.length;
      const int visible_begin = loaded_begin - key_begin, visible_end = loaded_end - key_begin;
      pipeline.acquire_keys(visible_begin, visible_end);
      attention.process_tile(stages.keys(pipeline.stage()), stages.values(pipeline.stage()), key_begin, loaded_begin,
                             loaded_end, shared.scratch(arch::warp()),
                             [&] { pipeline.acquire_values(visible_begin, visible_end); });
      pipeline.release();
    }
    if (!Tile::kQueryInRegisters && has_next) {
      arch::warp_sync();
      load_queries<Tile>(launch, upcoming.queries(launch), q);
      fills = 0;
    }

    timeline.mark();
    combine_cluster(launch, queries, attention, shared, combine_memory, segment.complete ? kFinal : slot);
    if (!segment.complete && cluster_rank(launch) == 0 && threadIdx.x == 0) {
      arch::publish(launch.ready + slot, launch.nonce);
    }
    slot = schedule.first_slot + 1;
  }

  if (schedule.partials.count > 0 && cluster_rank(launch) == 0) {
    combine_slots<Tile, Policy>(launch, schedule.partials, schedule.first.queries(launch));
  }
}

template <class Tile, class Policy, class Stages>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    decode_attention_kernel(const __grid_constant__ AttentionLaunch launch,
                            const __grid_constant__ typename Stages::Source source) {
  if constexpr (Stages::kAvailable) attend<Tile, Policy, Stages>(launch, source);
}

}  // namespace flashdecpp
