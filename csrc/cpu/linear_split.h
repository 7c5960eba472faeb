// How the threads share the work of a linear.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "torch_api.h"

namespace flashdecpp::cpu {

// A thread's share must be worth waking it: so many bytes of weights, for up to kMaxTileM rows of x.
inline constexpr int64_t kMinBytesPerThread = 64 * 1024;
inline constexpr int64_t kMinElementsPerThread = 32 * 1024;  // of x, to pack
// Weight rows that threads share out: whole tiles, and whole cache lines of the output.
inline constexpr int64_t kUnit = 16;
inline constexpr int64_t kRowBlock = 64;  // rows of x that threads share out where the weights have too few

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// pack(begin, end) for all rows of x, then multiply(LinearPart) for all outputs; a row of weights is row_bytes long.
template <class Pack, class Multiply>
void split_linear(const LinearParams& p, int64_t row_bytes, const Pack& pack, const Multiply& multiply) {
  if (p.m == 0 || p.n == 0) return;
  if (p.m * p.k <= kMinElementsPerThread) {
    pack(0, p.m);
  } else {
    torch::stable::parallel_for(0, p.m, ceil_div(kMinElementsPerThread, p.k), pack);
  }

  // Outputs in blocks of rows of x, each in units of rows of the weights.
  const int64_t units = ceil_div(p.n, kUnit);
  const int64_t block =
      units >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) ? p.m : std::min(p.m, kRowBlock);
  const int64_t unit_bytes = kUnit * row_bytes * ceil_div(block, kMaxTileM);
  torch::stable::parallel_for(
      0, ceil_div(p.m, block) * units, ceil_div(kMinBytesPerThread, unit_bytes), [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t m = begin / units * block, first = begin % units;
          const int64_t last = std::min(units, first + end - begin);
          multiply(LinearPart{m, std::min(m + block, p.m), first * kUnit, std::min(last * kUnit, p.n)});
          begin += last - first;
        }
      });
}

}  // namespace flashdecpp::cpu
