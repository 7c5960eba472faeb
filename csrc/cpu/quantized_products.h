// How quantized weights are decoded in registers and multiplied: the one place that knows what an instruction set does
// best with bytes and nibbles.
//
// A decoder reads kWeights weights at once, as `Raw`, in kParts parts of kPart weights. Where a part's weights come
// from is up to it (`source`), since x is packed once, in the same order. Scales belong to groups of at least 32
// weights; lane l of a part's products is of block lane_block(l), 32 weights, of those read.
#pragma once

#include <utility>

#include "cpu/products.h"
#include "cpu/simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kBlock = 32;  // weights that always share a scale

#if defined(__AVX512F__)

typedef __m512i Nibbles;  // 4 * kLanes bytes
typedef __m512i LaneIndices;

FLASHDECPP_INLINE Nibbles load_nibbles(const uint8_t* p) { return _mm512_loadu_si512(p); }
FLASHDECPP_INLINE Nibbles load_nibbles(const uint8_t* p, int n) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p);
}
// Nibble i of every 32 bits, less 8. The permutation looks no further than at four bits of an index.
template <int i>
FLASHDECPP_INLINE Vec nibble(Nibbles x) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(x, 4 * i), values)};
}
FLASHDECPP_INLINE Vec load_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
// kLanes bytes, one in every 32 bits: nibbles 0 and 1 are then the low and the high ones, in order.
FLASHDECPP_INLINE Nibbles spread_nibbles(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
FLASHDECPP_INLINE LaneIndices load_indices(const int32_t (&x)[kLanes]) { return _mm512_loadu_si512(x); }
// Lane l of the result is p[index[l]], for indices below kLanes / 4.
FLASHDECPP_INLINE Vec select(const float* p, LaneIndices index) {
  return {_mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(p)))};
}

#elif defined(__AVX2__)

typedef __m256i Nibbles;
typedef __m256i LaneIndices;

// Each nibble less 8 in two's complement, which a shift then extends.
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

#else  // four lanes: NEON, and the compiler's own vectors

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef Ints Nibbles;
struct LaneIndices {};

FLASHDECPP_INLINE Nibbles load_nibbles(const uint8_t* p) {
  Nibbles x;
  __builtin_memcpy(&x, p, sizeof(x));
  return (Ints)((Words)x ^ 0x88888888u);
}
template <int i>
FLASHDECPP_INLINE Vec nibble(Nibbles x) {
  return {__builtin_convertvector((Ints)((Words)x << (28 - 4 * i)) >> 28, Floats)};
}
FLASHDECPP_INLINE Vec load_bytes(const uint8_t* p) {
  const auto byte = [p](int i) { return static_cast<int32_t>(static_cast<int8_t>(p[i])); };
  return {__builtin_convertvector(Ints{byte(0), byte(1), byte(2), byte(3)}, Floats)};
}
FLASHDECPP_INLINE Nibbles spread_nibbles(const uint8_t* p) { return Ints{p[0], p[1], p[2], p[3]} ^ 0x88; }
FLASHDECPP_INLINE LaneIndices load_indices(const int32_t (&)[kLanes]) { return {}; }
FLASHDECPP_INLINE Vec select(const float* p, LaneIndices) { return set1(*p); }

#endif

#if !defined(__AVX512F__)
FLASHDECPP_INLINE Nibbles load_nibbles(const uint8_t* p, int n) {
  uint8_t copy[4 * kLanes] = {};
  __builtin_memcpy(copy, p, n);
  return load_nibbles(copy);
}
#endif

struct FloatProducts {
  using Packed = float;
  using Operand = Vec;
  static constexpr int kPart = kLanes;
  FLASHDECPP_INLINE Operand load_packed(const float* p) { return load(p); }
  FLASHDECPP_INLINE void add(Vec& acc, Operand w, Operand x) { acc = fma(w, x, acc); }
};

// 4 bits: part i has nibble i of every 32 bits.
template <class T>
struct Decoder4 : FloatProducts {
  using Raw = Nibbles;
  static constexpr int kParts = 8, kWeights = kParts * kPart;
  static constexpr int lane_block(int lane) { return lane / 4; }
  static constexpr int source(int part, int i) {
    return i / 4 * kBlock + i % 4 * 4 + part / 2 + part % 2 * (kBlock / 2);
  }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return load_nibbles(p); }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p, int n, uint8_t*) { return load_nibbles(p, n); }
  template <int part>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    return nibble<part>(raw);
  }
};

// 8 bits: in order.
template <class T>
struct Decoder8 : FloatProducts {
  using Raw = const uint8_t*;
  static constexpr int kParts = kBlock / kLanes, kWeights = kBlock;
  static constexpr int lane_block(int) { return 0; }
  static constexpr int source(int part, int i) { return part * kPart + i; }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return p; }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p, int n, uint8_t* copy) {
    for (int i = 0; i < kWeights; ++i) copy[i] = i < n ? p[i] : 0;
    return copy;
  }
  template <int part>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    return load_bytes(raw + part * kPart);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Products {
  using Packed = bf16;
  using Operand = __m512i;
  static constexpr int kPart = 2 * kLanes;
  FLASHDECPP_INLINE Operand load_packed(const bf16* p) { return _mm512_loadu_si512(p); }
  FLASHDECPP_INLINE void add(Vec& acc, const Operand& w, const Operand& x) { Products<bf16>::add(acc, w, x); }
};

// Part i has nibble i of every 16 bits; the permutation of a table that repeats itself looks no further.
template <>
struct Decoder4<bf16> : Bf16Products {
  using Raw = __m512i;
  static constexpr int kParts = 4, kWeights = kParts * kPart;
  static constexpr int lane_block(int lane) { return lane / 4; }
  static constexpr int source(int part, int i) {
    return i / 8 * kBlock + i % 8 * 2 + part / 2 + part % 2 * (kBlock / 2);
  }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return load_nibbles(p); }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p, int n, uint8_t*) { return load_nibbles(p, n); }
  template <int part>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    const __m256i values = _mm256_setr_epi16(0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000,
                                             0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 4 * part), _mm512_broadcast_i64x4(values));
  }
};

template <>
struct Decoder8<bf16> : Bf16Products {
  using Raw = __m256i;
  static constexpr int kParts = 1, kWeights = kBlock;
  static constexpr int lane_block(int) { return 0; }
  static constexpr int source(int, int i) { return i; }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p, int n, uint8_t*) {
    return _mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  template <int part>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(raw)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(raw, 1)));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
};
#endif

// f(0), f(1), ... f(kCount - 1), each with its number as a constant.
template <int kCount, class F>
FLASHDECPP_INLINE void unroll(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
