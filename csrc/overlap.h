// Whether tensors overlap in memory, decided exactly: views of one tensor may interleave without sharing a byte, as K
// and V of one cache do. No torch here. Strides are assumed not to be negative, as torch guarantees.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flashdecpp {

struct Region {
  uintptr_t begin;  // the address of the first element
  const int64_t* sizes;
  const int64_t* strides;  // in elements
  int64_t dim;
  int64_t element_size;  // in bytes

  bool empty() const {
    return std::any_of(sizes, sizes + dim, [](int64_t size) { return size == 0; });
  }
  uintptr_t end() const {  // for a region that is not empty
    int64_t last = 0;
    for (int64_t i = 0; i < dim; ++i) last += (sizes[i] - 1) * strides[i];
    return begin + (last + 1) * element_size;
  }
};

namespace overlap {

inline constexpr int kMaxDims = 64;  // torch's own limit
inline constexpr int kAttempts = 1 << 16;

// n * step for any integer n in [low, high].
struct Term {
  int64_t step, low, high;
};

// Terms, which order() sorts by descending step, and the range of the sums of terms i and up.
struct Terms {
  Term terms[2 * kMaxDims + 1];
  int64_t lowest[2 * kMaxDims + 2], highest[2 * kMaxDims + 2];
  int count = 0;

  void add(int64_t step, int64_t low, int64_t high) {
    if (step == 0 || low == high) return;
    for (int i = 0; i < count; ++i) {
      if (terms[i].step != step) continue;
      terms[i].low += low;
      terms[i].high += high;
      return;
    }
    terms[count++] = {step, low, high};
  }
  void order() {
    std::sort(terms, terms + count, [](const Term& a, const Term& b) { return a.step > b.step; });
    lowest[count] = highest[count] = 0;
    for (int i = count - 1; i >= 0; --i) {
      lowest[i] = lowest[i + 1] + terms[i].step * terms[i].low;
      highest[i] = highest[i + 1] + terms[i].step * terms[i].high;
    }
  }
  // Whether terms i and up can add up to `sum`. For views of one tensor, one or two values per term need trying;
  // strides irregular enough to use up `attempts` count as overlapping.
  bool reach(int64_t sum, int& attempts, int i = 0) const {
    if (i == count) return sum == 0;
    const Term& term = terms[i];
    const auto floor = [&](int64_t x) { return x / term.step - (x % term.step < 0); };
    const int64_t first = std::max(term.low, -floor(highest[i + 1] - sum));
    const int64_t last = std::min(term.high, floor(sum - lowest[i + 1]));
    for (int64_t n = first; n <= last; ++n) {
      if (--attempts < 0 || reach(sum - n * term.step, attempts, i + 1)) return true;
    }
    return false;
  }
};

}  // namespace overlap

// Whether some byte belongs to elements of both.
inline bool overlaps(const Region& a, const Region& b) {
  if (a.empty() || b.empty() || a.end() <= b.begin || b.end() <= a.begin) return false;
  // A byte of a is a byte of b if steps through a minus steps through b add up to the distance from a to b.
  overlap::Terms terms;
  for (int64_t i = 0; i < a.dim; ++i) terms.add(a.strides[i] * a.element_size, 0, a.sizes[i] - 1);
  for (int64_t i = 0; i < b.dim; ++i) terms.add(b.strides[i] * b.element_size, 1 - b.sizes[i], 0);
  terms.add(1, 1 - b.element_size, a.element_size - 1);
  terms.order();
  int attempts = overlap::kAttempts;
  return terms.reach(static_cast<int64_t>(b.begin - a.begin), attempts);
}

// Whether two indices of one tensor address the same element.
inline bool overlaps_itself(const Region& a) {
  if (a.empty()) return false;
  // They do if two index vectors give the same offset, that is, if a nonzero difference of indices gives offset 0.
  overlap::Terms steps;
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.sizes[i] <= 1) continue;
    const int before = steps.count;
    steps.add(a.strides[i], 1 - a.sizes[i], a.sizes[i] - 1);
    if (steps.count == before) return true;  // a stride of 0, or the same stride twice
  }
  steps.order();
  int attempts = overlap::kAttempts;
  for (int i = 0; i < steps.count; ++i) {
    const auto& [step, low, high] = steps.terms[i];  // the first nonzero difference, positive by symmetry
    for (int64_t n = 1; n <= high && n * step <= steps.highest[i + 1]; ++n) {
      if (steps.reach(-n * step, attempts, i + 1)) return true;
    }
  }
  return false;
}

}  // namespace flashdecpp
