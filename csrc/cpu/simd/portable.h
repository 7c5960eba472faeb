// 4 lanes of GCC and Clang vector types: SSE2 on x86-64, whatever the target has elsewhere. simd.h says what the names
// mean.
#pragma once

#include "cpu/simd/scalar.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kLanes = 4;
inline constexpr bool kManyRegisters = false;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

struct Vec {
  Floats v;
};
struct Pair {
  Vec first, second;
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

inline constexpr float kFp8LoadScale = 1.0f;

FLASHDECPP_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  const Floats a = x[0].v, b = x[1].v, c = x[2].v, d = x[3].v;
  // Spelled out, because GCC 11 lacks __builtin_shufflevector.
  const Floats ab = Floats{a[0], b[0], a[1], b[1]} + Floats{a[2], b[2], a[3], b[3]};
  const Floats cd = Floats{c[0], d[0], c[1], d[1]} + Floats{c[2], d[2], c[3], d[3]};
  return {Floats{ab[0], ab[1], cd[0], cd[1]} + Floats{ab[2], ab[3], cd[2], cd[3]}};
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
