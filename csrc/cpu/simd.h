// The vector seam: one type `Vec` of kLanes floats, and what the kernels need of it, for the instruction set that the
// including file is compiled for. Included once by each isa_<name>.cpp, which names its namespace FLASHDECPP_ISA:
// everything here lives inside that namespace, so code compiled for one instruction set never serves another.
#pragma once

#ifndef FLASHDECPP_ISA
#error "define FLASHDECPP_ISA before including simd.h"
#endif

#include <cstdint>

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 takes its own _mm512_undefined_ps for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FLASHDECPP_INLINE [[gnu::always_inline]] static inline

namespace flashdecpp::cpu::FLASHDECPP_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8 {  // e4m3fn: no infinities, NaN is 0x7f and 0xff
  uint8_t bits;
};

inline constexpr float kInf = __builtin_inff();

// --- one number -----------------------------------------------------------------------------------------------------

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
  if (magnitude < 0x0400) {  // subnormal: the magic number carries the exponent, so no subnormal float appears
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
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves its rounded bits at the bottom
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
  } else if (magnitude < 0x3c800000u) {  // subnormal, below 2^-6: a unit is 2^-9
    byte = as_bits(as_float(magnitude) + 0x1p14f) - as_bits(0x1p14f);
  } else {
    byte = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1) - (120u << 23)) >> 20;
  }
  out->bits = static_cast<uint8_t>(byte | sign);
}

// --- kLanes numbers -------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

inline constexpr int kLanes = 16;
inline constexpr bool kManyRegisters = true;  // 32

struct Vec {
  __m512 v;
};

FLASHDECPP_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
FLASHDECPP_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Of two operands of which one is NaN, max and min give b.
FLASHDECPP_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FLASHDECPP_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
FLASHDECPP_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
FLASHDECPP_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
// a < b ? x : y, lane by lane; NaN compares false.
FLASHDECPP_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
FLASHDECPP_INLINE Vec where_equal(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v)};
}
// x * 2^n for whole n; saturates as floats do.
FLASHDECPP_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

FLASHDECPP_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

FLASHDECPP_INLINE __m512 widen(__m256i x, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FLASHDECPP_INLINE __m512 widen(__m256i x, fp16) { return _mm512_cvtph_ps(x); }
FLASHDECPP_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FLASHDECPP_INLINE Vec load(const bf16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p), bf16{})}; }
FLASHDECPP_INLINE Vec load(const fp16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p), fp16{})}; }
// The first n of kLanes numbers, zeros behind; nothing else is read.
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

// Two vectors' worth of consecutive numbers, in an order that depends on the type alone: enough for a dot product of
// two arrays loaded the same way, and cheaper for bfloat16, whose odd and even numbers are floats after a mask or
// shift.
struct Pair {
  Vec first, second;
};
template <class T>
FLASHDECPP_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
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

// fp8 as fp16 has an exponent that is 8 too small, and fits: it is loaded as value / 256.
inline constexpr float kFp8Unit = 256.0f;
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

// What load_pair<T> gave, stored in the order of memory.
template <class T>
FLASHDECPP_INLINE void store_in_order(float* p, Pair x, T) {
  store(p, x.first);
  store(p + kLanes, x.second);
}
FLASHDECPP_INLINE void store_in_order(float* p, Pair x, bf16) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  store(p, {_mm512_permutex2var_ps(x.first.v, low, x.second.v)});
  store(p + kLanes, {_mm512_permutex2var_ps(x.first.v, high, x.second.v)});
}

// Lane i of the result is the sum of the lanes of x[i], in an order that is the same for every i.
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

#elif defined(__AVX2__)

inline constexpr int kLanes = 8;
inline constexpr bool kManyRegisters = false;  // 16

struct Vec {
  __m256 v;
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
FLASHDECPP_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
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

struct Pair {
  Vec first, second;
};
template <class T>
FLASHDECPP_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
FLASHDECPP_INLINE Pair load_pair(const bf16* p) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)p);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
}

inline constexpr float kFp8Unit = 256.0f;
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

template <class T>
FLASHDECPP_INLINE void store_in_order(float* p, Pair x, T) {
  store(p, x.first);
  store(p + kLanes, x.second);
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

#elif defined(__aarch64__) && !defined(FLASHDECPP_PORTABLE)

inline constexpr int kLanes = 4;
inline constexpr bool kManyRegisters = true;  // 32

struct Vec {
  float32x4_t v;
};

FLASHDECPP_INLINE Vec set1(float x) { return {vdupq_n_f32(x)}; }
FLASHDECPP_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
FLASHDECPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FLASHDECPP_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) { return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)}; }
FLASHDECPP_INLINE Vec where_equal(Vec a, Vec b, Vec x, Vec y) { return {vbslq_f32(vceqq_f32(a.v, b.v), x.v, y.v)}; }
// Not vmaxq and vminq, which give NaN where one operand is: here it is b, as on x86.
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
FLASHDECPP_INLINE void store(bf16* p, Vec x) {  // without the bfloat16 instructions, which not every core has
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t number = vceqq_f32(x.v, x.v);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16));
}
FLASHDECPP_INLINE void store(fp16* p, Vec x) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

