// linear_arch_sm80.cuh and what the GEMV takes from linear_arch_sm90.cuh, on the simulated GPU.
#pragma once

#include <algorithm>

#include "arch.h"

inline flashdecpp::arch::half __ushort_as_half(unsigned short bits) {
  flashdecpp::arch::half x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return chosen;
}

namespace flashdecpp::arch {

inline uint32_t load_2_or_4_bytes(const void* p, bool wide) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, wide ? 4 : 2);
  return bits;
}
inline float from_lane(float value, int source) { return take_from(value, source, "from_lane"); }
inline uint4 load_weight(const void* p) { return load_stream(p); }

template <class T>
struct PairOf {
  T v[2];
};
template <class T>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  auto &x = reinterpret_cast<PairOf<T>&>(a), &y = reinterpret_cast<PairOf<T>&>(b);
  for (int i = 0; i < 2; ++i) narrow(x.v[i], widened(x.v[i]) * widened(y.v[i]));
  return a;
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  auto &x = reinterpret_cast<PairOf<half>&>(a), &y = reinterpret_cast<PairOf<half>&>(b);
  for (int i = 0; i < 2; ++i) narrow(x.v[i], std::fmax(std::fabs(widened(x.v[i])), std::fabs(widened(y.v[i]))));
  return a;
}

}  // namespace flashdecpp::arch
