// Decode attention, the end of a segment: partials of warps, of a cluster's CTAs and of clusters are combined, and the
// output is written.
#pragma once

#include <type_traits>

#include "cuda/attention/compute.cuh"
#include "cuda/attention/scheduler.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/numeric.cuh"

namespace flashdecpp {

// Where a partial is stored, a state and `columns` sums per row. Null for the final result, which goes to the output.
struct PartialLocation {
  SoftmaxState* states = nullptr;
  float* out = nullptr;
  int columns = 0;

  static __device__ __forceinline__ PartialLocation slot(const AttentionLaunch& launch, int slot) {
    const int64_t at = int64_t{slot} * launch.slot_rows;
    return {launch.partial_states + at, launch.partial_out + at * launch.p.head_dim, launch.p.head_dim};
  }
};

// Values instead of a slot: the result is final, or is the CTA's partial for its cluster. A PartialLocation would
// occupy more registers, so it is made only where it is used.
inline constexpr int kFinal = -1, kClusterPartial = -2;

// Static shared memory of a CTA. The other CTAs of the cluster read cta_partial.
template <class Tile, class Stages>
struct CombineMemory {
  struct NoPartial {};
  struct CtaPartial {
    float out[Tile::kRows][Tile::kDims];
    SoftmaxState states[Tile::kRows];
  };

  std::conditional_t<Stages::kUsesClusters, CtaPartial, NoPartial> cta_partial;
  SoftmaxState warp_states[Tile::kWarps][Tile::kRows];
  float warp_factors[Tile::kWarps][Tile::kRows];  // of the warps' sums
  SoftmaxState merged[Tile::kRows];

  __device__ __forceinline__ PartialLocation location(const AttentionLaunch& launch, int slot) {
    if constexpr (Stages::kUsesClusters) {
      if (slot == kClusterPartial) return {cta_partial.states, cta_partial.out[0], Tile::kDims};
    }
    return slot == kFinal ? PartialLocation() : PartialLocation::slot(launch, slot);
  }
  __device__ __forceinline__ PartialLocation partial_of(int rank) {
    return {arch::map_shared_rank(cta_partial.states, rank), arch::map_shared_rank(cta_partial.out[0], rank),
            Tile::kDims};
  }
};

__device__ __forceinline__ float4 scaled_sum(float a, float4 x, float b, float4 y) {
  return {a * x.x + b * y.x, a * x.y + b * y.y, a * x.z + b * y.z, a * x.w + b * y.w};
}

// The factor that turns a row's final sums into its output. The thread with `leader` set also writes lse and the row
// maximum, and counts the row if its maximum is outside of phi's window.
template <class Policy>
__device__ __forceinline__ float finalize(const AttentionLaunch& launch, const QueryTile& queries, int row,
                                          const SoftmaxState& state, bool leader) {
  const AttentionParams& p = launch.p;
  const int head = queries.head(launch, row), token = queries.token(launch, row);
  float lse, factor = 1.f / state.sum;
  if (isnan(state.sum)) {
    lse = kNaN;
  } else if (state.max == -kInfinity) {  // no visible key
    lse = p.sinks ? p.sinks[head] : -kInfinity;
    factor = 0.f;
  } else {
    lse = log_sum<Policy>(state);
    if (leader && p.fallback_count && !phi_fits<Policy>(queries.phi(launch, row), state.max)) {
      atomicAdd(p.fallback_count, 1);
    }
    if (leader && p.row_max && token == p.q_len - 1) {
      p.row_max[queries.batch * p.row_max_batch_stride + head] = state.max;
    }
    if (p.sinks) {
      const float sink = p.sinks[head], distance = fabsf(lse - sink);
      factor /= 1.f + expf(sink - lse);
      lse = fmaxf(lse, sink) + log1pf(expf(-distance));
    }
    if (p.v_scale) factor *= p.v_scale[queries.kv_head];
  }
  if (leader) p.lse[(int64_t{queries.batch} * p.q_heads + head) * p.q_len + token] = lse;
  return factor;
}

// Writes four neighboring columns of a row.
template <class T>
__device__ __forceinline__ void store_output(const AttentionLaunch& launch, const QueryTile& queries, int row,
                                             int column, float factor, float4 o) {
  const AttentionParams& p = launch.p;
  const int64_t token = int64_t{queries.batch} * p.q_len + queries.token(launch, row);
  T* out = static_cast<T*>(p.out) + (token * p.q_heads + queries.head(launch, row)) * p.head_dim + column;
  const float values[4] = {factor * o.x, factor * o.y, factor * o.z, factor * o.w};
  arch::store_vector(out, values);
}

// Writes four neighboring columns of a row to a partial or, if they are final, to the output.
template <class Tile, class Policy>
__device__ __forceinline__ void store_row(const AttentionLaunch& launch, const QueryTile& queries, int row, int column,
                                          const SoftmaxState& state, float4 sums, const PartialLocation& to) {
  if (to.states) {
    if (column == 0) to.states[row] = state;
    *reinterpret_cast<float4*>(to.out + row * to.columns + column) = sums;
  } else {
    const float factor = finalize<Policy>(launch, queries, row, state, column == 0);
    store_output<typename Tile::T>(launch, queries, row, column, factor, sums);
  }
}

// Combines the partials of a CTA's warps. Scratch and `memory` may be overwritten after the next barrier.
template <class Tile, class Policy, class Stages>
__device__ __forceinline__ void combine_warps(const AttentionLaunch& launch, const QueryTile& queries,
                                              const WarpAttention<Tile, Policy>& attention,
                                              const SharedMemory<Tile, Stages>& shared,
                                              CombineMemory<Tile, Stages>& memory, int slot) {
  constexpr int kRowThreads = Tile::kDims / 4;  // of the widest row; some are idle if head_dim is smaller
  const unsigned thread = arch::rematerialize(unsigned{threadIdx.x});
  attention.for_each_row([&](int row, const SoftmaxState& state) { memory.warp_states[arch::warp()][row] = state; });
  __syncthreads();
  static_assert(Tile::kRows * Tile::kWarps <= Tile::kThreads);
  if (thread < Tile::kRows * Tile::kWarps) {
    const int row = thread / Tile::kWarps, warp = thread % Tile::kWarps;
    float factor;
    const SoftmaxState merged = merge_lanes<Tile::kWarps>(memory.warp_states[warp][row], factor);
    memory.warp_factors[warp][row] = factor;
    if (warp == 0) memory.merged[row] = merged;
  }

#pragma unroll
  for (int chunk = 0; chunk < Tile::kRows; chunk += Tile::kScratchRows) {  // unrolled for store_rows
    if (chunk >= queries.count) break;
    if (chunk > 0) __syncthreads();
    attention.store_rows(chunk, shared.scratch(arch::warp()));
    __syncthreads();
    const int chunk_rows = min(Tile::kScratchRows, queries.count - chunk);
#pragma unroll 1
    for (int item = thread; item < chunk_rows * kRowThreads; item += Tile::kThreads) {
      const int chunk_row = item / kRowThreads, row = chunk + chunk_row, column = item % kRowThreads * 4;
      if (column >= launch.p.head_dim) continue;
      float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < Tile::kWarps; ++w) {
        const float* from = shared.scratch(w) + chunk_row * Tile::kScratchStride + column;
        total = scaled_sum(1.f, total, memory.warp_factors[w][row], *reinterpret_cast<const float4*>(from));
      }
      store_row<Tile, Policy>(launch, queries, row, column, memory.merged[row], total, memory.location(launch, slot));
    }
  }
}

