// Decode attention, the end of a row: parts of splits written and merged, the verdict on phi, the output.
#pragma once

#include "attention_walk.cuh"

namespace flashdecpp {

// This split's part of every row, to global memory.
template <class Tile>
__device__ __forceinline__ void write_part(const AttentionLaunch& launch, const Work& work,
                                           const Rows<Waves<Tile>::kWaves>& rows,
                                           const TileC (&o)[Waves<Tile>::kOuts]) {
  const int split = blockIdx.y, head_dim = launch.p.head_dim;
  float* out = launch.part_out + work.part(launch.p, split, 0) * head_dim;
  for_each_out<Tile>(work, head_dim, o,
                     [&](int row, int column, float value) { out[row * head_dim + column] = value; });
  if (threadIdx.x < work.rows) {
    launch.part_state[work.part(launch.p, split, threadIdx.x)] = {rows.max[threadIdx.x], rows.sum[threadIdx.x]};
  }
}

// Maximum and sum of every row over `splits` parts.
template <class Tile, class Policy>
__device__ __forceinline__ void merge_states(const AttentionLaunch& launch, const Work& work, int splits,
                                             Rows<Waves<Tile>::kWaves>& rows) {
  const int64_t step = work.part(launch.p, 1, 0) - work.part(launch.p, 0, 0);
  for (int row = arch::wave(); row < work.rows; row += Waves<Tile>::kWaves) {
    const SoftmaxPart* parts = launch.part_state + work.part(launch.p, 0, row);
    float max = -kInfinity;
    for (int s = arch::lane(); s < splits; s += arch::kWaveSize) max = fmaxf(max, parts[s * step].max);
    max = arch::wave_max(max);
    float sum = 0.f;
    for (int s = arch::lane(); s < splits; s += arch::kWaveSize) {
      const SoftmaxPart part = parts[s * step];
      sum += part.sum * Policy::share(part.max, max);
    }
    sum = arch::wave_sum(sum);
    if (arch::lane() == 0) {
      rows.max[row] = max;
      rows.sum[row] = sum;
    }
  }
  __syncthreads();
}

// From maximum and sum: lse, the factor that makes O the output, and whether the row must be recomputed. `again`: the
// rows that are being recomputed, and no others.
template <class Tile, class Policy>
__device__ __forceinline__ void conclude(const AttentionParams& p, const Work& work, bool again,
                                         Rows<Waves<Tile>::kWaves>& rows) {
  const int row = threadIdx.x;
  if (row < work.rows && (!again || rows.redo[row])) {
    const int head = work.head(p, row);
    Policy state(rows.phi[row]);
    state.max = rows.max[row];
    state.sum = rows.sum[row];
    float lse, factor = 1.f / state.sum;
    if (isnan(state.sum)) {
      lse = kNaN;
    } else if (state.max == -kInfinity) {  // sees no key
      lse = p.sinks ? p.sinks[head] : -kInfinity;
      factor = 0.f;
    } else {
      lse = state.log_sum();
      if constexpr (Policy::kUnified) rows.redo[row] = !state.trusted();
      if (p.sinks) {
        const float sink = p.sinks[head], distance = fabsf(lse - sink);
        factor /= 1.f + expf(sink - lse);
        lse = fmaxf(lse, sink) + log1pf(expf(-distance));
      }
      if (p.v_scale) factor *= p.v_scale[work.kv_head];
    }
    rows.factor[row] = factor;
    p.lse[(int64_t{work.batch} * p.q_heads + head) * p.q_len + work.token(p, row)] = lse;
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ T* out_row(const AttentionParams& p, const Work& work, int row) {
  const int64_t token = int64_t{work.batch} * p.q_len + work.token(p, row);
  return static_cast<T*>(p.out) + (token * p.q_heads + work.head(p, row)) * p.head_dim;
}

// O that overflowed although the weights were in range: only values near the end of bfloat16 do that.
template <class Policy, int kWaves>
__device__ __forceinline__ void watch_overflow(Rows<kWaves>& rows, int row, float value) {
  if constexpr (Policy::kUnified) {
    if constexpr (Policy::Range::kMayOverflow) {
      if (!is_finite(value) && !isnan(rows.factor[row])) rows.redo[row] = 1;
    }
  }
}

// The output from registers. `again` as in conclude.
template <class Tile, class Policy>
__device__ __forceinline__ void write_out(const AttentionParams& p, const Work& work, bool again,
                                          const TileC (&o)[Waves<Tile>::kOuts], Rows<Waves<Tile>::kWaves>& rows) {
  using T = typename Tile::T;
  for_each_out<Tile>(work, p.head_dim, o, [&](int row, int column, float value) {
    if (again && !rows.redo[row]) return;
    watch_overflow<Policy>(rows, row, value);
    out_row<T>(p, work, row)[column] = arch::from_float<T>(value * rows.factor[row]);
  });
}

// The output from the parts of all splits. A thread adds four columns of a row; where rows are few, teams of threads
// add every so many of the splits.
template <class Tile, class Policy>
__device__ __forceinline__ void merge_out(const AttentionLaunch& launch, const Work& work, int splits,
                                          unsigned char* shared, Rows<Waves<Tile>::kWaves>& rows) {
  using T = typename Tile::T;
  const AttentionParams& p = launch.p;
  const int quads = p.head_dim / 4, items = work.rows * quads;
  const int64_t step = work.part(p, 1, 0) - work.part(p, 0, 0);

  const auto add = [&](int item, int team, int teams) {
    const int row = item / quads;
    const SoftmaxPart* states = launch.part_state + work.part(p, 0, row);
    const float* outs = launch.part_out + work.part(p, 0, row) * p.head_dim + item % quads * 4;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int s = team; s < splits; s += teams) {
      const float share = Policy::share(states[s * step].max, rows.max[row]);
      const float4 part = *reinterpret_cast<const float4*>(outs + s * step * p.head_dim);
      total.x += share * part.x;
      total.y += share * part.y;
      total.z += share * part.z;
      total.w += share * part.w;
    }
    return total;
  };
  const auto write = [&](int item, float4 total) {
    const int row = item / quads;
    T* out = out_row<T>(p, work, row) + item % quads * 4;
    const float values[] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      watch_overflow<Policy>(rows, row, values[i]);
      out[i] = arch::from_float<T>(values[i] * rows.factor[row]);
    }
  };

  if (items >= Tile::kThreads) {
    for (int item = threadIdx.x; item < items; item += Tile::kThreads) write(item, add(item, 0, 1));
    return;
  }
  const int teams = Tile::kThreads / items, team = threadIdx.x / items, item = threadIdx.x % items;
  float4* totals = reinterpret_cast<float4*>(Tile::stage(shared, 0));
  if (team < teams) totals[threadIdx.x] = add(item, team, teams);
  __syncthreads();
  if (team == 0) {
    float4 total = totals[item];
    for (int t = 1; t < teams; ++t) {
      const float4 part = totals[t * items + item];
      total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
    }
    write(item, total);
  }
}

}  // namespace flashdecpp
