// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for up to 16 rows of x, on the matrix units, straight from memory.
//
// A lane loads 16 bytes of a row: eight neighbours along K. Taken as they come, four lanes' loads are the fragments of
// two 16 x 8 x 16 products whose k is permuted; x is loaded with the same permutation, so the sums are the same. So a
// weight goes from memory to the matrix unit without a conversion or a pass through shared memory, and arithmetic does
// not grow with the rows of x as on the CUDA cores.
//
// A block holds 16 * kTiles rows of the weight; its waves share K and add their sums in the end, in the order of the
// waves. kLoads * 2 * kTiles loads are in flight a lane: 64 KiB a block, 128 KiB a multiprocessor. The first of them
// are asked for before the kernel ahead has ended: weights do not depend on it.
#pragma once

#include "linear_arch_sm90.cuh"
#include "linear_epilogue.cuh"
#include "linear_prologue.cuh"

namespace flashdecpp {

template <int row_tiles, int tiles, int loads>
struct TensorGemv {
  static constexpr int kRowTiles = row_tiles;  // of 8 rows of x
  static constexpr int kTiles = tiles;         // of 16 rows of the weight
  static constexpr int kLoads = loads;         // steps of 32 along K that are in flight
  static constexpr int kWaves = 8, kThreads = kWaves * arch::kWaveSize;
  static constexpr int kMaxRows = row_tiles * arch::kTileN, kBlockN = 16 * tiles;
};

// x's columns of one wave on their way through an RMSNorm. A product with them is right but for a factor of its row,
// which multiplies the sum in the end: 1 / rms, whose squares the matrix units add up as they go, the diagonal of x
// times itself. Rounded is x * weight. A half could overflow there, or lose bits at the low end: a power of two, which
// the wave finds before its first product, brings its largest below 2^15.
template <class T, class G>
struct NormedColumns {
  arch::TileC squares[G::kRowTiles];
  float scale[G::kRowTiles];  // of row lane / 4 + 8 j

  static constexpr bool kScaled = std::is_same_v<T, arch::half>;

  static __device__ __forceinline__ const uint4& weight(const LinearParams& p, int column) {
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(p.fusion.norm_weight) + column);
  }

  static __device__ __forceinline__ uint32_t pair_of(float v) {
    const T element = arch::from_float<T>(v);
    uint16_t bits;
    memcpy(&bits, &element, sizeof(bits));
    return bits * 0x10001u;
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t largest, const uint4& v) {
    using arch::larger_halves;
    return larger_halves(larger_halves(largest, larger_halves(v.x, v.y)), larger_halves(v.z, v.w));
  }
  static __device__ __forceinline__ float larger_of_pair(uint32_t pair) {
    float v[2];
    arch::unpack<T>(v, pair);
    return fmaxf(v[0], v[1]);
  }

  // A row's columns are shared out among the lanes that p.m rows leave over.
  __device__ __forceinline__ void find_scales(const LinearParams& p) {
    using namespace arch;
    if constexpr (kScaled) {
      constexpr int loads = G::kLoads;
      const int rows_shift = p.m <= 1 ? 0 : p.m <= 2 ? 1 : p.m <= 4 ? 2 : 3, parts = 8 >> rows_shift;
      const int row = lane() / 4 & ((1 << rows_shift) - 1), part = lane() / 4 >> rows_shift;
      const int k = static_cast<int>(p.k);
#pragma unroll
      for (int j = 0; j < G::kRowTiles; ++j) {
        const T* const x = static_cast<const T*>(p.x) + min(int64_t{j * 8 + row}, p.m - 1) * p.x_stride;
        uint32_t largest_x = 0, largest_weight = 0;
        for (int base = wave() * loads * 32; base < k; base += G::kWaves * loads * 32) {
#pragma unroll 2
          for (int u = part; u < loads; u += parts) {
            const int at = base + u * 32 + lane() % 4 * 8;
            if (at >= k) break;
            largest_x = larger(largest_x, *reinterpret_cast<const uint4*>(x + at));
            largest_weight = larger(largest_weight, weight(p, at));
          }
        }
        float of_x = larger_of_pair(largest_x), of_weight = larger_of_pair(largest_weight);
#pragma unroll
        for (int mask = 1; mask < kWaveSize; mask *= 2) {
          const float other_x = exchange_xor(of_x, mask), other_weight = exchange_xor(of_weight, mask);
          if (mask >= 4 && mask < 4 << rows_shift) continue;  // another row's
          of_x = fmaxf(of_x, other_x);
          of_weight = fmaxf(of_weight, other_weight);
        }
        const auto exponent = [](float v) { return static_cast<int>(__float_as_uint(v) >> 23) - 127; };
        const int e = min(13 - exponent(of_x) - max(exponent(of_weight), -1), 15);
        scale[j] = __uint_as_float(static_cast<uint32_t>(max(e, -24) + 127) << 23);
      }
    }
  }

