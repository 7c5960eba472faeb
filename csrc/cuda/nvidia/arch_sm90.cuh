// What Hopper adds to arch_sm80.cuh: tensor copies, which one thread asks for box by box and a barrier in shared memory
// counts. Code that uses them is compiled only where kHasTma.
#pragma once

#include <cuda.h>

#include "cuda/nvidia/arch_sm80.cuh"

namespace flashdecpp::arch {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kHasTma = true;
#else
inline constexpr bool kHasTma = false;
#endif

// In shared memory. A phase ends when its one arrival, expect(), has come and all the bytes that it announced.
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

  // Returns once the phase of this parity has ended: 0 for the first, 1 for the second, 0 for the third, ...
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

// A box of a tensor of four dimensions, whose first element has the coordinates x, the nearest in memory, to w.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, int x, int y, int z, int w,
                                         TmaBarrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(&barrier))
      : "memory");
}

// A hint that the description will be wanted.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Ordinary stores to shared memory before it, tensor copies after it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All threads of all blocks of the cluster that have not returned meet; what they wrote, all of them see.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class V>
__device__ __forceinline__ V* map_shared_rank(V* p, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<V*>(there);
}

// Rows of boxes of 128 bytes, kRows high, behind each other; in a box, chunk c of a row lies where c ^ row would.
template <class Element_, int kRows>
struct SwizzledRows {
  using Element = Element_;
  const unsigned char* data;  // on a multiple of 1024

  __device__ __forceinline__ const unsigned char* chunk(int row, int c) const {
    return data + row * 128 + (c ^ row % 8) * 16;
  }
  static __device__ __forceinline__ const unsigned char* moved(const unsigned char* p, int c) {
    return reinterpret_cast<const unsigned char*>(reinterpret_cast<uintptr_t>(p) ^ static_cast<uintptr_t>(c % 8 * 16)) +
           c / 8 * (128 * kRows);
  }
  __device__ __forceinline__ Element at(int row, int column) const {
    constexpr int kInChunk = 16 / sizeof(Element);
    return reinterpret_cast<const Element*>(moved(chunk(row, 0), column / kInChunk))[column % kInChunk];
  }
};

}  // namespace flashdecpp::arch
