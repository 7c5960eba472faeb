// 16 lanes of AVX-512 F, BW, VL and DQ. simd.h says what the names mean.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "cpu/simd/scalar.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kLanes = 16;
inline constexpr bool kManyRegisters = true;  // 32

struct Vec {
  __m512 v;
};
struct Pair {
  Vec first, second;
};

FLASHDECPP_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
FLASHDECPP_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FLASHDECPP_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
FLASHDECPP_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
FLASHDECPP_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
FLASHDECPP_INLINE Vec where_equal(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v)};
}
FLASHDECPP_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

FLASHDECPP_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

FLASHDECPP_INLINE __m512 widen(__m256i x, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FLASHDECPP_INLINE __m512 widen(__m256i x, fp16) { return _mm512_cvtph_ps(x); }
FLASHDECPP_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FLASHDECPP_INLINE Vec load(const bf16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p), bf16{})}; }
FLASHDECPP_INLINE Vec load(const fp16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p), fp16{})}; }
FLASHDECPP_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
FLASHDECPP_INLINE Vec load(const bf16* p, int n) {
  return {widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), bf16{})};
}
FLASHDECPP_INLINE Vec load(const fp16* p, int n) {
  return {widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), fp16{})};
}

FLASHDECPP_INLINE __m256i narrow(Vec x, bf16) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
FLASHDECPP_INLINE __m256i narrow(Vec x, fp16) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

FLASHDECPP_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
FLASHDECPP_INLINE void store(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x, bf16{})); }
FLASHDECPP_INLINE void store(fp16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, narrow(x, fp16{})); }
FLASHDECPP_INLINE void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
FLASHDECPP_INLINE void store(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x, bf16{})); }
FLASHDECPP_INLINE void store(fp16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x, fp16{})); }

FLASHDECPP_INLINE Pair split_pair(__m512i x) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
}
FLASHDECPP_INLINE Pair load_pair(const bf16* p) { return split_pair(_mm512_loadu_si512(p)); }
template <class T>
FLASHDECPP_INLINE Pair load_pair(const T* p, int n) {
  return n >= kLanes ? Pair{load(p), load(p + kLanes, n - kLanes)} : Pair{load(p, n), set1(0)};
}
FLASHDECPP_INLINE Pair load_pair(const bf16* p, int n) {
  return split_pair(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
}

// Moving the bits of an fp8 into an fp16 lowers the exponent by 8, so the value loaded is the true one / 256.
inline constexpr float kFp8LoadScale = 256.0f;
FLASHDECPP_INLINE Pair widen_fp8(__m256i x) {
  const __m512i shifted = _mm512_slli_epi16(_mm512_cvtepu8_epi16(x), 8);
  const __m512i half = _mm512_and_si512(_mm512_srai_epi16(shifted, 1), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
  Pair y = {{_mm512_cvtph_ps(_mm512_castsi512_si256(half))}, {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1))}};
  const __m256i magnitude = _mm256_set1_epi8(0x7f);
  if (const __mmask32 nan = _mm256_cmpeq_epi8_mask(_mm256_and_si256(x, magnitude), magnitude)) [[unlikely]] {
    const __m512 value = _mm512_set1_ps(__builtin_nanf(""));
    y.first.v = _mm512_mask_mov_ps(y.first.v, static_cast<__mmask16>(nan), value);
    y.second.v = _mm512_mask_mov_ps(y.second.v, static_cast<__mmask16>(nan >> 16), value);
  }
  return y;
}
FLASHDECPP_INLINE Pair load_pair(const fp8* p) { return widen_fp8(_mm256_loadu_si256((const __m256i*)p)); }
FLASHDECPP_INLINE Pair load_pair(const fp8* p, int n) {
  return widen_fp8(_mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
}

FLASHDECPP_INLINE void store_in_order(float* p, Pair x, bf16) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  store(p, {_mm512_permutex2var_ps(x.first.v, low, x.second.v)});
  store(p + kLanes, {_mm512_permutex2var_ps(x.first.v, high, x.second.v)});
}

FLASHDECPP_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  __m512 quarter[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = x[4 * i].v, b = x[4 * i + 1].v, c = x[4 * i + 2].v, d = x[4 * i + 3].v;
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    quarter[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  __m512 half[2];
  for (int i = 0; i < 2; ++i) {
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0x88),
                            _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0xdd));
  }
  return {_mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd))};
}
FLASHDECPP_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x.v); }
FLASHDECPP_INLINE float max_lane(Vec x) { return _mm512_reduce_max_ps(x.v); }

// --- bytes and nibbles

typedef __m512i Nibbles;
typedef __m512i LaneIndices;

FLASHDECPP_INLINE Nibbles load_nibbles(const uint8_t* p) { return _mm512_loadu_si512(p); }
// The permutation reads only the low four bits of an index, so the other nibbles need no mask.
template <int i>
FLASHDECPP_INLINE Vec nibble(Nibbles x) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(x, 4 * i), values)};
}
FLASHDECPP_INLINE Vec load_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
FLASHDECPP_INLINE Nibbles spread_nibbles(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
FLASHDECPP_INLINE LaneIndices load_indices(const int32_t (&x)[kLanes]) { return _mm512_loadu_si512(x); }
FLASHDECPP_INLINE Vec select(const float* p, LaneIndices index) {
  return {_mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(p)))};
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
