// The number types of the kernels and their scalar conversions, the same for every instruction set.
#pragma once

#include <cstdint>

#define FLASHDECPP_INLINE [[gnu::always_inline]] static inline
// For rare paths: one copy for all callers, neither inlined nor cloned for constant arguments.
#if defined(__clang__)
#define FLASHDECPP_OUTLINE [[gnu::noinline]]
#else
#define FLASHDECPP_OUTLINE [[gnu::noinline, gnu::noclone]]
#endif

namespace flashdecpp::cpu::FLASHDECPP_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8 {  // e4m3fn: no infinities; NaN is 0x7f and 0xff
  uint8_t bits;
};

inline constexpr float kInf = __builtin_inff();

FLASHDECPP_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FLASHDECPP_INLINE uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
FLASHDECPP_INLINE float max(float a, float b) { return a > b ? a : b; }
FLASHDECPP_INLINE float min(float a, float b) { return a < b ? a : b; }
FLASHDECPP_INLINE int max(int a, int b) { return a > b ? a : b; }
FLASHDECPP_INLINE int min(int a, int b) { return a < b ? a : b; }
FLASHDECPP_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FLASHDECPP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

FLASHDECPP_INLINE float to_float(float x) { return x; }
FLASHDECPP_INLINE float to_float(bf16 x) { return as_float(uint32_t{x.bits} << 16); }
FLASHDECPP_INLINE float to_float(fp16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude < 0x0400) {  // subnormal: the offset supplies the exponent, so no subnormal float is formed
    return as_float(as_bits(as_float((magnitude << 13) + (113u << 23)) - as_float(113u << 23)) | sign);
  }
  const uint32_t rebias = magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;
  return as_float(((magnitude << 13) + rebias) | sign);
}
FLASHDECPP_INLINE float to_float(fp8 x) {
  const uint32_t sign = uint32_t{x.bits & 0x80u} << 24, magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7f) return as_float(0x7fc00000u | sign);
  if (magnitude < 0x08) return as_float(as_bits(static_cast<float>(magnitude) * 0x1p-9f) | sign);
  return as_float(((magnitude << 20) + (120u << 23)) | sign);
}

FLASHDECPP_INLINE void from_float(float x, float* out) { *out = x; }
FLASHDECPP_INLINE void from_float(float x, bf16* out) {
  const uint32_t bits = as_bits(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
FLASHDECPP_INLINE void from_float(float x, fp16* out) {
  const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded bits at the bottom
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}
FLASHDECPP_INLINE void from_float(float x, fp8* out) {  // saturates
  const uint32_t bits = as_bits(x), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  uint32_t byte;
  if (magnitude > 0x7f800000u) {
    byte = 0x7f;
  } else if (magnitude >= 0x43e00000u) {  // 448
    byte = 0x7e;
  } else if (magnitude < 0x3c800000u) {  // subnormal, below 2^-6: multiples of 2^-9
    byte = as_bits(as_float(magnitude) + 0x1p14f) - as_bits(0x1p14f);
  } else {
    byte = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1) - (120u << 23)) >> 20;
  }
  out->bits = static_cast<uint8_t>(byte | sign);
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