  // Eight columns of row lane / 4 + 8 j.
  __device__ __forceinline__ void take(const LinearParams& p, int j, uint4& v, int column) {
    arch::mma(squares[j], arch::TileA<T>{{v.x, 0, v.y, 0}}, arch::TileB<T>{{v.x, v.y}});
    arch::mma(squares[j], arch::TileA<T>{{v.z, 0, v.w, 0}}, arch::TileB<T>{{v.z, v.w}});
    if (column >= p.k) return;
    const uint4 w = weight(p, column);
    const uint32_t pair = pair_of(scale[j]);
    const auto times = [&](uint32_t x, uint32_t weight) {
      if constexpr (kScaled) x = arch::multiply_pairs<T>(x, pair);
      return arch::multiply_pairs<T>(x, weight);
    };
    v = {times(v.x, w.x), times(v.y, w.y), times(v.z, w.z), times(v.w, w.w)};
  }

  // The scale off a wave's sums, and its squares to where the block adds them.
  __device__ __forceinline__ void finish(arch::TileC (&sums)[G::kTiles][G::kRowTiles],
                                         float (&all_squares)[G::kWaves][G::kMaxRows]) {
    using namespace arch;
#pragma unroll
    for (int j = 0; j < G::kRowTiles; ++j) {
#pragma unroll
      for (int e = 0; e < TileC::kValues; ++e) {
        if constexpr (kScaled) {
          const float of_column = from_lane(scale[j], TileC::col(e) * 4);
#pragma unroll
          for (int i = 0; i < G::kTiles; ++i) sums[i][j].v[e] /= of_column;
        }
        if (TileC::row(e) == TileC::col(e)) all_squares[wave()][j * 8 + TileC::col(e)] = squares[j].v[e];
      }
    }
  }
};

// fused: p.fusion is looked at; norm: there is one, whose weight is of T.
template <class T, class G, bool fused, bool norm>
__global__ void __launch_bounds__(G::kThreads, 2) tensor_gemv_kernel(LinearParams p) {
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

  TileC sums[tiles][row_tiles];
  NormedColumns<T, G> normed;
  if constexpr (norm) {
#pragma unroll
    for (float& scale : normed.scale) scale = 1.f;
  }
  bool waited = false;
  for (int base = wave() * loads * 32; base < k; base += G::kWaves * loads * 32) {
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
    if (!waited) {
      wait_for_previous_kernel();
      if constexpr (norm) normed.find_scales(p);
    }
    waited = true;
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      const int at = base + u * 32 + column;
#pragma unroll
      for (int j = 0; j < row_tiles; ++j) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (j * 8 + row < p.m && at < k) v = *reinterpret_cast<const uint4*>(x + j * 8 * p.x_stride + at);
        if constexpr (norm) normed.take(p, j, v, at);
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          const uint4 &low = w[u][i][0], &high = w[u][i][1];
          mma(sums[i][j], TileA<T>{{low.x, high.x, low.y, high.y}}, TileB<T>{{v.x, v.y}});
          mma(sums[i][j], TileA<T>{{low.z, high.z, low.w, high.w}}, TileB<T>{{v.z, v.w}});
        }
      }
    }
  }
  if (!waited) wait_for_previous_kernel();

  if constexpr (norm) {
    __shared__ float squares[G::kWaves][G::kMaxRows];
    normed.finish(sums, squares);
    write_wave_sums<T, G, fused>(p, sums, first_n, [&](int m) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < G::kWaves; ++w) sum += squares[w][m];
      return norm_factor(p, sum);
    });
  } else {
    write_wave_sums<T, G, fused>(p, sums, first_n);
  }
}

}  // namespace flashdecpp
