// out[m, n] = sum_k x[m, k] (scale q[n, k] + offset) + bias[n] for weights of 8 or 4 bits and up to 16 rows of x, on
// the matrix units. q is an integer that a half type holds exactly, so its products with x are exact and a group's sum
// is scaled in float32: the result differs from the float32 reference by the order of summation alone.
//
// As gemv_sm90.cuh: weights go from memory to registers, 16 bytes a load, and there become fragments. A product of
// 16 x 8 x 16 must not mix groups of different scales, and a 16-byte load of 4 bit is one group's. So the four lanes of
// a row exchange words: then every lane has four (and four) neighbours of every block of 32, and the block is two
// products. Offsets multiply the sum of x over the group, which a product with ones gives.
//
// Floor: the bytes of q, scales and offsets over the memory bandwidth.
#pragma once

#include "linear_epilogue.cuh"

namespace flashdecpp {

template <int bits, int row_tiles, int tiles>
struct QuantizedGemv {
  static constexpr int kBits = bits;
  static constexpr int kRowTiles = row_tiles;  // of 8 rows of x
  static constexpr int kTiles = tiles;         // of 16 rows of the weight
  static constexpr int kStepK = 128;           // of K: what four lanes decode at a time
  static constexpr int kBlocks = kStepK / 32;
  static constexpr int kStepLoads = bits / 4;            // of 16 bytes, a row
  static constexpr int kSteps = 4 / kStepLoads / tiles;  // in flight
  static constexpr int kWaves = 8, kThreads = kWaves * arch::kWaveSize;
  static constexpr int kMaxRows = row_tiles * arch::kTileN, kBlockN = 16 * tiles;
};

// Integers as pairs of a half type: those of bytes or nibbles 0 and 2 of a word, and of 1 and 3.
template <class T>
struct Widen;

template <>
struct Widen<arch::half> {
  static constexpr uint32_t kOnes = 0x3c003c00;
  static __device__ __forceinline__ uint32_t subtract(uint32_t pair, float value) {
    const __half2 difference = __hsub2(reinterpret_cast<const __half2&>(pair), __float2half2_rn(value));
    return reinterpret_cast<const uint32_t&>(difference);
  }
  // Beside 0x64 a number below 1024 is the mantissa of 1024 and more.
  static __device__ __forceinline__ uint32_t nibbles(uint32_t bits, float zero) {
    return subtract((bits & 0x000f000f) | 0x64006400, 1024.f + zero);
  }
  static __device__ __forceinline__ void signed_bytes(uint32_t word, uint32_t& even, uint32_t& odd) {
    const uint32_t from_0 = word ^ 0x80808080;
    even = subtract(__byte_perm(from_0, 0x64646464, 0x4240), 1024.f + 128.f);
    odd = subtract(__byte_perm(from_0, 0x64646464, 0x4341), 1024.f + 128.f);
  }
};

template <>
struct Widen<arch::bfloat16> {
  static constexpr uint32_t kOnes = 0x3f803f80;
  // Beside 0x43 a number below 128 is the mantissa of 128 and more.
  static __device__ __forceinline__ uint32_t nibbles(uint32_t bits, float zero) {
    const uint32_t pair = (bits & 0x000f000f) | 0x43004300;
    const __nv_bfloat162 difference =
        __hsub2(reinterpret_cast<const __nv_bfloat162&>(pair), __float2bfloat162_rn(128.f + zero));
    return reinterpret_cast<const uint32_t&>(difference);
  }
  // A byte is too long for that; it is the end of the mantissa of 2^23 in float32.
  static __device__ __forceinline__ float signed_byte(uint32_t from_0, int byte) {
    return __uint_as_float(__byte_perm(from_0, 0x4b000000, 0x7650 + byte)) - (8388608.f + 128.f);
  }
  static __device__ __forceinline__ void signed_bytes(uint32_t word, uint32_t& even, uint32_t& odd) {
    const uint32_t from_0 = word ^ 0x80808080;
    even = arch::pack<arch::bfloat16>(signed_byte(from_0, 0), signed_byte(from_0, 2));
    odd = arch::pack<arch::bfloat16>(signed_byte(from_0, 1), signed_byte(from_0, 3));
  }
};

// i is a constant where this is inlined.
__device__ __forceinline__ uint32_t component(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Lane t of four neighbours has word t of what each of them loaded, lane i's as word i.
__device__ __forceinline__ void exchange_words(uint4& v) {
  const auto swap = [](uint32_t& low, uint32_t& high, int mask) {
    const bool upper = arch::lane() & mask;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? low : high, mask);
    low = upper ? other : low;
    high = upper ? high : other;
  };
  swap(v.x, v.y, 1);
  swap(v.z, v.w, 1);
  swap(v.x, v.z, 2);
  swap(v.y, v.w, 2);
}

__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat16) return arch::to_float(static_cast<const arch::half*>(data)[index]);
  if (dtype == DType::kBFloat16) return arch::to_float(static_cast<const arch::bfloat16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

// What a lane has in flight of one row for one step: 128 weights of four lanes together, and the scale and the offset
// of block lane % 4.
template <class G>
struct QuantizedStep {
  uint4 bits[G::kStepLoads];
  float scale, offset;

  __device__ __forceinline__ void load(const QuantizedLinearParams& p, int64_t n, int step) {
    const int part = arch::lane() % 4;
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride;
    const int row_bytes = static_cast<int>(p.k * G::kBits / 8);
#pragma unroll
    for (int i = 0; i < G::kStepLoads; ++i) {
      const int at = ((step * G::kStepLoads + i) * 4 + part) * 16;
      bits[i] = at < row_bytes ? arch::load_stream(row + at) : make_uint4(0, 0, 0, 0);
    }
    const int k = step * G::kStepK + part * 32;
    const int64_t group = p.group == p.k ? 0 : k / static_cast<int>(p.group);
    scale = offset = 0.f;
    if (k < p.k || p.group == p.k) {
      scale = load_float(p.scales, p.scales_dtype, n * p.scales_stride + group);
      if (p.offsets) offset = load_float(p.offsets, p.scales_dtype, n * p.offsets_stride + group);
    }
  }

  // Words of this lane: word(block, half) has the weights 4 t to 4 t + 3 of the block, or the same of its other half.
  __device__ __forceinline__ void exchange() {
#pragma unroll
    for (uint4& b : bits) exchange_words(b);
  }

  // Pairs of a block's weights (4 t, 4 t + 2), (16 + 4 t, ...), (4 t + 1, 4 t + 3), (16 + 4 t + 1, ...).
  template <class T>
  __device__ __forceinline__ void decode(uint32_t (&pairs)[4], int block, float zero) const {
    if constexpr (G::kBits == 4) {
      const uint32_t word = component(bits[0], block);
      pairs[0] = Widen<T>::nibbles(word, zero);
      pairs[1] = Widen<T>::nibbles(word >> 4, zero);
      pairs[2] = Widen<T>::nibbles(word >> 8, zero);
      pairs[3] = Widen<T>::nibbles(word >> 12, zero);
    } else {
      Widen<T>::signed_bytes(component(bits[block / 2], block % 2 * 2), pairs[0], pairs[2]);
      Widen<T>::signed_bytes(component(bits[block / 2], block % 2 * 2 + 1), pairs[1], pairs[3]);
    }
  }
};

template <class T, class G>
__global__ void __launch_bounds__(G::kThreads, 2) quantized_gemv_kernel(QuantizedLinearParams p) {
  using namespace arch;
  constexpr int row_tiles = G::kRowTiles, tiles = G::kTiles;
  __shared__ float parts[G::kWaves][G::kMaxRows][G::kBlockN];
  allow_next_kernel();

  const int row = lane() / 4, part = lane() % 4;
  const int64_t first_n = blockIdx.x * int64_t{G::kBlockN};
  const int k = static_cast<int>(p.k), steps = (k + G::kStepK - 1) / G::kStepK;
  const T* const x = static_cast<const T*>(p.x) + row * p.x_stride + part * 4;
  // A power of two; where a row has one scale, the sums of a step are scaled together.
  const int blocks_a_group = p.group == p.k ? G::kBlocks : static_cast<int>(p.group / 32);
  const float zero = G::kBits == 4 && !p.offsets ? 8.f : 0.f;

  TileC sums[tiles][row_tiles];
  bool waited = false;
  for (int base = wave() * G::kSteps; base < steps; base += G::kWaves * G::kSteps) {
    QuantizedStep<G> loaded[G::kSteps][tiles][2];
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          loaded[u][i][half].load(p, min(first_n + i * 16 + half * 8 + row, p.n - 1), base + u);
        }
      }
    }
    if (!waited) wait_for_previous_kernel();
    waited = true;
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
      if (base + u >= steps) break;
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        loaded[u][i][0].exchange();
        loaded[u][i][1].exchange();
      }
      TileC products[tiles][row_tiles], x_sums[row_tiles];
