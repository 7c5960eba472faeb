// Decode attention. Every byte of K and V is read once, so memory is the floor: 2 * keys * kv_heads * head_dim *
// sizeof(element) over the read bandwidth. Arithmetic is far below it.
//
// The q_len * group query rows that share a KV head are packed, token by token, into tiles of 16: one side of the
// matrix tile. A wave takes 16 keys at a time, from Q K^T over the softmax to P V, in its own registers and out of its
// own ring of stages: waves meet only when a unit (a KV head of a sequence) is done.
//   tile          16 (or 32) rows x 16 keys x head_dim a wave
//   stages        K and V of 16 keys each, as many as the shared memory of BlockShape holds
//   shared        head_dim 128 in half on Hopper: 8.5 KiB a stage; and 17 KiB of queries and scratch
//   S = Q K^T     to the softmax policy in registers, whose result is the left factor of
//   O += P V      without a way through shared memory
// attention_schedule.cuh cuts the work into equal shares for a grid that just fills the machine; blocks that share a
// unit leave their parts in global memory and the one with the unit's end merges them, in order, in this launch.
//
// What is never read: keys that no row sees, and so anything beyond seq_len; their place holds zeros. A key that some
// rows see and others do not (new tokens among themselves, the edge of the window) is in the tile for all of them: its
// logit is set aside for the others, and where its V is not finite, so that 0 * V would be NaN, the product with V is
// taken key by key.
//
// Under programmatic dependent launch the block starts while the previous kernel is still running. Until that one is
// done nothing is read that counts: only hints go out, for the K and V that this block will want if nothing changes.
//
// attention_tile.cuh (what a block is), attention_schedule.cuh (who does what), attention_ring.cuh (loads),
// attention_walk.cuh (arithmetic) and attention_merge.cuh (parts and output) hold the steps; here they become the kernel.
#pragma once

#include "attention_merge.cuh"

