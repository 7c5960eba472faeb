// The seam between kernels and GPU architectures. Kernels use the names below and nothing else of the hardware. Each
// architecture defines them in its own files: nvidia/arch_sm80.cuh and arch_sm90.cuh, hip/arch_amd.h, and the simulated
// GPU of the tests.
//
//   half, bfloat16, float8                 element types; float8 is e4m3
//   kWarpSize                              lanes per warp
//   kTileN, kTilesOf16                     a matrix tile is 16 x kTileN x 16; 16 / kTileN
//   kBlockSharedBytes                      limit of the shared memory per CTA that kernels are written for
//   kMaxStages                             more stages than this do not help asynchronous copies
//   kHasTma                                whether code that uses TMA (nvidia/arch_sm90.cuh) is compiled
//
//   lane(), warp()                         indices of the lane in its warp and of the warp in its CTA
//   shfl_xor(v, mask)                      the value of lane ^ mask; v is float, uint32_t or uint64_t
//   shfl(v, lane)                          the value of that lane; v is a pointer, an int or, on NVIDIA, a float
//   first_lane(b)                          the first lane for which b is true
//   warp_any(b)                            whether b is true for some lane
//   warp_sync()                            barrier of the warp's lanes; makes their writes to memory visible to them
//   cluster_sync()                         barrier of all threads of a cluster; nothing without clusters
//   map_shared_rank(p, rank)               the address of p's counterpart in the shared memory of the cluster's CTA
//                                          `rank`; p itself without clusters
//   exp2_approx(x)                         2^x in one instruction
//   uniform(x)                             tells the compiler that an int is warp-uniform
//   rematerialize(x)                       the integer x, opaque to the compiler: values derived from it are
//                                          recomputed here instead of occupying registers through a loop
//   scheduling_barrier()                   keeps loads after it from being issued before it
//
//   dynamic_shared()                       the shared memory whose size the launch gives, aligned to 1024 bytes
//   copy_async(shared, global, valid)      copies 16 bytes, or zeros if not valid; copy_async<8> copies 8. A fourth
//                                          argument, 16 readable bytes, avoids a branch where there is no cp.async
//   copy_commit(), copy_wait<pending>()    groups of copies, as cp.async has them
//   load_stream(p)                         16 bytes that are read once; does not allocate in L1
//   load_2_or_4_bytes(p, wide)             the 2 bytes at p, or 4 if wide, which must be warp-uniform
//   load_fresh(p)                          an int32 from L2, which sees writes of other kernels since this one started
//   store_wide(p, v)                       16 bytes in one access, even where the compiler would split it
//   prefetch(p)                            requests the line at p into L2, where that is possible
//   publish(flag, value), await(flag, value)  release store and acquire spin loop: writes before publish, and before a
//                                          CTA barrier that precedes it, are visible to any CTA after await
//   allow_next_kernel(), wait_for_previous_kernel()  programmatic dependent launch; nothing where there is none
//
//   TileA<T>, TileB<T>, TileC              fragments of one tile, T = half or bfloat16; TileC accumulates in float
//   load_a(TileA&, p, stride)              A[r][k] = p[r * stride + k]
//   load_b(TileB&, p, stride)              B[k][n] = p[n * stride + k]
//   load_b(TileB[kTilesOf16]&, rows, j)    B[k][n] = R[n][16 j + k], n below 16; R is what `rows` describes (below)
//   load_b_transposed(TileB[kTilesOf16]&, rows, j)  B[k][n] = R[k][16 j + n]
//                                          These two also widen float8, exactly, but permute the 16 columns: k stands
//                                          for column widened_k(k) in load_b, column n of tile t for column
//                                          widened_column(t, n) in load_b_transposed.
//   kWidenedInOrder                        whether both permutations are the identity
//   load_b_interleaved<steps>(b, at, rows, j)  load_b_transposed of several steps at once into b[at ...], where column
//                                          n of tile t stands for interleaved_column<steps>(t, n). Only where
//                                          AttentionTuning::interleave is more than 1.
//   as_a(TileA&, TileC[kTilesOf16])        a 16 x 16 result, rounded, as the left factor of the next product
//   mma(TileC&, a, b)                      C += A B
//   store(p, stride, c)                    p[row * stride + col] = C[row][col], rounded to half or bfloat16
//   TileC::kValues, row(i), col(i)         values per lane; the element of C that this lane's value i is
//   TileC::kRowSlots, slot(i), slot_row(s) a lane holds values of kRowSlots rows: value i is of row slot_row(slot(i))
//   TileC::kRowLanes, kRowStride           a row is spread over kRowLanes lanes whose indices differ by kRowStride
//   TileC::leads_row()                     whether this lane is the first of those
//
//   AttentionTuning                        how a warp of decode attention processes a KV tile:
//     ::kAhead                             steps of 16 columns that are loaded before they are multiplied
//     ::interleave(head_dim)               steps per load_b_interleaved; 1: load_b_transposed
//     ::kQueryColumns                      head_dim up to which queries stay in registers
//
// A type that describes rows in shared memory has an Element and
//   chunk(row, c)     the address of 16-byte chunk c, 0 or 1, of a row
//   moved(p, c)       the address c chunks after p in the same row; c must be even unless p is chunk 0
//   at(row, column)   an element
//
// load_a, load_b and load_b_transposed read shared memory; p and stride * sizeof(T) are multiples of 16 bytes. All
// lanes of a warp must call a tile function together.
#pragma once

