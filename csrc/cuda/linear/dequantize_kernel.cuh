// Quantized weights: loading of scales and offsets, the word exchange of the quantized GEMVs, and dequantization to x's
// dtype for the BLAS. Floor of dequantize_kernel: the bytes of q and of the output over the memory bandwidth.
#pragma once

#include "cuda/numeric.cuh"

namespace flashdecpp {

// The raw bits of a scale or offset; to_parameter() converts them at first use, so that the load stays in flight.
__device__ __forceinline__ uint32_t load_parameter_bits(const void* data, DType dtype, int64_t index) {
  const bool wide = dtype == DType::kFloat32;
  return arch::load_2_or_4_bytes(static_cast<const unsigned char*>(data) + index * (wide ? 4 : 2), wide);
}

__device__ __forceinline__ float to_parameter(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat16) return arch::to_float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return __uint_as_float(dtype == DType::kBFloat16 ? bits << 16 : bits);
}

// `i` must be a compile-time constant after inlining and unrolling: v stays in registers.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Transposes a 4 x 4 matrix of words held by four lanes that are `apart` lanes from each other: word j of lane i
// becomes the former word i of lane j.
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

// Writes the weight to `out`, [n, k] of p.dtype. Grid: (K / 256, N).
template <class T>
__global__ void dequantize_kernel(QuantizedLinearParams p, T* out) {
  const int64_t k = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (k >= p.k) return;
  for (int64_t n = blockIdx.y; n < p.n; n += gridDim.y) {
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride;
    const int64_t group = k / p.group;
    const auto at = [&](const void* data, int64_t stride) {
      return to_parameter(load_parameter_bits(data, p.scales_dtype, n * stride + group), p.scales_dtype);
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
