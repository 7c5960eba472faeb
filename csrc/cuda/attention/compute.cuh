// Decode attention, arithmetic: one warp processes one KV tile: S = Q K^T, the softmax policy, O += P V.
#pragma once

#include "cuda/attention/softmax.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/numeric.cuh"

namespace flashdecpp {

// Softcap and ALiBi of a scaled product; `distance` is the row's position minus the key's.
__device__ __forceinline__ float logit(const AttentionParams& p, float x, float slope, int distance) {
  if (p.softcap > 0.f) {  // tanh(y) = 1 - 2 / (e^(2y) + 1)
    const float e = arch::exp2_approx(x * (2.f * kLog2E / p.softcap));
    x = p.softcap * (1.f - __fdividef(2.f, e + 1.f));
  }
  if (p.alibi_slopes) x -= slope * static_cast<float>(distance);
  return x;
}

// phi of a lane's rows, loaded one work tile ahead because a small load queues behind many large ones.
template <class Tile, class Policy>
struct RowPhi {
  float phi[TileC::kRowSlots];

  __device__ __forceinline__ void load(const AttentionLaunch& launch, const QueryTile& queries) {
#pragma unroll
    for (int s = 0; s < TileC::kRowSlots; ++s) {
      const int row = TileC::slot_row(s);
      phi[s] = 0.f;
      if (Policy::kUnified && row < queries.count) phi[s] = queries.phi(launch, row);
    }
  }
};

// A warp's partial of one work tile: O, and the softmax of every row that this lane holds values of.
template <class Tile, class Policy>
class WarpAttention {
  using T = typename Tile::T;
  static constexpr int kRowSlots = TileC::kRowSlots;
  static constexpr int kAhead = Tile::kAhead;

 public:
  __device__ __forceinline__ WarpAttention(const AttentionLaunch& launch, const QueryTile& queries,
                                           const RowPhi<Tile, Policy>& row_phi, float scale)
      : p_(launch.p), scale_(scale) {
    const AttentionParams& p = launch.p;
#pragma unroll
    for (int s = 0; s < kRowSlots; ++s) {
      const int row = TileC::slot_row(s);
      const bool used = row < queries.count;
      const int position = used ? queries.position(launch, row) : -1;
      first_key_[s] = Sequence::window_begin(p, position);
      last_key_[s] = position;
      slope_[s] = used && p.alibi_slopes ? p.alibi_slopes[queries.head(launch, row)] : 0.f;
      const float phi = row_phi.phi[s];
      ref_[s] = is_usable(phi) ? phi : 0.f;
      max_[s] = -kInfinity;
      sum_[s] = 0.f;
      seen_[s] = position < 0;  // unused rows have nothing to wait for
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) o_[n] = TileC();
    const int begin = queries.position(launch, 0), end = queries.position(launch, queries.count - 1);
    common_begin_ = Sequence::window_begin(p, max(end, 0));
    common_end_ = begin + 1;
  }

  // The work tile's queries, [kRows, kDims] in shared memory, where they must stay unless kQueryInRegisters.
  __device__ __forceinline__ void set_queries(const T* q) {
    q_ = q;
    if constexpr (Tile::kQueryInRegisters) {
#pragma unroll
      for (int k = 0; k < Tile::kDims / 16; ++k) load_query(q_tiles_[k], k);
    }
  }

  // Adds the KV tile whose first key is `key_begin`. V is zero outside of the sequence's keys [loaded_begin,
  // loaded_end). keys_done() is called between the last access to K and the first to V.
  template <class Rows, class KeysDone>
  __device__ __forceinline__ void process_tile(const Rows& keys, const Rows& values, int key_begin, int loaded_begin,
                                               int loaded_end, float* scratch, KeysDone keys_done) {
    TileC scores[kTilesOf16];
    compute_scores(keys, scores);
    keys_done();
    to_logits(scores, key_begin);
    to_weights(scores);
    const bool loaded_visible =
        max(key_begin, loaded_begin) >= common_begin_ && min(key_begin + kKvTile, loaded_end) <= common_end_;
    if (loaded_visible || all_finite(values)) {
      accumulate_values(values, scores);
    } else {
      accumulate_visible(values, scores, key_begin, reinterpret_cast<T*>(scratch));
    }
  }

  // Calls f(row, SoftmaxState) for every row, in one of the lanes that hold values of it.
  template <class F>
  __device__ __forceinline__ void for_each_row(F f) const {
#pragma unroll
    for (int s = 0; s < kRowSlots; ++s) {
      const float max = arch::row_reduce(max_[s], [](float a, float b) { return fmaxf(a, b); });
      const float sum = arch::row_reduce(sum_[s], [](float a, float b) { return a + b; });
      if (TileC::leads_row()) f(TileC::slot_row(s), SoftmaxState{ref_[s], max, sum});
    }
  }

