// What the GEMV and the quantized one take from linear_arch_sm90.cuh, on the simulated GPU.
#pragma once

#include "cuda/arch.h"

namespace flashdecpp::arch {

inline uint4 load_weight(const void* p) { return load_stream(p); }

}  // namespace flashdecpp::arch
