// out[m, n] = sum_k x[m, k] w[n, k] + bias[n] for up to 16 rows of x on the matrix cores, where w has 16 bits, or 8 or
// 4 bits with scales and offsets: AMD's counterpart of gemv_mma.cuh and quantized_gemv.cuh.
//
// Weights go from memory to registers in 16-byte loads and become the A operand of 16 x 16 x 16 products there.
// Quantized ones become integers minus the middle of their range, which half and bfloat16 both hold exactly (not
// subnormals: MI200's matrix cores flush them to zero). A group's sum is scaled in float32; an offset multiplies x's
// sum over the group, a product with ones. All values of a lane belong to one row of the weight, so it holds the scale
// it needs. The result differs from the float32 reference in the order of summation only.
//
// MFMA needs four consecutive columns of K per lane, fewer than 16 bytes of quantized weights hold, so the four lanes
// of a row exchange words. WMMA needs 16, and the two halves of a warp load the same bytes.
//
// A CTA of 8 warps computes 16 or 32 rows of the weight; its warps split K in steps of 128 (CDNA) or 64 (RDNA). Shared
// memory: 8 or 16 KiB of warp sums. Floor: the bytes of q, scales and offsets over the memory bandwidth.
#pragma once

#include "cuda/linear/dequantize_kernel.cuh"
#include "cuda/linear/epilogue.cuh"

namespace flashdecpp {

template <int bits, int tiles, bool fine>
struct StreamGemv {
  static constexpr int kBits = bits, kTiles = tiles;  // tiles of 16 rows of the weight
  static constexpr bool kFine = fine;                 // loads a scale per 32 weights; otherwise one per step
  static constexpr int kRowTiles = 1, kMaxRows = 16, kBlockN = 16 * tiles;
  static constexpr int kWarps = 8, kThreads = kWarps * arch::kWarpSize;
  static constexpr int kRowLanes = 16 / arch::kInner;  // lanes that share a row of the weight
  static constexpr int kStepK = kRowLanes > 1 ? 128 : 64, kProducts = kStepK / 16;
  static constexpr int kLoads = kStepK * bits / 128 / kRowLanes;                 // loads per row and step
  static constexpr int kSteps = kLoads * tiles >= 4 ? 1 : 4 / (kLoads * tiles);  // steps in flight
  static constexpr int kScales = bits == 16 ? 0 : fine ? kStepK / 32 : 1;
};

// Four unsigned bytes minus `middle`, as four numbers of type T.
template <class T>
__device__ __forceinline__ uint2 widen_bytes(uint32_t bytes, int middle) {
  if constexpr (std::is_same_v<T, arch::half>) {
    using Pair = _Float16 __attribute__((vector_size(4)));
    const _Float16 zero = static_cast<_Float16>(1024 + middle);
    const auto pair = [&](uint32_t bits) {  // two of 1024 + byte
      Pair value;
      memcpy(&value, &bits, sizeof(bits));
      value -= Pair{zero, zero};
      memcpy(&bits, &value, sizeof(bits));
      return bits;
    };
    constexpr uint32_t high = 0x64646464;
    return make_uint2(pair(__builtin_amdgcn_perm(high, bytes, 0x04010400)),
                      pair(__builtin_amdgcn_perm(high, bytes, 0x04030402)));
  } else {
    const float zero = static_cast<float>(middle);
    const auto bits = [&](uint32_t byte) { return __float_as_uint(static_cast<float>(byte) - zero); };
    const auto pair = [&](uint32_t low, uint32_t high) {  // the upper 16 bits of both: bfloat16
      return __builtin_amdgcn_perm(bits(high), bits(low), 0x07060302);
    };
    return make_uint2(pair(bytes & 0xff, bytes >> 8 & 0xff), pair(bytes >> 16 & 0xff, bytes >> 24));
  }
}

// What a lane loads of one row for one step.
template <class G>
struct StreamStep {
  uint4 bits[G::kLoads];
  uint32_t scales[G::kScales + 1], offsets[G::kScales + 1];

  __device__ __forceinline__ void load(const QuantizedLinearParams& p, int64_t n, int step) {
    constexpr int element = G::kBits == 16 ? 2 : 1;
    const int k = static_cast<int>(p.k), row_bytes = k * G::kBits / 8, slice = arch::lane() / 16 % G::kRowLanes;
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride * element;
#pragma unroll
    for (int i = 0; i < G::kLoads; ++i) {
      const int at = ((step * G::kLoads + i) * G::kRowLanes + slice) * 16;
      bits[i] = arch::load_stream(row + (at < row_bytes ? at : 0));  // beyond the row's end x is zero
    }
#pragma unroll
    for (int i = 0; i < G::kScales; ++i) {
      const int group = min(step * G::kStepK + i * 32, k - 1) / static_cast<int>(p.group);
      scales[i] = load_parameter_bits(p.scales, p.scales_dtype, n * p.scales_stride + group);
      if (p.offsets) offsets[i] = load_parameter_bits(p.offsets, p.scales_dtype, n * p.offsets_stride + group);
    }
  }

  __device__ __forceinline__ void exchange() {
    if constexpr (G::kBits < 16 && G::kRowLanes > 1) {
#pragma unroll
      for (uint4& b : bits) exchange_words<16>(b);
    }
  }

