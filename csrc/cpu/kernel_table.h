// All kernels for one instruction set, as a table.
#pragma once

#include "attention_kernel.h"
#include "fused_kernel.h"
#include "kernels.h"
#include "linear_kernel.h"
#include "sample_kernel.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

constexpr Kernels kernel_table(const char* name) {
  return {name, attend, merge, pack, linear, norm, rotary, gated, argmax, scores, weights, block_sums};
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
