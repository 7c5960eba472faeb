// Decode attention, the end of a row: the waves' parts merged, the blocks' parts written and merged, the output.
#pragma once

#include "attention_walk.cuh"

namespace flashdecpp {

// In shared memory.
template <class Tile>
struct MergeMemory {
  RowPart parts[Tile::kWaves][Tile::kRows];
  float shares[Tile::kWaves][Tile::kRows];  // what a wave's O counts
  RowPart whole[Tile::kRows];
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

// The end of a segment, for all waves: their parts become the output, or, where `slot` is not negative, the block's
// part there. Scratch and memory are free again after the next barrier.
template <class Tile, class Policy, class Ring>
__device__ __forceinline__ void merge_waves(const AttentionLaunch& launch, const RowBlock& rows, int slot,
                                            const WavePart<Tile, Policy>& part, const SharedMemory<Tile, Ring>& shared,
                                            MergeMemory<Tile>& memory) {
  constexpr int kRowThreads = Tile::kDims / 4;  // for the widest row; of a narrower one some are idle
  const unsigned thread = arch::recomputed(unsigned{threadIdx.x});
  part.for_each_row([&](int row, const RowPart& state) { memory.parts[arch::wave()][row] = state; });
  __syncthreads();
  static_assert(Tile::kRows * Tile::kWaves <= Tile::kThreads);
  if (thread < Tile::kRows * Tile::kWaves) {
    const int row = thread / Tile::kWaves, wave = thread % Tile::kWaves;
    float factor;
    const RowPart whole = whole_of_neighbours<Tile::kWaves>(memory.parts[wave][row], factor);
    memory.shares[wave][row] = factor;
    if (wave == 0) memory.whole[row] = whole;
  }

#pragma unroll
  for (int chunk = 0; chunk < Tile::kRows; chunk += Tile::kMergeRows) {  // so that its rows' registers are known
    if (chunk >= rows.count) break;
    if (chunk > 0) __syncthreads();
    part.store_rows(chunk, shared.scratch(arch::wave()));
    __syncthreads();
    const int chunk_rows = min(Tile::kMergeRows, rows.count - chunk);
#pragma unroll 1
    for (int item = thread; item < chunk_rows * kRowThreads; item += Tile::kThreads) {
      const int in_chunk = item / kRowThreads, row = chunk + in_chunk, column = item % kRowThreads * 4;
      if (column >= launch.p.head_dim) continue;
      float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < Tile::kWaves; ++w) {
        const float* from = shared.scratch(w) + in_chunk * Tile::kScratchStride + column;
        total = scaled_sum(1.f, total, memory.shares[w][row], *reinterpret_cast<const float4*>(from));
      }
      const RowPart& whole = memory.whole[row];
      if (slot < 0) {
        const float factor = conclude<Policy>(launch, rows, row, whole, column == 0);
        write_out<typename Tile::T>(launch, rows, row, column, factor, total);
      } else {
        const int64_t at = int64_t{slot} * launch.slot_rows + row;
        if (column == 0) launch.part_state[at] = whole;
        *reinterpret_cast<float4*>(launch.part_out + at * launch.p.head_dim + column) = total;
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
  for (int item = arch::recomputed(unsigned{threadIdx.x}); item < rows.count * kRowThreads; item += Tile::kThreads) {
    const int row = item / kRowThreads, column = item % kRowThreads * 4;
    if (column >= p.head_dim) continue;
    WholeRow whole;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int begin = 0; begin < slots.count; begin += kAtOnce) {
      RowPart states[kAtOnce];
      float4 o[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        states[i] = kNoPart;
        if (begin + i >= slots.count) continue;
        const int64_t at = int64_t{slots[begin + i]} * launch.slot_rows + row;
        states[i] = launch.part_state[at];
        o[i] = *reinterpret_cast<const float4*>(launch.part_out + at * p.head_dim + column);
      }
      float factors[kAtOnce];
      const float kept = whole.add(states, factors);
      total = {kept * total.x, kept * total.y, kept * total.z, kept * total.w};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i < slots.count) total = scaled_sum(1.f, total, factors[i], o[i]);
      }
    }
    const float factor = conclude<Policy>(launch, rows, row, whole.row, column == 0);
    write_out<typename Tile::T>(launch, rows, row, column, factor, total);
  }
}

}  // namespace flashdecpp
