// Decode attention by TMA, for GPUs with the 228 KiB of shared memory per SM of Hopper and of datacenter Blackwell.
#pragma once

#include "cuda/attention/decode_attention_launch.cuh"
#include "cuda/nvidia/attention_pipeline_tma.cuh"
#include "cuda/nvidia/cache_map.h"

namespace flashdecpp {

template <>
struct AttentionPath<LoadPath::kTma> {
  template <class Tile>
  using Stages = TmaStages<Tile>;
  static constexpr int kSharedBytesPerSm = 228 * 1024;

  template <class Tile>
  static CacheMaps source(const AttentionParams& p) {
    constexpr int columns = TmaStages<Tile>::kBoxColumns;
    return {cache_map("k_cache", p, p.k_cache, p.k, columns), cache_map("v_cache", p, p.v_cache, p.v, columns)};
  }
};

}  // namespace flashdecpp
