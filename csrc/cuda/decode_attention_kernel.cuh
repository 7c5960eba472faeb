// Decode attention: a few new tokens a sequence over a long KV cache. Every byte of K and V is read once, so memory is
// the floor: 2 * keys * kv_heads * head_dim * sizeof(element) over the read bandwidth. Arithmetic is far below it.
//
// A block is (row tile of one KV head of one sequence, split). The q_len * group rows that share the KV head are
// packed, token by token, into tiles of 16: one side of the matrix tile. The split walks over its key tiles.
//   tile          64 keys, 32 where head_dim is above 128; K and V tiles are the items of one ring in shared memory
//   stages        what kSharedBudget holds, up to 6; head_dim 128 in half: 4 of 17 KiB, 3 of them in flight
//   shared        78.5 KiB at head_dim 128: two blocks a multiprocessor, 96 KiB of K and V in flight on it
//   S = Q K^T     each wave takes some of the keys; the policy of softmax.cuh turns S into P
//   O += P V      each wave takes some of the columns; P comes through shared memory
// Two barriers a tile with the unified maximum, three with the online one. The splits of a row tile are merged, in a
// fixed order, by the last of them to arrive; rows whose maximum phi did not fit are recomputed there.
//
// What is never read: keys that no row of the tile sees, and so anything beyond seq_len; their place holds zeros. A
// key that some rows see and others do not (new tokens among themselves, the edge of the window) is in the tile for
// all of them: its logit is set aside for the others, and where its V is not finite, so that 0 * V would be NaN, the
// product with V is taken key by key.
//
// attention_tile.cuh (what a block is), attention_stream.cuh (loads), attention_walk.cuh (arithmetic) and
// attention_merge.cuh (splits and output) hold the steps; here they become the kernel.
#pragma once

#include "attention_merge.cuh"

namespace flashdecpp {

// Rows that the unified maximum did not fit, from the first key to the last with the online softmax.
template <class Tile>
__device__ __forceinline__ void recompute(const AttentionLaunch& launch, const Work& work, unsigned char* shared,
                                          Rows<Waves<Tile>::kWaves>& rows) {
  __syncthreads();
  const int count = __syncthreads_count(threadIdx.x < work.rows && rows.redo[threadIdx.x]);
  if (count == 0) return;
  if (threadIdx.x == 0 && launch.p.fallback_count) atomicAdd(launch.p.fallback_count, count);
  TileC o[Waves<Tile>::kOuts];
  attend<Tile, OnlineMax>(launch, work, shared, rows, work.tile_begin, work.tile_begin + work.tile_count, o);
  conclude<Tile, OnlineMax>(launch.p, work, true, rows);
  write_out<Tile, OnlineMax>(launch.p, work, true, o, rows);
}

template <class Tile, class Policy>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    decode_attention_kernel(const __grid_constant__ AttentionLaunch launch) {
  __shared__ Rows<Waves<Tile>::kWaves> rows;
  unsigned char* shared = arch::dynamic_shared();
  const Work work(launch, Tile::kKeys);

  // No split is shorter than a tile; those without one have nothing to do.
  const int splits = min(static_cast<int>(gridDim.y), max(work.tile_count, 1)), split = blockIdx.y;
  if (split >= splits) return;
  const auto split_begin = [&](int s) {
    return work.tile_begin + static_cast<int>(int64_t{work.tile_count} * s / splits);
  };

  describe_rows<Tile>(launch.p, work, rows);
  load_queries<Tile>(launch.p, work, shared);
  TileC o[Waves<Tile>::kOuts];
  attend<Tile, Policy>(launch, work, shared, rows, split_begin(split), split_begin(split + 1), o);
  if (splits == 1) {
    conclude<Tile, Policy>(launch.p, work, false, rows);
    write_out<Tile, Policy>(launch.p, work, false, o, rows);
  } else {
    write_part<Tile>(launch, work, rows, o);
    if (!arch::last_block_to_arrive(launch.arrivals + work.unit, splits)) return;
    merge_states<Tile, Policy>(launch, work, splits, rows);
    conclude<Tile, Policy>(launch.p, work, false, rows);
    merge_out<Tile, Policy>(launch, work, splits, shared, rows);
  }
  if constexpr (Policy::kUnified) recompute<Tile>(launch, work, shared, rows);
}

}  // namespace flashdecpp
