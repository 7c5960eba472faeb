// out[m, n] = sum_k x[m, k] w[n, k] + bias[n] for up to 16 rows of x on the matrix units, w of 16 bits, or of 8 or 4
// with scales and offsets: what gemv_sm90.cuh and quantized_linear_kernel.cuh are on NVIDIA machines.
//
// Weights go from memory to registers, 16 bytes a load, and there become the left factor of products of 16 x 16 x 16.
// Quantised ones become the integers that they are, less the middle of their range, which half and bfloat16 both hold
// exactly (subnormals are of no use: MI200's matrix units take them for zero); a group's sum is scaled in float32, and
// what an offset adds is x's sum over the group, a product with ones. A lane's values are of one row of the weight, so
// it has the scale that it needs. The result differs from the float32 reference by the order of summation alone.
//
// MFMA wants four neighbours along K of a lane, so a row's 16 bytes are in four lanes: those exchange words. WMMA wants
// 16, and the two halves of a wave load the same.
//
// Floor: the bytes of q, scales and offsets over the memory bandwidth.
#pragma once

#include "dequantize_kernel.cuh"
#include "linear_epilogue.cuh"

namespace flashdecpp {

template <int bits, int tiles, bool fine>
struct StreamGemv {
  static constexpr int kBits = bits, kTiles = tiles;  // of 16 rows of the weight
  static constexpr bool kFine = fine;                 // a scale for every 32 weights is loaded; else one a step
  static constexpr int kRowTiles = 1, kMaxRows = 16, kBlockN = 16 * tiles;
  static constexpr int kWaves = 8, kThreads = kWaves * arch::kWaveSize;
  static constexpr int kRowLanes = 16 / arch::kInner;  // that have a row of the weight among them
  static constexpr int kStepK = kRowLanes > 1 ? 128 : 64, kProducts = kStepK / 16;
  static constexpr int kLoads = kStepK * bits / 128 / kRowLanes;                 // of a step, a row
  static constexpr int kSteps = kLoads * tiles >= 4 ? 1 : 4 / (kLoads * tiles);  // in flight
  static constexpr int kScales = bits == 16 ? 0 : fine ? kStepK / 32 : 1;
};

// i is a constant where this is inlined.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Of the four lanes of a row, 16 apart, the i-th has word i of what each of them loaded, lane j's as word j.
__device__ __forceinline__ void exchange_row(uint4& v) {
  const auto swap = [](uint32_t& low, uint32_t& high, int mask) {
    const bool upper = arch::lane() & mask;
    const uint32_t other = arch::exchange_xor(upper ? low : high, mask);
    low = upper ? other : low;
    high = upper ? high : other;
  };
  swap(v.x, v.y, 16);
  swap(v.z, v.w, 16);
  swap(v.x, v.z, 32);
  swap(v.y, v.w, 32);
}

// Four bytes, less `middle`, as numbers.
template <class T>
__device__ __forceinline__ uint2 numbers(uint32_t bytes, int middle) {
  if constexpr (std::is_same_v<T, arch::half>) {
    using Pair = _Float16 __attribute__((vector_size(4)));
    const auto pair = [&](uint32_t low, uint32_t high) {  // 1024 + byte
      const uint32_t bits = 0x64006400u | low | high << 16;
      const _Float16 zero = static_cast<_Float16>(1024 + middle);
      Pair value;
      memcpy(&value, &bits, sizeof(bits));
      value -= Pair{zero, zero};
      uint32_t result;
      memcpy(&result, &value, sizeof(result));
      return result;
    };
    return make_uint2(pair(bytes & 0xff, bytes >> 8 & 0xff), pair(bytes >> 16 & 0xff, bytes >> 24));
  } else {
    const auto bits = [&](uint32_t byte) {
      return __float_as_uint(static_cast<float>(byte) - static_cast<float>(middle));
    };
    const auto pair = [&](uint32_t low, uint32_t high) { return bits(low) >> 16 | (bits(high) & 0xffff0000u); };
    return make_uint2(pair(bytes & 0xff, bytes >> 8 & 0xff), pair(bytes >> 16 & 0xff, bytes >> 24));
  }
}

// What a lane has in flight of one row for one step.
template <class G>
struct StreamStep {
  uint4 bits[G::kLoads];
  uint32_t scales[G::kScales + 1], offsets[G::kScales + 1];

  __device__ __forceinline__ void load(const QuantizedLinearParams& p, int64_t n, int step) {
    constexpr int element = G::kBits == 16 ? 2 : 1;
    const int k = static_cast<int>(p.k), row_bytes = k * G::kBits / 8, part = arch::lane() / 16 % G::kRowLanes;
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride * element;
#pragma unroll
    for (int i = 0; i < G::kLoads; ++i) {
      const int at = ((step * G::kLoads + i) * G::kRowLanes + part) * 16;
      bits[i] = arch::load_stream(row + (at < row_bytes ? at : 0));  // beyond it x is zero
    }
#pragma unroll
    for (int i = 0; i < G::kScales; ++i) {
      const int group = min(step * G::kStepK + i * 32, k - 1) / static_cast<int>(p.group);
      scales[i] = load_parameter(p.scales, p.scales_dtype, n * p.scales_stride + group);
      if (p.offsets) offsets[i] = load_parameter(p.offsets, p.scales_dtype, n * p.offsets_stride + group);
    }
  }

