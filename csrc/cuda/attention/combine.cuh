// Decode attention, the end of a row: parts merged, of warps, of a team's blocks and of teams, and the output.
#pragma once

#include "cuda/attention/compute.cuh"

namespace flashdecpp {

// Where a part of a unit's rows is kept, a state and `columns` sums a row; nowhere: it is the whole.
struct PartialLocation {
  SoftmaxState* states = nullptr;
  float* out = nullptr;
  int columns = 0;

  static __device__ __forceinline__ PartialLocation slot(const AttentionLaunch& launch, int slot) {
    const int64_t at = int64_t{slot} * launch.slot_rows;
    return {launch.partial_states + at, launch.partial_out + at * launch.p.head_dim, launch.p.head_dim};
  }
};

// In place of a slot: what is merged is the whole, or the block's part for its team. A PartialLocation takes more
// registers, and is made where it is used.
inline constexpr int kFinal = -1, kClusterPartial = -2;

// In shared memory. `part` is the block's, for the others of its team.
template <class Tile, class Stages>
struct CombineMemory {
  struct Nothing {};
  struct Part {
    float out[Tile::kRows][Tile::kDims];
    SoftmaxState states[Tile::kRows];
  };

  std::conditional_t<Stages::kUsesClusters, Part, Nothing> part;
  SoftmaxState parts[Tile::kWarps][Tile::kRows];
  float streams[Tile::kWarps][Tile::kRows];  // what a warp's O counts
  SoftmaxState whole[Tile::kRows];

  __device__ __forceinline__ PartialLocation location(const AttentionLaunch& launch, int slot) {
    if constexpr (Stages::kUsesClusters) {
      if (slot == kClusterPartial) return {part.states, part.out[0], Tile::kDims};
    }
    return slot == kFinal ? PartialLocation() : PartialLocation::slot(launch, slot);
  }
  __device__ __forceinline__ PartialLocation part_of(int rank) {
    return {arch::map_shared_rank(part.states, rank), arch::map_shared_rank(part.out[0], rank), Tile::kDims};
  }
};

__device__ __forceinline__ float4 scaled_sum(float a, float4 x, float b, float4 y) {
  return {a * x.x + b * y.x, a * x.y + b * y.y, a * x.z + b * y.z, a * x.w + b * y.w};
}

// The factor that makes the O of a whole row its output. `first`: of the threads that ask, the one that also writes lse
// and the row maximum and counts the row where phi did not fit it.
template <class Policy>
__device__ __forceinline__ float finalize(const AttentionLaunch& launch, const QueryTile& rows, int row,
                                          const SoftmaxState& whole, bool first) {
  const AttentionParams& p = launch.p;
  const int head = rows.head(launch, row), token = rows.token(launch, row);
  float lse, factor = 1.f / whole.sum;
  if (isnan(whole.sum)) {
    lse = kNaN;
  } else if (whole.max == -kInfinity) {  // sees no key
    lse = p.sinks ? p.sinks[head] : -kInfinity;
    factor = 0.f;
  } else {
    lse = log_sum<Policy>(whole);
    if (first && p.fallback_count && !trusted<Policy>(rows.phi(launch, row), whole.max)) atomicAdd(p.fallback_count, 1);
    if (first && p.row_max && token == p.q_len - 1) {
      p.row_max[rows.batch * p.row_max_batch_stride + head] = whole.max;
    }
    if (p.sinks) {
      const float sink = p.sinks[head], distance = fabsf(lse - sink);
      factor /= 1.f + expf(sink - lse);
      lse = fmaxf(lse, sink) + log1pf(expf(-distance));
    }
    if (p.v_scale) factor *= p.v_scale[rows.kv_head];
  }
  if (first) p.lse[(int64_t{rows.batch} * p.q_heads + head) * p.q_len + token] = lse;
  return factor;
}

// Four neighboring columns of a row.
template <class T>
__device__ __forceinline__ void store_output(const AttentionLaunch& launch, const QueryTile& rows, int row, int column,
                                             float factor, float4 o) {
  const AttentionParams& p = launch.p;
  const int64_t token = int64_t{rows.batch} * p.q_len + rows.token(launch, row);
  T* out = static_cast<T*>(p.out) + (token * p.q_heads + rows.head(launch, row)) * p.head_dim + column;
  const float values[4] = {factor * o.x, factor * o.y, factor * o.z, factor * o.w};
  arch::store_vector(out, values);
}

// Four neighboring columns of a row to where they are kept, or, of a whole, to the output.
template <class Tile, class Policy>
__device__ __forceinline__ void store_row(const AttentionLaunch& launch, const QueryTile& rows, int row, int column,
                                          const SoftmaxState& state, float4 sums, const PartialLocation& to) {
  if (to.states) {
    if (column == 0) to.states[row] = state;
    *reinterpret_cast<float4*>(to.out + row * to.columns + column) = sums;
  } else {
    const float factor = finalize<Policy>(launch, rows, row, state, column == 0);
    store_output<typename Tile::T>(launch, rows, row, column, factor, sums);
  }
}

// The end of a segment in a block, for all warps: their parts become one. Scratch and memory are free again after the
// next barrier.
template <class Tile, class Policy, class Stages>
__device__ __forceinline__ void combine_warps(const AttentionLaunch& launch, const QueryTile& rows,
                                              const WarpAttention<Tile, Policy>& part,
                                              const SharedMemory<Tile, Stages>& shared,
                                              CombineMemory<Tile, Stages>& memory, int slot) {
  constexpr int kRowThreads = Tile::kDims / 4;  // for the widest row; of a narrower one some are idle
  const unsigned thread = arch::rematerialize(unsigned{threadIdx.x});
  part.for_each_row([&](int row, const SoftmaxState& state) { memory.parts[arch::warp()][row] = state; });
  __syncthreads();
  static_assert(Tile::kRows * Tile::kWarps <= Tile::kThreads);
  if (thread < Tile::kRows * Tile::kWarps) {
    const int row = thread / Tile::kWarps, warp = thread % Tile::kWarps;
    float factor;
    const SoftmaxState whole = merge_lanes<Tile::kWarps>(memory.parts[warp][row], factor);
    memory.streams[warp][row] = factor;
    if (warp == 0) memory.whole[row] = whole;
  }

#pragma unroll
  for (int chunk = 0; chunk < Tile::kRows; chunk += Tile::kMergeRows) {  // so that its rows' registers are known
    if (chunk >= rows.count) break;
    if (chunk > 0) __syncthreads();
    part.store_rows(chunk, shared.scratch(arch::warp()));
    __syncthreads();
    const int chunk_rows = min(Tile::kMergeRows, rows.count - chunk);
#pragma unroll 1
    for (int item = thread; item < chunk_rows * kRowThreads; item += Tile::kThreads) {
      const int in_chunk = item / kRowThreads, row = chunk + in_chunk, column = item % kRowThreads * 4;
      if (column >= launch.p.head_dim) continue;
      float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < Tile::kWarps; ++w) {
        const float* from = shared.scratch(w) + in_chunk * Tile::kScratchStride + column;
        total = scaled_sum(1.f, total, memory.streams[w][row], *reinterpret_cast<const float4*>(from));
      }
      store_row<Tile, Policy>(launch, rows, row, column, memory.whole[row], total, memory.location(launch, slot));
    }
  }
}

