// AMD's side of the seam (cuda/arch.h): CDNA (warps of 64, MFMA 16x16x16) and RDNA3 (warps of 32, WMMA 16x16x16). A
// matrix tile is 16 x 16 x 16 on both.
//
// There are no asynchronous copies to shared memory: copy_async copies at once. (gfx942 can load 4 bytes per lane
// directly to LDS, a quarter of what an ordinary load brings.)
#pragma once

#include <hip/hip_bf16.h>
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define __grid_constant__  // kernel parameters are never copied

namespace flashdecpp::arch {

using half = __half;
using bfloat16 = __hip_bfloat16;

// e4m3 with 4 bits of exponent, bias 7 and no infinity (OCP); the format that gfx942 converts in hardware differs.
struct float8 {
  uint8_t bits;

  float8() = default;
  __device__ explicit float8(float x) {
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
    const float magnitude = fminf(fabsf(x), 448.f);
    if (isnan(x)) {
      bits = 0x7f;
    } else if (magnitude < 0x1p-6f) {  // subnormal: steps of 2^-9
      bits = static_cast<uint8_t>(sign | static_cast<uint32_t>(rintf(magnitude * 0x1p9f)));
    } else {  // rounds to nearest even; the carry may go into the exponent
      const uint32_t wide = __float_as_uint(magnitude), odd = wide >> 20 & 1;
      bits = static_cast<uint8_t>(sign | (((wide + 0x7ffff + odd) >> 20) - (120 << 3)));
    }
  }
  // Places exponent and mantissa where float has them; the product corrects the bias, of subnormals too.
  __device__ explicit operator float() const {
    const uint32_t sign = (bits & 0x80u) << 24, magnitude = bits & 0x7fu;
    const float value = __uint_as_float(sign | magnitude << 20) * 0x1p120f;
    return magnitude == 0x7f ? __uint_as_float(0x7fc00000) : value;
  }
};

#if defined(__GFX11__)
inline constexpr int kWarpSize = 32;
#else  // CDNA; also the host, which asks the device instead
inline constexpr int kWarpSize = 64;
#endif
inline constexpr int kTileN = 16, kTilesOf16 = 1;
inline constexpr int kBlockSharedBytes = 64 * 1024;
inline constexpr int kMaxStages = 2;  // one is filled while the other is read
inline constexpr bool kHasTma = false, kWidenedInOrder = true;

// ---- lanes ----------------------------------------------------------------------------------------------------------
__device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
// Moves x to a scalar register, of which there are plenty.
__device__ __forceinline__ int uniform(int x) { return __builtin_amdgcn_readfirstlane(x); }
__device__ __forceinline__ int warp() { return uniform(threadIdx.x / kWarpSize); }

__device__ __forceinline__ float shfl_xor(float value, int mask) { return __shfl_xor(value, mask, kWarpSize); }
__device__ __forceinline__ uint32_t shfl_xor(uint32_t value, int mask) { return __shfl_xor(value, mask, kWarpSize); }
__device__ __forceinline__ uint64_t shfl_xor(uint64_t value, int mask) {
  return __shfl_xor(static_cast<unsigned long long>(value), mask, kWarpSize);
}
template <class T>
__device__ __forceinline__ T* shfl(T* value, int source) {
  return reinterpret_cast<T*>(__shfl(reinterpret_cast<unsigned long long>(value), source, kWarpSize));
}
__device__ __forceinline__ int shfl(int value, int source) { return __shfl(value, source, kWarpSize); }
__device__ __forceinline__ int first_lane(bool value) { return __ffsll(__ballot(value)) - 1; }
__device__ __forceinline__ bool warp_any(bool value) { return __ballot(value) != 0; }
__device__ __forceinline__ void warp_sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

__device__ __forceinline__ float exp2_approx(float x) { return __builtin_amdgcn_exp2f(x); }

// Warps of 32 have no registers for loads that the compiler moves ahead of the current step.
__device__ __forceinline__ void scheduling_barrier() {
  if constexpr (kWarpSize == 32) __builtin_amdgcn_sched_barrier(0);
}

// The compiler would spend registers on precomputed addresses of all copies and tiles; recomputing them is cheaper.
template <class Int>
__device__ __forceinline__ Int rematerialize(Int x) {
#if defined(__HIP_DEVICE_COMPILE__)
  asm volatile("" : "+v"(x));
#endif
  return x;
}

// ---- memory ---------------------------------------------------------------------------------------------------------
__device__ __forceinline__ unsigned char* dynamic_shared() {
  HIP_DYNAMIC_SHARED(unsigned char, dynamic_shared_memory);
  return dynamic_shared_memory;
}

template <int bytes>
using Words = std::conditional_t<bytes == 16, uint4, uint2>;

template <int bytes = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  static_assert(bytes == 16 || bytes == 8);
  Words<bytes> words = {};
  if (valid) words = *static_cast<const Words<bytes>*>(global);
  *static_cast<Words<bytes>*>(shared) = words;
}
// Conditional loads are waited for one by one, unconditional ones together.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid, const void* readable) {
  const uint4 words = *static_cast<const uint4*>(valid ? global : readable);
  *static_cast<uint4*>(shared) =
      make_uint4(valid ? words.x : 0, valid ? words.y : 0, valid ? words.z : 0, valid ? words.w : 0);
}
__device__ __forceinline__ void copy_commit() {}
template <int pending>
__device__ __forceinline__ void copy_wait() {}