struct Pair {
  Vec first, second;
};
template <class T>
FLASHDECPP_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
FLASHDECPP_INLINE Pair load_pair(const bf16* p) {
  const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  return {{vreinterpretq_f32_u32(vshlq_n_u32(x, 16))}, {vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)))}};
}

inline constexpr float kFp8Unit = 256.0f;
FLASHDECPP_INLINE Pair load_pair(const fp8* p) {
  const uint8x8_t x = vld1_u8(reinterpret_cast<const uint8_t*>(p));
  const int16x8_t shifted = vreinterpretq_s16_u16(vshll_n_u8(x, 8));
  const int16x8_t nan = vmovl_s8(vreinterpret_s8_u8(vceq_u8(vand_u8(x, vdup_n_u8(0x7f)), vdup_n_u8(0x7f))));
  const int16x8_t half = vandq_s16(vshrq_n_s16(shifted, 1), vdupq_n_s16(static_cast<int16_t>(0xbf80)));
  const float16x8_t y = vreinterpretq_f16_s16(vorrq_s16(half, nan));
  return {{vcvt_f32_f16(vget_low_f16(y))}, {vcvt_f32_f16(vget_high_f16(y))}};
}

template <class T>
FLASHDECPP_INLINE void store_in_order(float* p, Pair x, T) {
  store(p, x.first);
  store(p + kLanes, x.second);
}
FLASHDECPP_INLINE void store_in_order(float* p, Pair x, bf16) {
  store(p, {vzip1q_f32(x.first.v, x.second.v)});
  store(p + kLanes, {vzip2q_f32(x.first.v, x.second.v)});
}

FLASHDECPP_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  return {vpaddq_f32(vpaddq_f32(x[0].v, x[1].v), vpaddq_f32(x[2].v, x[3].v))};
}

#else  // the compiler's own vectors of 16 bytes: SSE2, or whatever the target has

inline constexpr int kLanes = 4;
inline constexpr bool kManyRegisters = false;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

struct Vec {
  Floats v;
};

FLASHDECPP_INLINE Vec set1(float x) { return {Floats{x, x, x, x}}; }
FLASHDECPP_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FLASHDECPP_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FLASHDECPP_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FLASHDECPP_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
FLASHDECPP_INLINE Vec where_less(Vec a, Vec b, Vec x, Vec y) { return {a.v < b.v ? x.v : y.v}; }
FLASHDECPP_INLINE Vec where_equal(Vec a, Vec b, Vec x, Vec y) { return {a.v == b.v ? x.v : y.v}; }
FLASHDECPP_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
FLASHDECPP_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
FLASHDECPP_INLINE Vec abs(Vec a) { return {(Floats)((Words)a.v & 0x7fffffffu)}; }
FLASHDECPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FLASHDECPP_INLINE Vec round(Vec a) {  // to nearest even, for |a| < 2^22
  const Floats magic = {0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f};
  return {(a.v + magic) - magic};
}
FLASHDECPP_INLINE Vec scale_by_power(Vec x, Vec n) {  // in two steps, since 2^n itself may be out of range
  const Ints whole = __builtin_convertvector(n.v, Ints), half = whole >> 1;
  return {x.v * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23)};
}

FLASHDECPP_INLINE Floats widen(Halves x, bf16) { return (Floats)(__builtin_convertvector(x, Words) << 16); }
FLASHDECPP_INLINE Floats widen(Halves x, fp16) {
  const Words wide = __builtin_convertvector(x, Words);
  const Words sign = (wide & 0x8000u) << 16, magnitude = wide & 0x7fffu;
  const Words special = (Words)(magnitude >= 0x7c00u) & (112u << 23);
  const Words normal = (magnitude << 13) + (112u << 23) + special;
  const Floats one = (Floats)(Words{} + (113u << 23));
  const Words subnormal = (Words)((Floats)((magnitude << 13) + (113u << 23)) - one);
  return (Floats)((magnitude < 0x0400u ? subnormal : normal) | sign);
}

FLASHDECPP_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
FLASHDECPP_INLINE Vec load_halves(const T* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof(x));
  return {widen(x, T{})};
}
FLASHDECPP_INLINE Vec load(const bf16* p) { return load_halves(p); }
FLASHDECPP_INLINE Vec load(const fp16* p) { return load_halves(p); }
FLASHDECPP_INLINE Vec load(const fp8* p) {
  return {Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
FLASHDECPP_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }
template <class T>
FLASHDECPP_INLINE void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(x.v[i], p + i);
}

