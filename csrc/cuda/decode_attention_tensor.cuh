// Decode attention by tensor copies, which exist on Hopper alone: its shared memory is known. Two blocks a
// multiprocessor hide each other's ends; of few units, more waves in a block make a team's work shorter.
#pragma once

#include "attention_ring_sm90.cuh"
#include "cache_map.h"
#include "decode_attention_launch.cuh"

namespace flashdecpp {

template <class KV, int dims>
struct Machine<CopyKind::kTensor, KV, dims> {
  template <class Tile>
  using Ring = TensorRing<Tile>;
  static constexpr bool kNarrow = dims <= 128;
  static constexpr int kStages = kNarrow ? (sizeof(KV) == 1 ? 3 : dims <= 64 ? 4 : 2) : dims <= 192 ? 3 : 2;
  using Shape = BlockShape<4, kStages, (kNarrow ? 2 : 1), 8>;
  using ShapeOfFew = BlockShape<(kNarrow ? 8 : 4), kStages, 1, 8>;
  static constexpr int kSharedBytes = 227 * 1024;
};

template <class Tile>
CacheMaps ring_source(const AttentionParams& p, TensorRing<Tile>*) {
  constexpr int columns = TensorRing<Tile>::kBoxColumns;
  return {cache_map("k_cache", p, p.k_cache, p.k, columns), cache_map("v_cache", p, p.v_cache, p.v, columns)};
}

}  // namespace flashdecpp
