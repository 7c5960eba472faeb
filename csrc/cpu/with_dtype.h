// From a dtype at run time to a number type of the kernels.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/scalar.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// Calls f.template operator()<T>() for the type T of a dtype that x may have.
template <class F>
FLASHDECPP_INLINE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float>();
    case DType::kFloat16: return f.template operator()<fp16>();
    case DType::kBFloat16: return f.template operator()<bf16>();
    default: return;
  }
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
