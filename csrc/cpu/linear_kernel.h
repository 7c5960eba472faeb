// out[m, n] = x[m, :] . weight[n, :] + bias[n], streaming the weights once for up to 8 rows of x.
//
// Every output is one vector accumulator that walks K from its start to its end, then one fixed tree over its lanes,
// whatever the tile around it. So an output's bits depend on its row of x and its row of weights alone: not on M, nor
// on where the threads' shares of N begin.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

inline constexpr int kMaxTileM = 8;

// Weight rows that a tile of m rows of x reads side by side: as many as the accumulators leave room for.
constexpr int tile_rows(int m) {
  constexpr int accumulators = kManyRegisters ? 16 : 8;
  const int rows = accumulators / m;
  return rows > 8 ? 8 : rows;
}

template <class T, int kRows, int kM>
FLASHDECPP_INLINE void linear_tile(const T* weight, int64_t weight_stride, const float* x, int64_t x_stride, int64_t k,
                                   const T* bias, T* out, int64_t out_stride) {
  constexpr int kCount = kRows * kM;
  constexpr int kVectors = (kCount + kLanes - 1) / kLanes;
  Vec acc[kVectors * kLanes];
  for (int i = 0; i < kVectors * kLanes; ++i) acc[i] = set1(0.0f);

  auto step = [&](int64_t i, auto&& load_weights) __attribute__((always_inline)) {
    Pair w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = load_weights(weight + r * weight_stride + i);
    for (int m = 0; m < kM; ++m) {
      const Vec first = load(x + m * x_stride + i), second = load(x + m * x_stride + i + kLanes);
      for (int r = 0; r < kRows; ++r) {
        Vec& a = acc[m * kRows + r];
        a = fma(w[r].second, second, fma(w[r].first, first, a));
      }
    }
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
    step(i, [](const T* p) __attribute__((always_inline)) { return load_pair(p); });
  }
  if (i < k) {
    const int rest = static_cast<int>(k - i);
    step(i, [rest](const T* p) __attribute__((always_inline)) { return load_pair(p, rest); });
  }

  float sums[kVectors * kLanes];
  for (int v = 0; v < kVectors; ++v) {
    store(sums + v * kLanes, sum_each(*reinterpret_cast<const Vec(*)[kLanes]>(acc + v * kLanes)));
  }
  for (int m = 0; m < kM; ++m) {
    for (int r = 0; r < kRows; ++r) {
      const float value = bias ? sums[m * kRows + r] + to_float(bias[r]) : sums[m * kRows + r];
      from_float(value, out + m * out_stride + r);
    }
  }
}

// Weight rows [begin, end) for kM rows of x, tile by tile.
template <class T, int kM>
void linear_columns(const LinearParams& p, const float* x, int64_t x_stride, int64_t m, int64_t begin, int64_t end) {
  constexpr int kRows = tile_rows(kM);
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out) + m * p.n;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) {
    linear_tile<T, kRows, kM>(weight + n * p.weight_stride, p.weight_stride, x, x_stride, p.k,
                              bias ? bias + n : nullptr, out + n, p.n);
  }
  for (; n < end; ++n) {
    linear_tile<T, 1, kM>(weight + n * p.weight_stride, p.weight_stride, x, x_stride, p.k, bias ? bias + n : nullptr,
                          out + n, p.n);
  }
}

template <class T>
void linear_typed(const LinearParams& p, const float* x, int64_t x_stride, int64_t begin, int64_t end) {
  using Columns = void (*)(const LinearParams&, const float*, int64_t, int64_t, int64_t, int64_t);
  static constexpr Columns columns[kMaxTileM] = {linear_columns<T, 1>, linear_columns<T, 2>, linear_columns<T, 3>,
                                                 linear_columns<T, 4>, linear_columns<T, 5>, linear_columns<T, 6>,
                                                 linear_columns<T, 7>, linear_columns<T, 8>};
  // More rows of x than a tile holds: the weights of one strip stay in the nearest cache while the tiles pass over it.
  constexpr int64_t kStripBytes = 16384;
  const int64_t row_bytes = p.k * static_cast<int64_t>(sizeof(T));
  const int64_t strip = p.m <= kMaxTileM ? end - begin : max(int64_t{8}, kStripBytes / row_bytes / 8 * 8);
  for (int64_t n = begin; n < end; n += strip) {
    for (int64_t m = 0; m < p.m; m += kMaxTileM) {
      columns[min(p.m - m, int64_t{kMaxTileM}) - 1](p, x + m * x_stride, x_stride, m, n, min(n + strip, end));
    }
  }
}

static void linear(const LinearParams& p, const float* x, int64_t x_stride, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32: return linear_typed<float>(p, x, x_stride, begin, end);
    case DType::kFloat16: return linear_typed<fp16>(p, x, x_stride, begin, end);
    case DType::kBFloat16: return linear_typed<bf16>(p, x, x_stride, begin, end);
    default: return;
  }
}

template <class T>
void pack_typed(const LinearParams& p, float* packed, int64_t packed_stride) {
  for (int64_t m = 0; m < p.m; ++m) {
    const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
    float* row = packed + m * packed_stride;
    int64_t i = 0;
    for (; i + 2 * kLanes <= p.k; i += 2 * kLanes) {
      const Pair pair = load_pair(x + i);
      store(row + i, pair.first);
      store(row + i + kLanes, pair.second);
    }
    if (i < p.k) {
      const Pair pair = load_pair(x + i, static_cast<int>(p.k - i));
      store(row + i, pair.first);
      store(row + i + kLanes, pair.second);
    }
  }
}

static void pack(const LinearParams& p, float* packed, int64_t packed_stride) {
  switch (p.dtype) {
    case DType::kFloat32: return pack_typed<float>(p, packed, packed_stride);
    case DType::kFloat16: return pack_typed<fp16>(p, packed, packed_stride);
    case DType::kBFloat16: return pack_typed<bf16>(p, packed, packed_stride);
    default: return;
  }
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
