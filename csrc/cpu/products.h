// Dot products by number type; the only place that knows which types have dot product instructions.
#pragma once

#include "cpu/simd/simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// Dot products of an array of T that is read once from memory with an array that is packed beforehand and reused. Both
// are read two vectors at a time, in load_pair's order.
template <class T>
struct Products {
  using Packed = float;
  using Operand = Pair;
  static constexpr int kStep = 2 * kLanes;
  FLASHDECPP_INLINE Operand load_once(const T* p) { return load_pair(p); }
  FLASHDECPP_INLINE Operand load_once(const T* p, int n) { return load_pair(p, n); }
  FLASHDECPP_INLINE Operand load_packed(const float* p) { return {load(p), load(p + kLanes)}; }
  FLASHDECPP_INLINE void add(Vec& acc, const Operand& w, const Operand& x) {
    acc = fma(w.second, x.second, fma(w.first, x.first, acc));
  }
  FLASHDECPP_INLINE void pack(float* out, const T* x) { store_pair(out, load_pair(x)); }
  FLASHDECPP_INLINE void pack(float* out, const T* x, int n) { store_pair(out, load_pair(x, n)); }
};

#if defined(__AVX512BF16__)
// One instruction multiplies and adds pairs of bfloat16: half the arithmetic and no conversion. Subnormals count as
// zero.
template <>
struct Products<bf16> {
  using Packed = bf16;
  using Operand = __m512i;
  static constexpr int kStep = 2 * kLanes;
  FLASHDECPP_INLINE Operand load_once(const bf16* p) { return _mm512_loadu_si512(p); }
  FLASHDECPP_INLINE Operand load_once(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  FLASHDECPP_INLINE Operand load_packed(const bf16* p) { return _mm512_loadu_si512(p); }
  FLASHDECPP_INLINE void add(Vec& acc, const Operand& w, const Operand& x) {
    acc.v = _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  FLASHDECPP_INLINE void pack(bf16* out, const bf16* x) { _mm512_storeu_si512(out, load_once(x)); }
  FLASHDECPP_INLINE void pack(bf16* out, const bf16* x, int n) { _mm512_storeu_si512(out, load_once(x, n)); }
};
#endif

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
