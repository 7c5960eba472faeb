// 4 lanes of NEON. simd.h says what the names mean.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/scalar.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kLanes = 4;
inline constexpr bool kManyRegisters = true;  // 32

struct Vec {
  float32x4_t v;
};
struct Pair {
  Vec first, second;
};

FLASHDECPP_INLINE Vec set1(float x) { return {vdupq_n_f32(x)}; }
FLASHDECPP_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FLASHDECPP_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) { return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)}; }
FLASHDECPP_INLINE Vec where_equal(Vec a, Vec b, Vec x, Vec y) { return {vbslq_f32(vceqq_f32(a.v, b.v), x.v, y.v)}; }
// Not vmaxq and vminq: those return NaN if either operand is NaN; these return b, as on x86.
FLASHDECPP_INLINE Vec max(Vec a, Vec b) { return where_less(b, a, a, b); }
FLASHDECPP_INLINE Vec min(Vec a, Vec b) { return where_less(a, b, a, b); }
FLASHDECPP_INLINE Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
FLASHDECPP_INLINE Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
FLASHDECPP_INLINE Vec scale_by_power(Vec x, Vec n) {  // in two steps, since 2^n itself may be out of range
  const int32x4_t whole = vcvtq_s32_f32(n.v), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
  const float32x4_t a = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  const float32x4_t b = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23));
  return {vmulq_f32(vmulq_f32(x.v, a), b)};
}

FLASHDECPP_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
FLASHDECPP_INLINE Vec load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
FLASHDECPP_INLINE Vec load(const fp16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}

FLASHDECPP_INLINE void store(float* p, Vec x) { vst1q_f32(p, x.v); }
FLASHDECPP_INLINE void store(bf16* p, Vec x) {  // without the bfloat16 instructions, which many cores lack
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t number = vceqq_f32(x.v, x.v);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16));
}
FLASHDECPP_INLINE void store(fp16* p, Vec x) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

FLASHDECPP_INLINE Pair load_pair(const bf16* p) {
  const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  return {{vreinterpretq_f32_u32(vshlq_n_u32(x, 16))}, {vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)))}};
}

// Through fp16, as in avx512.h.
inline constexpr float kFp8LoadScale = 256.0f;
FLASHDECPP_INLINE Pair load_pair(const fp8* p) {
  const uint8x8_t x = vld1_u8(reinterpret_cast<const uint8_t*>(p));
  const int16x8_t shifted = vreinterpretq_s16_u16(vshll_n_u8(x, 8));
  const int16x8_t nan = vmovl_s8(vreinterpret_s8_u8(vceq_u8(vand_u8(x, vdup_n_u8(0x7f)), vdup_n_u8(0x7f))));
  const int16x8_t half = vandq_s16(vshrq_n_s16(shifted, 1), vdupq_n_s16(static_cast<int16_t>(0xbf80)));
  const float16x8_t y = vreinterpretq_f16_s16(vorrq_s16(half, nan));
  return {{vcvt_f32_f16(vget_low_f16(y))}, {vcvt_f32_f16(vget_high_f16(y))}};
}

FLASHDECPP_INLINE void store_in_order(float* p, Pair x, bf16) {
  store(p, {vzip1q_f32(x.first.v, x.second.v)});
  store(p + kLanes, {vzip2q_f32(x.first.v, x.second.v)});
}

FLASHDECPP_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  return {vpaddq_f32(vpaddq_f32(x[0].v, x[1].v), vpaddq_f32(x[2].v, x[3].v))};
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
