// The vector passes over a row of logits that sampling needs; sample.cpp makes the choice. The floor of greedy sampling
// is one read of the logits; argmax reads a second time only up to the maximum.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

FLASHDECPP_INLINE Vec nan_to_minus_inf(Vec x) { return where_equal(x, x, x, set1(-kInf)); }

// The first index of the largest of x[0, n), or -1 if none is above -inf; NaN counts as -inf.
template <class T>
int64_t argmax_typed(const T* x, int64_t n) {
  Vec largest[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  int64_t i = 0;
  // max(x, largest) is `largest` if x is NaN.
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) largest[u] = max(load(x + i + u * kLanes), largest[u]);
  }
  float top = max_lane(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  for (; i < n; ++i) top = to_float(x[i]) > top ? to_float(x[i]) : top;
  if (top == -kInf) return -1;

  const Vec wanted = set1(top);
  for (i = 0; i + 4 * kLanes <= n; i += 4 * kLanes) {
    Vec hits = set1(0.0f);
    for (int u = 0; u < 4; ++u) hits = max(hits, where_equal(load(x + i + u * kLanes), wanted, set1(1.0f), set1(0.0f)));
    if (max_lane(hits) > 0.0f) break;
  }
  while (i < n && !(to_float(x[i]) == top)) ++i;
  return i;
}

static int64_t argmax(const void* x, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kFloat32: return argmax_typed(static_cast<const float*>(x), n);
    case DType::kFloat16: return argmax_typed(static_cast<const fp16*>(x), n);
    case DType::kBFloat16: return argmax_typed(static_cast<const bf16*>(x), n);
    default: return -1;
  }
}

template <class T>
float scores_typed(const SampleParams& p, int64_t row, float* x) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  if (p.repetition_penalty) {
    const bool* seen = p.seen + row * p.vocab;
    const float given = p.repetition_penalty[row], penalty = given > 0 && given < kInf ? given : 1.0f;
    for (int64_t i = 0; i < p.vocab; ++i) {
      float y = to_float(logits[i]);
      if (seen[i]) y = y > 0 ? y / penalty : y * penalty;
      x[i] = y;
    }
  }
  Vec largest = set1(-kInf);
  int64_t i = 0;
  for (; i + kLanes <= p.vocab; i += kLanes) {
    const Vec y = nan_to_minus_inf(p.repetition_penalty ? load(x + i) : load(logits + i));
    largest = max(y, largest);
    store(x + i, y);
  }
  float top = max_lane(largest);
  for (; i < p.vocab; ++i) {
    const float y = p.repetition_penalty ? x[i] : to_float(logits[i]);
    x[i] = y == y ? y : -kInf;
    top = max(top, x[i]);
  }
  return top;
}

static float scores(const SampleParams& p, int64_t row, float* x) {
  switch (p.dtype) {
    case DType::kFloat32: return scores_typed<float>(p, row, x);
    case DType::kFloat16: return scores_typed<fp16>(p, row, x);
    case DType::kBFloat16: return scores_typed<bf16>(p, row, x);
    default: return -kInf;
  }
}

static void weights(const float* x, float largest, float temperature, float* w, int64_t n) {
  // (y - largest) / temperature is computed as (y / 4 - largest / 4) * (4 / temperature), with both factors in the
  // normal range. Nothing then overflows for any logits and temperature except to -inf, whose weight is 0. The largest
  // logit has weight 1 by definition, because inf - inf would be NaN.
  constexpr float kMaxFactor = 0x1.fffffep127f;
  const Vec top = set1(largest), quarter_top = set1(-0.25f * largest);
  const Vec inverse = set1(min(4.0f / min(temperature, kMaxFactor), kMaxFactor));
  auto weight = [&](Vec y) __attribute__((always_inline)) {
    return where_equal(y, top, set1(1.0f), exp(fma(y, set1(0.25f), quarter_top) * inverse));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(w + i, weight(load(x + i)));
  if (i < n) store(w + i, weight(load(x + i, static_cast<int>(n - i))), static_cast<int>(n - i));
}

static void block_sums(const float* w, double* sums, int64_t n) {
  for (int64_t block = 0; block * kSumBlock < n; ++block) {
    const int64_t begin = block * kSumBlock, end = min(begin + kSumBlock, n);
    double total[8] = {};
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int u = 0; u < 8; ++u) total[u] += w[i + u];
    }
    for (; i < end; ++i) total[0] += w[i];
    sums[block] = ((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + total[5]) + (total[6] + total[7]));
  }
}

static void block_maxima(const float* x, float* maxima, int64_t n) {
  for (int64_t block = 0; block * kMaxBlock < n; ++block) {
    const int64_t begin = block * kMaxBlock, end = min(begin + kMaxBlock, n);
    Vec largest = set1(-kInf);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) largest = max(load(x + i), largest);
    float top = max_lane(largest);
    for (; i < end; ++i) top = max(top, x[i]);
    maxima[block] = top;
  }
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
