// Element types on the device: conversions to and from float, eight at a time where a vector load delivers eight.
#pragma once

#include <type_traits>

#include "cuda/arch.h"
#include "params.h"

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

// Loads n consecutive elements in as few accesses as possible. p must be aligned to their size, or to 16 bytes if that
// is less.
template <class T, int n>
__device__ __forceinline__ void load_vector(float (&values)[n], const T* p) {
  constexpr int bytes = sizeof(T) * n;
  if constexpr (bytes % 16 == 0 && bytes > 16) {
#pragma unroll
    for (int i = 0; i < n; i += 16 / sizeof(T)) {
      load_vector(reinterpret_cast<float (&)[16 / sizeof(T)]>(values[i]), p + i);
    }
  } else {
    using W = std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, T>>;
    static_assert(sizeof(W) == bytes);
    const W word = *reinterpret_cast<const W*>(p);
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = to_float(reinterpret_cast<const T*>(&word)[i]);
  }
}

template <class T, int n>
__device__ __forceinline__ void store_vector(T* p, const float (&values)[n]) {
  constexpr int bytes = sizeof(T) * n, per_word = 4 / sizeof(T);
  if constexpr (n == 1) {
    *p = from_float<T>(values[0]);
  } else {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;
    static_assert(bytes == 4 || bytes == 8 || bytes % 16 == 0);
    uint32_t words[bytes / 4] = {};
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const T element = from_float<T>(values[i]);
      Bits bits;
      memcpy(&bits, &element, sizeof(bits));
      words[i / per_word] |= static_cast<uint32_t>(bits) << (i % per_word * 8 * sizeof(T));
    }
    if constexpr (bytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < bytes / 4; i += 4) {
        store_wide(p + i * per_word, make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
      }
    } else if constexpr (bytes == 8) {
      *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(p) = words[0];
    }
  }
}

// Converts the packed elements of `bits`, such as the eight of a 16-byte load, to float.
template <class T, class Bits>
__device__ __forceinline__ void unpack(float (&values)[sizeof(Bits) / sizeof(T)], const Bits& bits) {
  const T* packed = reinterpret_cast<const T*>(&bits);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Bits) / sizeof(T)); ++i) values[i] = to_float(packed[i]);
}

// On the host: calls f with a null pointer to the device type of a dtype, as in with_half_type(dtype, [](auto* type) {
// ... }).
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
