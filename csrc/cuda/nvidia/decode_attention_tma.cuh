// Decode attention by tensor copies, which exist on Hopper alone: its shared memory is known. Two blocks a
// SM hide each other's ends; of few units, more warps in a block make a team's work shorter.
#pragma once

#include "cuda/attention/decode_attention_launch.cuh"
#include "cuda/nvidia/attention_pipeline_tma.cuh"
#include "cuda/nvidia/cache_map.h"

namespace flashdecpp {

template <class KV, int dims>
struct AttentionConfig<LoadPath::kTma, KV, dims> {
  template <class Tile>
  using Stages = TmaStages<Tile>;
  static constexpr bool kNarrow = dims <= 128;
  static constexpr int kStages = kNarrow ? (sizeof(KV) == 1 ? 3 : dims <= 64 ? 4 : 2) : dims <= 192 ? 3 : 2;
  using Shape = CtaShape<4, kStages, (kNarrow ? 2 : 1), 8>;
  using LatencyShape = CtaShape<(kNarrow ? 8 : 4), kStages, 1, 8>;
  static constexpr int kSharedBytes = 227 * 1024;
};

template <class Tile>
CacheMaps stages_source(const AttentionParams& p, TmaStages<Tile>*) {
  constexpr int columns = TmaStages<Tile>::kBoxColumns;
  return {cache_map("k_cache", p, p.k_cache, p.k, columns), cache_map("v_cache", p, p.v_cache, p.v, columns)};
}

}  // namespace flashdecpp