namespace flashdecpp {

// A wave's queries of a pass, zeros for rows and columns that there are not; one group of copies. In a float8 cache's
// order of columns where K is widened.
template <class Tile>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const RowBlock& rows, typename Tile::T* q) {
  using T = typename Tile::T;
  constexpr int kChunks = Tile::kDims / 8;
  for (int index = arch::lane(); index < Tile::kRows * kChunks; index += arch::kWaveSize) {
    const int row = index / kChunks, dim = index % kChunks * 8;
    const bool valid = row < rows.count && dim < p.head_dim;
    const int64_t offset = valid ? rows.batch * p.q_batch_stride + rows.token(p, row) * p.q_token_stride +
                                       rows.head(p, row) * p.q_head_stride + dim
                                 : 0;
    const T* from = static_cast<const T*>(p.q) + offset;
    T* to = q + row * Tile::kQStride;
    if constexpr (!Tile::kWiden) {
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

// A wave's passes: over the keys of a segment for up to kRows of its rows, then of the next.
template <class Tile>
struct Pass {
  const AttentionLaunch& launch;
  Segment segment;
  int left, count, index = 0;

  __device__ Pass(const AttentionLaunch& all, const Schedule& schedule)
      : launch(all),
        segment(schedule.first),
        left(schedule.groups),
        count((all.rows() + Tile::kRows - 1) / Tile::kRows) {}

  __device__ int head_in_block() const { return launch.block_heads == 1 ? 0 : arch::wave(); }
  __device__ RowBlock rows() const {
    const int begin = index * Tile::kRows;
    return {segment.batch, segment.head_set * launch.block_heads + head_in_block(), begin,
            min(Tile::kRows, launch.rows() - begin), segment.sequence.length};
  }
  __device__ bool last_of_segment() const { return index == count - 1; }
  __device__ bool next() {
    if (++index < count) return true;
    index = 0;
    return Schedule::next(launch, segment, left);
  }
};

template <class Tile, class Policy, class Ring>
__device__ __forceinline__ void attend(const AttentionLaunch& launch, const typename Ring::Source& source) {
  __shared__ union {
    ScheduleMemory<Tile::kThreads> schedule;
    MergeMemory<Tile> merge;
  } memory;
  __shared__ uint64_t barriers[Ring::kBarrierBytes / 8 + 1];
  const SharedMemory<Tile, Ring> shared{arch::dynamic_shared()};
  const AttentionParams& p = launch.p;
  const bool share_head = launch.block_heads == 1;

  arch::allow_next_kernel();
  Ring ring(shared.ring(arch::wave()), reinterpret_cast<unsigned char*>(barriers), p, source);
  if (launch.prefetch) {
    const Schedule hint(launch, memory.schedule);
    if (hint.groups > 0) KeyValueStream<Tile, Ring>(launch, hint, 1).prefetch(ring, Tile::kStages);
    __syncthreads();
  }
  arch::wait_for_previous_kernel();

  const Schedule schedule(launch, memory.schedule);
  if (schedule.groups == 0) return;
  __syncthreads();
  Pass<Tile> pass(launch, schedule);
  KeyValueStream<Tile, Ring> stream(launch, schedule, pass.count);
  stream.start(ring);
  typename Tile::T* q = shared.q(arch::wave());
  load_queries<Tile>(p, pass.rows(), q);

  int slot = schedule.first_slot, taken = 0;
  for (bool more = true; more;) {
    const Segment segment = pass.segment;
    const RowBlock rows = pass.rows();
    const bool last = pass.last_of_segment();
    const int64_t place = int64_t{slot} * launch.block_heads + pass.head_in_block();
    WavePart<Tile, Policy> part(p, rows, p.scale * (p.k_scale ? p.k_scale[rows.kv_head] : 1.f));
    ring.wait_for_others(taken);
    arch::wave_sync();
    part.take_queries(q);
    more = pass.next();
    if (Tile::kQueryInRegisters && more) {
      arch::wave_sync();
      load_queries<Tile>(p, pass.rows(), q);
    }

    taken = 0;
    for (int group = segment.begin + (share_head ? arch::wave() : 0); group < segment.end; ++taken) {
      const int key_begin = (segment.sequence.first_group + group) * kGroup;
      const int loaded_begin = segment.sequence.key_begin, loaded_end = segment.sequence.length;
      stream.acquire(ring, loaded_begin - key_begin, loaded_end - key_begin);
      part.take(ring.keys(stream.stage()), ring.values(stream.stage()), key_begin, loaded_begin, loaded_end,
                shared.scratch(arch::wave()));
      stream.release(ring);
      group += share_head ? Tile::kWaves : 1;
    }
    if (!Tile::kQueryInRegisters && more) {
      arch::wave_sync();
      load_queries<Tile>(p, pass.rows(), q);
      taken = 0;
    }

    const PartPlace destination{segment.whole() ? -1 : place * launch.rows() + rows.begin};
    if (share_head) {
      finish_block(launch, rows, destination, part, shared, memory.merge);
      __syncthreads();
    } else {
      finish_wave(launch, rows, destination, part);
      arch::wave_sync();
    }
    if (last) {
      const bool speaks = share_head ? threadIdx.x == 0 : arch::lane() == 0;
      if (!segment.whole() && speaks) arch::publish(launch.ready + place, launch.nonce);
      slot = schedule.first_slot + 1;
    }
  }

  if (schedule.merge.count > 0) {
    const Segment& unit = schedule.first;
    const int head = share_head ? 0 : arch::wave();
    const RowBlock rows{unit.batch, unit.head_set * launch.block_heads + head, 0, launch.rows(),
                        unit.sequence.length};
    merge_slots<Tile, Policy>(launch, schedule.merge, rows, head, share_head ? threadIdx.x : arch::lane(),
                              share_head ? Tile::kThreads : arch::kWaveSize);
  }
}

template <class Tile, class Policy, class Ring>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    decode_attention_kernel(const __grid_constant__ AttentionLaunch launch,
                            const __grid_constant__ typename Ring::Source source) {
  if constexpr (Ring::kAvailable) attend<Tile, Policy, Ring>(launch, source);
}

}  // namespace flashdecpp
