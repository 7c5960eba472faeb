// exp, tanh and erfc, lane by lane. Included by simd.h, after Vec.
#pragma once

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// e^x within 1.5 ulp; 0 below -87.3, inf above 88.7, NaN for NaN.
FLASHDECPP_INLINE Vec exp(Vec x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 is split in two so that n times its first half is exact.
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
// e^(x - y), corrected for the rounding of x - y, which dominates the error when x and y are far apart.
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
  const Vec large = set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f));  // correct for both signs
  return where_less(abs(x), set1(0.625f), small, large);
}

// 1 - erf(x) for x >= 0, with a small relative error even in the tail: e^(-x^2) t Q(t), t = 1 / (1 + x / 2).
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
