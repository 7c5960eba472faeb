// The softmax of one row as a policy that a kernel is compiled with: a value in registers that takes logits, and whose
// parts (some of the row's keys each) merge into the whole.
//
//   OnlineMax   weights relative to the largest logit so far. When that grows, all that was summed before shrinks: the
//               running maximum sits on the critical path of every tile.
//   UnifiedMax  weights relative to phi, fixed beforehand (FlashDecoding++ section 3): partial sums just add up, in any
//               order. The maximum is tracked on the side, to know at the end whether phi was fit for the row.
//
// A key that the row does not see comes as -infinity and weighs nothing; a visible key without a finite logit comes as
// NaN, which stays in the sum (and in the output, through its weight) to the end.
#pragma once

#include <cfloat>

#include "arch.h"

namespace flashdecpp {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kNaN = __builtin_nanf("");

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// What is kept of a row's part between blocks.
struct SoftmaxPart {
  float max, sum;
};

struct OnlineMax {
  static constexpr bool kUnified = false;
  float max = -kInfinity, sum = 0.f;

  explicit __device__ OnlineMax(float /*phi*/ = 0.f) {}

  // The maximum becomes at least `candidate`: the factor that everything summed so far shrinks by.
  __device__ __forceinline__ float raise(float candidate) {
    const float before = max;
    max = fmaxf(max, candidate);
    const float factor = share(before, max);
    sum *= factor;
    return factor;
  }

  // x is at most max. The difference is taken before the change of base: exact near the maximum, finite for any x.
  __device__ __forceinline__ float weight(float x) {
    const float w = share(x, max);
    sum += w;
    return w;
  }

  // e^(part - whole): what a part relative to the maximum `part` counts in the whole.
  static __device__ __forceinline__ float share(float part, float whole) {
    return arch::exp2_approx((part - (whole == -kInfinity ? 0.f : whole)) * kLog2E);
  }

  __device__ bool trusted() const { return true; }
  __device__ float log_sum() const { return max + logf(sum); }
};

// The weights are 2^(x log2(e) - c), where 2^c stands for e^phi, lifted so that the range of T is used well. A row is
// safe while its largest weight is 2^low to 2^high.
//
// half: the weights go through the tensor cores as half. Upwards 65504 = 2^15.99 is the end. Downwards half loses
//   precision below 2^-14 and everything below 2^-25: the online softmax, whose largest weight is 1, does too, and as a
//   sequence may have 2^17 keys of 2^-17 times the largest weight, nothing can be given away there. So the largest
//   weight is 2^-0.5 to 2^15.5, at the middle of which phi lies: row maxima within 5.5 of phi are safe.
// bfloat16: the range of float32, so the ends are set by what is summed: 2^17 keys x 2^32 x |v| stays finite up to
//   |v| = 2^78 (and an output that is not finite all the same makes the row unsafe: kMayOverflow); with a largest
//   weight of 2^-32, weights of 2^-94 times that are still normal numbers. Beyond that, the exponent's own rounding
//   (2^-19 at 32) would show in lse. Row maxima within 22 of phi are safe.
// Sums are float32 in either case: at most 2^17 x 2^32.
template <class T>
struct UnifiedRange;
template <>
struct UnifiedRange<arch::half> {
  static constexpr float kLow = -0.5f, kHigh = 15.5f;
  static constexpr bool kMayOverflow = false;
};
template <>
struct UnifiedRange<arch::bfloat16> {
  static constexpr float kLow = -32.f, kHigh = 32.f;
  static constexpr bool kMayOverflow = true;
};

template <class T>
struct UnifiedMax {
  static constexpr bool kUnified = true;
  using Range = UnifiedRange<T>;
  float max = -kInfinity, sum = 0.f;
  float c;
  bool usable;

  // A phi that is no number, or so large that c would not be one, serves no row.
  explicit __device__ UnifiedMax(float phi = 0.f) : usable(fabsf(phi) < 1e37f) {
    c = usable ? phi * kLog2E - 0.5f * (Range::kLow + Range::kHigh) : 0.f;
  }

  __device__ __forceinline__ float weight(float x) {
    max = fmaxf(max, x);  // passes over NaN
    const float w = arch::exp2_approx(fmaf(x, kLog2E, -c));
    sum += w;
    return w;
  }

  static __device__ __forceinline__ float share(float, float) { return 1.f; }

  // Only the row's true maximum decides.
  __device__ bool trusted() const {
    const float exponent = fmaf(max, kLog2E, -c);
    return usable && exponent >= Range::kLow && exponent <= Range::kHigh;
  }

  // log(sum) + c ln 2, where the two may be large and of opposite sign: the exponents cancel exactly.
  __device__ float log_sum() const {
    int exponent;
    const float fraction = frexpf(sum, &exponent);
    return fmaf(static_cast<float>(exponent) + c, kLn2, logf(fraction));
  }
};

}  // namespace flashdecpp
