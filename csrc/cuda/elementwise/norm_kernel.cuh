// RMSNorm and LayerNorm of rows, with an optional residual add before.
//
// One CTA per row; each thread handles `vector` neighboring elements at a time. Shared memory: 128 bytes of sums.
// Every pass after the first (centered squares, output) reads the row again, from L1. The weight does not depend on the
// preceding kernel, so it is loaded while that still runs. Floor: the bytes of x, residual and out over the memory
// bandwidth; in decode, the latency of one pass.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

inline constexpr int kNormMaxThreads = 1024;

// W: the type of weight and bias. Grid: rows.
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
  const T* const h = residual ? residual : x;  // the row to normalize

  Timeline timeline(TimelineOf::kNorm);
  allow_next_kernel();  // a linear, which loads its first weights meanwhile
  float w[vector];      // weight of this thread's first columns
  if (weight && first < p.cols) load_vector(w, weight + first);
  timeline.mark();
  wait_for_previous_kernel();
  timeline.mark();

  float sum = 0.f;
  for (int64_t c = first; c < p.cols; c += step) {
    float v[vector];
    load_vector(v, x + c);
    if (residual) {
      float r[vector];
      load_vector(r, residual + c);
#pragma unroll
      for (int i = 0; i < vector; ++i) v[i] = to_float(from_float<T>(r[i] + v[i]));
      store_vector(residual + c, v);
    }
#pragma unroll
    for (int i = 0; i < vector; ++i) sum += p.subtract_mean ? v[i] : v[i] * v[i];
  }

  // When |mean| >> std, the float32 mean is off by a noticeable part of std; mean(x - mean) corrects it.
  float mean = 0.f, correction = 0.f;
  if (p.subtract_mean) {
    mean = block_sum(sum) / p.cols;
    sum = 0.f;
    for (int64_t c = first; c < p.cols; c += step) {
      float v[vector];
      load_vector(v, h + c);
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        const float centered = v[i] - mean;
        correction += centered;
        sum += centered * centered;
      }
    }
    correction = block_sum(correction) / p.cols;
  }
  const float scale = rsqrtf(block_sum(sum) / p.cols - correction * correction + p.eps);

  for (int64_t c = first; c < p.cols; c += step) {
    float v[vector];
    load_vector(v, h + c);
#pragma unroll
    for (int i = 0; i < vector; ++i) v[i] = (v[i] - mean - correction) * scale;
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