  // Writes O of kScratchRows rows to scratch, from row `first` on, which must be a compile-time constant.
  __device__ __forceinline__ void store_rows(int first, float* scratch) const {
#pragma unroll
    for (int s = 0; s < kRowSlots; ++s) {
      const int row = arch::rematerialize(TileC::slot_row(s) - first);
      if (row < 0 || row >= Tile::kScratchRows) continue;
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

  // Loads run kAhead steps ahead of the products, and steps alternate between two accumulators, because a warp stalls
  // mostly on chains of dependent instructions.
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

  // Turns products into logits: NaN if not finite, -infinity if the row does not see the key.
  __device__ __forceinline__ void to_logits(TileC (&scores)[kTilesOf16], int key_begin) {
    const bool scaled_only = p_.softcap <= 0.f && !p_.alibi_slopes;
    const bool all_visible = key_begin >= common_begin_ && key_begin + kKvTile <= common_end_;
    for_each_score([&](int t, int i) {
      const float x = scores[t].v[i] * scale_;
      scores[t].v[i] = is_finite(x) ? x : kNaN;
    });
    if (scaled_only && all_visible) return;
    for_each_score([&](int t, int i) {
      const int s = TileC::slot(i), key = key_begin + t * arch::kTileN + TileC::col(i);
      float x = scores[t].v[i];
      if (!scaled_only) x = logit(p_, x, slope_[s], last_key_[s] - key);
      scores[t].v[i] = key >= first_key_[s] && key <= last_key_[s] ? (is_finite(x) ? x : kNaN) : -kInfinity;
    });
  }

  // Turns logits into weights.
  __device__ __forceinline__ void to_weights(TileC (&scores)[kTilesOf16]) {
    if constexpr (Policy::kUnified) {
      bool outside = !all_seen_;
      for_each_score([&](int t, int i) {
        const int s = TileC::slot(i);
        max_[s] = fmaxf(max_[s], scores[t].v[i]);  // ignores NaN
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

  // Calls f(t, i) for value i of column tile t.
  template <class F>
  static __device__ __forceinline__ void for_each_score(F f) {
#pragma unroll
    for (int t = 0; t < kTilesOf16; ++t) {
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) f(t, i);
    }
  }

  // Gives a new reference to the rows that need one for these logits, before their weights are computed.
  __device__ __forceinline__ void rebase(const TileC (&scores)[kTilesOf16]) {
    float factors[kRowSlots];
    bool changed = false, unseen = false;
#pragma unroll
    for (int s = 0; s < kRowSlots; ++s) {
      float tile_max = -kInfinity;
#pragma unroll
      for (int t = 0; t < kTilesOf16; ++t) {
#pragma unroll
        for (int i = 0; i < TileC::kValues; ++i) {
          if (TileC::slot(i) == s) tile_max = fmaxf(tile_max, scores[t].v[i]);
        }
      }
      tile_max = arch::row_reduce(tile_max, [](float a, float b) { return fmaxf(a, b); });
      if constexpr (!Policy::kUnified) max_[s] = fmaxf(max_[s], tile_max);
      factors[s] = 1.f;
      if (tile_max > -kInfinity) {
        const float e = exponent<Policy>(tile_max, ref_[s]);
        if (e > Policy::kHigh || (!seen_[s] && e < Policy::kLow)) {
          const float ref = rebased<Policy>(tile_max);
          if (seen_[s]) factors[s] = rescale(ref_[s], ref);
          ref_[s] = ref;
          changed = true;
        }
        seen_[s] = true;
      }
      unseen |= !seen_[s];
    }
    all_seen_ = !arch::warp_any(unseen);
    if (!arch::warp_any(changed)) return;
#pragma unroll
    for (int s = 0; s < kRowSlots; ++s) sum_[s] *= factors[s];
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < TileC::kValues; ++i) o_[n].v[i] *= factors[TileC::slot(i)];
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
      for (int j = 0; j < kAhead && begin + j < Tile::kDims / 16; j += Tile::kInterleave) {
        arch::load_b_steps<Tile::kInterleave>(b, j, values, begin + j);
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

  // O += P V, key by key and row by row, for a tile with a V that is not finite and keys that not all rows see: 0 * V
  // would be NaN.
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
        if (key_begin + j < first_key_[s] || key_begin + j > last_key_[s]) continue;
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
  int first_key_[kRowSlots], last_key_[kRowSlots];  // keys that each row sees, inclusive
  float slope_[kRowSlots];
  float ref_[kRowSlots], max_[kRowSlots], sum_[kRowSlots];  // max and sum are over this lane's keys
  bool seen_[kRowSlots], all_seen_ = false;                 // whether a row, and whether all rows have seen a key
  int common_begin_, common_end_;                           // keys that every row sees
  TileC o_[Tile::kColumnTiles];
};

}  // namespace flashdecpp
