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
__device__ __forceinline__ float conclude(const AttentionParams& p, const RowBlock& rows, int row,
                                          const RowPart& whole, bool first) {
  const int head = rows.head(p, row), token = rows.token(p, row);
  float lse, factor = 1.f / whole.sum;
  if (isnan(whole.sum)) {
    lse = kNaN;
  } else if (whole.max == -kInfinity) {  // sees no key
    lse = p.sinks ? p.sinks[head] : -kInfinity;
    factor = 0.f;
  } else {
    lse = log_sum<Policy>(whole);
    if (first && p.fallback_count && !trusted<Policy>(rows.phi(p, row), whole.max)) atomicAdd(p.fallback_count, 1);
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

template <class T>
__device__ __forceinline__ T* out_row(const AttentionParams& p, const RowBlock& rows, int row) {
  const int64_t token = int64_t{rows.batch} * p.q_len + rows.token(p, row);
  return static_cast<T*>(p.out) + (token * p.q_heads + rows.head(p, row)) * p.head_dim;
}

// Four neighbouring columns of a row.
template <class T>
__device__ __forceinline__ void write_out(const AttentionParams& p, const RowBlock& rows, int row, int column,
                                          float factor, float4 o) {
  const float values[4] = {factor * o.x, factor * o.y, factor * o.z, factor * o.w};
  arch::store_vector(out_row<T>(p, rows, row) + column, values);
}

// Where a part of rows goes that are not whole yet.
struct PartPlace {
  int64_t first_row;  // of the pass, in part_state; negative: the rows are whole and go to the output
};

// The end of a pass of a wave with a KV head of its own.
template <class Tile, class Policy>
__device__ __forceinline__ void finish_wave(const AttentionLaunch& launch, const RowBlock& rows, PartPlace place,
                                            const WavePart<Tile, Policy>& part) {
  using T = typename Tile::T;
  const AttentionParams& p = launch.p;
  const bool whole = place.first_row < 0, first = arch::lane() % TileC::kRowLanes == 0;
  float factors[Tile::kRowTiles * TileC::kRowSlots];
  part.for_each_row([&](int slot, int row, const RowPart& state) {
    factors[slot] = 1.f;
    if (row >= rows.count) return;
    if (whole) {
      factors[slot] = conclude<Policy>(p, rows, row, state, first);
    } else if (first) {
      launch.part_state[place.first_row + row] = state;
    }
  });
  part.for_each_out([&](int slot, int row, int column, float value) {
    if (row >= rows.count || column >= p.head_dim) return;
    if (whole) {
      out_row<T>(p, rows, row)[column] = arch::from_float<T>(factors[slot] * value);
    } else {
      launch.part_out[(place.first_row + row) * p.head_dim + column] = value;
    }
  });
}

// The end of a pass of waves that share a KV head. Scratch and memory are free again after the next barrier.
template <class Tile, class Policy, class Ring>
__device__ __forceinline__ void finish_block(const AttentionLaunch& launch, const RowBlock& rows, PartPlace place,
                                             const WavePart<Tile, Policy>& part,
                                             const SharedMemory<Tile, Ring>& shared, MergeMemory<Tile>& memory) {
  const AttentionParams& p = launch.p;
  const bool is_whole = place.first_row < 0;
  part.for_each_row([&](int, int row, const RowPart& state) {
    if (arch::lane() % TileC::kRowLanes == 0) memory.parts[arch::wave()][row] = state;
  });

  const int quads = p.head_dim / 4;
  for (int chunk = 0; chunk < rows.count; chunk += Tile::kMergeRows) {
    float* mine = shared.scratch(arch::wave());
    part.for_each_out([&](int, int row, int column, float value) {
      if (row >= chunk && row < chunk + Tile::kMergeRows) mine[(row - chunk) * Tile::kScratchStride + column] = value;
    });
    __syncthreads();
    if (chunk == 0) {
      const int row = threadIdx.x;
      if (row < rows.count) {
        WholeRow whole;
#pragma unroll
        for (int w = 0; w < Tile::kWaves; ++w) whole.add(memory.parts[w][row]);
#pragma unroll
        for (int w = 0; w < Tile::kWaves; ++w) {
          const RowPart& of_wave = memory.parts[w][row];
          memory.shares[w][row] = of_wave.max > -kInfinity ? share(of_wave.ref, whole.ref) : 1.f;
        }
        if (is_whole) {
          memory.factor[row] = conclude<Policy>(p, rows, row, whole.part(), true);
        } else {
          launch.part_state[place.first_row + row] = whole.part();
        }
      }
      __syncthreads();
    }
    const int items = min(Tile::kMergeRows, rows.count - chunk) * quads;
    for (int item = threadIdx.x; item < items; item += Tile::kThreads) {
      const int row = item / quads, column = item % quads * 4;
      float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < Tile::kWaves; ++w) {
        const float* from = shared.scratch(w) + row * Tile::kScratchStride + column;
        total = scaled_sum(1.f, total, memory.shares[w][chunk + row], *reinterpret_cast<const float4*>(from));
      }
      if (is_whole) {
        write_out<typename Tile::T>(p, rows, chunk + row, column, memory.factor[chunk + row], total);
      } else {
        *reinterpret_cast<float4*>(launch.part_out + (place.first_row + chunk + row) * p.head_dim + column) = total;
      }
    }
    if (chunk + Tile::kMergeRows < rows.count) __syncthreads();
  }
}

// The parts of one KV head of a unit become the output of its rows, four columns a thread. The `threads` that share the
// head call with their `thread` of them.
template <class Tile, class Policy>
__device__ __forceinline__ void merge_slots(const AttentionLaunch& launch, const Slots& slots, const RowBlock& rows,
                                            int head_in_block, int thread, int threads) {
  constexpr int kAtOnce = 8;  // loads in flight
  const AttentionParams& p = launch.p;
  const int quads = p.head_dim / 4;
  const auto place = [&](int i) { return int64_t{slots[i]} * launch.block_heads + head_in_block; };
  for (int i = thread; i < slots.count; i += threads) arch::await(launch.ready + place(i), launch.nonce);
  if (threads == arch::kWaveSize) {
    arch::wave_sync();
  } else {
    __syncthreads();
  }
  // A graph launches this with the same nonce again.
  for (int i = thread; i < slots.count; i += threads) launch.ready[place(i)] = 0;

  for (int item = thread; item < rows.count * quads; item += threads) {
    const int row = item / quads, column = item % quads * 4;
    WholeRow whole;
    float4 total = {0.f, 0.f, 0.f, 0.f};
    for (int begin = 0; begin < slots.count; begin += kAtOnce) {
      RowPart state[kAtOnce];
      float4 o[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t at = place(min(begin + j, slots.count - 1)) * rows.count + row;
        state[j] = launch.part_state[at];
        o[j] = *reinterpret_cast<const float4*>(launch.part_out + at * p.head_dim + column);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j >= slots.count) break;
        const float2 factors = whole.add(state[j]);
        total = scaled_sum(factors.x, total, factors.y, o[j]);
      }
    }
    const float factor = conclude<Policy>(p, rows, row, whole.part(), column == 0);
    write_out<typename Tile::T>(p, rows, row, column, factor, total);
  }
}

}  // namespace flashdecpp