// Parts of one unit, location(i) for i below `count`, become one: items of four columns of a row, each `step`-th from
// `first` on.
template <class Tile, class Policy, int at_once, class Location>
__device__ __forceinline__ void combine_partials(const AttentionLaunch& launch, const QueryTile& rows, int count,
                                                 const Location& location, int first, int step,
                                                 const PartialLocation& to) {
  constexpr int kRowThreads = Tile::kDims / 4;  // as in combine_warps
#pragma unroll 1
  for (int item = first; item < rows.count * kRowThreads; item += step) {
    const int row = item / kRowThreads, column = item % kRowThreads * 4;
    if (column >= launch.p.head_dim) continue;
    MergedState whole;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += at_once) {
      SoftmaxState states[at_once];
      float4 o[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        states[i] = kEmptyState;
        if (begin + i >= count) continue;
        const PartialLocation from = location(begin + i);
        states[i] = from.states[row];
        o[i] = *reinterpret_cast<const float4*>(from.out + row * from.columns + column);
      }
      float factors[at_once];
      const float kept = whole.add(states, factors);
      total = {kept * total.x, kept * total.y, kept * total.z, kept * total.w};
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if (begin + i < count) total = scaled_sum(1.f, total, factors[i], o[i]);
      }
    }
    store_row<Tile, Policy>(launch, rows, row, column, whole.row, total, to);
  }
}

// The end of a segment. The blocks of a team leave their parts in their shared memory, and each makes one of a share of
// them. Afterwards all of the team is through with all of it.
template <class Tile, class Policy, class Stages>
__device__ __forceinline__ void combine_cluster(const AttentionLaunch& launch, const QueryTile& rows,
                                                const WarpAttention<Tile, Policy>& part,
                                                const SharedMemory<Tile, Stages>& shared,
                                                CombineMemory<Tile, Stages>& memory, int slot) {
  const bool alone = !Stages::kUsesClusters || launch.cluster_size_log2 == 0;
  combine_warps(launch, rows, part, shared, memory, alone ? slot : kClusterPartial);
  if constexpr (Stages::kUsesClusters) {
    if (!alone) {
      arch::cluster_sync();
      combine_partials<Tile, Policy, kMaxClusterSize>(
          launch, rows, 1 << launch.cluster_size_log2, [&](int i) { return memory.part_of(i); },
          arch::rematerialize(unsigned{threadIdx.x}) + cluster_rank(launch) * Tile::kThreads,
          Tile::kThreads << launch.cluster_size_log2, memory.location(launch, slot));
      arch::cluster_sync();
      return;
    }
  }
  __syncthreads();
}

// The parts of one unit that teams left in slots become its output.
template <class Tile, class Policy>
__device__ __forceinline__ void combine_slots(const AttentionLaunch& launch, const Slots& slots,
                                              const QueryTile& rows) {
  for (int i = threadIdx.x; i < slots.count; i += Tile::kThreads) arch::await(launch.ready + slots[i], launch.nonce);
  __syncthreads();
  // A graph launches this with the same nonce again.
  for (int i = threadIdx.x; i < slots.count; i += Tile::kThreads) launch.ready[slots[i]] = 0;
  combine_partials<Tile, Policy, 16>(launch, rows, slots.count,
                                     [&](int i) { return PartialLocation::slot(launch, slots[i]); },
                                     arch::rematerialize(unsigned{threadIdx.x}), Tile::kThreads, {});
}

}  // namespace flashdecpp
