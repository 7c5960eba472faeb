// The softmax of one row as a policy that a kernel is compiled with. A row's keys are taken in parts (by warps, by
// blocks); a part holds its weights relative to a reference `ref`,
//
//   weight(x) = 2^((x - ref) log2(e) + kLift),
//
// and is well kept while its largest weight so far lies between 2^kLow and 2^kHigh. Where it does not, the part is
// rebased: a new reference, and what was summed is multiplied by rescale(old, new).
//
//   OnlineMax   the window is the single point 1: the reference is the largest logit so far, compared before any weight
//               of a tile can be taken. The running maximum sits on the critical path.
//   UnifiedMax  the reference is phi, fixed beforehand (FlashDecoding++ section 3), and the window is as wide as the
//               number format allows, with phi in its middle: weights are taken at once, partial sums of different
//               parts just add up in any order. That a weight left the window upwards is seen from the weights'
//               exponents themselves, in whichever lane it happens; that a part's first keys are all below it is looked
//               at once. Both rebase the part, in place: any logits give the exact softmax, whatever phi is, and a row
//               costs no second pass over its keys.
//
// A row whose true maximum is outside of phi's window is rescale_or_one (fallback_count), however its parts went.
//
// A key that the row does not see comes as -infinity and weighs nothing; a visible key without a finite logit comes as
// NaN, which stays in the sum (and in the output, through its weight) to the end.
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

// half: the weights go through the tensor cores as half. Upwards 65504 = 2^15.99 is the end. Downwards half loses
//   precision below 2^-14 and everything below 2^-25: the online softmax, whose largest weight is 1, does too, and as a
//   sequence may have 2^17 keys of 2^-17 times the largest weight, nothing can be given away there. So the largest
//   weight is 2^-0.5 to 2^15.5: row maxima within 5.5 of phi are safe. A rebased part starts low, with room to grow.
// bfloat16: the range of float32, and weights up to 1, so that sums of weighted values overflow no earlier than the
//   online softmax's. With a largest weight of 2^-64, weights of 2^-62 times that are still normal numbers. Row maxima
//   within 22 of phi are safe.
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

// A part of a row as it is kept between warps and between blocks. max is -infinity while no key was seen.
struct alignas(16) SoftmaxState {
  float ref, max, sum;
};

// The binary exponent of a weight. The difference is taken before the change of base: finite wherever it matters.
template <class Policy>
__device__ __forceinline__ float exponent(float x, float ref) {
  return fmaf(x - ref, kLog2E, Policy::kLift);
}

// What a part relative to `ref` counts in one relative to `whole`.
__device__ __forceinline__ float rescale(float ref, float whole) { return arch::exp2_approx((ref - whole) * kLog2E); }

// The reference of a part whose largest logit so far is `top`, where it is outside of the window.
template <class Policy>
__device__ __forceinline__ float rebased(float top) {
  return top + (Policy::kLift - Policy::kRebased) * kLn2;
}

// A phi that is no number, or near the end of float32, serves no row.
__device__ __forceinline__ bool usable(float phi) { return fabsf(phi) < 1e37f; }

// Whether phi was fit for a row, which only the row's true maximum decides.
template <class Policy>
__device__ __forceinline__ bool trusted(float phi, float max) {
  const float e = exponent<Policy>(max, phi);
  return !Policy::kUnified || (usable(phi) && e >= Policy::kLow && e <= Policy::kHigh);
}

template <class Policy>
__device__ __forceinline__ float log_sum(const SoftmaxState& row) {
  return row.ref + (logf(row.sum) - Policy::kLift * kLn2);
}

// A row from its parts. Its reference is the largest of a part that saw a key: each part's maximum is at least kLow
// above its reference, so the whole's is too. A part without a key changes nothing, and a NaN in a sum stays.
inline constexpr SoftmaxState kEmptyState = {0.f, -kInfinity, 0.f};

// What a part counts in a whole of that reference.
__device__ __forceinline__ float rescale_or_one(const SoftmaxState& part, float ref) {
  return part.max > -kInfinity ? rescale(part.ref, ref) : 1.f;
}

struct MergedState {
  SoftmaxState row = {-kInfinity, -kInfinity, 0.f};

  // Takes n more parts, to count by `factors`; what was summed before counts by what is returned. The parts' factors do
  // not depend on each other.
  template <int n>
  __device__ __forceinline__ float add(const SoftmaxState (&parts)[n], float (&factors)[n]) {
    const float before = row.ref;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (parts[i].max > -kInfinity) row.ref = fmaxf(row.ref, parts[i].ref);
      row.max = fmaxf(row.max, parts[i].max);
    }
    const float kept = before > -kInfinity ? rescale(before, row.ref) : 1.f;
    row.sum *= kept;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      factors[i] = rescale_or_one(parts[i], row.ref);
      row.sum = fmaf(factors[i], parts[i].sum, row.sum);
    }
    return kept;
  }
};

// The same from the parts that neighboring lanes hold, one each.
template <int lanes>
__device__ __forceinline__ SoftmaxState merge_lanes(const SoftmaxState& part, float& factor) {
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto sum = [](float a, float b) { return a + b; };
  const float ref = arch::lanes_reduce<lanes>(part.max > -kInfinity ? part.ref : -kInfinity, larger);
  factor = rescale_or_one(part, ref);
  return {ref, arch::lanes_reduce<lanes>(part.max, larger), arch::lanes_reduce<lanes>(factor * part.sum, sum)};
}

}  // namespace flashdecpp
