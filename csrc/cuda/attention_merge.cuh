// Decode attention, the end of a row: the waves' parts merged, the blocks' parts written and merged, the output.
#pragma once

#include "attention_walk.cuh"

namespace flashdecpp {

// In shared memory.
template <class Tile>
struct MergeMemory {
  RowPart parts[Tile::kWaves][Tile::kRows];
  float shares[Tile::kWaves][Tile::kRows];  // what a wave's O counts
  float factor[Tile::kRows];                // output = factor * O
};

__device__ __forceinline__ float4 scaled_sum(float a, float4 x, float b, float4 y) {
  return {a * x.x + b * y.x, a * x.y + b * y.y, a * x.z + b * y.z, a * x.w + b * y.w};
}

// The factor that makes the O of a whole row its output. `first`: of the threads that ask, the one that also writes lse
// and the row maximum and counts the row where phi did not fit it.
template <class Policy>
__device__ __forceinline__ float conclude(const AttentionLaunch& launch, const RowBlock& rows, int row,
                                          const RowPart& whole, bool first) {
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

// Four neighbouring columns of a row.
template <class T>
__device__ __forceinline__ void write_out(const AttentionLaunch& launch, const RowBlock& rows, int row, int column,
                                          float factor, float4 o) {
  const AttentionParams& p = launch.p;
  const int64_t token = int64_t{rows.batch} * p.q_len + rows.token(launch, row);
  T* out = static_cast<T*>(p.out) + (token * p.q_heads + rows.head(launch, row)) * p.head_dim + column;
  const float values[4] = {factor * o.x, factor * o.y, factor * o.z, factor * o.w};
  arch::store_vector(out, values);
}

// The end of a pass, for all waves: their parts become the output, or the block's part in `slot` where that is not
// negative. Scratch and memory are free again after the next barrier.
template <class Tile, class Policy, class Ring>
__device__ __forceinline__ void merge_waves(const AttentionLaunch& launch, const RowBlock& rows, int slot,
                                            const WavePart<Tile, Policy>& part, const SharedMemory<Tile, Ring>& shared,
                                            MergeMemory<Tile>& memory) {
  const AttentionParams& p = launch.p;
  const int64_t first = int64_t{slot} * launch.rows() + rows.begin;
  part.for_each_row([&](int row, const RowPart& state) { memory.parts[arch::wave()][row] = state; });
  __syncthreads();
  if (const int row = threadIdx.x; row < rows.count) {
    WholeRow whole;
#pragma unroll 1
    for (int w = 0; w < Tile::kWaves; ++w) whole.add(memory.parts[w][row]);
#pragma unroll 1
    for (int w = 0; w < Tile::kWaves; ++w) {
      const RowPart& of_wave = memory.parts[w][row];
      memory.shares[w][row] = of_wave.max > -kInfinity ? share(of_wave.ref, whole.ref) : 1.f;
    }
    if (slot < 0) {
      memory.factor[row] = conclude<Policy>(launch, rows, row, whole.part(), true);
    } else {
      launch.part_state[first + row] = whole.part();
    }
  }

  for (int chunk = 0; chunk < rows.count; chunk += Tile::kMergeRows) {
    if (chunk > 0) __syncthreads();
    part.store_rows(chunk / 16, chunk % 16 / Tile::kMergeRows, shared.scratch(arch::wave()));
    __syncthreads();
    const int chunk_rows = min(Tile::kMergeRows, rows.count - chunk);
    // kDims / 4 threads a row, for the widest row; a narrower one leaves some idle.
    constexpr int kRowThreads = Tile::kDims / 4;
#pragma unroll 1
    for (int item = threadIdx.x; item < chunk_rows * kRowThreads; item += Tile::kThreads) {
      const int row = item / kRowThreads, column = item % kRowThreads * 4;
      if (column >= p.head_dim) continue;
      float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < Tile::kWaves; ++w) {
        const float* from = shared.scratch(w) + row * Tile::kScratchStride + column;
        total = scaled_sum(1.f, total, memory.shares[w][chunk + row], *reinterpret_cast<const float4*>(from));
      }
      if (slot < 0) {
        write_out<typename Tile::T>(launch, rows, chunk + row, column, memory.factor[chunk + row], total);
      } else {
        *reinterpret_cast<float4*>(launch.part_out + (first + chunk + row) * p.head_dim + column) = total;
      }
    }
  }
}

// The parts of one unit become the output of its rows, four columns a thread.
template <class Tile, class Policy>
__device__ __forceinline__ void merge_slots(const AttentionLaunch& launch, const Slots& slots, const RowBlock& rows) {
  constexpr int kAtOnce = 16, kRowThreads = Tile::kDims / 4;  // loads in flight; threads of a row, as in merge_waves
  const AttentionParams& p = launch.p;
  for (int i = threadIdx.x; i < slots.count; i += Tile::kThreads) arch::await(launch.ready + slots[i], launch.nonce);
  __syncthreads();
  // A graph launches this with the same nonce again.
  for (int i = threadIdx.x; i < slots.count; i += Tile::kThreads) launch.ready[slots[i]] = 0;

#pragma unroll 1
  for (int item = threadIdx.x; item < rows.count * kRowThreads; item += Tile::kThreads) {
    const int row = item / kRowThreads, column = item % kRowThreads * 4;
    if (column >= p.head_dim) continue;
    WholeRow whole;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int begin = 0; begin < slots.count; begin += kAtOnce) {
      RowPart state[kAtOnce];
      float4 o[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j >= slots.count) continue;
        const int64_t at = int64_t{slots[begin + j]} * rows.count + row;
        state[j] = launch.part_state[at];
        o[j] = *reinterpret_cast<const float4*>(launch.part_out + at * p.head_dim + column);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j >= slots.count) continue;
        const float2 factors = whole.add(state[j]);
        total = scaled_sum(factors.x, total, factors.y, o[j]);
      }
    }
    const float factor = conclude<Policy>(launch, rows, row, whole.part(), column == 0);
    write_out<typename Tile::T>(launch, rows, row, column, factor, total);
  }
}

}  // namespace flashdecpp
