// The softmax state of a row over some keys, as a value that merges, and the reference that is subtracted from its
// logits.
//
// A block's logits are all in memory before its first exponential, so the row maximum is always known and phi saves no
// work here: it fixes the reference and decides what counts as a fallback, and results are exact either way.
#pragma once

#include "cpu/simd/simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// No phi: the running maximum. Earlier sums are rescaled whenever it grows.
struct MaxReference {
  Vec operator()(Vec maximum) const { return maximum; }
};

// With phi: the upper end of the safe window around it, for rows whose maximum lies in that window. No weight then
// exceeds 1, so a value that the online softmax can sum does not overflow here either. The largest weight is at least
// e^-44, which keeps float's full precision down to values of 1e-19. Any other row uses its maximum, a fallback.
struct PhiReference {
  static constexpr float kSafe = 22.0f;
  Vec phi;  // of kLanes rows
  static bool fits(float phi, float maximum) { return __builtin_fabsf(maximum - phi) <= kSafe; }
  Vec operator()(Vec maximum) const {
    const Vec distance = abs(maximum - phi), safe = set1(kSafe), fixed = phi + safe;
    return where_less(distance, safe, fixed, where_equal(distance, safe, fixed, maximum));
  }
};

struct SoftmaxState {
  float reference = -kInf;  // subtracted from the logits
  float sum = 0.0f;         // of the exponentials; NaN if a logit was not finite, which makes the row NaN
  float maximum = -kInf;    // the largest logit

  bool empty() const { return sum == 0.0f && maximum == -kInf; }
};

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
