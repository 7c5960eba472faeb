// The seam between kernels and machines. Kernels are written against the names below and nothing else: an architecture
// is one file that defines them.
//
//   kWarpSize                              lanes that run together
//   kTileN                                 columns of one matrix tile: the tile is 16 x kTileN x 16
//   kBlockSharedBytes                      the most shared memory that a kernel may be written for
//   TileA<T>, TileB<T>, TileC              fragments of one tile, T = half or bfloat16, accumulators float
//   load_a(TileA&, p, stride)              A[r][k] = p[r * stride + k]
//   load_b(TileB&, p, stride)              B[k][n] = p[n * stride + k]       (rows of p are columns of B)
//   load_b(TileB[kTilesOf16]&, rows, j)    B[k][n] = R[n][16 j + k], n to 16, where R is what rows describe (below)
//   load_b_transposed(TileB[kTilesOf16]&, rows, j)   B[k][n] = R[k][16 j + n]
//                                          From float8 too, widened exactly; then k stands for column widened_k(k) of
//                                          the 16 in load_b, and in load_b_transposed column n of tile t for column
//                                          widened_column(t, n)
//   kWidenedInOrder                        whether these two leave every column where it is
//   load_b_interleaved<run>(b, at, rows, j)  where AttentionTuning::run is more than 1: load_b_transposed of that many
//   steps into
//                                          b[at ...], in which column n of tile t stands for run_column<run>(t, n)
//   AttentionTuning                                   how a warp of decode attention goes over a group of keys:
//     ::kAhead                             steps of 16 columns that are loaded before they are multiplied
//     ::run(head_dim)                      of load_b_interleaved
//     ::kQueryColumns                      columns of queries that stay in registers
//   as_a(TileA&, TileC[kTilesOf16])        a 16 x 16 result, rounded, as the left factor of the next product
//   mma(TileC&, a, b)                      C += A B
//   TileC::row(i), TileC::col(i)           the element that this lane's value i is
//   TileC::kRowSlots, slot(i), slot_row(s) the rows that a lane holds values of: value i lies in row slot_row(slot(i))
//   TileC::kRowLanes, kRowStride           so many lanes hold one row among them, so far from each other
//   TileC::leads_row()                     whether this lane is the first of those
//   store(p, stride, c)                    p[row * stride + col] = C[row][col], rounded to half or bfloat16
//   dynamic_shared()                       the shared memory whose size the launch names, on a multiple of 1024
//   copy_async(shared, global, valid)      16 bytes, zeros where not valid; copy_commit(), copy_wait<pending>();
//                                          copy_async<8> for 8 bytes. A fourth argument, 16 bytes that may be read in
//                                          any case, helps where there are no such copies
//   kMaxStages                            buffers that copies can make use of
//   load_stream(p)                         16 bytes that are read once: past L1
//   store_wide(p, v)                       16 bytes in one access, also where the compiler would take them apart
//   load_2_or_4_bytes(p, wide)             the 2 bytes at p, or the 4 where they are wide: for all of the warp or none
//   shfl_xor(v, mask)                  the value of lane ^ mask; v is float, uint32_t or uint64_t
//   shfl(v, lane)                     the value of that lane; v is a pointer, an int, and on NVIDIA a float
//   first_lane(b)                          the first lane for which b is true
//   warp_any(b)                            whether b is true for some lane
//   warp_sync()                            the warp's lanes meet; what they wrote to memory, all of them see
//   prefetch(p)                            what lies around p comes into L2, where memory can be asked for that
//   load_fresh(p)                          an int32 from L2: what another kernel wrote since this one started, too
//   publish(flag, value), await(flag, value)   what was written before publish, and before a barrier before it, is
//                                          seen by whoever awaited the value, in any block
//   exp2_approx(x)                         2^x in one instruction
//   uniform(x)                             x, an int that is the same for all of the warp: as such, for the compiler
//   rematerialize(x)                          an integer, worked out where this stands: what depends on it is not kept
//   in
//                                          registers through loops that need those
//   scheduling_barrier()                           loads that stand behind this are not begun before it
//   cluster_sync(), map_shared_rank(p, rank)      in a cluster of blocks, which the launch makes: all of their threads
//   meet;
//                                          where block `rank` has what is at p in this block's shared memory. Nothing
//                                          where there are no clusters
//   wait_for_previous_kernel(), allow_next_kernel()   programmatic dependent launch; nothing where there is none
//   kHasTma                       whether there is what arch_sm90.cuh adds
//
// Rows in shared memory are described by a type with an Element and
//   chunk(row, c)     the address of 16-byte chunk c of a row; c may be 0 or 1
//   moved(p, c)       that of the chunk c further on in the row; c is even unless chunk() was asked for 0
//   at(row, column)   an element
//
// load_a, load_b and load_b_transposed read shared memory; p and stride * sizeof(T) are multiples of 16 bytes. All
// lanes of a warp take part in a tile function.
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

namespace flashdecpp::arch {

// Rows behind each other, kStride elements apart.
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

// Over `lanes` neighbors, a power of two.
template <int lanes, class Combine>
__device__ __forceinline__ float lanes_reduce(float value, Combine combine) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = combine(value, shfl_xor(value, mask));
  return value;
}

template <int run>
__device__ __forceinline__ constexpr int run_column(int tile, int column) {
  return run == 1 ? tile * kTileN + column : tile / run * run * kTileN + column * run + tile % run;
}

template <int run, int ahead, class T, class Rows>
__device__ __forceinline__ void load_run(TileB<T> (&b)[ahead][kTilesOf16], int at, const Rows& rows, int j) {
  if constexpr (run == 1) {
    load_b_transposed(b[at], rows, j);
  } else {
    load_b_interleaved<run>(b, at, rows, j);
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

// The sum of the lanes before this one, and of all.
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

// Over a whole block; `scratch` holds blockDim.x / kWarpSize values in shared memory. Every thread gets the result.
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
