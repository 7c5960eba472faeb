// Decoders of quantized weights: they turn packed weights into operands of a product, in registers.
//
// A decoder loads kWeights weights at once, as `Raw`, and decodes them in kSlices slices of kSlice weights. It chooses
// which weights form a slice (`source`), and x is packed once in the same order. Scales belong to groups of at least
// one block of 32 weights; lane l of a slice's products comes from block lane_block(l) of the weights loaded.
#pragma once

#include <utility>

#include "cpu/products.h"
#include "cpu/simd/simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kBlock = 32;  // the smallest group of weights that has one scale

struct FloatProducts {
  using Packed = float;
  using Operand = Vec;
  static constexpr int kSlice = kLanes;
  FLASHDECPP_INLINE Operand load_packed(const float* p) { return load(p); }
  FLASHDECPP_INLINE void add(Vec& acc, Operand w, Operand x) { acc = fma(w, x, acc); }
};

// 4 bits: slice i is nibble i of every 32 bits. P is the type of packed numbers of x.
template <class P>
struct Decoder4 : FloatProducts {
  using Raw = Nibbles;
  static constexpr int kSlices = 8, kWeights = kSlices * kSlice;
  static constexpr int lane_block(int lane) { return lane / 4; }
  static constexpr int source(int slice, int i) {
    return i / 4 * kBlock + i % 4 * 4 + slice / 2 + slice % 2 * (kBlock / 2);
  }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return load_nibbles(p); }
  template <int slice>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    return nibble<slice>(raw);
  }
};

// 8 bits, in memory order.
template <class P>
struct Decoder8 : FloatProducts {
  using Raw = const uint8_t*;
  static constexpr int kSlices = kBlock / kLanes, kWeights = kBlock;
  static constexpr int lane_block(int) { return 0; }
  static constexpr int source(int slice, int i) { return slice * kSlice + i; }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return p; }
  template <int slice>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    return load_bytes(raw + slice * kSlice);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Products {
  using Packed = bf16;
  using Operand = __m512i;
  static constexpr int kSlice = 2 * kLanes;
  FLASHDECPP_INLINE Operand load_packed(const bf16* p) { return _mm512_loadu_si512(p); }
  FLASHDECPP_INLINE void add(Vec& acc, const Operand& w, const Operand& x) { Products<bf16>::add(acc, w, x); }
};

// Slice i is nibble i of every 16 bits. The permutation reads the low five bits of an index and the table repeats after
// 16 entries, so the other nibbles need no mask.
template <>
struct Decoder4<bf16> : Bf16Products {
  using Raw = __m512i;
  static constexpr int kSlices = 4, kWeights = kSlices * kSlice;
  static constexpr int lane_block(int lane) { return lane / 4; }
  static constexpr int source(int slice, int i) {
    return i / 8 * kBlock + i % 8 * 2 + slice / 2 + slice % 2 * (kBlock / 2);
  }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return load_nibbles(p); }
  template <int slice>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    const __m256i values = _mm256_setr_epi16(0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000,
                                             0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 4 * slice), _mm512_broadcast_i64x4(values));
  }
};

template <>
struct Decoder8<bf16> : Bf16Products {
  using Raw = __m256i;
  static constexpr int kSlices = 1, kWeights = kBlock;
  static constexpr int lane_block(int) { return 0; }
  static constexpr int source(int, int i) { return i; }
  FLASHDECPP_INLINE Raw load_raw(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  template <int slice>
  FLASHDECPP_INLINE Operand decode(const Raw& raw) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(raw)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(raw, 1)));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
};
#endif

// f(0), f(1), ... f(kCount - 1), each argument a compile-time constant.
template <int kCount, class F>
FLASHDECPP_INLINE void unroll(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
