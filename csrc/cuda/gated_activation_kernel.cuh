// act(gate) * up over packed gate and up halves. One vector a thread; floor: three times the bytes of the output.
#pragma once

#include "numeric.cuh"

namespace flashdecpp {

inline constexpr int kGatedThreads = 256;

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu: return x / (1.f + expf(-x));
    case Activation::kGelu: return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case Activation::kGeluTanh: return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x < 0.f ? 0.f : x;  // NaN stays
  }
  return x;
}

// Grid: (rows, columns / (threads * vector)).
template <class T, int vector>
__global__ void __launch_bounds__(kGatedThreads) gated_activation_kernel(GatedParams p) {
  using namespace arch;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const int64_t c = (blockIdx.y * int64_t{kGatedThreads} + threadIdx.x) * vector;
  if (c >= p.cols) return;
  const T* const gate_row = static_cast<const T*>(p.gate_up) + row * 2 * p.cols;
  float gate[vector], up[vector];
  load_vector(gate, gate_row + c);
  load_vector(up, gate_row + p.cols + c);
#pragma unroll
  for (int i = 0; i < vector; ++i) gate[i] = activate(p.activation, gate[i]) * up[i];
  store_vector(static_cast<T*>(p.out) + row * p.cols + c, gate);
}

}  // namespace flashdecpp
