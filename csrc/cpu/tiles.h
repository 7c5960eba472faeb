// AMX: eight tile registers of 16 rows of 64 bytes, and bfloat16 products between them. FLASHDECPP_SIMULATED_TILES
// simulates them, for tests.
#pragma once

#include <cstdint>

#include "cpu/simd/simd.h"

#if defined(__AMX_BF16__) || defined(FLASHDECPP_SIMULATED_TILES)
#define FLASHDECPP_TILES 1
#endif

namespace flashdecpp::cpu::FLASHDECPP_ISA {

#if defined(FLASHDECPP_TILES)

inline constexpr int kTileRows = 16, kTileBytes = 64;

#if defined(FLASHDECPP_SIMULATED_TILES)

struct SimulatedTile {
  char rows[kTileRows][kTileBytes];
};
inline thread_local SimulatedTile simulated_tiles[8];

struct [[maybe_unused]] TileScope {};

template <int tile>
void tile_zero() {
  simulated_tiles[tile] = {};
}

template <int tile>
void tile_load(const void* first, int64_t row_bytes) {
  for (int r = 0; r < kTileRows; ++r) {
    __builtin_memcpy(simulated_tiles[tile].rows[r], static_cast<const char*>(first) + r * row_bytes, kTileBytes);
  }
}

template <int tile>
void tile_store(void* first, int64_t row_bytes) {
  for (int r = 0; r < kTileRows; ++r) {
    __builtin_memcpy(static_cast<char*>(first) + r * row_bytes, simulated_tiles[tile].rows[r], kTileBytes);
  }
}

template <int sums, int a, int b>
void tile_products() {
  for (int r = 0; r < kTileRows; ++r) {
    float row[16];
    __builtin_memcpy(row, simulated_tiles[sums].rows[r], sizeof(row));
    for (int pair = 0; pair < 16; ++pair) {
      for (int half = 0; half < 2; ++half) {
        bf16 left;
        __builtin_memcpy(&left, simulated_tiles[a].rows[r] + pair * 4 + half * 2, 2);
        for (int c = 0; c < 16; ++c) {
          bf16 right;
          __builtin_memcpy(&right, simulated_tiles[b].rows[pair] + c * 4 + half * 2, 2);
          row[c] += to_float(left) * to_float(right);
        }
      }
    }
    __builtin_memcpy(simulated_tiles[sums].rows[r], row, sizeof(row));
  }
}

#else

// Configures all of this thread's tiles as 16 x 64 bytes for its lifetime.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, unused[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof(shapes) == 64);
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kTileBytes;
      shapes.rows[tile] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
  }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Inline assembly, because GCC's intrinsics do not accept a template parameter as the tile number.
template <int tile>
FLASHDECPP_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
FLASHDECPP_INLINE void tile_load(const void* first, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
FLASHDECPP_INLINE void tile_store(void* first, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(first), "r"(row_bytes), "i"(tile) : "memory");
}
// sums[r][c] += sum over pairs j of a[r][2 j] b[j][2 c] + a[r][2 j + 1] b[j][2 c + 1]; sums are float32.
template <int sums, int a, int b>
FLASHDECPP_INLINE void tile_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

#endif
#endif

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
