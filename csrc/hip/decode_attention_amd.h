// Decode attention on AMD machines. Host code is compiled once for all of them: what it sees of a block is the same on
// all, and 64 KiB hold it.
#pragma once

#include "cuda/attention/decode_attention_launch.cuh"
#include "hip/attention_pipeline_amd.h"

namespace flashdecpp {

template <class KV, int dims>
struct AttentionConfig<LoadPath::kRegister, KV, dims> {
  template <class Tile>
  using Stages = RegisterStages<Tile>;
  using Shape = CtaShape<(dims <= 128 ? 4 : 2), 1, 1, 4>;
  using LatencyShape = Shape;
  static constexpr int kSharedBytes = arch::kBlockSharedBytes;
};

template <class Tile>
typename RegisterStages<Tile>::Source stages_source(const AttentionParams&, RegisterStages<Tile>*) {
  return {};
}

}  // namespace flashdecpp
