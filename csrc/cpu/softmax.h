// The softmax of one row as a value that merges: what was subtracted from its logits, the sum of exponentials, and the
// largest logit. The policy says what to subtract.
#pragma once

#include "simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// The running maximum: exact for every row, and earlier sums are rescaled when it grows.
struct OnlineMax {
  float reference(float maximum) const { return maximum; }
};

// One value fixed beforehand. Only a row whose own maximum is near enough may use it. What is subtracted is the upper
// end of the safe window, so no weight exceeds 1: a value that the online softmax can sum does not overflow here
// either. The largest weight is then at least e^-44, and float keeps its precision down to values of 1e-19. Any other
// row takes its maximum, which costs nothing here, since a block's logits are all there before the first exponential.
struct UnifiedMax {
  static constexpr float kSafe = 22.0f;
  float phi;
  bool serves(float maximum) const { return __builtin_fabsf(maximum - phi) <= kSafe; }
  float reference(float maximum) const { return serves(maximum) ? phi + kSafe : maximum; }
};

struct SoftmaxState {
  float reference = -kInf;
  float sum = 0.0f;  // NaN: a logit was not finite, and so is the row
  float maximum = -kInf;

  bool empty() const { return sum == 0.0f && maximum == -kInf; }

  // Prepares for keys whose largest logit is given. Returns the factor for what was accumulated so far.
  template <class Policy>
  float admit(float largest, Policy policy) {
    maximum = max(maximum, largest);
    const float next = policy.reference(maximum);
    const float factor = reference == next ? 1.0f : reference == -kInf ? 0.0f : exp_difference(reference, next);
    reference = next;
    sum *= factor;
    return factor;
  }
};

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
