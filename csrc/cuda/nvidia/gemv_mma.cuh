// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to 16 rows of x, on the matrix units, straight from memory.
//
// A lane loads 16 bytes of a row: eight neighbors along K. Taken as they come, four lanes' loads are the fragments of
// two 16 x 8 x 16 products whose k is permuted; x is loaded with the same permutation, so the sums are the same. So a
// weight goes from memory to the matrix unit without a conversion or a pass through shared memory, and arithmetic does
// not grow with the rows of x as on the CUDA cores.
//
// A block holds 16 * kTiles rows of the weight; its warps share K and add their sums in the end, in the order of the
// warps. kLoads * 2 * kTiles loads are in flight a lane: 64 KiB a block, 128 KiB a SM. The first of them
// are asked for before the kernel ahead has ended: weights do not depend on it.
#pragma once

#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/prologue.cuh"
#include "cuda/nvidia/linear_arch.cuh"

namespace flashdecpp {

template <int row_tiles, int tiles, int loads>
struct MmaGemv {
  static constexpr int kRowTiles = row_tiles;  // of 8 rows of x
  static constexpr int kTiles = tiles;         // of 16 rows of the weight
  static constexpr int kLoads = loads;         // steps of 32 along K that are in flight
  static constexpr int kWarps = 8, kThreads = kWarps * arch::kWarpSize;
  static constexpr int kMaxRows = row_tiles * arch::kTileN, kBlockN = 16 * tiles;
};

// x's columns of one warp on their way through an RMSNorm. A product with them is right but for a factor of its row,
// which multiplies the sum in the end: 1 / rms, whose squares the matrix units add up as they go, the diagonal of x
// times itself. Rounded is x * weight. A half could overflow there, or lose bits at the low end: a power of two, of a
// pass over kLoads steps and a row, brings the largest below 2^15.
//
// Everything is asked for once, the norm's weight before the wait, into shared memory, and no warp waits for another:
// with the memory busy, a load takes as long as all that is under way.
template <class T, class G>
struct NormedColumns {
  static_assert(G::kRowTiles == 1);
  static constexpr bool kScaled = std::is_same_v<T, arch::half>;
  static constexpr int kPassK = G::kLoads * 32;

  unsigned char* weights;  // in shared memory, where its column is
  arch::TileC squares;
  float scale = 1.f;    // of row lane / 4
  int weight_exponent;  // of the largest among the warp's

  // The columns that this warp multiplies.
  __device__ __forceinline__ explicit NormedColumns(const LinearParams& p) : weights(arch::dynamic_shared()) {
    const int k = static_cast<int>(p.k), chunk = arch::lane() * 8;
    const T* const from = static_cast<const T*>(p.fusion.norm_weight);
    for (int base = arch::warp() * kPassK; base < k; base += G::kWarps * kPassK) {
      const int at = base + chunk;
      if (chunk < kPassK) arch::copy_async(weights + at * 2, from + at, at < k, from);
    }
    arch::copy_commit();
  }

  static __device__ __forceinline__ uint32_t largest(uint32_t so_far, const uint4& v) {
    using arch::larger_halves;
    return larger_halves(larger_halves(so_far, larger_halves(v.x, v.y)), larger_halves(v.z, v.w));
  }

  __device__ __forceinline__ const uint4& weight(int column) const {
    return *reinterpret_cast<const uint4*>(weights + column * 2);
  }

  // Of the largest magnitude that `lanes` neighbors have in `pair`.
  template <int lanes>
  static __device__ __forceinline__ int exponent(uint32_t pair) {
#pragma unroll
    for (int mask = 1; mask < lanes; mask *= 2) pair = arch::larger_halves(pair, arch::shfl_xor(pair, mask));
    float v[2];
    arch::unpack<T>(v, pair);
    return static_cast<int>(__float_as_uint(fmaxf(v[0], v[1])) >> 23) - 127;
  }

  // Waits for the norm's weight.
  __device__ __forceinline__ void arrive(const LinearParams& p) {
    arch::copy_wait<0>();
    arch::warp_sync();
    if constexpr (kScaled) {
      const int chunk = arch::lane() * 8;
      uint32_t of_weight = 0;
      for (int base = arch::warp() * kPassK; base < p.k; base += G::kWarps * kPassK) {
        if (chunk < kPassK) of_weight = largest(of_weight, weight(base + chunk));
      }
      weight_exponent = max(exponent<arch::kWarpSize>(of_weight), -1);
    }
  }

  __device__ __forceinline__ void begin_pass(const uint4 (&columns)[G::kLoads]) {
    if constexpr (kScaled) {
      uint32_t of_x = 0;
#pragma unroll
      for (int u = 0; u < G::kLoads; ++u) of_x = largest(of_x, columns[u]);
      const int e = min(13 - exponent<4>(of_x) - weight_exponent, 15);
      scale = __uint_as_float(static_cast<uint32_t>(max(e, -24) + 127) << 23);
    }
  }

  // Eight columns of row lane / 4, those from `column` on.
  __device__ __forceinline__ uint4 take(const uint4& v, int column) {
    arch::mma(squares, arch::TileA<T>{{v.x, 0, v.y, 0}}, arch::TileB<T>{{v.x, v.y}});
    arch::mma(squares, arch::TileA<T>{{v.z, 0, v.w, 0}}, arch::TileB<T>{{v.z, v.w}});
    const uint4& w = weight(column);
    const auto times = [&](uint32_t x, uint32_t weight) {
      if constexpr (kScaled) x = arch::multiply_pairs<T>(x, arch::pair_of<T>(scale));
      return arch::multiply_pairs<T>(x, weight);
    };
    return {times(v.x, w.x), times(v.y, w.y), times(v.z, w.z), times(v.w, w.w)};
  }

