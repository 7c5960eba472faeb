// The simulated GPU's side of the seam (cuda/arch.h), with the matrix tiles of mma.sync m16n8k16. Asynchronous copies
// arrive when they are waited for, and not before.
#pragma once

#include "simulated_gpu.h"

inline _Float16 __ushort_as_half(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

namespace flashdecpp::arch {

// The element that a lane's value e is: A is 16 x 16, B and C are 16 x kN.
struct Layout {
  static constexpr int kN = 8, kA = 8, kB = 4, kC = 4, kRowSlots = 2, kRowLanes = 4;
  static int a_row(int lane, int e) { return lane / 4 + e / 2 % 2 * 8; }
  static int a_k(int lane, int e) { return lane % 4 * 2 + e % 2 + e / 4 * 8; }
  static int b_n(int lane, int) { return lane / 4; }
  static int b_k(int lane, int e) { return lane % 4 * 2 + e % 2 + e / 2 * 8; }
  static int c_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
  static int c_col(int lane, int e) { return lane % 4 * 2 + e % 2; }
};

inline constexpr int kWarpSize = simulated::kWarp;
inline constexpr int kTileN = Layout::kN;
inline constexpr int kTilesOf16 = 16 / kTileN;
inline constexpr int kBlockSharedBytes = 160 * 1024, kMaxStages = 8;
inline constexpr bool kHasTma = false, kWidenedInOrder = true;

// ---- element types --------------------------------------------------------------------------------------------------
using half = _Float16;
struct bfloat16 {
  uint16_t bits;
};
struct float8 {  // e4m3
  uint8_t bits = 0;

  float8() = default;
  explicit float8(float x) {  // rounds to nearest even, saturates
    float best = INFINITY;
    for (int code = 0; code < 127; ++code) {
      float8 candidate;
      candidate.bits = static_cast<uint8_t>(code);
      const float distance = std::fabs(static_cast<float>(candidate) - std::fabs(x));
      if (distance < best || (distance == best && code % 2 == 0)) {
        best = distance;
        bits = candidate.bits;
      }
    }
    if (std::signbit(x)) bits |= 0x80;
    if (std::isnan(x)) bits = 0x7f;
  }
  explicit operator float() const {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float value = exponent == 0 ? std::ldexp(mantissa / 8.f, -6) : std::ldexp(1.f + mantissa / 8.f, exponent - 7);
    if ((bits & 0x7f) == 0x7f) value = NAN;
    return bits & 0x80 ? -value : value;
  }
};

inline float __half2float(half x) { return static_cast<float>(x); }
inline half __float2half_rn(float x) { return static_cast<half>(x); }
inline float __bfloat162float(bfloat16 x) { return simulated::from_bfloat16_bits(x.bits); }
inline bfloat16 __float2bfloat16(float x) { return {simulated::to_bfloat16_bits(x)}; }

inline float widened(half x) { return __half2float(x); }
inline float widened(bfloat16 x) { return __bfloat162float(x); }
inline float widened(float8 x) { return static_cast<float>(x); }
inline void narrow(half& to, float x) { to = __float2half_rn(x); }
inline void narrow(bfloat16& to, float x) { to = __float2bfloat16(x); }

// ---- lanes ---------------------------------------------------------------------------------------------------------
using simulated::lane;
using simulated::lane_value;
using simulated::shuffle;
inline int warp() { return static_cast<int>(simulated::gpu().thread() / kWarpSize); }

inline float __shfl_sync(unsigned, float value, int source) { return shuffle(value, source, "__shfl_sync"); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline float shfl_xor(float value, int mask) { return shuffle(value, lane() ^ mask, "shfl_xor"); }
inline uint32_t shfl_xor(uint32_t value, int mask) { return shuffle(value, lane() ^ mask, "shfl_xor"); }
inline uint64_t shfl_xor(uint64_t value, int mask) { return shuffle(value, lane() ^ mask, "shfl_xor"); }
template <class T>
T* shfl(T* value, int source) {
  return shuffle(value, source, "shfl");
}
inline int shfl(int value, int source) { return shuffle(value, source, "shfl"); }
inline float shfl(float value, int source) { return shuffle(value, source, "shfl"); }
inline int first_lane(bool value) {
  const auto* lanes = simulated::gpu().exchange(value, "first_lane");
  for (int i = 0; i < kWarpSize; ++i) {
    if (lane_value<bool>(lanes, i)) return i;
  }
  simulated::fail("first_lane: true for no lane");
}
inline bool warp_any(bool value) {
  const auto* lanes = simulated::gpu().exchange(value, "warp_any");
  bool any = false;
  for (int i = 0; i < kWarpSize; ++i) any |= lane_value<bool>(lanes, i);
  return any;
}
inline void warp_sync() { simulated::gpu().exchange(0, "warp_sync"); }

inline void scheduling_barrier() {}
inline int uniform(int x) {
  if (shuffle(x, 0, "uniform") != x) simulated::fail("uniform: lanes differ");
  return x;
}
template <class Int>
Int rematerialize(Int x) {
  return x;
}

inline float exp2_approx(float x) { return std::exp2(x); }

// ---- memory ---------------------------------------------------------------------------------------------------------
inline unsigned char* dynamic_shared() { return simulated::aligned_shared(); }

template <int bytes = 16>
void copy_async(void* shared, const void* global, bool valid, const void* /*readable*/ = nullptr) {
  static_assert(bytes == 16 || bytes == 8);
  if (reinterpret_cast<uintptr_t>(shared) % bytes || (valid && reinterpret_cast<uintptr_t>(global) % bytes)) {
    simulated::fail("copy_async: not aligned");
  }
  simulated::gpu().fiber().copies.back().push_back({shared, valid ? global : nullptr, bytes});
}
inline void copy_commit() { simulated::gpu().fiber().copies.emplace_back(); }
template <int pending>
void copy_wait() {
  auto& groups = simulated::gpu().fiber().copies;
  while (groups.size() > pending + 1u) {
    for (const simulated::AsyncCopy& copy : groups.front()) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

inline uint4 load_stream(const void* p) { return *static_cast<const uint4*>(p); }
inline uint32_t load_2_or_4_bytes(const void* p, bool wide) {
  return wide ? *static_cast<const uint32_t*>(p) : *static_cast<const uint16_t*>(p);
}
inline void store_wide(void* p, const uint4& v) { *static_cast<uint4*>(p) = v; }
inline void prefetch(const void* /*p*/) {}
inline int32_t load_fresh(const int32_t* p) { return *p; }
inline void publish(uint64_t* flag, uint64_t value) { *flag = value; }
inline void await(const uint64_t* flag, uint64_t value) {
  while (*flag != value) simulated::gpu().wait("await");
}
inline void cluster_sync() { simulated::gpu().cluster_barrier(); }
template <class V>
V* map_shared_rank(V* p, int rank) {
  return simulated::gpu().map_shared_rank(p, rank);
}
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

// ---- matrix tiles --------------------------------------------------------------------------------------------------
// Two elements per word, as kernels that build fragments themselves expect.
template <class T>
struct TileA {
  uint32_t v[Layout::kA / 2];
};
template <class T>
struct TileB {
  uint32_t v[Layout::kB / 2];
};
template <class T>
T& element(TileA<T>& tile, int e) {
  return reinterpret_cast<T*>(tile.v)[e];
}
template <class T>
T& element(TileB<T>& tile, int e) {
  return reinterpret_cast<T*>(tile.v)[e];
}
struct TileC {
  static constexpr int kValues = Layout::kC;
  static constexpr int kRowSlots = Layout::kRowSlots, kRowLanes = Layout::kRowLanes, kRowStride = 1;
  float v[kValues] = {};

  static constexpr int slot(int i) { return i / (kValues / kRowSlots); }
  static int slot_row(int slot) { return Layout::c_row(lane(), slot * (kValues / kRowSlots)); }
  static bool leads_row() { return lane() % kRowLanes == 0; }
  static int row(int i) { return Layout::c_row(lane(), i); }
  static int col(int i) { return Layout::c_col(lane(), i); }
};

template <class T>
void load_a(TileA<T>& tile, const T* p, int stride) {
  warp_sync();
  for (int e = 0; e < Layout::kA; ++e) element(tile, e) = p[Layout::a_row(lane(), e) * stride + Layout::a_k(lane(), e)];
}
template <class T>
void load_b(TileB<T>& tile, const T* p, int stride) {
  warp_sync();
  for (int e = 0; e < Layout::kB; ++e) element(tile, e) = p[Layout::b_n(lane(), e) * stride + Layout::b_k(lane(), e)];
}

inline constexpr int widened_k(int k) { return k; }
inline constexpr int widened_column(int tile, int n) { return tile * kTileN + n; }

// Element `column` of a row, addressed by chunk as a matrix load does.
template <class Rows>
float element_of(const Rows& rows, int row, int column) {
  using Element = typename Rows::Element;
  constexpr int per_chunk = 16 / sizeof(Element);
  const auto* p = reinterpret_cast<const Element*>(rows.moved(rows.chunk(row, 0), column / per_chunk));
  return widened(p[column % per_chunk]);
}
template <class T, class Rows>
void load_b(TileB<T> (&tiles)[kTilesOf16], const Rows& rows, int j) {
  warp_sync();
  for (int t = 0; t < kTilesOf16; ++t) {
    for (int e = 0; e < Layout::kB; ++e) {
      const int n = t * kTileN + Layout::b_n(lane(), e);
      narrow(element(tiles[t], e), element_of(rows, n, 16 * j + Layout::b_k(lane(), e)));
    }
  }
}
template <class T, class Rows>
void load_b_transposed(TileB<T> (&tiles)[kTilesOf16], const Rows& rows, int j) {
  warp_sync();
  for (int t = 0; t < kTilesOf16; ++t) {
    for (int e = 0; e < Layout::kB; ++e) {
      const int n = t * kTileN + Layout::b_n(lane(), e);
      narrow(element(tiles[t], e), element_of(rows, Layout::b_k(lane(), e), 16 * j + n));
    }
  }
}

template <class T>
void as_a(TileA<T>& a, const TileC (&c)[kTilesOf16]) {
  struct Tiles {
    TileC c[kTilesOf16];
  } own;
  for (int t = 0; t < kTilesOf16; ++t) own.c[t] = c[t];
  const auto* lanes = simulated::gpu().exchange(own, "as_a");
  float result[16][16];
  for (int l = 0; l < kWarpSize; ++l) {
    const Tiles tiles = lane_value<Tiles>(lanes, l);
    for (int t = 0; t < kTilesOf16; ++t) {
      for (int e = 0; e < Layout::kC; ++e) {
        result[Layout::c_row(l, e)][t * kTileN + Layout::c_col(l, e)] = tiles.c[t].v[e];
      }
    }
  }
  for (int e = 0; e < Layout::kA; ++e) narrow(element(a, e), result[Layout::a_row(lane(), e)][Layout::a_k(lane(), e)]);
}

template <class T>
void mma(TileC& c, const TileA<T>& a, const TileB<T>& b) {
  struct Factors {
    TileA<T> a;
    TileB<T> b;
  };
  const auto* lanes = simulated::gpu().exchange(Factors{a, b}, "mma");
  float left[16][16], right[16][kTileN];
  for (int l = 0; l < kWarpSize; ++l) {
    Factors factors = lane_value<Factors>(lanes, l);
    for (int e = 0; e < Layout::kA; ++e) left[Layout::a_row(l, e)][Layout::a_k(l, e)] = widened(element(factors.a, e));
    for (int e = 0; e < Layout::kB; ++e) right[Layout::b_k(l, e)][Layout::b_n(l, e)] = widened(element(factors.b, e));
  }
  for (int e = 0; e < Layout::kC; ++e) {
    const int row = Layout::c_row(lane(), e), col = Layout::c_col(lane(), e);
    for (int k = 0; k < 16; ++k) c.v[e] += left[row][k] * right[k][col];
  }
}

template <class T>
void store(T* p, int stride, const TileC& c) {
  for (int i = 0; i < TileC::kValues; ++i) narrow(p[TileC::row(i) * stride + TileC::col(i)], c.v[i]);
}

struct AttentionTuning {
  static constexpr int kQueryColumns = 192, kAhead = 4;
  static constexpr int interleave(int /*head_dim*/) { return 1; }
};

}  // namespace flashdecpp::arch