struct Pair {
  Vec first, second;
};
template <class T>
FLASHDECPP_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}

inline constexpr float kFp8Unit = 1.0f;

template <class T>
FLASHDECPP_INLINE void store_in_order(float* p, Pair x, T) {
  store(p, x.first);
  store(p + kLanes, x.second);
}

FLASHDECPP_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  const Floats a = x[0].v, b = x[1].v, c = x[2].v, d = x[3].v;
  const Floats ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Floats cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return {__builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7)};
}

#endif

#if !defined(__AVX512F__)  // without masks: a part of a vector goes through a copy
template <class T>
FLASHDECPP_INLINE Vec load(const T* p, int n) {
  T copy[kLanes] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
}
template <class T>
FLASHDECPP_INLINE void store(T* p, Vec x, int n) {
  T copy[kLanes];
  store(copy, x);
  for (int i = 0; i < n; ++i) p[i] = copy[i];
}
template <class T>
FLASHDECPP_INLINE Pair load_pair(const T* p, int n) {
  T copy[2 * kLanes] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load_pair(copy);
}
FLASHDECPP_INLINE float sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
FLASHDECPP_INLINE float max_lane(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 1; i < kLanes; ++i) lanes[0] = max(lanes[0], lanes[i]);
  return lanes[0];
}
#endif

// Keeps the compiler from folding one load into every instruction that uses it: load ports are what runs out.
template <class T>
FLASHDECPP_INLINE void keep_in_register(T& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  (void)x;
#endif
}
FLASHDECPP_INLINE void keep_in_registers(Pair& x) {
  keep_in_register(x.first.v);
  keep_in_register(x.second.v);
}
#if defined(__AVX512F__)
FLASHDECPP_INLINE void keep_in_registers(__m512i& x) { keep_in_register(x); }
#endif
FLASHDECPP_INLINE void store_pair(float* p, Pair x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}

// --- functions ------------------------------------------------------------------------------------------------------

// e^x within 1.5 ulp; 0 below -87.3, inf above 88.7, NaN for NaN.
FLASHDECPP_INLINE Vec exp(Vec x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, so that n times the first is exact.
  const Vec bounded = min(set1(89.0f), max(set1(-87.33654f), x));
  const Vec n = round(bounded * set1(1.44269504f));
  const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), bounded));
  Vec p = set1(1.381459837e-3f);
  p = fma(p, r, set1(8.368716898e-3f));
  p = fma(p, r, set1(4.166838805e-2f));
  p = fma(p, r, set1(1.666652063e-1f));
  p = fma(p, r, set1(4.999999345e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return where_less(x, set1(-87.33654f), set1(0.0f), scale_by_power(p, n));
}
// e^(x - y) without the rounding of x - y, which between distant numbers of either sign would be most of the error.
FLASHDECPP_INLINE Vec exp_difference(Vec x, Vec y) {
  const Vec difference = x - y;
  const Vec lost = x - (difference + y);
  const Vec e = exp(difference);
  return where_less(difference, set1(-87.33654f), set1(0.0f), fma(e, lost, e));
}
FLASHDECPP_INLINE float exp_difference(float x, float y) {
  float lanes[kLanes];
  store(lanes, x == y ? set1(1.0f) : exp_difference(set1(x), set1(y)));
  return lanes[0];
}

FLASHDECPP_INLINE Vec tanh(Vec x) {
  const Vec s = x * x;
  Vec p = set1(-5.704986323e-3f);
  p = fma(p, s, set1(2.063908656e-2f));
  p = fma(p, s, set1(-5.373971484e-2f));
  p = fma(p, s, set1(1.333144219e-1f));
  p = fma(p, s, set1(-3.333328194e-1f));
  const Vec small = fma(p * s, x, x);
  const Vec large = set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f));  // right for both signs
  return where_less(abs(x), set1(0.625f), small, large);
}

// 1 - erf(x) for x >= 0, with a small relative error even where it is tiny: e^(-x^2) t Q(t), t = 1 / (1 + x / 2).
FLASHDECPP_INLINE Vec erfc_positive(Vec x) {
  const Vec t = set1(1.0f) / fma(x, set1(0.5f), set1(1.0f));
  Vec p = set1(-5.927729842e-2f);
  p = fma(p, t, set1(2.855924731e-1f));
  p = fma(p, t, set1(-4.893088316e-1f));
  p = fma(p, t, set1(2.804820606e-1f));
  p = fma(p, t, set1(-2.829053883e-2f));
  p = fma(p, t, set1(2.033916846e-1f));
  p = fma(p, t, set1(2.429255915e-1f));
  p = fma(p, t, set1(2.823997919e-1f));
  p = fma(p, t, set1(2.820850234e-1f));
  return exp(set1(0.0f) - x * x) * (t * p);
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
