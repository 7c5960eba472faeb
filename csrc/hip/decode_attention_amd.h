// Decode attention on AMD machines. Host code is compiled once for all of them: what it sees of a block is the same on
// all, and 64 KiB hold it.
#pragma once

#include "attention_ring_amd.h"
#include "decode_attention_launch.cuh"

namespace flashdecpp {

template <class KV, int dims>
struct Machine<CopyKind::kRegisters, KV, dims> {
  template <class Tile>
  using Ring = RegisterRing<Tile>;
  using Shape = BlockShape<(dims <= 128 ? 4 : 2), 1, 1, 4>;
  using ShapeOfFew = Shape;
  static constexpr int kSharedBytes = arch::kBlockSharedBytes;
};

template <class Tile>
typename RegisterRing<Tile>::Source ring_source(const AttentionParams&, RegisterRing<Tile>*) {
  return {};
}

}  // namespace flashdecpp