#pragma unroll
      for (int block = 0; block < G::kBlocks; ++block) {
        TileB<T> columns[row_tiles][2];  // x in the order of the pairs
#pragma unroll
        for (int j = 0; j < row_tiles; ++j) {
          const int at = (base + u) * G::kStepK + block * 32;
          uint2 low = make_uint2(0, 0), high = low;
          const T* const source = x + j * 8 * p.x_stride + at;
          if (j * 8 + row < p.m) {
            if (at < k) low = *reinterpret_cast<const uint2*>(source);
            if (at + 16 < k) high = *reinterpret_cast<const uint2*>(source + 16);
          }
          columns[j][0] = {{__byte_perm(low.x, low.y, 0x5410), __byte_perm(high.x, high.y, 0x5410)}};
          columns[j][1] = {{__byte_perm(low.x, low.y, 0x7632), __byte_perm(high.x, high.y, 0x7632)}};
          if (p.offsets) {
            constexpr uint32_t ones = Widen<T>::kOnes;
            mma(x_sums[j], TileA<T>{{ones, ones, ones, ones}}, columns[j][0]);
            mma(x_sums[j], TileA<T>{{ones, ones, ones, ones}}, columns[j][1]);
          }
        }
        const bool group_ends = ((block + 1) & (blocks_a_group - 1)) == 0;
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          const QuantizedStep<G>(&rows)[2] = loaded[u][i];
          uint32_t low[4], high[4];
          rows[0].template decode<T>(low, block, zero);
          rows[1].template decode<T>(high, block, zero);
#pragma unroll
          for (int j = 0; j < row_tiles; ++j) {
            mma(products[i][j], TileA<T>{{low[0], high[0], low[1], high[1]}}, columns[j][0]);
            mma(products[i][j], TileA<T>{{low[2], high[2], low[3], high[3]}}, columns[j][1]);
          }
          if (!group_ends) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float scale = __shfl_sync(0xffffffffu, rows[half].scale, lane() / 4 * 4 + block);
            const float offset = __shfl_sync(0xffffffffu, rows[half].offset, lane() / 4 * 4 + block);
#pragma unroll
            for (int j = 0; j < row_tiles; ++j) {
#pragma unroll
              for (int e = half * 2; e < half * 2 + 2; ++e) {
                sums[i][j].v[e] += scale * products[i][j].v[e] + offset * x_sums[j].v[e];
                products[i][j].v[e] = 0.f;
              }
            }
          }
        }
        if (group_ends) {
#pragma unroll
          for (int j = 0; j < row_tiles; ++j) x_sums[j] = TileC();
        }
      }
    }
  }
  if (!waited) wait_for_previous_kernel();

