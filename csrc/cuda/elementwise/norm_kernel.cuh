// RMSNorm and LayerNorm of rows, with the residual sum on the way in.
//
// One block a row, `vector` neighbors a thread at a time, no shared memory but the sums. The row is read again for
// each pass (mean, squares, output): from L1, which holds it since the first. Floor: the bytes of x, residual and out;
// in decode, the latency of one pass. The weight is asked for while the kernel ahead still runs: it does not depend on
// that one.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

inline constexpr int kNormMaxThreads = 1024;

// W: the type of weight and bias.
template <class T, class W, int vector>
__global__ void __launch_bounds__(kNormMaxThreads) norm_kernel(NormParams p) {
  using namespace arch;
  __shared__ float scratch[kNormMaxThreads / kWarpSize];
  const auto block_sum = [&](float value) {
    return block_reduce(value, 0.f, scratch, [](float a, float b) { return a + b; });
  };
  const int64_t row = blockIdx.x;
  const int64_t first = threadIdx.x * int64_t{vector}, step = blockDim.x * int64_t{vector};
  const T* const x = static_cast<const T*>(p.x) + row / p.inner_rows * p.outer_stride + row % p.inner_rows * p.x_stride;
  T* const residual = p.residual ? static_cast<T*>(p.residual) + row * p.cols : nullptr;
  T* const out = static_cast<T*>(p.out) + row * p.cols;
  const W* const weight = static_cast<const W*>(p.weight);
  const W* const bias = static_cast<const W*>(p.bias);
  const T* const h = residual ? residual : x;  // what is normalized

  allow_next_kernel();  // a linear's, which asks for its first weights meanwhile
  float w[vector];      // of the columns that this thread comes to first
  if (weight && first < p.cols) load_vector(w, weight + first);
  wait_for_previous_kernel();

  float sum = 0.f;
  for (int64_t c = first; c < p.cols; c += step) {
    float v[vector];
    load_vector(v, x + c);
    if (residual) {
      float before[vector];
      load_vector(before, residual + c);
#pragma unroll
      for (int i = 0; i < vector; ++i) v[i] = to_float(from_float<T>(before[i] + v[i]));
      store_vector(residual + c, v);
    }
#pragma unroll
    for (int i = 0; i < vector; ++i) sum += p.subtract_mean ? v[i] : v[i] * v[i];
  }

  // A float32 mean far from zero is off by more than the spread may bear: what it is off by is the mean of the rest.
  float mean = 0.f, rest = 0.f;
  if (p.subtract_mean) {
    mean = block_sum(sum) / p.cols;
    sum = 0.f;
    for (int64_t c = first; c < p.cols; c += step) {
      float v[vector];
      load_vector(v, h + c);
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        const float centred = v[i] - mean;
        rest += centred;
        sum += centred * centred;
      }
    }
    rest = block_sum(rest) / p.cols;
  }
  const float scale = rsqrtf(block_sum(sum) / p.cols - rest * rest + p.eps);

  for (int64_t c = first; c < p.cols; c += step) {
    float v[vector];
    load_vector(v, h + c);
#pragma unroll
    for (int i = 0; i < vector; ++i) v[i] = (v[i] - mean - rest) * scale;
    if (weight) {
      if (c != first) load_vector(w, weight + c);
#pragma unroll
      for (int i = 0; i < vector; ++i) v[i] *= w[i];
    }
    if (bias) {
      float b[vector];
      load_vector(b, bias + c);
#pragma unroll
      for (int i = 0; i < vector; ++i) v[i] += b[i];
    }
    store_vector(out + c, v);
  }
}

}  // namespace flashdecpp
