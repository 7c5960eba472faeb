// What Hopper adds to arch_sm80.cuh: TMA with mbarriers, and clusters with distributed shared memory. Code that uses
// these is compiled only where kHasTma.
#pragma once

#include <cuda.h>

#include "cuda/nvidia/arch_sm80.cuh"

namespace flashdecpp::arch {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kHasTma = true;
#else
inline constexpr bool kHasTma = false;
#endif

// An mbarrier in shared memory. A phase completes when its one arrival, expect(), and the bytes that it announced are
// in.
struct TmaBarrier {
  uint64_t bits;

  __device__ __forceinline__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(this)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }

  // Waits until the phase of this parity has completed; parities alternate, starting with 0.
  __device__ __forceinline__ void wait(int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// Loads a box of a four-dimensional tensor. (x, y, z, w) is its first element, x the innermost dimension.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, int x, int y, int z, int w,
                                         TmaBarrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(&barrier))
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Orders generic accesses to shared memory before later TMA accesses.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barrier of all threads of the cluster that have not returned, with release and acquire of their writes.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class V>
__device__ __forceinline__ V* map_shared_rank(V* p, int rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<V*>(mapped);
}

// Consecutive boxes of kRows rows of 128 bytes in TMA's 128-byte swizzle: chunk c of a row is stored at c ^ (row % 8).
template <class Element_, int kRows>
struct SwizzledRows {
  using Element = Element_;
  const unsigned char* data;  // aligned to 1024 bytes

  __device__ __forceinline__ const unsigned char* chunk(int row, int c) const {
    return data + row * 128 + (c ^ row % 8) * 16;
  }
  static __device__ __forceinline__ const unsigned char* moved(const unsigned char* p, int c) {
    return reinterpret_cast<const unsigned char*>(reinterpret_cast<uintptr_t>(p) ^ static_cast<uintptr_t>(c % 8 * 16)) +
           c / 8 * (128 * kRows);
  }
  __device__ __forceinline__ Element at(int row, int column) const {
    constexpr int kChunkElements = 16 / sizeof(Element);
    return reinterpret_cast<const Element*>(moved(chunk(row, 0), column / kChunkElements))[column % kChunkElements];
  }
};

}  // namespace flashdecpp::arch
