// Decode attention by tensor copies, which exist on Hopper alone: its shared memory is known.
#pragma once

#include "attention_ring_sm90.cuh"
#include "cache_map.h"
#include "decode_attention_launch.cuh"

namespace flashdecpp {

template <int dims, int row_tiles>
struct Machine<CopyKind::kTensor, dims, row_tiles> {
  template <class Tile>
  using Ring = TensorRing<Tile>;
  static constexpr int kWaves = dims * row_tiles <= 128 ? 8 : 4;
  static constexpr int kStages = dims <= 64 ? 4 : dims <= 128 ? (row_tiles == 1 ? 2 : 4) : dims <= 192 ? 3 : 2;
  using Shape = BlockShape<kWaves, kStages, 1, 8>;
  static constexpr int kSharedBytes = 227 * 1024, kMostRowTiles = dims <= 128 ? 2 : 1;
};

template <class Tile>
CacheMaps ring_source(const AttentionParams& p, TensorRing<Tile>*) {
  constexpr int columns = TensorRing<Tile>::kBoxColumns;
  return {cache_map("k_cache", p, p.k_cache, p.k, columns), cache_map("v_cache", p, p.v_cache, p.v, columns)};
}

}  // namespace flashdecpp
