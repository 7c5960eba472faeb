// Partial vectors and reductions for instruction sets without masked loads and stores: both go through a small copy.
// Included by simd.h, after Vec and Pair.
#pragma once

namespace flashdecpp::cpu::FLASHDECPP_ISA {

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

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
