// The bfloat16 linear on AMX tile registers, for more rows of x than one pass of the vector kernel handles (kMaxTileM).
//
// 16 rows of the weight, 32 numbers each, form a tile directly from memory. 16 rows of x are packed as the other
// factor: pairs of neighbors along K, with the rows of each pair adjacent. Two tiles of each give four tiles of sums
// (32 x 32 outputs), so each tile loaded is used twice. The weight's edges go through a zero-padded copy. An output is
// summed along all of K in one order, whatever its neighbors. Subnormals count as zero, as in the vector instructions
// for bfloat16.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

#if defined(FLASHDECPP_TILES)

// Whether this call runs on tiles.
inline bool on_tiles(const LinearParams& p) { return p.dtype == DType::kBFloat16 && p.m > kMaxTileM; }

inline constexpr int64_t kTileK = kTileBytes / 2;

// The tile row of x that holds row m: 16 rows as [k / 2][16][2]. The last tile row is padded to 16 rows, which the
// caller's buffer of 4 bytes per number has room for because m > kMaxTileM.
inline bf16* packed_tiles(const void* packed, int64_t packed_stride, int64_t m) {
  return static_cast<bf16*>(const_cast<void*>(packed)) + m / kTileRows * kTileRows * packed_stride;
}

inline void pack_tiles(const LinearParams& p, void* packed, int64_t packed_stride, int64_t begin, int64_t end) {
  static_assert(kPackAlign % kTileK == 0);
  for (int64_t m = begin; m < end; ++m) {
    const bf16* x = static_cast<const bf16*>(p.x) + m * p.x_stride;
    bf16* to = packed_tiles(packed, packed_stride, m) + m % kTileRows * 2;
    for (int64_t k = 0; k < packed_stride; ++k) to[k / 2 * kTileRows * 2 + k % 2] = k < p.k ? x[k] : bf16{};
  }
}

class TiledLinear {
 public:
  TiledLinear(const LinearParams& p, const void* packed, int64_t packed_stride)
      : p_(p), packed_(packed), packed_stride_(packed_stride) {}

  void run(const LinearTask& task) const {
    const TileScope scope;
    for (int64_t n = task.n_begin; n < task.n_end; n += 2 * kTileRows) {
      for (int64_t m = task.m_begin; m < task.m_end; m += 2 * kTileRows) sums(task, n, m);
    }
  }

 private:
  // Up to 32 x 32 outputs.
  void sums(const LinearTask& task, int64_t n, int64_t m) const {
    const bool second_n = n + kTileRows < task.n_end, second_m = m + kTileRows < task.m_end;
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
    write<0>(task, n, m);
    if (second_m) write<1>(task, n, m + kTileRows);
    if (second_n) write<2>(task, n + kTileRows, m);
    if (second_n && second_m) write<3>(task, n + kTileRows, m + kTileRows);
  }

  template <int tile>
  void load_x(int64_t m, int64_t k) const {
    tile_load<tile>(packed_tiles(packed_, packed_stride_, m) + k * kTileRows, kTileBytes);
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

  // Stores sums [n][m] as outputs [m][n], plus bias, or added to the outputs.
  template <int tile>
  void write(const LinearTask& task, int64_t n, int64_t m) const {
    alignas(kTileBytes) float sums[kTileRows][kTileRows];
    tile_store<tile>(sums, kTileBytes);
    const int64_t rows = min(task.m_end - m, int64_t{kTileRows}), columns = min(task.n_end - n, int64_t{kTileRows});
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

  static constexpr int64_t kAheadK = 8 * kTileK;  // prefetch distance along a row of weights

  const LinearParams& p_;
  const void* packed_;
  int64_t packed_stride_;
};

#endif

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
