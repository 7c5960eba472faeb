// The linear of bfloat16 for more rows of x than one pass of the vector kernel serves (kMaxTileM), on tile registers.
//
// 16 rows of the weight, 32 numbers each, are a tile as they lie in memory; 16 rows of x are packed so that they are
// the other factor: pairs of neighbors along K, row beside row. Two tiles of either make four of sums, so that each is
// loaded once for two products; what is left of the weight at its edges goes through a copy with zeros around it. An
// output is summed up along K from its start to its end, whatever is computed beside it. Subnormal numbers count as
// zero, as they do in the vector instructions for bfloat16.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

#if defined(FLASHDECPP_TILES)

// Whether a call is one for tiles.
inline bool on_tiles(const LinearParams& p) { return p.dtype == DType::kBFloat16 && p.m > kMaxTileM; }

inline constexpr int64_t kTileK = kTileBytes / 2;

// 16 rows of x, [k / 2][16][2], packed_stride numbers a row; the memory of 4 bytes a number that there is for fewer
// rows holds them, since there are more than kMaxTileM.
inline bf16* tile_group(const void* packed, int64_t packed_stride, int64_t m) {
  return static_cast<bf16*>(const_cast<void*>(packed)) + m / kTileRows * kTileRows * packed_stride;
}

inline void pack_tiles(const LinearParams& p, void* packed, int64_t packed_stride, int64_t begin, int64_t end) {
  static_assert(kPackAlign % kTileK == 0);
  for (int64_t m = begin; m < end; ++m) {
    const bf16* x = static_cast<const bf16*>(p.x) + m * p.x_stride;
    bf16* to = tile_group(packed, packed_stride, m) + m % kTileRows * 2;
    for (int64_t k = 0; k < packed_stride; ++k) to[k / 2 * kTileRows * 2 + k % 2] = k < p.k ? x[k] : bf16{};
  }
}

class TiledLinear {
 public:
  TiledLinear(const LinearParams& p, const void* packed, int64_t packed_stride)
      : p_(p), packed_(packed), packed_stride_(packed_stride) {}

  void run(const LinearPart& part) const {
    const TileScope scope;
    for (int64_t n = part.n_begin; n < part.n_end; n += 2 * kTileRows) {
      for (int64_t m = part.m_begin; m < part.m_end; m += 2 * kTileRows) sums(part, n, m);
    }
  }

 private:
  // Outputs of up to 32 x 32.
  void sums(const LinearPart& part, int64_t n, int64_t m) const {
    const bool second_n = n + kTileRows < part.n_end, second_m = m + kTileRows < part.m_end;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t k = 0; k < p_.k; k += kTileK) {
      load_weight<4>(n, k);
      load_x<6>(m, k);
      tile_products<0, 4, 6>();
      if (second_m) {
        load_x<7>(m + kTileRows, k);
        tile_products<1, 4, 7>();
      }
      if (!second_n) continue;
      load_weight<5>(n + kTileRows, k);
      tile_products<2, 5, 6>();
      if (second_m) tile_products<3, 5, 7>();
    }
    write<0>(part, n, m);
    if (second_m) write<1>(part, n, m + kTileRows);
    if (second_n) write<2>(part, n + kTileRows, m);
    if (second_n && second_m) write<3>(part, n + kTileRows, m + kTileRows);
  }

  template <int tile>
  void load_x(int64_t m, int64_t k) const {
    tile_load<tile>(tile_group(packed_, packed_stride_, m) + k * kTileRows, kTileBytes);
  }

  template <int tile>
  void load_weight(int64_t n, int64_t k) const {
    const bf16* const first = static_cast<const bf16*>(p_.weight) + n * p_.weight_stride + k;
    const int64_t rows = min(p_.n - n, int64_t{kTileRows}), columns = min(p_.k - k, kTileK);
    if (rows == kTileRows && columns == kTileK) {
      for (int64_t r = 0; r < kTileRows; ++r) __builtin_prefetch(first + r * p_.weight_stride + kAheadK);
      return tile_load<tile>(first, p_.weight_stride * static_cast<int64_t>(sizeof(bf16)));
    }
    alignas(kTileBytes) bf16 edge[kTileRows][kTileK] = {};
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_memcpy(edge[r], first + r * p_.weight_stride, static_cast<size_t>(columns) * sizeof(bf16));
    }
    tile_load<tile>(edge, kTileBytes);
  }

  // Sums [n][m] to outputs [m][n], with bias or what the outputs hold.
  template <int tile>
  void write(const LinearPart& part, int64_t n, int64_t m) const {
    alignas(kTileBytes) float sums[kTileRows][kTileRows];
    tile_store<tile>(sums, kTileBytes);
    const int64_t rows = min(part.m_end - m, int64_t{kTileRows}), columns = min(part.n_end - n, int64_t{kTileRows});
    const bf16* const bias = static_cast<const bf16*>(p_.bias);
    for (int64_t i = 0; i < rows; ++i) {
      bf16* const out = static_cast<bf16*>(p_.out) + (m + i) * p_.n + n;
      float values[kTileRows] = {};
      for (int64_t j = 0; j < columns; ++j) {
        values[j] = sums[j][i] + (bias ? to_float(bias[n + j]) : 0.f) + (p_.fusion.adds() ? to_float(out[j]) : 0.f);
      }
      bf16 rounded[kTileRows];
      for (int j = 0; j < kTileRows; j += kLanes) store(rounded + j, load(values + j));
      __builtin_memcpy(out, rounded, static_cast<size_t>(columns) * sizeof(bf16));
    }
  }

  static constexpr int64_t kAheadK = 8 * kTileK;  // of a row: what is fetched ahead of its use

  const LinearParams& p_;
  const void* packed_;
  int64_t packed_stride_;
};

#endif

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
