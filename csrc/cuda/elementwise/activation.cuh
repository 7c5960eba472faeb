// The activation functions of gated layers.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu: return x / (1.f + expf(-x));
    case Activation::kGelu: return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case Activation::kGeluTanh: return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x < 0.f ? 0.f : x;  // keeps NaN
  }
  return x;
}

}  // namespace flashdecpp