#if defined(USE_ROCM)
#include "hip/arch_amd.h"
#elif defined(FLASHDECPP_SIMULATED)
#include "arch_simulated.h"
#else
#include "cuda/nvidia/arch_sm80.cuh"
#include "cuda/nvidia/arch_sm90.cuh"
#endif

#include <type_traits>

#include "cuda/timeline.h"

namespace flashdecpp::arch {

// Rows that are kStride elements apart.
template <class Element_, int kStride>
struct PlainRows {
  using Element = Element_;
  const unsigned char* data;

  __device__ __forceinline__ const unsigned char* chunk(int row, int c) const {
    return data + row * (kStride * static_cast<int>(sizeof(Element))) + c * 16;
  }
  static __device__ __forceinline__ const unsigned char* moved(const unsigned char* p, int c) { return p + c * 16; }
  __device__ __forceinline__ Element at(int row, int column) const {
    return reinterpret_cast<const Element*>(data)[row * kStride + column];
  }
};

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = combine(value, shfl_xor(value, mask));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce(value, [](float a, float b) { return a + b; });
}

// Over `lanes` neighboring lanes, a power of two.
template <int lanes, class Combine>
__device__ __forceinline__ float lanes_reduce(float value, Combine combine) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = combine(value, shfl_xor(value, mask));
  return value;
}

template <int steps>
__device__ __forceinline__ constexpr int interleaved_column(int tile, int column) {
  return steps == 1 ? tile * kTileN + column : tile / steps * steps * kTileN + column * steps + tile % steps;
}

template <int steps, int ahead, class T, class Rows>
__device__ __forceinline__ void load_b_steps(TileB<T> (&b)[ahead][kTilesOf16], int at, const Rows& rows, int j) {
  if constexpr (steps == 1) {
    load_b_transposed(b[at], rows, j);
  } else {
    load_b_interleaved<steps>(b, at, rows, j);
  }
}

// Over the lanes that hold one row of a TileC.
template <class Combine>
__device__ __forceinline__ float row_reduce(float value, Combine combine) {
#pragma unroll
  for (int lanes = TileC::kRowLanes / 2; lanes > 0; lanes /= 2) {
    value = combine(value, shfl_xor(value, lanes * TileC::kRowStride));
  }
  return value;
}

// Sum over the lanes before this one, and over all lanes.
struct WarpScan {
  uint32_t before = 0, total;

  __device__ __forceinline__ explicit WarpScan(uint32_t value) : total(value) {
#pragma unroll
    for (int mask = 1; mask < kWarpSize; mask *= 2) {
      const uint32_t other = shfl_xor(total, mask);
      if (lane() & mask) before += other;
      total += other;
    }
  }
};

// Over a CTA. `scratch` is shared memory for blockDim.x / kWarpSize values; every thread gets the result.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, std::type_identity_t<T> identity, T* scratch, Combine combine) {
  value = warp_reduce(value, combine);
  const int warps = blockDim.x / kWarpSize;
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T total = identity;
  for (int w = 0; w < warps; ++w) total = combine(total, scratch[w]);
  return total;
}

}  // namespace flashdecpp::arch
