// Decode attention, the arithmetic: S = Q K^T, the softmax policy, O += P V over a run of key tiles.
#pragma once

#include "attention_stream.cuh"

namespace flashdecpp {

__device__ __forceinline__ float logit(const AttentionParams& p, float scale, float product, float slope,
                                       int distance) {
  float x = product * scale;
  if (p.softcap > 0.f) x = p.softcap * tanhf(x / p.softcap);
  if (p.alibi_slopes) x -= slope * static_cast<float>(distance);
  return is_finite(x) ? x : kNaN;
}

// O += P V, key by key and row by row, for a tile with a V that is not finite and that not all rows see.
template <class Tile>
__device__ __forceinline__ void add_values_selected(const typename Tile::T* p, const typename Tile::T* v, int key_begin,
                                                    const int (&first)[TileC::kRowSlots],
                                                    const int (&last)[TileC::kRowSlots],
                                                    TileC (&o)[Waves<Tile>::kOuts]) {
#pragma unroll 1
  for (int j = 0; j < Tile::kKeys; ++j) {
#pragma unroll
    for (int i = 0; i < TileC::kValues; ++i) {
      const int slot = TileC::slot(i);
      if (key_begin + j < first[slot] || key_begin + j > last[slot]) continue;
      const float weight = arch::to_float(p[TileC::row(i) * Tile::kPStride + j]);
#pragma unroll
      for (int n = 0; n < Waves<Tile>::kOuts; ++n) {
        if (!Waves<Tile>::has_outs(n)) continue;
        const int column = Waves<Tile>::tile(n) * arch::kTileN + TileC::col(i);
        o[n].v[i] += weight * arch::to_float(v[j * Tile::kStride + column]);
      }
    }
  }
}

template <class Tile>
__device__ __forceinline__ bool all_finite(const typename Tile::T* v) {
  bool finite = true;
  for (int index = threadIdx.x; index < Tile::kKeys * Tile::kDims; index += Tile::kThreads) {
    finite &= is_finite(arch::to_float(v[index / Tile::kDims * Tile::kStride + index % Tile::kDims]));
  }
  return !__syncthreads_or(!finite);
}

// The attention of the block's rows to key tiles tile_begin .. tile_end: O in o, and maximum and sum in rows.
template <class Tile, class Policy>
__device__ __forceinline__ void attend(const AttentionLaunch& launch, const Work& work, unsigned char* shared,
                                       Rows<Waves<Tile>::kWaves>& rows, int tile_begin, int tile_end,
                                       TileC (&o)[Waves<Tile>::kOuts]) {
  using T = typename Tile::T;
  using W = Waves<Tile>;
  const AttentionParams& p = launch.p;
  const float scale = p.scale * (p.k_scale ? p.k_scale[work.kv_head] : 1.f);
  const auto maximum = [](float a, float b) { return fmaxf(a, b); };
  const auto plus = [](float a, float b) { return a + b; };

  KeyValueStream<Tile> stream(launch, work, shared, tile_begin, tile_end);

  int first[TileC::kRowSlots], last[TileC::kRowSlots];
  float slope[TileC::kRowSlots];
  Policy state[TileC::kRowSlots];
#pragma unroll
  for (int s = 0; s < TileC::kRowSlots; ++s) {
    const int row = TileC::slot_row(s);
    first[s] = rows.first[row];
    last[s] = rows.last[row];
    slope[s] = rows.slope[row];
    state[s] = Policy(rows.phi[row]);
  }
#pragma unroll
  for (int n = 0; n < W::kOuts; ++n) o[n] = TileC();

  TileA<T> q[Tile::kDims / 16];
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const int key_begin = tile * Tile::kKeys;

    // S = Q K^T, the logits of this wave's keys.
    const T* keys = stream.keys(tile);
    if (tile == tile_begin) {
#pragma unroll
      for (int k = 0; k < Tile::kDims / 16; ++k) arch::load_a(q[k], Tile::q(shared) + k * 16, Tile::kStride);
    }
    TileC scores[W::kScores];
#pragma unroll
    for (int k = 0; k < Tile::kDims / 16; ++k) {
#pragma unroll
      for (int n = 0; n < W::kScores; ++n) {
        if (!W::has_scores(n)) continue;
        TileB<T> b;
        arch::load_b(b, keys + W::tile(n) * arch::kTileN * Tile::kStride + k * 16, Tile::kStride);
        arch::mma(scores[n], q[k], b);
      }
    }
#pragma unroll
    for (int n = 0; n < W::kScores; ++n) {
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) {
        const int s = TileC::slot(i);
        const int key = key_begin + W::tile(n) * arch::kTileN + TileC::col(i);
        const bool visible = key >= first[s] && key <= last[s] && W::has_scores(n);
        const float x = logit(p, scale, scores[n].v[i], slope[s], last[s] - key);
        scores[n].v[i] = visible ? x : -kInfinity;
      }
    }

