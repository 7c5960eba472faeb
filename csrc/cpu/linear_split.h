// Splits a linear into tasks and runs them on torch's threads.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "torch_api.h"

namespace flashdecpp::cpu {

// The least work that repays waking a thread: bytes of weights per kMaxTileM rows of x, and elements of x to pack.
inline constexpr int64_t kMinBytesPerThread = 64 * 1024;
inline constexpr int64_t kMinElementsPerThread = 32 * 1024;
// Work tiles of outputs. A multiple of kTaskN weight rows fills whole register tiles and cache lines of the output; x
// is split as well, by kTaskM rows, only if the weights have too few tiles for the threads.
inline constexpr int64_t kTaskN = 16;
inline constexpr int64_t kTaskM = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls pack(begin, end) for all rows of x, then multiply(LinearTask) for all outputs. A row of weights has row_bytes.
template <class Pack, class Multiply>
void split_linear(const LinearParams& p, int64_t row_bytes, const Pack& pack, const Multiply& multiply) {
  if (p.m == 0 || p.n == 0) return;
  if (p.m * p.k <= kMinElementsPerThread) {
    pack(0, p.m);
  } else {
    torch::stable::parallel_for(0, p.m, ceil_div(kMinElementsPerThread, p.k), pack);
  }

  const int64_t n_tiles = ceil_div(p.n, kTaskN);
  const int64_t tile_m =
      n_tiles >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) ? p.m : std::min(p.m, kTaskM);
  const int64_t tile_bytes = kTaskN * row_bytes * ceil_div(tile_m, kMaxTileM);
  torch::stable::parallel_for(
      0, ceil_div(p.m, tile_m) * n_tiles, ceil_div(kMinBytesPerThread, tile_bytes), [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t m = begin / n_tiles * tile_m, first = begin % n_tiles;
          const int64_t last = std::min(n_tiles, first + end - begin);
          multiply(LinearTask{m, std::min(m + tile_m, p.m), first * kTaskN, std::min(last * kTaskN, p.n)});
          begin += last - first;
        }
      });
}

}  // namespace flashdecpp::cpu
