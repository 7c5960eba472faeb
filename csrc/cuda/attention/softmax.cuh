// The softmax of a row as a compile-time policy, and its state as a value that merges. Warps, CTAs and clusters each
// see some of a row's keys; their partials hold weights relative to a reference `ref`,
//
//   weight(x) = 2^((x - ref) log2(e) + kLift),
//
// and are accurate while the largest weight so far lies in the window from 2^kLow to 2^kHigh. A partial whose largest
// weight leaves the window is rebased: it gets a new reference, and its sums are multiplied by rescale(old, new).
//
//   OnlineMax   The window is the single point 1: the reference is the largest logit so far, and must be known before
//               any weight of a tile can be computed. The running maximum is on the critical path.
//   UnifiedMax  The reference is phi, fixed beforehand (FlashDecoding++ section 3), and the window is as wide as the
//               number format allows, centered on phi. Weights need no maximum first, and partials with the same
//               reference simply add up in any order. A weight above the window shows in its own exponent, in whichever
//               lane computes it; whether a partial's first keys are all below it is checked once. Both cases rebase
//               the partial in place, so any logits give the exact softmax whatever phi is, without a second pass over
//               the row's keys.
//
// A row whose true maximum is outside of phi's window is counted in fallback_count, whatever happened to its partials.
//
// A key that the row does not see has logit -infinity and weight 0. A visible key whose logit is not finite has logit
// NaN, which stays in the sum, and so in the output, to the end.
#pragma once

#include <cfloat>

#include "cuda/arch.h"

namespace flashdecpp {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kNaN = __builtin_nanf("");

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

struct OnlineMax {
  static constexpr bool kUnified = false;
  static constexpr float kLift = 0.f, kLow = 0.f, kHigh = 0.f, kRebased = 0.f;
};

// half: weights enter the tensor cores as half, whose largest value is 65504 = 2^15.99 and which loses precision below
//   2^-14 and everything below 2^-25. The online softmax, whose largest weight is 1, has the same lower limit; as a
//   sequence may have 2^17 keys of 2^-17 times the largest weight, no range can be sacrificed there. So the largest
//   weight may be 2^-0.5 to 2^15.5, and row maxima within 5.5 of phi are safe. Rebased partials start low, with room to
//   grow.
// bfloat16: the exponent range of float32, with weights up to 1, so that weighted sums overflow no earlier than with
//   the online softmax. With a largest weight of 2^-64, weights of 2^-62 times that are still normal numbers. Row
//   maxima within 22 of phi are safe.
template <class T>
struct UnifiedMax;
template <>
struct UnifiedMax<arch::half> {
  static constexpr bool kUnified = true;
  static constexpr float kLift = 7.5f, kLow = -0.5f, kHigh = 15.5f, kRebased = 0.f;
};
template <>
struct UnifiedMax<arch::bfloat16> {
  static constexpr bool kUnified = true;
  static constexpr float kLift = -32.f, kLow = -64.f, kHigh = 0.f, kRebased = -32.f;
};

// The softmax of one row over some of its keys. max is -infinity if there was no key.
struct alignas(16) SoftmaxState {
  float ref, max, sum;
};

// The binary exponent of a weight. Subtracting before changing the base keeps it finite wherever it matters.
template <class Policy>
__device__ __forceinline__ float exponent(float x, float ref) {
  return fmaf(x - ref, kLog2E, Policy::kLift);
}

// exp(ref - new_ref): converts a sum relative to `ref` into one relative to `new_ref`.
__device__ __forceinline__ float rescale(float ref, float new_ref) {
  return arch::exp2_approx((ref - new_ref) * kLog2E);
}

// The new reference of a partial that left the window with `max` as its largest logit so far.
template <class Policy>
__device__ __forceinline__ float rebased(float max) {
  return max + (Policy::kLift - Policy::kRebased) * kLn2;
}

// False for NaN and for values near the limits of float32.
__device__ __forceinline__ bool is_usable(float phi) { return fabsf(phi) < 1e37f; }

// Whether a row's true maximum, which alone decides, lies in phi's window.
template <class Policy>
__device__ __forceinline__ bool phi_fits(float phi, float max) {
  const float e = exponent<Policy>(max, phi);
  return !Policy::kUnified || (is_usable(phi) && e >= Policy::kLow && e <= Policy::kHigh);
}

template <class Policy>
__device__ __forceinline__ float log_sum(const SoftmaxState& state) {
  return state.ref + (logf(state.sum) - Policy::kLift * kLn2);
}

// The state of a row that saw no key. Merging it changes nothing.
inline constexpr SoftmaxState kEmptyState = {0.f, -kInfinity, 0.f};

// Factor that converts a partial to reference `ref`; 1 if the partial saw no key, so that a NaN in its sum remains.
__device__ __forceinline__ float rescale_or_one(const SoftmaxState& partial, float ref) {
  return partial.max > -kInfinity ? rescale(partial.ref, ref) : 1.f;
}

// Merges partials of a row. The merged reference is the largest of the partials that saw a key: relative to its own
// reference each partial's maximum has an exponent of at least kLow, so the merged maximum does too.
struct MergedState {
  SoftmaxState state = {-kInfinity, -kInfinity, 0.f};

  // Merges n more partials. Their sums are to be multiplied by `factors`, and earlier sums by the result. The factors
  // do not depend on each other.
  template <int n>
  __device__ __forceinline__ float add(const SoftmaxState (&partials)[n], float (&factors)[n]) {
    const float old_ref = state.ref;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (partials[i].max > -kInfinity) state.ref = fmaxf(state.ref, partials[i].ref);
      state.max = fmaxf(state.max, partials[i].max);
    }
    const float old_factor = old_ref > -kInfinity ? rescale(old_ref, state.ref) : 1.f;
    state.sum *= old_factor;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      factors[i] = rescale_or_one(partials[i], state.ref);
      state.sum = fmaf(factors[i], partials[i].sum, state.sum);
    }
    return old_factor;
  }
};

// Merges the partials of `lanes` neighboring lanes, one each; `factor` is that of this lane's partial.
template <int lanes>
__device__ __forceinline__ SoftmaxState merge_lanes(const SoftmaxState& partial, float& factor) {
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto sum = [](float a, float b) { return a + b; };
  const float ref = arch::lanes_reduce<lanes>(partial.max > -kInfinity ? partial.ref : -kInfinity, larger);
  factor = rescale_or_one(partial, ref);
  return {ref, arch::lanes_reduce<lanes>(partial.max, larger), arch::lanes_reduce<lanes>(factor * partial.sum, sum)};
}

}  // namespace flashdecpp
