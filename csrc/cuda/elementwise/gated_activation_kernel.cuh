// act(gate) * up over packed [gate, up] rows, or act(x). One vector of `vector` outputs per thread, no shared memory.
// Floor: the bytes of the input and the output over the memory bandwidth.
#pragma once

#include "cuda/elementwise/activation.cuh"

namespace flashdecpp {

inline constexpr int kActivationThreads = 256;

// Grid: (rows, columns / (threads * vector)).
template <class T, int vector>
__global__ void __launch_bounds__(kActivationThreads) activation_kernel(ActivationParams p) {
  using namespace arch;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const int64_t c = (blockIdx.y * int64_t{kActivationThreads} + threadIdx.x) * vector;
  if (c >= p.cols) return;
  const T* const x = static_cast<const T*>(p.x) + row * p.cols * (p.gated ? 2 : 1);
  float value[vector], up[vector];
  load_vector(value, x + c);
#pragma unroll
  for (int i = 0; i < vector; ++i) up[i] = 1.f;
  if (p.gated) load_vector(up, x + p.cols + c);
#pragma unroll
  for (int i = 0; i < vector; ++i) value[i] = activate(p.activation, value[i]) * up[i];
  store_vector(static_cast<T*>(p.out) + row * p.cols + c, value);
}

}  // namespace flashdecpp
