// 8 lanes of AVX2, FMA and F16C. simd.h says what the names mean.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own _mm256_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kLanes = 8;
inline constexpr bool kManyRegisters = false;  // 16

struct Vec {
  __m256 v;
};
struct Pair {
  Vec first, second;
};

FLASHDECPP_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
FLASHDECPP_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FLASHDECPP_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FLASHDECPP_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FLASHDECPP_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
FLASHDECPP_INLINE Vec where_equal(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
FLASHDECPP_INLINE Vec scale_by_power(Vec x, Vec n) {  // in two steps, since 2^n itself may be out of range
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}

FLASHDECPP_INLINE __m256 widen(__m128i x, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
FLASHDECPP_INLINE __m256 widen(__m128i x, fp16) { return _mm256_cvtph_ps(x); }
FLASHDECPP_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FLASHDECPP_INLINE Vec load(const bf16* p) { return {widen(_mm_loadu_si128((const __m128i*)p), bf16{})}; }
FLASHDECPP_INLINE Vec load(const fp16* p) { return {widen(_mm_loadu_si128((const __m128i*)p), fp16{})}; }

FLASHDECPP_INLINE __m128i narrow(Vec x, bf16) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
FLASHDECPP_INLINE __m128i narrow(Vec x, fp16) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

FLASHDECPP_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
FLASHDECPP_INLINE void store(bf16* p, Vec x) { _mm_storeu_si128((__m128i*)p, narrow(x, bf16{})); }
FLASHDECPP_INLINE void store(fp16* p, Vec x) { _mm_storeu_si128((__m128i*)p, narrow(x, fp16{})); }

FLASHDECPP_INLINE Pair load_pair(const bf16* p) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)p);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
}

// Through fp16, as in avx512.h.
inline constexpr float kFp8LoadScale = 256.0f;
FLASHDECPP_INLINE Pair load_pair(const fp8* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 8);
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(shifted, 1), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  Pair y = {{_mm256_cvtph_ps(_mm256_castsi256_si128(half))}, {_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))}};
  const __m128i magnitude = _mm_set1_epi8(0x7f), nan = _mm_cmpeq_epi8(_mm_and_si128(x, magnitude), magnitude);
  if (_mm_movemask_epi8(nan)) [[unlikely]] {
    y.first.v = _mm256_or_ps(y.first.v, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan)));
    y.second.v = _mm256_or_ps(y.second.v, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(nan, 8))));
  }
  return y;
}

FLASHDECPP_INLINE void store_in_order(float* p, Pair x, bf16) {
  const __m256 low = _mm256_unpacklo_ps(x.first.v, x.second.v), high = _mm256_unpackhi_ps(x.first.v, x.second.v);
  store(p, {_mm256_permute2f128_ps(low, high, 0x20)});
  store(p + kLanes, {_mm256_permute2f128_ps(low, high, 0x31)});
}

FLASHDECPP_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  __m256 half[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 a = x[4 * i].v, b = x[4 * i + 1].v, c = x[4 * i + 2].v, d = x[4 * i + 3].v;
    const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    half[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  }
  return {
      _mm256_add_ps(_mm256_permute2f128_ps(half[0], half[1], 0x20), _mm256_permute2f128_ps(half[0], half[1], 0x31))};
}

// --- bytes and nibbles

typedef __m256i Nibbles;
typedef __m256i LaneIndices;

// Flipping the top bit of a nibble makes it q - 8 in two's complement, which `nibble` sign-extends with shifts.
FLASHDECPP_INLINE Nibbles load_nibbles(const uint8_t* p) {
  return _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(static_cast<char>(0x88)));
}
template <int i>
FLASHDECPP_INLINE Vec nibble(Nibbles x) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 28 - 4 * i), 28))};
}
FLASHDECPP_INLINE Vec load_bytes(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
FLASHDECPP_INLINE Nibbles spread_nibbles(const uint8_t* p) {
  return _mm256_xor_si256(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_set1_epi32(0x88));
}
FLASHDECPP_INLINE LaneIndices load_indices(const int32_t (&x)[kLanes]) { return _mm256_loadu_si256((const __m256i*)x); }
FLASHDECPP_INLINE Vec select(const float* p, LaneIndices index) {
  return {
      _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)p))), index)};
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