// Combines `count` partials of a work tile, the i-th at location(i), `unroll` at a time. An item is four columns of a
// row; this thread processes every `step`-th from `first` on.
template <class Tile, class Policy, int unroll, class Location>
__device__ __forceinline__ void combine_partials(const AttentionLaunch& launch, const QueryTile& queries, int count,
                                                 const Location& location, int first, int step,
                                                 const PartialLocation& to) {
  constexpr int kRowThreads = Tile::kDims / 4;  // as in combine_warps
#pragma unroll 1
  for (int item = first; item < queries.count * kRowThreads; item += step) {
    const int row = item / kRowThreads, column = item % kRowThreads * 4;
    if (column >= launch.p.head_dim) continue;
    MergedState merged;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += unroll) {
      SoftmaxState states[unroll];
      float4 o[unroll];
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        states[i] = kEmptyState;
        if (begin + i >= count) continue;
        const PartialLocation from = location(begin + i);
        states[i] = from.states[row];
        o[i] = *reinterpret_cast<const float4*>(from.out + row * from.columns + column);
      }
      float factors[unroll];
      const float old_factor = merged.add(states, factors);
      total = {old_factor * total.x, old_factor * total.y, old_factor * total.z, old_factor * total.w};
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        if (begin + i < count) total = scaled_sum(1.f, total, factors[i], o[i]);
      }
    }
    store_row<Tile, Policy>(launch, queries, row, column, merged.state, total, to);
  }
}

// Combines the partials of a cluster at the end of a segment: every CTA leaves its partial in its shared memory and
// combines some of the items. On return no CTA of the cluster still reads another's shared memory.
template <class Tile, class Policy, class Stages>
__device__ __forceinline__ void combine_cluster(const AttentionLaunch& launch, const QueryTile& queries,
                                                const WarpAttention<Tile, Policy>& attention,
                                                const SharedMemory<Tile, Stages>& shared,
                                                CombineMemory<Tile, Stages>& memory, int slot) {
  const bool single_cta = !Stages::kUsesClusters || launch.cluster_size_log2 == 0;
  combine_warps(launch, queries, attention, shared, memory, single_cta ? slot : kClusterPartial);
  if constexpr (Stages::kUsesClusters) {
    if (!single_cta) {
      arch::cluster_sync();
      combine_partials<Tile, Policy, kMaxClusterSize>(
          launch, queries, 1 << launch.cluster_size_log2, [&](int i) { return memory.partial_of(i); },
          arch::rematerialize(unsigned{threadIdx.x}) + cluster_rank(launch) * Tile::kThreads,
          Tile::kThreads << launch.cluster_size_log2, memory.location(launch, slot));
      arch::cluster_sync();
      return;
    }
  }
  __syncthreads();
}

// Combines the partials of one work tile that clusters left in slots, and writes its output.
template <class Tile, class Policy>
__device__ __forceinline__ void combine_slots(const AttentionLaunch& launch, const PartialSlots& slots,
                                              const QueryTile& queries) {
  for (int i = threadIdx.x; i < slots.count; i += Tile::kThreads) arch::await(launch.ready + slots[i], launch.nonce);
  __syncthreads();
  // A CUDA graph launches this again with the same nonce.
  for (int i = threadIdx.x; i < slots.count; i += Tile::kThreads) launch.ready[slots[i]] = 0;
  combine_partials<Tile, Policy, 16>(launch, queries, slots.count,
                                     [&](int i) { return PartialLocation::slot(launch, slots[i]); },
                                     arch::rematerialize(unsigned{threadIdx.x}), Tile::kThreads, {});
}

}  // namespace flashdecpp