    // The online maximum: of the tile over all waves, before any weight.
    if constexpr (!Policy::kUnified) {
      float top[TileC::kRowSlots];
#pragma unroll
      for (int s = 0; s < TileC::kRowSlots; ++s) {
        top[s] = -kInfinity;
#pragma unroll
        for (int n = 0; n < W::kScores; ++n) {
#pragma unroll
          for (int i = 0; i < TileC::kValues; ++i) {
            if (TileC::slot(i) == s) top[s] = fmaxf(top[s], scores[n].v[i]);
          }
        }
        top[s] = arch::row_reduce(top[s], maximum);
        if (arch::lane() % TileC::kRowLanes == 0) rows.wave_max[arch::wave()][TileC::slot_row(s)] = top[s];
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < TileC::kRowSlots; ++s) {
#pragma unroll
        for (int w = 0; w < W::kWaves; ++w) top[s] = fmaxf(top[s], rows.wave_max[w][TileC::slot_row(s)]);
        const float shrink = state[s].raise(top[s]);
#pragma unroll
        for (int n = 0; n < W::kOuts; ++n) {
#pragma unroll
          for (int i = 0; i < TileC::kValues; ++i) {
            if (TileC::slot(i) == s) o[n].v[i] *= shrink;
          }
        }
      }
    }

    // P, through shared memory to all waves.
#pragma unroll
    for (int n = 0; n < W::kScores; ++n) {
      if (!W::has_scores(n)) continue;
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) scores[n].v[i] = state[TileC::slot(i)].weight(scores[n].v[i]);
      arch::store(Tile::p(shared) + W::tile(n) * arch::kTileN, Tile::kPStride, scores[n]);
    }

    // O += P V, for this wave's columns.
    const T* values = stream.values(tile);
    const bool common = max(key_begin, work.key_begin) >= work.common_begin &&
                        min(key_begin + (Tile::kKeys - 1), work.key_end - 1) < work.common_end;
    if (common || all_finite<Tile>(values)) {
#pragma unroll
      for (int k = 0; k < Tile::kKeys / 16; ++k) {
        TileA<T> a;
        arch::load_a(a, Tile::p(shared) + k * 16, Tile::kPStride);
#pragma unroll
        for (int n = 0; n < W::kOuts; ++n) {
          if (!W::has_outs(n)) continue;
          TileB<T> b;
          arch::load_b_transposed(b, values + k * 16 * Tile::kStride + W::tile(n) * arch::kTileN, Tile::kStride);
          arch::mma(o[n], a, b);
        }
      }
    } else {
      add_values_selected<Tile>(Tile::p(shared), values, key_begin, first, last, o);
    }
  }
  arch::copy_wait<0>();

#pragma unroll
  for (int s = 0; s < TileC::kRowSlots; ++s) {
    const float max = Policy::kUnified ? arch::row_reduce(state[s].max, maximum) : state[s].max;
    const float sum = arch::row_reduce(state[s].sum, plus);
    if (arch::lane() % TileC::kRowLanes == 0) {
      rows.wave_max[arch::wave()][TileC::slot_row(s)] = max;
      rows.wave_sum[arch::wave()][TileC::slot_row(s)] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < kTileRows) {
    float max = -kInfinity, sum = 0.f;
    for (int w = 0; w < W::kWaves; ++w) {
      max = fmaxf(max, rows.wave_max[w][threadIdx.x]);
      sum += rows.wave_sum[w][threadIdx.x];
    }
    rows.max[threadIdx.x] = max;
    rows.sum[threadIdx.x] = sum;
  }
  __syncthreads();
}

// f(row, column, value) for every element of O that this lane holds.
template <class Tile, class Function>
__device__ __forceinline__ void for_each_out(const Work& work, int head_dim, const TileC (&o)[Waves<Tile>::kOuts],
                                             Function f) {
#pragma unroll
  for (int n = 0; n < Waves<Tile>::kOuts; ++n) {
    if (!Waves<Tile>::has_outs(n)) continue;
#pragma unroll
    for (int i = 0; i < TileC::kValues; ++i) {
      const int row = TileC::row(i), column = Waves<Tile>::tile(n) * arch::kTileN + TileC::col(i);
      if (row < work.rows && column < head_dim) f(row, column, o[n].v[i]);
    }
  }
}

}  // namespace flashdecpp
