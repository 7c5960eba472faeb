// What the linear kernels use of Hopper beyond arch_sm90.cuh: rings of tensor copies that several warps consume,
// matrix products of four warps on operands in shared memory, sums across the blocks of a cluster.
#pragma once

#include <type_traits>

#include "cuda/arch.h"

#if defined(FLASHDECPP_SIMULATED)
#include "linear_arch_simulated.h"
#else

namespace flashdecpp::arch {

// Code that uses what is below load_weight is compiled only where kHasWgmma: for sm_90a, not for plain sm_90.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

inline constexpr int kWarpgroup = 4 * kWarpSize;  // threads that issue one matrix product together

// How long L2 should keep what an access brings: the policies that createpolicy gives for all of it.
enum class L2Hint : uint64_t { kEvictFirst = 0x12f0000000000000, kLong = 0x14f0000000000000 };

// A load of weights: past L1, L2 asks memory for 256 bytes at a time, and lets go of them before all else.
__device__ __forceinline__ uint4 load_weight(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(static_cast<uint64_t>(L2Hint::kEvictFirst)));
  return v;
}

// A barrier that a consumer arrives at, too: what a ring's producer waits for.
struct ConsumerBarrier : TmaBarrier {
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
};

// A box of a matrix, whose first element is [row, column].
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, int column, int row, TmaBarrier& barrier,
                                         L2Hint keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// ---- products: 64 x n x 16, both operands in shared memory as boxes of swizzled rows of 128 bytes ------------------

// Describes rows from `box` on, a multiple of 1024, and of their columns those from 16 * step.
__device__ __forceinline__ uint64_t smem_descriptor(const void* box, int step) {
  constexpr uint64_t eight_rows = 1024 / 16, swizzled_128 = 1;
  return ((shared_address(box) & 0x3ffff) / 16 + 2 * step) | uint64_t{1} << 16 | eight_rows << 32 | swizzled_128 << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_wait() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Columns of the product: this lane's sums[4 * j ... 4 * j + 3] are a TileC of rows 16 * (warp % 4) and columns 8 * j
// on.
template <class T, int n>
__device__ __forceinline__ void multiply(float (&sums)[n / 2], uint64_t a, uint64_t b);

#define FLASHDECPP_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASHDECPP_SUMS_8(i) FLASHDECPP_SUMS_4(i), FLASHDECPP_SUMS_4(i + 4)
#define FLASHDECPP_SUMS_16(i) FLASHDECPP_SUMS_8(i), FLASHDECPP_SUMS_8(i + 8)
#define FLASHDECPP_SUMS_32(i) FLASHDECPP_SUMS_16(i), FLASHDECPP_SUMS_16(i + 16)
#define FLASHDECPP_SUMS_64(i) FLASHDECPP_SUMS_32(i), FLASHDECPP_SUMS_32(i + 32)
#define FLASHDECPP_NAMES_4 "%0, %1, %2, %3"
#define FLASHDECPP_NAMES_8 FLASHDECPP_NAMES_4 ", %4, %5, %6, %7"
#define FLASHDECPP_NAMES_16 FLASHDECPP_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHDECPP_NAMES_32 \
  FLASHDECPP_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHDECPP_NAMES_64                                                          \
  FLASHDECPP_NAMES_32                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// n, n / 2, and the numbers of the two operands behind the sums
#define FLASHDECPP_MULTIPLY(n, sums, a_name, b_name)                                                  \
  template <>                                                                                         \
  __device__ __forceinline__ void multiply<half, n>(float (&d)[n / 2], uint64_t a, uint64_t b) {      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" FLASHDECPP_NAMES_##sums   \
                 "}, " a_name ", " b_name ", 1, 1, 1, 0, 0;"                                          \
                 : FLASHDECPP_SUMS_##sums(0)                                                          \
                 : "l"(a), "l"(b));                                                                   \
  }                                                                                                   \
  template <>                                                                                         \
  __device__ __forceinline__ void multiply<bfloat16, n>(float (&d)[n / 2], uint64_t a, uint64_t b) {  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" FLASHDECPP_NAMES_##sums \
                 "}, " a_name ", " b_name ", 1, 1, 1, 0, 0;"                                          \
                 : FLASHDECPP_SUMS_##sums(0)                                                          \
                 : "l"(a), "l"(b));                                                                   \
  }
FLASHDECPP_MULTIPLY(8, 4, "%4", "%5")
FLASHDECPP_MULTIPLY(16, 8, "%8", "%9")
FLASHDECPP_MULTIPLY(32, 16, "%16", "%17")
FLASHDECPP_MULTIPLY(64, 32, "%32", "%33")
FLASHDECPP_MULTIPLY(128, 64, "%64", "%65")
#undef FLASHDECPP_MULTIPLY
#undef FLASHDECPP_NAMES_4
#undef FLASHDECPP_NAMES_8
#undef FLASHDECPP_NAMES_16
#undef FLASHDECPP_NAMES_32
#undef FLASHDECPP_NAMES_64
#undef FLASHDECPP_SUMS_4
#undef FLASHDECPP_SUMS_8
#undef FLASHDECPP_SUMS_16
#undef FLASHDECPP_SUMS_32
#undef FLASHDECPP_SUMS_64

// The threads of one warp group meet.
__device__ __forceinline__ void warp_group_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kWarpgroup) : "memory"); }

// ---- clusters: blocks that run at the same time and read each other's shared memory --------------------------------

// What the shared memory of the cluster's block `rank` has at the place that `p` is in this block's: a float or four.
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