  // A pass's products to the sums, its scale taken off.
  __device__ __forceinline__ void end_pass(arch::TileC (&sums)[G::kTiles][1],
                                           const arch::TileC (&products)[G::kTiles][1]) const {
    using namespace arch;
#pragma unroll
    for (int e = 0; e < TileC::kValues; ++e) {
      const float of_column = kScaled ? shfl(1.f / scale, TileC::col(e) * 4) : 1.f;
#pragma unroll
      for (int i = 0; i < G::kTiles; ++i) sums[i][0].v[e] += products[i][0].v[e] * of_column;
    }
  }

  // This warp's squares to where the block adds them.
  __device__ __forceinline__ void finish(float (&all_squares)[G::kWarps][G::kMaxRows]) const {
    using namespace arch;
#pragma unroll
    for (int e = 0; e < TileC::kValues; ++e) {
      if (TileC::row(e) == TileC::col(e)) all_squares[warp()][TileC::col(e)] = squares.v[e];
    }
  }
};

// Shared memory of a launch with a norm.
template <class G>
int norm_bytes(int64_t k) {
  constexpr int pass = G::kWarps * G::kLoads * 32;
  return static_cast<int>((k + pass - 1) / pass * pass * 2);
}

struct NoNorm {
  __device__ explicit NoNorm(const LinearParams&) {}
};

// fused: p.fusion is looked at; norm: there is one, whose weight is of T; for up to 8 rows of x.
template <class T, class G, bool fused, bool norm>
__global__ void __launch_bounds__(G::kThreads, 2) mma_gemv_kernel(LinearParams p) {
  using namespace arch;
  constexpr int row_tiles = G::kRowTiles, tiles = G::kTiles, loads = G::kLoads;
  allow_next_kernel();

  const int row = lane() / 4, column = lane() % 4 * 8;  // in a tile and a step
  const int64_t first_n = blockIdx.x * int64_t{G::kBlockN};
  const int k = static_cast<int>(p.k);
  const T* const x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight[tiles][2];
#pragma unroll
  for (int i = 0; i < tiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = weight_row<fused>(p, first_n, i, half, row);
      weight[i][half] = static_cast<const T*>(p.weight) + n * p.weight_stride;
    }
  }

  Addends<T, G, fused> addends(p, first_n);
  TileC sums[tiles][row_tiles];
  [[maybe_unused]] std::conditional_t<norm, NormedColumns<T, G>, NoNorm> normed(p);
  bool waited = false;
  for (int base = warp() * loads * 32; base < k; base += G::kWarps * loads * 32) {
    uint4 w[loads][tiles][2];
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      const int at = base + u * 32 + column;
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          w[u][i][half] = at < k ? load_weight(weight[i][half] + at) : make_uint4(0, 0, 0, 0);
        }
      }
    }
    const bool first_pass = !waited;
    if (first_pass) {
      wait_for_previous_kernel();
      addends.load_before(p, first_n);
    }
    waited = true;
    const auto load_x = [&](int u, int j) {
      const int at = base + u * 32 + column;
      return j * 8 + row < p.m && at < k ? *reinterpret_cast<const uint4*>(x + j * 8 * p.x_stride + at)
                                         : make_uint4(0, 0, 0, 0);
    };
    const auto multiply = [&](TileC(&into)[tiles][row_tiles], int u, int j, const uint4& v) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        const uint4 &low = w[u][i][0], &high = w[u][i][1];
        mma(into[i][j], TileA<T>{{low.x, high.x, low.y, high.y}}, TileB<T>{{v.x, v.y}});
        mma(into[i][j], TileA<T>{{low.z, high.z, low.w, high.w}}, TileB<T>{{v.z, v.w}});
      }
    };
    if constexpr (norm) {
      uint4 columns[loads];
#pragma unroll
      for (int u = 0; u < loads; ++u) columns[u] = load_x(u, 0);
      if (first_pass) normed.arrive(p);  // x is under way by then
      normed.begin_pass(columns);
      TileC products[tiles][1];
#pragma unroll
      for (int u = 0; u < loads; ++u) multiply(products, u, 0, normed.take(columns[u], base + u * 32 + column));
      normed.end_pass(sums, products);
    } else {
#pragma unroll
      for (int u = 0; u < loads; ++u) {
#pragma unroll
        for (int j = 0; j < row_tiles; ++j) multiply(sums, u, j, load_x(u, j));
      }
    }
  }
  if (!waited) {
    wait_for_previous_kernel();
    addends.load_before(p, first_n);
  }

  if constexpr (norm) {
    __shared__ float squares[G::kWarps][G::kMaxRows];
    normed.finish(squares);
    write_warp_sums<T, G, fused>(p, sums, first_n, addends, [&](int m) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < G::kWarps; ++w) sum += squares[w][m];
      return norm_factor(p, sum);
    });
  } else {
    write_warp_sums<T, G, fused>(p, sums, first_n, addends);
  }
}

}  // namespace flashdecpp