#pragma unroll
  for (int i = 0; i < tiles; ++i) {
#pragma unroll
    for (int j = 0; j < row_tiles; ++j) {
#pragma unroll
      for (int e = 0; e < TileC::kValues; ++e) {
        parts[wave()][j * 8 + TileC::col(e)][i * 16 + TileC::row(e)] = sums[i][j].v[e];
      }
    }
  }
  __syncthreads();
  write_wave_sums<T, G>(p, parts, first_n);
}

// out[n, k] of p.dtype: a weight for the BLAS. Grid: (K / 256, N).
template <class T>
__global__ void dequantize_kernel(QuantizedLinearParams p, T* out) {
  const int64_t k = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (k >= p.k) return;
  for (int64_t n = blockIdx.y; n < p.n; n += gridDim.y) {
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride;
    const int64_t group = k / p.group;
    const float scale = load_float(p.scales, p.scales_dtype, n * p.scales_stride + group);
    float offset = p.offsets ? load_float(p.offsets, p.scales_dtype, n * p.offsets_stride + group) : 0.f;
    int q;
    if (p.bits == 8) {
      q = static_cast<signed char>(row[k]);
    } else {
      q = row[k / 32 * 16 + k % 16] >> (k % 32 / 16 * 4) & 15;
      if (!p.offsets) offset = -8.f * scale;
    }
    out[n * p.k + k] = arch::from_float<T>(scale * static_cast<float>(q) + offset);
  }
}

}  // namespace flashdecpp
