// act(gate) * up over packed gate and up halves. One vector a thread; floor: three times the bytes of the output.
#pragma once

#include "cuda/elementwise/activation.cuh"

namespace flashdecpp {

inline constexpr int kGatedThreads = 256;

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
