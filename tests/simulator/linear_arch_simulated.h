// The part of cuda/nvidia/linear_arch.cuh that every GPU has, on the simulated GPU.
#pragma once

#include "cuda/arch.h"

namespace flashdecpp::arch {

inline uint4 load_weight(const void* p) { return load_stream(p); }

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

}  // namespace flashdecpp::arch
