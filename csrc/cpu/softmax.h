// The softmax of one row as a value that merges: what was subtracted from its logits, the sum of exponentials, and the
// largest logit. The policy says what to subtract, for kLanes rows at once.
#pragma once

#include "cpu/simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// The running maximum: exact for every row, and earlier sums are rescaled when it grows.
struct OnlineMax {
  Vec reference(Vec maximum) const { return maximum; }
};

// One value fixed beforehand. Only a row whose own maximum is near enough may use it. What is subtracted is the upper
// end of the safe window, so no weight exceeds 1: a value that the online softmax can sum does not overflow here
// either. The largest weight is then at least e^-44, and float keeps its precision down to values of 1e-19. Any other
// row takes its maximum, which costs nothing here, since a block's logits are all there before the first exponential.
struct UnifiedMax {
  static constexpr float kSafe = 22.0f;
  Vec phi;
  static bool serves(float phi, float maximum) { return __builtin_fabsf(maximum - phi) <= kSafe; }
  Vec reference(Vec maximum) const {
    const Vec distance = abs(maximum - phi), safe = set1(kSafe), fixed = phi + safe;
    return where_less(distance, safe, fixed, where_equal(distance, safe, fixed, maximum));
  }
};

struct SoftmaxState {
  float reference = -kInf;
  float sum = 0.0f;  // NaN: a logit was not finite, and so is the row
  float maximum = -kInf;

  bool empty() const { return sum == 0.0f && maximum == -kInf; }
};

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
