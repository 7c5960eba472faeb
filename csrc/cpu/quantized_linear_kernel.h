// quantized_linear on the loops of linear_kernel.h: out = sum over groups of scale * (q . x) + offset * sum(x). Weights
// are decoded in registers, and each group's sum of products is scaled once. The floor is the time to read the weights:
// n * k * bits / 8 bytes, plus the scales.
//
// 4-bit weights are multiplied as q - 8, and sum(x) by offset + 8 * scale: products centered on zero lose less to
// rounding than products of numbers from 0 to 15.
#pragma once

#include "cpu/linear_kernel.h"
#include "cpu/quantized_products.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// Prefetch distance of scales and offsets, which are streams separate from the weights.
inline constexpr int64_t kGroupsAheadBytes = 2048;

template <class T>
FLASHDECPP_INLINE Vec load_up_to(const T* p, int64_t left) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kGroupsAheadBytes);
  return left >= kLanes ? load(p) : left > 0 ? load(p, static_cast<int>(left)) : set1(0.0f);
}

// kLanes scales or offsets from `index` on, zeros after the first `left`.
FLASHDECPP_INLINE Vec load_groups(DType dtype, const void* from, int64_t index, int64_t left) {
  if (dtype == DType::kFloat16) return load_up_to(static_cast<const fp16*>(from) + index, left);
  if (dtype == DType::kBFloat16) return load_up_to(static_cast<const bf16*>(from) + index, left);
  return load_up_to(static_cast<const float*>(from) + index, left);
}

FLASHDECPP_INLINE Vec load_scales(const QuantizedLinearParams& p, int64_t n, int64_t group, int64_t left) {
  return load_groups(p.scales_dtype, p.scales, n * p.scales_stride + group, left);
}

// The factor of each group's sum of x.
FLASHDECPP_INLINE Vec load_offsets(const QuantizedLinearParams& p, int64_t n, int64_t group, int64_t left) {
  const Vec offsets = load_groups(p.scales_dtype, p.offsets, n * p.offsets_stride + group, left);
  return p.bits == 8 ? offsets : fma(set1(8.0f), load_scales(p, n, group, left), offsets);
}

