// NVIDIA's side of the seam (cuda/arch.h) from Ampere on: mma.sync m16n8k16, ldmatrix, cp.async; programmatic dependent
// launch from Hopper on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace flashdecpp::arch {

using half = __half;
using bfloat16 = __nv_bfloat16;
using float8 = __nv_fp8_e4m3;

inline constexpr int kWarpSize = 32;
inline constexpr int kTileN = 8;
inline constexpr bool kWidenedInOrder = false;
inline constexpr int kMaxStages = 8;
inline constexpr int kBlockSharedBytes = 160 * 1024;  // an A100 has 163 KiB; the host asks its device

__device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarpSize; }

__device__ __forceinline__ float shfl_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

__device__ __forceinline__ uint64_t shfl_xor(uint64_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(value), mask);
}

template <class T>
__device__ __forceinline__ T* shfl(T* value, int source) {
  return reinterpret_cast<T*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(value), source));
}

__device__ __forceinline__ int shfl(int value, int source) { return __shfl_sync(0xffffffffu, value, source); }
__device__ __forceinline__ float shfl(float value, int source) { return __shfl_sync(0xffffffffu, value, source); }

__device__ __forceinline__ uint32_t shfl_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ int first_lane(bool value) { return __ffs(__ballot_sync(0xffffffffu, value)) - 1; }
__device__ __forceinline__ bool warp_any(bool value) { return __any_sync(0xffffffffu, value); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void scheduling_barrier() {}
__device__ __forceinline__ int uniform(int x) { return x; }
template <class Int>
__device__ __forceinline__ Int rematerialize(Int x) {
  return x;  // nvcc decides this well by itself
}

// ---- memory --------------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

template <int bytes = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid,
                                           const void* /*readable*/ = nullptr) {
  static_assert(bytes == 16 || bytes == 8);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 8 : 0)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// A predicated pair of loads: a conversion, or a select between two loads, would wait for the data here.
