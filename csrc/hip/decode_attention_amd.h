// Decode attention on AMD GPUs. Host code is compiled once for all of them, so a CTA has the same shape on all and fits
// into 64 KiB of LDS.
#pragma once

#include "cuda/attention/decode_attention_launch.cuh"
#include "hip/attention_pipeline_amd.h"

namespace flashdecpp {

template <>
struct AttentionPath<LoadPath::kRegister> {
  template <class Tile>
  using Stages = RegisterStages<Tile>;
  static constexpr int kSharedBytesPerSm = arch::kBlockSharedBytes + 1024;

  template <class Tile>
  static typename RegisterStages<Tile>::Source source(const AttentionParams&) {
    return {};
  }
};

}  // namespace flashdecpp
