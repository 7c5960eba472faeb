// Decode attention, the arithmetic: one warp takes a group of keys: S = Q K^T, the softmax policy, O += P V.
#pragma once

#include "cuda/attention/pipeline.cuh"

namespace flashdecpp {

__device__ __forceinline__ float logit(const AttentionParams& p, float x, float slope, int distance) {
  if (p.softcap > 0.f) {  // tanh(y) = 1 - 2 / (e^(2y) + 1)
    const float e = arch::exp2_approx(x * (2.f * kLog2E / p.softcap));
    x = p.softcap * (1.f - __fdividef(2.f, e + 1.f));
  }
  if (p.alibi_slopes) x -= slope * static_cast<float>(distance);
  return x;
}

// What a lane's rows of a unit begin with, asked for a unit ahead: a small load waits behind many large ones.
template <class Tile, class Policy>
struct RowPhi {
  float phi[TileC::kRowSlots];

  __device__ __forceinline__ void load(const AttentionLaunch& launch, const QueryTile& rows) {
#pragma unroll
    for (int s = 0; s < TileC::kRowSlots; ++s) {
      const int row = TileC::slot_row(s);
      phi[s] = 0.f;
      if (Policy::kUnified && row < rows.count) phi[s] = rows.phi(launch, row);
    }
  }
};

// A warp's part of the rows of one unit: O, and for every row that this lane holds values of, its softmax.
template <class Tile, class Policy>
class WarpAttention {
  using T = typename Tile::T;
  static constexpr int kSlots = TileC::kRowSlots;
  static constexpr int kAhead = Tile::kAhead;

 public:
  __device__ __forceinline__ WarpAttention(const AttentionLaunch& launch, const QueryTile& rows,
                                           const RowPhi<Tile, Policy>& row_phi, float scale)
      : p_(launch.p), scale_(scale) {
    const AttentionParams& p = launch.p;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int row = TileC::slot_row(s);
      const bool used = row < rows.count;
      const int position = used ? rows.position(launch, row) : -1;
      first_[s] = Sequence::window_begin(p, position);
      last_[s] = position;
      slope_[s] = used && p.alibi_slopes ? p.alibi_slopes[rows.head(launch, row)] : 0.f;
      const float phi = row_phi.phi[s];
      ref_[s] = usable(phi) ? phi : 0.f;
      max_[s] = -kInfinity;
      sum_[s] = 0.f;
      seen_[s] = position < 0;  // nothing to wait for
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) o_[n] = TileC();
    const int begin = rows.position(launch, 0), end = rows.position(launch, rows.count - 1);
    common_begin_ = Sequence::window_begin(p, max(end, 0));
    common_end_ = begin + 1;
  }

  // The unit's queries, [kRows, kDims] in shared memory; to be left there.
  __device__ __forceinline__ void set_queries(const T* q) {
    q_ = q;
    if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
      for (int k = 0; k < Tile::kDims / 16; ++k) load_query(q_tiles_[k], k);
    }
  }

  // A group whose first key is `key_begin`. The sequence's keys from loaded_begin to loaded_end are in it, zeros in the
  // place of others' values.
  template <class Rows>
  __device__ __forceinline__ void process_tile(const Rows& keys, const Rows& values, int key_begin, int loaded_begin,
                                               int loaded_end, float* scratch) {
    TileC scores[kTilesOf16];
    compute_scores(keys, scores);
    to_logits(scores, key_begin);
    weigh(scores);
    const bool common =
        max(key_begin, loaded_begin) >= common_begin_ && min(key_begin + kKvTile, loaded_end) <= common_end_;
    if (common || all_finite(values)) {
      accumulate_values(values, scores);
    } else {
      accumulate_visible(values, scores, key_begin, reinterpret_cast<T*>(scratch));
    }
  }

  // f(row of the unit, SoftmaxState) for every row, by one of the lanes that hold values of it.
  template <class F>
  __device__ __forceinline__ void for_each_row(F f) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const float max = arch::row_reduce(max_[s], [](float a, float b) { return fmaxf(a, b); });
      const float sum = arch::row_reduce(sum_[s], [](float a, float b) { return a + b; });
      if (TileC::leads_row()) f(TileC::slot_row(s), SoftmaxState{ref_[s], max, sum});
    }
  }

  // O of the kMergeRows rows from `first` on, a constant, as rows of the scratch.
  __device__ __forceinline__ void store_rows(int first, float* scratch) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int row = arch::rematerialize(TileC::slot_row(s) - first);
      if (row < 0 || row >= Tile::kMergeRows) continue;
