// Element types on the device: conversions to and from float, eight at a time where a vector load delivers eight.
#pragma once

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

}  // namespace flashdecpp::arch