  // The column of the step where a lane's weights of a product start: lane_column() + product_column(product).
  static constexpr bool kAsLoaded = G::kBits == 16 && G::kRowLanes > 1;  // each load then serves two products
  static __device__ __forceinline__ int lane_column() { return kAsLoaded ? arch::lane() / 16 * 8 : arch::first_k(); }
  static constexpr __device__ int product_column(int product) {
    return kAsLoaded ? product / 2 * G::kRowLanes * 8 + product % 2 * 4 : product * 16;
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
        values[w] = G::kBits == 4 ? widen_bytes<T>(word >> product % 2 * 4 & 0x0f0f0f0f, 8)
                                  : widen_bytes<T>(word ^ 0x80808080, 128);
      }
    }
    arch::TileA<T> a;
    memcpy(&a.v, values, sizeof(a.v));
    return a;
  }
};

// Loads x for one product: `at` points to this lane's first column, `left` columns remain in the row. Unless `whole`,
// all of them may be out of range, or the second half of RDNA's 16.
template <class T, bool whole>
__device__ __forceinline__ arch::TileB<T> load_x(const T* at, int left) {
  constexpr int piece = arch::kInner < 8 ? arch::kInner : 8;
  using Piece = std::conditional_t<piece == 8, uint4, uint2>;
  arch::TileB<T> b;
#pragma unroll
  for (int e = 0; e < arch::kInner; e += piece) {
    Piece values = {};
    if (whole || e < left) values = *reinterpret_cast<const Piece*>(at + e);
    memcpy(reinterpret_cast<unsigned char*>(&b.v) + e * sizeof(T), &values, sizeof(values));
  }
  return b;
}

// Adds the products of the step that starts at column `begin` to `sums`; whole: all of its columns are in range.
template <class T, class G, bool whole>
__device__ __forceinline__ void multiply_step(const QuantizedLinearParams& p, StreamStep<G> (&step)[G::kTiles],
                                              const T* x, int begin, arch::TileC (&sums)[G::kTiles][1]) {
  using namespace arch;
  const int at = begin + StreamStep<G>::lane_column(), left = static_cast<int>(p.k) - at;
  TileC group_sums[G::kTiles], x_sums;
  TileA<T> ones;
#pragma unroll
  for (int e = 0; e < kInner; ++e) ones.v[e] = round_to<T>(1.f);
#pragma unroll
  for (int i = 0; i < G::kTiles; ++i) step[i].exchange();
#pragma unroll
  for (int j = 0; j < G::kProducts; ++j) {
    scheduling_barrier();
    const int column = StreamStep<G>::product_column(j);
    const TileB<T> b = load_x<T, whole>(x + at + column, left - column);
    if (G::kBits < 16 && p.offsets) mma(x_sums, ones, b);
#pragma unroll
    for (int i = 0; i < G::kTiles; ++i)
      mma(G::kBits == 16 ? sums[i][0] : group_sums[i], step[i].template weights<T>(j), b);
    if constexpr (G::kBits < 16) {
      if (G::kFine ? j % 2 == 0 : j + 1 < G::kProducts) continue;
      constexpr float middle = G::kBits == 4 ? 8.f : 0.f;  // the operand that q = 0 becomes, negated
#pragma unroll
      for (int i = 0; i < G::kTiles; ++i) {
        const int which = G::kFine ? j / 2 : 0;
        const float scale = to_parameter(step[i].scales[which], p.scales_dtype);
        const float of_x = p.offsets ? to_parameter(step[i].offsets[which], p.scales_dtype) + middle * scale : 0.f;
#pragma unroll
        for (int e = 0; e < TileC::kValues; ++e) sums[i][0].v[e] += scale * group_sums[i].v[e] + of_x * x_sums.v[e];
        group_sums[i] = TileC();
      }
      x_sums = TileC();
    }
  }
}

// Grid: tiles of kBlockN rows of the weight. Requires p.m <= 16; p.fusion is ignored. Of 16-bit weights (kBits), the
// fields that describe scales are not read.
template <class T, class G>
__global__ void __launch_bounds__(G::kThreads, 2) stream_gemv_kernel(QuantizedLinearParams p) {
  using namespace arch;
  constexpr int tiles = G::kTiles;
  const int64_t first_n = blockIdx.x * int64_t{G::kBlockN};
  const int k = static_cast<int>(p.k), steps = (k + G::kStepK - 1) / G::kStepK;
  const T* const x = static_cast<const T*>(p.x) + min(int64_t{outer()}, p.m - 1) * p.x_stride;

  TileC sums[tiles][1];
  for (int base = warp() * G::kSteps; base < steps; base += G::kWarps * G::kSteps) {
    StreamStep<G> loaded[G::kSteps][tiles];
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) loaded[u][i].load(p, min(first_n + i * 16 + outer(), p.n - 1), base + u);
    }
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
      const int begin = (base + u) * G::kStepK;
      if (begin + G::kStepK <= k) {
        multiply_step<T, G, true>(p, loaded[u], x, begin, sums);
      } else if (begin < k) {
        multiply_step<T, G, false>(p, loaded[u], x, begin, sums);
      }
    }
  }
  // Bias is loaded only here: while weights are in flight, no registers are free.
  write_warp_sums<T, G, false>(p, sums, first_n, EpilogueOperands<T, G, false>(p, first_n));
}

}  // namespace flashdecpp
