// NVIDIA primitives of the linear kernels beyond arch.h: weight loads and packed 16-bit arithmetic for sm_80 and later;
// TMA boxes with L2 hints, wgmma and loads across a cluster for sm_90a.
#pragma once

#include <type_traits>

#include "cuda/arch.h"

#if defined(FLASHDECPP_SIMULATED)
#include "linear_arch_simulated.h"
#else

namespace flashdecpp::arch {

// ---- every GPU from sm_80 on ----------------------------------------------------------------------------------------

// L2 eviction priority of an access: the constants that createpolicy.fractional returns for a fraction of 1.
enum class L2Hint : uint64_t { kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000 };

// Loads 16 bytes of a weight, which is read once: bypasses L1, prefetches 256 bytes into L2 and evicts them first.
__device__ __forceinline__ uint4 load_weight(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(static_cast<uint64_t>(L2Hint::kEvictFirst)));
  return v;
}

// The low 16 bits of a and of b, and the high ones, a's below.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// ---- sm_90a: call only under `if constexpr (kHasWgmma)` -------------------------------------------------------------

// wgmma is in the architecture-specific feature set: compiling for plain sm_90 does not provide it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

inline constexpr int kWarpgroup = 4 * kWarpSize;  // threads that issue a wgmma together

// An mbarrier that the consumer of a stage arrives at to hand the stage back to the producer.
struct ConsumerBarrier : TmaBarrier {
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
};

// Copies the box of a matrix that starts at [row, column].
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, int column, int row, TmaBarrier& barrier,
                                         L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// wgmma m64nNk16, both operands K-major in shared memory: boxes of 128-byte rows with the 128-byte swizzle.

// Descriptor of the 16 columns from 16 * step on, for the rows from `box` on, which is aligned to 1024 bytes.
__device__ __forceinline__ uint64_t smem_descriptor(const void* box, int step) {
  constexpr uint64_t eight_rows = 1024 / 16, swizzled_128 = 1;
  return ((shared_address(box) & 0x3ffff) / 16 + 2 * step) | uint64_t{1} << 16 | eight_rows << 32 | swizzled_128 << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_wait() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// d += a b. This lane's d[4 * j, 4 * j + 4) are the TileC at row 16 * (warp % 4) and column 8 * j of the result.
template <class T, int n>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b);

#define FLASHDECPP_ACCUMULATORS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASHDECPP_ACCUMULATORS_8(i) FLASHDECPP_ACCUMULATORS_4(i), FLASHDECPP_ACCUMULATORS_4(i + 4)
#define FLASHDECPP_ACCUMULATORS_16(i) FLASHDECPP_ACCUMULATORS_8(i), FLASHDECPP_ACCUMULATORS_8(i + 8)
#define FLASHDECPP_ACCUMULATORS_32(i) FLASHDECPP_ACCUMULATORS_16(i), FLASHDECPP_ACCUMULATORS_16(i + 16)
#define FLASHDECPP_ACCUMULATORS_64(i) FLASHDECPP_ACCUMULATORS_32(i), FLASHDECPP_ACCUMULATORS_32(i + 32)
#define FLASHDECPP_OPERANDS_4 "%0, %1, %2, %3"
#define FLASHDECPP_OPERANDS_8 FLASHDECPP_OPERANDS_4 ", %4, %5, %6, %7"
#define FLASHDECPP_OPERANDS_16 FLASHDECPP_OPERANDS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHDECPP_OPERANDS_32 \
  FLASHDECPP_OPERANDS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHDECPP_OPERANDS_64                                                       \
  FLASHDECPP_OPERANDS_32                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// n, n / 2 accumulators, and the operand numbers of the two descriptors that follow them.
#define FLASHDECPP_WGMMA(n, sums, a_name, b_name)                                                        \
  template <>                                                                                            \
  __device__ __forceinline__ void wgmma<half, n>(float (&d)[n / 2], uint64_t a, uint64_t b) {            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" FLASHDECPP_OPERANDS_##sums   \
                 "}, " a_name ", " b_name ", 1, 1, 1, 0, 0;"                                             \
                 : FLASHDECPP_ACCUMULATORS_##sums(0)                                                     \
                 : "l"(a), "l"(b));                                                                      \
  }                                                                                                      \
  template <>                                                                                            \
  __device__ __forceinline__ void wgmma<bfloat16, n>(float (&d)[n / 2], uint64_t a, uint64_t b) {        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" FLASHDECPP_OPERANDS_##sums \
                 "}, " a_name ", " b_name ", 1, 1, 1, 0, 0;"                                             \
                 : FLASHDECPP_ACCUMULATORS_##sums(0)                                                     \
                 : "l"(a), "l"(b));                                                                      \
  }
FLASHDECPP_WGMMA(8, 4, "%4", "%5")
FLASHDECPP_WGMMA(16, 8, "%8", "%9")
FLASHDECPP_WGMMA(32, 16, "%16", "%17")
FLASHDECPP_WGMMA(64, 32, "%32", "%33")
FLASHDECPP_WGMMA(128, 64, "%64", "%65")
#undef FLASHDECPP_WGMMA
#undef FLASHDECPP_OPERANDS_4
#undef FLASHDECPP_OPERANDS_8
#undef FLASHDECPP_OPERANDS_16
#undef FLASHDECPP_OPERANDS_32
#undef FLASHDECPP_OPERANDS_64
#undef FLASHDECPP_ACCUMULATORS_4
#undef FLASHDECPP_ACCUMULATORS_8
#undef FLASHDECPP_ACCUMULATORS_16
#undef FLASHDECPP_ACCUMULATORS_32
#undef FLASHDECPP_ACCUMULATORS_64

// A barrier of the one consumer warpgroup.
__device__ __forceinline__ void warpgroup_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kWarpgroup) : "memory"); }

// Loads V, float or float4, from distributed shared memory: CTA `rank`'s counterpart of the address p in this CTA.
template <class V>
__device__ __forceinline__ V load_shared_cluster(const float* p, int rank) {
  uint32_t remote;
  V v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(p)), "r"(rank));
  if constexpr (std::is_same_v<V, float>) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(remote) : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(remote)
                 : "memory");
  }
  return v;
}

}  // namespace flashdecpp::arch

#endif
