// Quantised weights: their scales and offsets, and the weights as a dtype of x for the BLAS.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

// Scales and offsets as they are loaded; what they say is worked out when it is needed.
__device__ __forceinline__ uint32_t load_parameter(const void* data, DType dtype, int64_t index) {
  const bool wide = dtype == DType::kFloat32;
  return arch::load_2_or_4_bytes(static_cast<const unsigned char*>(data) + index * (wide ? 4 : 2), wide);
}

__device__ __forceinline__ float parameter(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat16) return arch::to_float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return __uint_as_float(dtype == DType::kBFloat16 ? bits << 16 : bits);
}

// i is a constant where this is inlined.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Of four lanes, `apart` from each other, the i-th has word i of what each of them loaded, lane j's as word j.
template <int apart>
__device__ __forceinline__ void exchange_words(uint4& v) {
  const auto swap = [](uint32_t& low, uint32_t& high, int mask) {
    const bool upper = arch::lane() & mask;
    const uint32_t other = arch::shfl_xor(upper ? low : high, mask);
    low = upper ? other : low;
    high = upper ? high : other;
  };
  swap(v.x, v.y, apart);
  swap(v.z, v.w, apart);
  swap(v.x, v.z, 2 * apart);
  swap(v.y, v.w, 2 * apart);
}

// out[n, k] of p.dtype: a weight for the BLAS. Grid: (K / 256, N).
template <class T>
__global__ void dequantize_kernel(QuantizedLinearParams p, T* out) {
  const int64_t k = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (k >= p.k) return;
  for (int64_t n = blockIdx.y; n < p.n; n += gridDim.y) {
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride;
    const int64_t group = k / p.group;
    const auto at = [&](const void* data, int64_t stride) {
      return parameter(load_parameter(data, p.scales_dtype, n * stride + group), p.scales_dtype);
    };
    const float scale = at(p.scales, p.scales_stride);
    float offset = p.offsets ? at(p.offsets, p.offsets_stride) : 0.f;
    int q;
    if (p.bits == 8) {
      q = static_cast<signed char>(row[k]);
    } else {
      q = row[k / 32 * 16 + k % 16] >> (k % 32 / 16 * 4) & 15;
      if (!p.offsets) offset = -8.f * scale;
    }
    out[n * p.k + k] = arch::from_float<T>(scale * static_cast<float>(q) + offset);
  }
}

}  // namespace flashdecpp