constexpr int64_t padded_groups(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// log2 of the group size; if a row is one group, a shift that maps every weight to group 0.
FLASHDECPP_INLINE int group_shift(const QuantizedLinearParams& p) {
  return p.groups() == 1 ? 62 : p.group == 32 ? 5 : p.group == 64 ? 6 : 7;
}

// Not of x's dtype, but of the type in which x is packed, which most dtypes share: the loops are compiled once for it.
template <class P, template <class> class Decoder, int kBits>
struct QuantizedWeights {
  using D = Decoder<P>;
  using Packed = typename D::Packed;
  static constexpr int64_t kStep = kQuantizedAlign;
  static_assert(kStep % D::kWeights == 0);
  static constexpr int tile_rows(int m) { return rows_within(kManyRegisters ? 12 : 4, m); }
  // Groups in the longest run, plus the ones that `select` reads past the end.
  static constexpr int64_t max_groups(int m) {
    return padded_groups((kActivationBytes / (m * static_cast<int64_t>(sizeof(Packed))) + kStep) / kBlock + 4);
  }

  const QuantizedLinearParams& p;

  const char* row(int64_t n) const { return static_cast<const char*>(p.weight) + n * p.weight_stride; }
  int64_t stride() const { return p.weight_stride; }
  static constexpr int64_t bytes(int64_t k) { return k * kBits / 8; }
  template <class F>
  FLASHDECPP_INLINE void with_out(const QuantizedWeights& self, F&& f) {
    with_dtype(self.p.dtype, f);
  }

  template <int kRows, int kM>
  FLASHDECPP_INLINE void run(const QuantizedWeights& self, Vec (&acc)[kM * kRows], int64_t n, int64_t k, int64_t count,
                             const Packed* x, int64_t x_stride, const Lookahead& ahead) {
    const QuantizedLinearParams& p = self.p;
    const int shift = group_shift(p);
    const int64_t first = k >> shift, groups = ((count - 1) >> shift) + 1;
    float scales[kRows][max_groups(kM)];
    for (int r = 0; r < kRows; ++r) {
      for (int64_t g = 0; g < groups + 4; g += kLanes) {
        store(scales[r] + g, load_scales(p, n + r, first + g, groups - g));
      }
    }
    int32_t group_of_lane[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      group_of_lane[lane] = static_cast<int32_t>((int64_t{D::lane_block(lane)} * kBlock) >> shift);
    }
    const LaneIndices indices = load_indices(group_of_lane);

    const uint8_t* weight = reinterpret_cast<const uint8_t*>(self.row(n)) + bytes(k);
    x += k;
    constexpr int64_t kStepBytes = bytes(D::kWeights);
    const auto step = [&](int64_t byte, const uint8_t* from, int64_t stride) __attribute__((always_inline)) {
      const int64_t i = byte * 8 / kBits;
      typename D::Raw raw[kRows];
      for (int r = 0; r < kRows; ++r) {
        Lookahead::fetch<kStepBytes>(ahead, byte, r * p.weight_stride);
        raw[r] = D::load_raw(from + r * stride);
      }
      Vec products[kM * kRows];
      for (int j = 0; j < kM * kRows; ++j) products[j] = set1(0.0f);
      unroll<D::kSlices>([&](auto slice) __attribute__((always_inline)) {
        typename D::Operand w[kRows];
        for (int r = 0; r < kRows; ++r) w[r] = D::template decode<slice>(raw[r]);
        for (int m = 0; m < kM; ++m) {
          const typename D::Operand operand = D::load_packed(x + m * x_stride + i + slice * D::kSlice);
          for (int r = 0; r < kRows; ++r) D::add(products[m * kRows + r], w[r], operand);
        }
      });
      for (int r = 0; r < kRows; ++r) {
        const float* group = scales[r] + (i >> shift);
        const Vec scale = D::kWeights > kBlock ? select(group, indices) : set1(*group);
        for (int m = 0; m < kM; ++m) acc[m * kRows + r] = fma(products[m * kRows + r], scale, acc[m * kRows + r]);
      }
    };
    for_steps<kRows, kStepBytes>(weight, p.weight_stride, bytes(count), step);
  }

  template <int kRows, int kM>
  FLASHDECPP_INLINE void finish(const QuantizedWeights& self, Vec (&acc)[kM * kRows], int64_t n, const Packed* x,
                                int64_t x_stride) {
    const QuantizedLinearParams& p = self.p;
    if (!p.offsets) return;
    const float* sums = reinterpret_cast<const float*>(x) + quantized_sums_at(p.k);
    const int64_t sums_stride = x_stride * static_cast<int64_t>(sizeof(Packed)) / static_cast<int64_t>(sizeof(float));
    for (int64_t g = 0; g < p.groups(); g += kLanes) {
      for (int r = 0; r < kRows; ++r) {
        const Vec offsets = load_offsets(p, n + r, g, p.groups() - g);
        for (int m = 0; m < kM; ++m) {
          acc[m * kRows + r] = fma(offsets, load(sums + m * sums_stride + g), acc[m * kRows + r]);
        }
      }
    }
  }
};

template <class W, class T>
void pack_quantized_typed(const QuantizedLinearParams& p, void* packed, int64_t packed_stride, int64_t begin,
                          int64_t end) {
  using D = typename W::D;
  using Packed = typename W::Packed;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
    float* row = static_cast<float*>(packed) + m * packed_stride;
    auto* numbers = reinterpret_cast<Packed*>(row);
    for (int64_t k = 0; k < p.k; k += D::kWeights) {
      Packed ordered[D::kWeights];
      const int64_t count = min(p.k - k, int64_t{D::kWeights});
      if constexpr (sizeof(Packed) == sizeof(T)) {
        for (int64_t i = 0; i < D::kWeights; ++i) ordered[i] = i < count ? x[k + i] : T{};
      } else {
        for (int64_t i = 0; i < D::kWeights; i += kLanes) {
          store(ordered + i, load_up_to(x + k + i, count - i));
        }
      }
      for (int slice = 0; slice < D::kSlices; ++slice) {
        for (int i = 0; i < D::kSlice; ++i) numbers[k + slice * D::kSlice + i] = ordered[D::source(slice, i)];
      }
    }
    if (!p.offsets) continue;
    float* sums = row + quantized_sums_at(p.k);
    for (int64_t g = 0; g < padded_groups(p.groups()); ++g) {
      Vec total = set1(0.0f);
      const int64_t last = g < p.groups() ? (g + 1) * p.group : 0;
      int64_t k = g * p.group;
      for (; k + kLanes <= last; k += kLanes) total = total + load(x + k);
      if (k < last) total = total + load(x + k, static_cast<int>(last - k));
      sums[g] = sum(total);
    }
  }
}