#pragma unroll
      for (int n = 0; n < Tile::kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < TileC::kValues; ++i) {
          if (TileC::slot(i) == s) scratch[row * Tile::kScratchStride + Tile::column(n, i)] = o_[n].v[i];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void load_query(TileA<T>& a, int k) const { arch::load_a(a, q_ + k * 16, Tile::kQStride); }

  // Loads run ahead of the products by kAhead steps, and the steps alternate between two sums: chains of dependent
  // instructions are what a warp waits for most.
  template <class Rows>
  __device__ __forceinline__ void compute_scores(const Rows& keys, TileC (&scores)[kTilesOf16]) {
    constexpr int kSteps = Tile::kDims / 16;
    TileC odd[kTilesOf16];
#pragma unroll
    for (int begin = 0; begin < kSteps; begin += kAhead) {
      arch::scheduling_barrier();
      TileB<T> b[kAhead][kTilesOf16];
#pragma unroll
      for (int j = 0; j < kAhead && begin + j < kSteps; ++j) arch::load_b(b[j], keys, begin + j);
#pragma unroll
      for (int j = 0; j < kAhead && begin + j < kSteps; ++j) {
        const int k = begin + j;
        TileA<T> loaded;
        if constexpr (!Tile::kQueryInRegisters) load_query(loaded, k);
        const TileA<T>& a = Tile::kQueryInRegisters ? q_tiles_[Tile::kQueryInRegisters ? k : 0] : loaded;
#pragma unroll
        for (int t = 0; t < kTilesOf16; ++t) arch::mma(k % 2 == 0 ? scores[t] : odd[t], a, b[j][t]);
      }
    }
    for_each_score([&](int t, int i) { scores[t].v[i] += odd[t].v[i]; });
  }

  // Products to logits: NaN where they are not finite, -infinity where a row does not see the key.
  __device__ __forceinline__ void to_logits(TileC (&scores)[kTilesOf16], int key_begin) {
    const bool plain = p_.softcap <= 0.f && !p_.alibi_slopes;
    const bool full = key_begin >= common_begin_ && key_begin + kKvTile <= common_end_;
    for_each_score([&](int t, int i) {
      const float x = scores[t].v[i] * scale_;
      scores[t].v[i] = is_finite(x) ? x : kNaN;
    });
    if (plain && full) return;
    for_each_score([&](int t, int i) {
      const int s = TileC::slot(i), key = key_begin + t * arch::kTileN + TileC::col(i);
      float x = scores[t].v[i];
      if (!plain) x = logit(p_, x, slope_[s], last_[s] - key);
      scores[t].v[i] = key >= first_[s] && key <= last_[s] ? (is_finite(x) ? x : kNaN) : -kInfinity;
    });
  }

  // Logits to weights.
  __device__ __forceinline__ void weigh(TileC (&scores)[kTilesOf16]) {
    if constexpr (Policy::kUnified) {
      bool outside = !settled_;
      for_each_score([&](int t, int i) {
        const int s = TileC::slot(i);
        max_[s] = fmaxf(max_[s], scores[t].v[i]);  // passes over NaN
        outside |= exponent<Policy>(scores[t].v[i], ref_[s]) > Policy::kHigh;
      });
      if (arch::warp_any(outside)) rebase(scores);
    } else {
      rebase(scores);
    }
    for_each_score([&](int t, int i) {
      const int s = TileC::slot(i);
      const float weight = arch::exp2_approx(exponent<Policy>(scores[t].v[i], ref_[s]));
      sum_[s] += weight;
      scores[t].v[i] = weight;
    });
  }

  // f(key tile, value).
  template <class F>
  static __device__ __forceinline__ void for_each_score(F f) {
#pragma unroll
    for (int t = 0; t < kTilesOf16; ++t) {
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) f(t, i);
    }
  }

  // New row_phi for the rows that need one, before the weights of these logits are taken.
  __device__ __forceinline__ void rebase(const TileC (&scores)[kTilesOf16]) {
    float shrink[kSlots];
    bool changed = false, unsettled = false;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      float top = -kInfinity;
#pragma unroll
      for (int t = 0; t < kTilesOf16; ++t) {
#pragma unroll
        for (int i = 0; i < TileC::kValues; ++i) {
          if (TileC::slot(i) == s) top = fmaxf(top, scores[t].v[i]);
        }
      }
      top = arch::row_reduce(top, [](float a, float b) { return fmaxf(a, b); });
      if constexpr (!Policy::kUnified) max_[s] = fmaxf(max_[s], top);
      shrink[s] = 1.f;
      if (top > -kInfinity) {
        const float e = exponent<Policy>(top, ref_[s]);
        if (e > Policy::kHigh || (!seen_[s] && e < Policy::kLow)) {
          const float ref = rebased<Policy>(top);
          if (seen_[s]) shrink[s] = rescale(ref_[s], ref);
          ref_[s] = ref;
          changed = true;
        }
        seen_[s] = true;
      }
      unsettled |= !seen_[s];
    }
    settled_ = !arch::warp_any(unsettled);
    if (!arch::warp_any(changed)) return;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) sum_[s] *= shrink[s];
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) o_[n].v[i] *= shrink[TileC::slot(i)];
    }
  }

  template <class Rows>
  __device__ __forceinline__ void accumulate_values(const Rows& values, const TileC (&weights)[kTilesOf16]) {
    TileA<T> a;
    arch::as_a(a, weights);
#pragma unroll
    for (int begin = 0; begin < Tile::kDims / 16; begin += kAhead) {
      arch::scheduling_barrier();
      TileB<T> b[kAhead][kTilesOf16];
#pragma unroll
      for (int j = 0; j < kAhead && begin + j < Tile::kDims / 16; j += Tile::kRun) {
        arch::load_run<Tile::kRun>(b, j, values, begin + j);
      }
#pragma unroll
      for (int j = 0; j < kAhead && begin + j < Tile::kDims / 16; ++j) {
#pragma unroll
        for (int t = 0; t < kTilesOf16; ++t) arch::mma(o_[(begin + j) * kTilesOf16 + t], a, b[j][t]);
      }
    }
  }

  template <class Rows>
  __device__ __forceinline__ bool all_finite(const Rows& values) const {
    bool finite = true;
#pragma unroll 1
    for (int index = arch::lane(); index < kKvTile * Tile::kDims; index += arch::kWarpSize) {
      finite &= is_finite(arch::to_float(values.at(index / Tile::kDims, index % Tile::kDims)));
    }
    return !arch::warp_any(!finite);
  }

  // O += P V, key by key and row by row, for a group with a V that is not finite and that not all rows see: 0 * V would
  // be NaN.
  template <class Rows>
  __device__ __forceinline__ void accumulate_visible(const Rows& values, const TileC (&weights)[kTilesOf16],
                                                     int key_begin, T* scratch) {
    arch::warp_sync();
#pragma unroll
    for (int t = 0; t < kTilesOf16; ++t) arch::store(scratch + t * arch::kTileN, kKvTile, weights[t]);
    arch::warp_sync();
#pragma unroll 1
    for (int j = 0; j < kKvTile; ++j) {
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) {
        const int s = TileC::slot(i);
        if (key_begin + j < first_[s] || key_begin + j > last_[s]) continue;
        const float weight = arch::to_float(scratch[TileC::row(i) * kKvTile + j]);
#pragma unroll
        for (int n = 0; n < Tile::kColumnTiles; ++n) {
          o_[n].v[i] += weight * arch::to_float(values.at(j, Tile::column(n, i)));
        }
      }
    }
  }

  const AttentionParams& p_;
  float scale_;
  const T* q_;
  TileA<T> q_tiles_[Tile::kQueryInRegisters ? Tile::kDims / 16 : 1];
  int first_[kSlots], last_[kSlots];  // the keys that a row sees
  float slope_[kSlots];
  float ref_[kSlots], max_[kSlots], sum_[kSlots];  // max and sum: over this lane's keys
  bool seen_[kSlots], settled_ = false;            // whether the row, whether all rows have seen a key
  int common_begin_, common_end_;                  // the keys that every row sees
  TileC o_[Tile::kColumnTiles];
};

}  // namespace flashdecpp
