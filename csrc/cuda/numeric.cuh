// Element types on the device: conversions to and from float, eight at a time where a vector load delivers eight.
#pragma once

#include "../params.h"
#include "arch.h"

namespace flashdecpp::arch {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float8 x) { return static_cast<float>(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ float8 from_float<float8>(float x) {
  return float8(x);  // saturates to +-448
}

// n neighbours in memory as one value: one load or store of up to 16 bytes, or several of 16.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Vector {
  T v[n];
};

template <class T, int n>
__device__ __forceinline__ void load_vector(float (&values)[n], const T* p) {
  const Vector<T, n> packed = *reinterpret_cast<const Vector<T, n>*>(p);
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = to_float(packed.v[i]);
}

template <class T, int n>
__device__ __forceinline__ void store_vector(T* p, const float (&values)[n]) {
  Vector<T, n> packed;
#pragma unroll
  for (int i = 0; i < n; ++i) packed.v[i] = from_float<T>(values[i]);
  *reinterpret_cast<Vector<T, n>*>(p) = packed;
}

// The eight values of a 16-byte load.
template <class T>
__device__ __forceinline__ void unpack(float (&values)[8], const uint4& bits) {
  static_assert(sizeof(T) == 2);
  const T* packed = reinterpret_cast<const T*>(&bits);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_float(packed[i]);
}

// Host: calls f with a null pointer of the device type that a dtype names, f([](auto* type) { using T = ...; }).
template <class F>
void with_half_type(DType dtype, F&& f) {
  if (dtype == DType::kFloat16) {
    f(static_cast<half*>(nullptr));
  } else {
    f(static_cast<bfloat16*>(nullptr));
  }
}

template <class F>
void with_float_type(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) {
    f(static_cast<float*>(nullptr));
  } else {
    with_half_type(dtype, f);
  }
}

}  // namespace flashdecpp::arch