__device__ __forceinline__ uint32_t load_2_or_4_bytes(const void* p, bool wide) {
  uint32_t bits;
  asm volatile(
      "{\n"
      ".reg .pred wide;\n"
      "setp.ne.s32 wide, %2, 0;\n"
      "@wide ld.global.nc.u32 %0, [%1];\n"
      "@!wide ld.global.nc.u16 %0, [%1];\n"
      "}\n"
      : "=r"(bits)
      : "l"(p), "r"(static_cast<int>(wide)));
  return bits;
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ int32_t load_fresh(const int32_t* p) {
  int32_t v;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void publish(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ void await(const uint64_t* flag, uint64_t value) {
  uint64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != value);
}

__device__ __forceinline__ void store_wide(void* p, const uint4& v) {
  asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- matrix tiles: 16 x 8 x 16 -------------------------------------------------------------------------------------
template <class T>
struct TileA {
  uint32_t v[4];
};

template <class T>
struct TileB {
  uint32_t v[2];
};

struct TileC {
  float v[4] = {0.f, 0.f, 0.f, 0.f};
  static constexpr int kValues = 4;
  static constexpr int kRowSlots = 2, kRowLanes = 4, kRowStride = 1;
  static constexpr __host__ __device__ int slot(int i) { return i / 2; }
  static __device__ __forceinline__ int slot_row(int slot) { return lane() / 4 + slot * 8; }
  static __device__ __forceinline__ bool leads_row() { return lane() % kRowLanes == 0; }
  static __device__ __forceinline__ int row(int i) { return slot_row(slot(i)); }
  static __device__ __forceinline__ int col(int i) { return (lane() % 4) * 2 + i % 2; }
};

template <class T>
__device__ __forceinline__ void load_a(TileA<T>& tile, const T* p, int stride) {
  const T* row = p + (lane() % 16) * stride + (lane() / 16) * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile.v[0]), "=r"(tile.v[1]), "=r"(tile.v[2]), "=r"(tile.v[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ __forceinline__ void load_b(TileB<T>& tile, const T* p, int stride) {
  const T* row = p + (lane() % 8) * stride + (lane() / 8 % 2) * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(tile.v[0]), "=r"(tile.v[1])
               : "r"(shared_address(row))
               : "memory");
}

inline constexpr int kTilesOf16 = 16 / kTileN;

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ __forceinline__ void as_a(TileA<T>& a, const TileC (&c)[kTilesOf16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.v[i] = pack<T>(c[i / 2].v[i % 2 * 2], c[i / 2].v[i % 2 * 2 + 1]);
}

__device__ __forceinline__ void mma(TileC& c, const TileA<half>& a, const TileB<half>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
}

__device__ __forceinline__ void mma(TileC& c, const TileA<bfloat16>& a, const TileB<bfloat16>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
}

template <class T>
__device__ __forceinline__ void store(T* p, int stride, const TileC& c) {
#pragma unroll
  for (int i = 0; i < TileC::kValues; i += 2) {
    *reinterpret_cast<uint32_t*>(p + TileC::row(i) * stride + TileC::col(i)) = pack<T>(c.v[i], c.v[i + 1]);
  }
}

// ---- fp8 -----------------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t widen_pair(uint32_t pair, half) {
  const __half2_raw wide = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return wide.x | static_cast<uint32_t>(wide.y) << 16;
}

__device__ __forceinline__ uint32_t widen_pair(uint32_t pair, bfloat16) {
  const __half2 wide(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
  const float2 value = __half22float2(wide);
  const __nv_bfloat162_raw narrow = __floats2bfloat162_rn(value.x, value.y);
  return narrow.x | static_cast<uint32_t>(narrow.y) << 16;
}

// ldmatrix moves bytes in pairs: it gives a lane four neighbors of one row (load_b), or two neighbors of two rows each
// (load_b_transposed). These are the column orders that result.
__device__ __forceinline__ constexpr int widened_k(int k) { return k % 8 / 2 * 4 + k / 8 * 2 + k % 2; }
__device__ __forceinline__ constexpr int widened_column(int tile, int n) { return 2 * n + tile; }

template <class T, class Rows>
__device__ __forceinline__ void load_b(TileB<T> (&tiles)[kTilesOf16], const Rows& rows, int j) {
  if constexpr (sizeof(typename Rows::Element) == sizeof(T)) {
    const void* p = rows.moved(rows.chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2), 2 * j);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0].v[0]), "=r"(tiles[0].v[1]), "=r"(tiles[1].v[0]), "=r"(tiles[1].v[1])
                 : "r"(shared_address(p))
                 : "memory");
  } else {
    uint32_t raw[kTilesOf16];
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(raw[0]), "=r"(raw[1])
                 : "r"(shared_address(rows.moved(rows.chunk(lane() % 16, 0), j)))
                 : "memory");
#pragma unroll
    for (int t = 0; t < kTilesOf16; ++t) {
      tiles[t].v[0] = widen_pair(raw[t] & 0xffff, T());
      tiles[t].v[1] = widen_pair(raw[t] >> 16, T());
    }
  }
}

template <class T, class Rows>
__device__ __forceinline__ void load_b_transposed(TileB<T> (&tiles)[kTilesOf16], const Rows& rows, int j) {
  if constexpr (sizeof(typename Rows::Element) == sizeof(T)) {
    const void* p = rows.moved(rows.chunk(lane() % 16, lane() / 16), 2 * j);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0].v[0]), "=r"(tiles[0].v[1]), "=r"(tiles[1].v[0]), "=r"(tiles[1].v[1])
                 : "r"(shared_address(p))
                 : "memory");
  } else {
    uint32_t raw[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(raw[0]), "=r"(raw[1])
                 : "r"(shared_address(rows.moved(rows.chunk(lane() % 16, 0), j)))
                 : "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t by_column = __byte_perm(raw[i], 0, 0x3120);
      tiles[0].v[i] = widen_pair(by_column & 0xffff, T());
      tiles[1].v[i] = widen_pair(by_column >> 16, T());
    }
  }
}

// ---- decode attention ----------------------------------------------------------------------------------------------
struct AttentionTuning {
  static constexpr int kQueryColumns = 192, kAhead = 4;
  static constexpr int interleave(int /*head_dim*/) { return 1; }
};

// ---- programmatic dependent launch, from Hopper on ------------------------------------------------------------------
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace flashdecpp::arch