__device__ __forceinline__ uint4 load_stream(const void* p) {
  using Words = uint32_t __attribute__((vector_size(16)));
  const Words v = __builtin_nontemporal_load(static_cast<const Words*>(p));
  return make_uint4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ uint32_t load_2_or_4_bytes(const void* p, bool wide) {
  return wide ? *static_cast<const uint32_t*>(p) : *static_cast<const uint16_t*>(p);
}
__device__ __forceinline__ void store_wide(void* p, const uint4& v) { *static_cast<uint4*>(p) = v; }
__device__ __forceinline__ void prefetch(const void* /*p*/) {}
__device__ __forceinline__ int32_t load_fresh(const int32_t* p) {
  return __hip_atomic_load(p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
__device__ __forceinline__ void publish(uint64_t* flag, uint64_t value) {
  __hip_atomic_store(flag, value, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_AGENT);
}
__device__ __forceinline__ void await(const uint64_t* flag, uint64_t value) {
  while (__hip_atomic_load(flag, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_AGENT) != value) __builtin_amdgcn_s_sleep(1);
}
__device__ __forceinline__ void cluster_sync() {}
template <class V>
__device__ __forceinline__ V* map_shared_rank(V* p, int /*rank*/) {
  return p;
}
__device__ __forceinline__ void wait_for_previous_kernel() {}
__device__ __forceinline__ void allow_next_kernel() {}

// ---- matrix tiles --------------------------------------------------------------------------------------------------
// A lane holds kInner neighbors along K of one row of A and of one column of B, starting at first_k(). MFMA spreads K
// over the quarters of a warp; WMMA repeats all of K in both halves.
inline constexpr int kInner = kWarpSize == 64 ? 4 : 16;
__device__ __forceinline__ int outer() { return lane() % 16; }
__device__ __forceinline__ int first_k() { return kWarpSize == 64 ? lane() / 16 * 4 : 0; }

using Bits = uint16_t;  // half or bfloat16
using Bits8 = unsigned char;
using Inner = Bits __attribute__((vector_size(kInner * 2)));

template <class T>
struct TileA {
  Inner v;
};
template <class T>
struct TileB {
  Inner v;
};
// mma() swaps the factors, whose layouts are alike, so this is the transpose of the instruction's C. A lane's values
// then belong to one row, and are already in place as the left factor of the next product (MFMA).
struct TileC {
  static constexpr int kValues = 256 / kWarpSize, kRowSlots = 1, kRowLanes = kWarpSize / 16, kRowStride = 16;
  float v[kValues] = {};

  static constexpr __host__ __device__ int slot(int) { return 0; }
  static __device__ __forceinline__ int slot_row(int) { return lane() % 16; }
  static __device__ __forceinline__ bool leads_row() { return lane() < 16; }
  static __device__ __forceinline__ int row(int) { return lane() % 16; }
  static __device__ __forceinline__ int col(int i) {
    return kWarpSize == 64 ? lane() / 16 * 4 + i : i * 2 + lane() / 16;
  }
};

template <class T>
__device__ __forceinline__ Bits round_to(float x);
template <>
__device__ __forceinline__ Bits round_to<half>(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
template <>
__device__ __forceinline__ Bits round_to<bfloat16>(float x) {
  const bfloat16 rounded = __float2bfloat16(x);
  Bits bits;
  memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

// Loads kInner neighbors from shared memory: two halves of at most 16 consecutive bytes each.
__device__ __forceinline__ void load_inner(Inner& v, const void* low, const void* high) {
  constexpr int half_bytes = sizeof(v) / 2;
  memcpy(&v, __builtin_assume_aligned(low, 4 * sizeof(Bits)), half_bytes);
  memcpy(reinterpret_cast<unsigned char*>(&v) + half_bytes, __builtin_assume_aligned(high, half_bytes), half_bytes);
}
__device__ __forceinline__ void load_inner(Inner& v, const void* p) {
  load_inner(v, p, static_cast<const unsigned char*>(p) + sizeof(v) / 2);
}

template <class T>
__device__ __forceinline__ void load_a(TileA<T>& tile, const T* p, int stride) {
  load_inner(tile.v, p + outer() * stride + first_k());
}
template <class T>
__device__ __forceinline__ void load_b(TileB<T>& tile, const T* p, int stride) {
  load_inner(tile.v, p + outer() * stride + first_k());
}

__device__ __forceinline__ constexpr int widened_k(int k) { return k; }
__device__ __forceinline__ constexpr int widened_column(int, int n) { return n; }

// Exact, because float8 has fewer bits of exponent and mantissa than either type.
template <class T>
__device__ __forceinline__ Bits widened(const unsigned char* chunk, int index) {
  float8 narrow;
  narrow.bits = chunk[index];
  const float value = static_cast<float>(narrow);
  return std::is_same_v<T, half> ? round_to<half>(value) : static_cast<Bits>(__float_as_uint(value) >> 16);
}

template <class T, class Rows>
__device__ __forceinline__ void load_b(TileB<T> (&tiles)[kTilesOf16], const Rows& rows, int j) {
  if constexpr (sizeof(typename Rows::Element) == sizeof(T)) {
    if constexpr (kInner == 4) {
      load_inner(tiles[0].v, rows.moved(rows.chunk(outer(), first_k() / 8), 2 * j) + first_k() % 8 * 2);
    } else {
      load_inner(tiles[0].v, rows.moved(rows.chunk(outer(), 0), 2 * j), rows.moved(rows.chunk(outer(), 1), 2 * j));
    }
  } else {
    const unsigned char* chunk = rows.moved(rows.chunk(outer(), 0), j);
#pragma unroll
    for (int e = 0; e < kInner; ++e) tiles[0].v[e] = widened<T>(chunk, first_k() + e);
  }
}

template <class T, class Rows>
__device__ __forceinline__ void load_b_transposed(TileB<T> (&tiles)[kTilesOf16], const Rows& rows, int j) {
#pragma unroll
  for (int e = 0; e < kInner; ++e) {
    const int row = first_k() + e;
    if constexpr (sizeof(typename Rows::Element) == sizeof(T)) {
      const unsigned char* chunk = rows.moved(rows.chunk(row, outer() / 8), 2 * j);
      tiles[0].v[e] = reinterpret_cast<const Bits*>(chunk)[outer() % 8];
    } else {
      tiles[0].v[e] = widened<T>(rows.moved(rows.chunk(row, 0), j), outer());
    }
  }
}

// A lane reads `steps` neighboring columns of each key at once, one for each tile.
template <int steps, int ahead, class T, class Rows>
__device__ __forceinline__ void load_b_interleaved(TileB<T> (&b)[ahead][kTilesOf16], int at, const Rows& rows, int j) {
  using Element = typename Rows::Element;
  constexpr int bytes = steps * sizeof(Element), reads_per_chunk = 16 / bytes;
  struct alignas(bytes) Columns {
    Bits8 bytes[steps * sizeof(Element)];
  };
#pragma unroll
  for (int e = 0; e < kInner; ++e) {
    const unsigned char* chunk =
        rows.moved(rows.chunk(first_k() + e, 0), j * static_cast<int>(sizeof(Element)) + outer() / reads_per_chunk);
    Columns read;
    memcpy(&read, __builtin_assume_aligned(chunk + outer() % reads_per_chunk * bytes, bytes), bytes);
#pragma unroll
    for (int t = 0; t < steps; ++t) {
      if constexpr (sizeof(Element) == sizeof(T)) {
        Bits bits;
        memcpy(&bits, read.bytes + t * sizeof(Bits), sizeof(bits));
        b[at + t][0].v[e] = bits;
      } else {
        b[at + t][0].v[e] = widened<T>(read.bytes, t);
      }
    }
  }
}

// MFMA leaves values in the lanes that need them; WMMA leaves those with odd k in the other half of the warp.
template <class T>
__device__ __forceinline__ void as_a(TileA<T>& a, const TileC (&c)[kTilesOf16]) {
  if constexpr (kInner == TileC::kValues) {
#pragma unroll
    for (int e = 0; e < kInner; ++e) a.v[e] = round_to<T>(c[0].v[e]);
  } else {
    const bool odd = lane() / 16;
#pragma unroll
    for (int i = 0; i < TileC::kValues; i += 2) {
      const uint32_t mine = round_to<T>(c[0].v[i]) | static_cast<uint32_t>(round_to<T>(c[0].v[i + 1])) << 16;
      const uint32_t other = shfl_xor(mine, 16), even_k = odd ? other : mine, odd_k = odd ? mine : other;
      a.v[2 * i] = static_cast<Bits>(even_k);
      a.v[2 * i + 1] = static_cast<Bits>(odd_k);
      a.v[2 * i + 2] = static_cast<Bits>(even_k >> 16);
      a.v[2 * i + 3] = static_cast<Bits>(odd_k >> 16);
    }
  }
}

using Sums = float __attribute__((vector_size(4 * 256 / kWarpSize)));

template <class Factor>
__device__ __forceinline__ Factor factor(const Inner& v) {
  static_assert(sizeof(Factor) == sizeof(Inner));
  Factor as;
  memcpy(&as, &v, sizeof(as));
  return as;
}

__device__ __forceinline__ Sums add_product(const Sums& sums, const TileB<half>& a, const TileA<half>& b) {
  using Factor [[maybe_unused]] = _Float16 __attribute__((vector_size(kInner * 2)));
#if defined(__GFX11__)
  return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(factor<Factor>(a.v), factor<Factor>(b.v), sums);
#elif defined(__gfx90a__) || defined(__gfx942__)
  return __builtin_amdgcn_mfma_f32_16x16x16f16(factor<Factor>(a.v), factor<Factor>(b.v), sums, 0, 0, 0);
#else
  return sums;  // host compilation only
#endif
}

__device__ __forceinline__ Sums add_product(const Sums& sums, const TileB<bfloat16>& a, const TileA<bfloat16>& b) {
  using Factor [[maybe_unused]] = short __attribute__((vector_size(kInner * 2)));
#if defined(__GFX11__)
  return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(factor<Factor>(a.v), factor<Factor>(b.v), sums);
#elif defined(__gfx90a__) || defined(__gfx942__)
  return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(factor<Factor>(a.v), factor<Factor>(b.v), sums, 0, 0, 0);
#else
  return sums;
#endif
}

template <class T>
__device__ __forceinline__ void mma(TileC& c, const TileA<T>& a, const TileB<T>& b) {
  Sums sums;
  memcpy(&sums, c.v, sizeof(sums));
  sums = add_product(sums, b, a);
  memcpy(c.v, &sums, sizeof(sums));
}

template <class T>
__device__ __forceinline__ void store(T* p, int stride, const TileC& c) {
#pragma unroll
  for (int i = 0; i < TileC::kValues; ++i) {
    const Bits bits = round_to<T>(c.v[i]);
    memcpy(static_cast<void*>(p + TileC::row(i) * stride + TileC::col(i)), &bits, sizeof(bits));
  }
}

// ---- decode attention -----------------------------------------------------------------------------------------------
// A warp of 32 needs twice the registers per lane for C, and four times for A and B, which both halves hold in full.
struct AttentionTuning {
  static constexpr int kQueryColumns = kWarpSize == 64 ? 192 : 0, kAhead = kWarpSize == 64 ? 4 : 2;
  static constexpr int interleave(int head_dim) { return kWarpSize == 64 && head_dim % 64 == 0 ? 4 : 2; }
};

}  // namespace flashdecpp::arch
