// All kernels for one instruction set, as a table.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/elementwise_kernel.h"
#include "cpu/kernels.h"
#include "cpu/linear_kernel.h"
#include "cpu/quantized_linear_kernel.h"
#include "cpu/sample_kernel.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

constexpr Kernels kernel_table(const char* name) {
#if defined(__AVX512BF16__)
  constexpr bool bfloat16_dot = true;
#else
  constexpr bool bfloat16_dot = false;
#endif
  return {name, bfloat16_dot, attend, merge,      pack,   linear, pack_quantized, quantized_linear, dequantize,
          add,  norm,         rotary, activation, argmax, scores, weights,        block_sums,       block_maxima};
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
