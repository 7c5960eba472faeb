// Bytes and nibbles in 4 lanes, for NEON and portable alike: GCC and Clang vector types. Included by simd.h, after Vec.
#pragma once

namespace flashdecpp::cpu::FLASHDECPP_ISA {

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

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