  __device__ __forceinline__ void prepare() {
    if constexpr (G::kBits < 16 && G::kRowLanes > 1) {
#pragma unroll
      for (uint4& b : bits) exchange_row(b);
    }
  }

  // Where a lane's weights of a product lie in the step.
  static __device__ __forceinline__ int place(int product) {
    if (G::kBits == 16 && G::kRowLanes > 1) {  // as they are loaded: a load is two products
      return (product / 2 * G::kRowLanes + arch::lane() / 16) * 8 + product % 2 * 4;
    }
    return product * 16 + arch::first_k();
  }

  template <class T>
  __device__ __forceinline__ arch::TileA<T> weights(int product) const {
    constexpr int words = arch::kInner / 4;
    uint2 values[words];
#pragma unroll
    for (int w = 0; w < words; ++w) {
      if constexpr (G::kBits == 16) {
        const uint4& b = bits[words == 1 ? product / 2 : product * 2 + w / 2];
        const int at = words == 1 ? product % 2 * 2 : w % 2 * 2;
        values[w] = make_uint2(word_of(b, at), word_of(b, at + 1));
      } else {
        const int block = G::kBits == 4 ? product / 2 : product;  // of 16 bytes
        const uint32_t word = words == 1 ? word_of(bits[block / 4], block % 4) : word_of(bits[block], w);
        values[w] =
            G::kBits == 4 ? numbers<T>(word >> product % 2 * 4 & 0x0f0f0f0f, 8) : numbers<T>(word ^ 0x80808080, 128);
      }
    }
    arch::TileA<T> a;
    memcpy(&a.v, values, sizeof(a.v));
    return a;
  }
};

template <class T, class G>
__global__ void __launch_bounds__(G::kThreads, 2) stream_gemv_kernel(QuantizedLinearParams p) {
  using namespace arch;
  constexpr int tiles = G::kTiles;
  const int64_t first_n = blockIdx.x * int64_t{G::kBlockN};
  const int k = static_cast<int>(p.k), steps = (k + G::kStepK - 1) / G::kStepK;
  const T* const x = static_cast<const T*>(p.x) + min(int64_t{outer()}, p.m - 1) * p.x_stride;
  TileA<T> ones;
#pragma unroll
  for (int e = 0; e < kInner; ++e) ones.v[e] = round_to<T>(1.f);

  TileC sums[tiles][1];
  for (int base = wave() * G::kSteps; base < steps; base += G::kWaves * G::kSteps) {
    StreamStep<G> loaded[G::kSteps][tiles];
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) loaded[u][i].load(p, min(first_n + i * 16 + outer(), p.n - 1), base + u);
    }
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
      if (base + u >= steps) break;
      TileC part[tiles], x_sums;
#pragma unroll
      for (int i = 0; i < tiles; ++i) loaded[u][i].prepare();
#pragma unroll
      for (int j = 0; j < G::kProducts; ++j) {
        TileB<T> b;  // of x: eight bytes, or 32 of which each half may be beyond the end
        constexpr int piece = kInner < 8 ? kInner : 8;
#pragma unroll
        for (int e = 0; e < kInner; e += piece) {
          using Piece = std::conditional_t<piece == 8, uint4, uint2>;
          const int at = (base + u) * G::kStepK + StreamStep<G>::place(j) + e;
          Piece values = {};
          if (at < k) values = *reinterpret_cast<const Piece*>(x + at);
          memcpy(reinterpret_cast<unsigned char*>(&b.v) + e * sizeof(T), &values, sizeof(values));
        }
        if (G::kBits < 16 && p.offsets) mma(x_sums, ones, b);
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          const TileA<T> a = loaded[u][i].template weights<T>(j);
          mma(G::kBits == 16 ? sums[i][0] : part[i], a, b);
        }
        if constexpr (G::kBits < 16) {
          if (G::kFine ? j % 2 == 0 : j + 1 < G::kProducts) continue;
          constexpr float middle = G::kBits == 4 ? 8.f : 0.f;  // from where offsets count
#pragma unroll
          for (int i = 0; i < tiles; ++i) {
            const int which = G::kFine ? j / 2 : 0;
            const float scale = parameter(loaded[u][i].scales[which], p.scales_dtype);
            const float of_x =
                p.offsets ? parameter(loaded[u][i].offsets[which], p.scales_dtype) + middle * scale : 0.f;
#pragma unroll
            for (int e = 0; e < TileC::kValues; ++e) sums[i][0].v[e] += scale * part[i].v[e] + of_x * x_sums.v[e];
            part[i] = TileC();
          }
          x_sums = TileC();
        }
      }
    }
  }
  write_wave_sums<T, G>(p, sums, first_n);
}

}  // namespace flashdecpp