template <class W>
void quantized_linear_typed(const QuantizedLinearParams& p, const void* packed, int64_t packed_stride,
                            const LinearTask& task) {
  using Packed = typename W::Packed;
  const int64_t stride = packed_stride * static_cast<int64_t>(sizeof(float) / sizeof(Packed));
  run_linear(W{p}, static_cast<const Packed*>(packed), stride, task);
}

template <class T>
void dequantize_typed(const QuantizedLinearParams& p, void* out, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 4096;
  const int shift = group_shift(p);
  float scales[padded_groups(kChunk / kBlock)], offsets[padded_groups(kChunk / kBlock)];
  T* to = static_cast<T*>(out);
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* row = static_cast<const uint8_t*>(p.weight) + n * p.weight_stride;
    for (int64_t first = 0; first < p.k; first += kChunk) {
      const int64_t last = min(first + kChunk, p.k), groups = ((last - 1 - first) >> shift) + 1;
      for (int64_t g = 0; g < groups; g += kLanes) {
        store(scales + g, load_scales(p, n, (first >> shift) + g, groups - g));
        store(offsets + g, p.offsets ? load_offsets(p, n, (first >> shift) + g, groups - g) : set1(0.0f));
      }
      for (int64_t k = first; k < last; k += kBlock) {
        const Vec scale = set1(scales[(k - first) >> shift]), offset = set1(offsets[(k - first) >> shift]);
        if (p.bits == 4) {
          for (int i = 0; i < kBlock / 2; i += kLanes) {
            const Nibbles nibbles = spread_nibbles(row + k / 2 + i);
            store(to + k + i, fma(nibble<0>(nibbles), scale, offset));
            store(to + k + i + kBlock / 2, fma(nibble<1>(nibbles), scale, offset));
          }
          continue;
        }
        const int64_t count = min(last - k, int64_t{kBlock});
        for (int64_t i = 0; i < count; i += kLanes) {
          if (count - i >= kLanes) {
            store(to + k + i, fma(load_bytes(row + k + i), scale, offset));
          } else {
            uint8_t rest[kLanes] = {};
            __builtin_memcpy(rest, row + k + i, count - i);
            store(to + k + i, fma(load_bytes(rest), scale, offset), static_cast<int>(count - i));
          }
        }
      }
    }
    to += p.k;
  }
}

// Calls f.template operator()<W, T>() for the weights' bits and x's dtype.
template <class F>
void with_quantized(const QuantizedLinearParams& p, F&& f) {
  with_dtype(p.dtype, [&]<class T>() {
    using Packed = typename Products<T>::Packed;
    if (p.bits == 4) return f.template operator()<QuantizedWeights<Packed, Decoder4, 4>, T>();
    return f.template operator()<QuantizedWeights<Packed, Decoder8, 8>, T>();
  });
}

static void pack_quantized(const QuantizedLinearParams& p, void* packed, int64_t packed_stride, int64_t begin,
                           int64_t end) {
  with_quantized(p, [&]<class W, class T>() { pack_quantized_typed<W, T>(p, packed, packed_stride, begin, end); });
}

static void quantized_linear(const QuantizedLinearParams& p, const void* packed, int64_t packed_stride,
                             const LinearTask& task) {
  with_quantized(p, [&]<class W, class>() { quantized_linear_typed<W>(p, packed, packed_stride, task); });
}

static void dequantize(const QuantizedLinearParams& p, void* out, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&]<class T>() { dequantize_typed<T>(p, out, begin, end); });
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
