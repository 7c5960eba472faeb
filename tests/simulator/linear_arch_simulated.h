// What the GEMV and the quantized one take from linear_arch_sm90.cuh, on the simulated GPU.
#pragma once

#include <cmath>

#include "cuda/arch.h"

namespace flashdecpp::arch {

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
template <class T>
uint32_t pair_of(float v) {
  PairOf<T> pair;
  for (T& value : pair.v) narrow(value, v);
  return reinterpret_cast<const uint32_t&>(pair);
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  auto &x = reinterpret_cast<PairOf<half>&>(a), &y = reinterpret_cast<PairOf<half>&>(b);
  for (int i = 0; i < 2; ++i) narrow(x.v[i], std::fmax(std::fabs(widened(x.v[i])), std::fabs(widened(y.v[i]))));
  return a;
}

}  // namespace flashdecpp::arch
