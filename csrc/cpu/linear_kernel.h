// out[m, n] = x[m, :] . weight[n, :] + bias[n] (or +=, where p.fusion adds), streaming the weights once for up
// to 8 rows of x.
//
// Every output is one vector accumulator that walks K from its start to its end, then one fixed tree over its lanes,
// whatever the tile around it. So an output's bits depend on its row of x and its row of weights alone: not on M, nor
// on where the threads' shares of N begin.
//
// How weights are stored is a type: DenseWeights here, the quantized ones in quantized_linear_kernel.h. It has
//   Out, Packed               the types of an output and of x's packed numbers
//   kStep                     a multiple of which are the lengths of runs along K
//   tile_rows(m)              weight rows that a tile of m rows of x reads side by side
//   row(n), stride(), bytes(k)  where a row of weights is, how far apart rows are, how long k weights are; in bytes
//   run, finish               the products of a run, and what is left to do behind the last one
#pragma once

#include "cpu/kernels.h"
#include "cpu/linear_tiles.h"
#include "cpu/products.h"
#include "cpu/simd.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// Weight rows beside each other, as many as the accumulators leave room for.
constexpr int rows_within(int accumulators, int m) {
  const int rows = accumulators / m;
  return rows > 8 ? 8 : (rows > 0 ? rows : 1);
}

// What is fetched ahead of its use. The processor's own prefetchers do not keep up: they follow one row at a time, and
// the arithmetic of 8 rows of x fills the window in which loads could overlap.
inline constexpr int64_t kAheadBytes = 8192;
// Rows of x in the nearest cache beside the weights that stream through it. A longer K is walked in blocks, with the
// accumulators of kStripRows rows of weights kept in memory between them.
inline constexpr int64_t kActivationBytes = 24576;
inline constexpr int kStripRows = 16;

// Where to prefetch while walking a run of weights: at byte i, (i < turn ? first : second) + i.
struct Ahead {
  const char *first, *second;
  int64_t turn;

  template <int kBytes>
  FLASHDECPP_INLINE void fetch(const Ahead& ahead, int64_t i, int64_t row) {
    const char* next = (i < ahead.turn ? ahead.first : ahead.second) + i + row;
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(next + line);
  }
};

// Weights of x's dtype, [n, k].
template <class T>
struct DenseWeights {
  using Out = T;
  using P = Products<T>;
  using Packed = typename P::Packed;
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr int tile_rows(int m) { return rows_within(kManyRegisters ? 16 : 8, m); }

  const LinearParams& p;

  const char* row(int64_t n) const { return static_cast<const char*>(p.weight) + n * stride(); }
  int64_t stride() const { return bytes(p.weight_stride); }
  static constexpr int64_t bytes(int64_t k) { return k * static_cast<int64_t>(sizeof(T)); }

  // acc[m][r] += x[m][0, count) * weight[r][0, count), lane by lane, for weights from [n, k] on.
  template <int kRows, int kM>
  FLASHDECPP_INLINE void run(const DenseWeights& self, Vec (&acc)[kM * kRows], int64_t n, int64_t k, int64_t count,
                             const Packed* x, int64_t x_stride, const Ahead& ahead) {
    const int64_t stride = self.p.weight_stride;
    const T* weight = static_cast<const T*>(self.p.weight) + n * stride + k;
    x += k;
    auto step = [&](int64_t i, auto&& load_weights) __attribute__((always_inline)) {
      typename P::Operand w[kRows];
      for (int r = 0; r < kRows; ++r) {
        Ahead::fetch<bytes(kStep)>(ahead, bytes(i), bytes(r * stride));
        w[r] = load_weights(weight + r * stride + i);
      }
      for (int m = 0; m < kM; ++m) {
        typename P::Operand operand = P::load_packed(x + m * x_stride + i);
        if (kRows > 1) keep_in_registers(operand);
        for (int r = 0; r < kRows; ++r) P::add(acc[m * kRows + r], w[r], operand);
      }
    };
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      step(i, [](const T* p) __attribute__((always_inline)) { return P::load_once(p); });
    }
    if (i < count) {
      const int rest = static_cast<int>(count - i);
      step(i, [rest](const T* p) __attribute__((always_inline)) { return P::load_once(p, rest); });
    }
  }

  template <int kRows, int kM>
  FLASHDECPP_INLINE void finish(const DenseWeights&, Vec (&)[kM * kRows], int64_t, const Packed*, int64_t) {}
};

// The lanes of every accumulator added up, plus bias, into out[m][r]; or added to what that holds.
template <class T, int kRows, int kM>
FLASHDECPP_INLINE void linear_finish(const Vec (&acc)[kM * kRows], const T* bias, bool add, T* out,
                                     int64_t out_stride) {
  constexpr int kCount = kM * kRows, kPadded = (kCount + kLanes - 1) / kLanes * kLanes;
  float offsets[kPadded] = {};
  if (bias) {
    for (int i = 0; i < kCount; ++i) offsets[i] = to_float(bias[i % kRows]);
  }
  if (add) {
    for (int i = 0; i < kCount; ++i) offsets[i] += to_float(out[i / kRows * out_stride + i % kRows]);
  }
  T values[kPadded];
  for (int i = 0; i < kPadded; i += kLanes) {
    Vec group[kLanes];
    for (int j = 0; j < kLanes; ++j) group[j] = i + j < kCount ? acc[i + j] : set1(0.0f);
    const Vec sums = sum_each(group);
    store(values + i, bias || add ? sums + load(offsets + i) : sums);
  }
  for (int m = 0; m < kM; ++m) __builtin_memcpy(out + m * out_stride, values + m * kRows, sizeof(T) * kRows);
}

// Weight rows [begin, end), a multiple of kRows, for the rows [m, m + kM) of x.
template <class W, int kRows, int kM>
void linear_tiles(const W& weights, const typename W::Packed* x, int64_t x_stride, int64_t m, int64_t begin,
                  int64_t end) {
  using T = typename W::Out;
  const LinearParams& p = weights.p;
  const char* first_row = weights.row(begin);
  const int64_t tile_bytes = kRows * weights.stride();
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out) + m * p.n;
  x += m * x_stride;

  // A run is one tile of rows over one block of K; runs follow each other block by block within a strip of tiles.
  const int64_t blocks =
      (p.k * kM * static_cast<int64_t>(sizeof(typename W::Packed)) + kActivationBytes - 1) / kActivationBytes;
  const int64_t length = ((p.k + blocks - 1) / blocks + W::kStep - 1) / W::kStep * W::kStep;
  const int64_t tiles = blocks > 1 ? kStripRows / kRows : 1;
  const int64_t run_bytes = W::bytes(length);
  const auto address = [&](int64_t run) {
    if (blocks == 1) return first_row + run * tile_bytes;
    const int64_t strip = run / (blocks * tiles), block = run / tiles % blocks;
    return first_row + (strip * tiles + run % tiles) * tile_bytes + block * run_bytes;
  };
  constexpr int64_t kAhead = kAheadBytes / kRows;
  // Short runs look whole runs ahead, so that the inner loop does not change its mind in the middle of one.
  const int64_t runs_ahead = run_bytes <= kAhead ? (kAhead + run_bytes - 1) / run_bytes : 0;
  const int64_t rest_ahead = run_bytes <= kAhead ? 0 : kAhead;
  const auto ahead_of = [&](int64_t run) {
    return Ahead{address(run + runs_ahead) + rest_ahead, address(run + runs_ahead + 1) + rest_ahead - run_bytes,
                 run_bytes - rest_ahead};
  };

  Vec kept[kStripRows / kRows][kM * kRows];
  int64_t run = 0;
  for (int64_t strip = begin; strip < end; strip += tiles * kRows) {
    const int64_t tiles_here = min(tiles, (end - strip) / kRows);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k = block * length, count = min(length, p.k - k);
      for (int64_t tile = 0; tile < tiles_here; ++tile, ++run) {
        const int64_t row = strip + tile * kRows;
        Vec acc[kM * kRows];
        for (int i = 0; i < kM * kRows; ++i) acc[i] = block == 0 ? set1(0.0f) : kept[tile][i];
        W::template run<kRows, kM>(weights, acc, row, k, count, x, x_stride, ahead_of(run));
        if (block + 1 < blocks) {
          for (int i = 0; i < kM * kRows; ++i) kept[tile][i] = acc[i];
        } else {
          W::template finish<kRows, kM>(weights, acc, row, x, x_stride);
          linear_finish<T, kRows, kM>(acc, bias ? bias + row : nullptr, p.fusion.adds(), out + row, p.n);
        }
      }
    }
  }
}

// Weight rows [begin, end) for the rows [m, m + kM) of x.
template <class W, int kM>
void linear_columns(const W& weights, const typename W::Packed* x, int64_t x_stride, int64_t m, int64_t begin,
                    int64_t end) {
  constexpr int kRows = W::tile_rows(kM);
  const int64_t whole = begin + (end - begin) / kRows * kRows;
  if (begin < whole) linear_tiles<W, kRows, kM>(weights, x, x_stride, m, begin, whole);
  if (whole < end) linear_tiles<W, 1, kM>(weights, x, x_stride, m, whole, end);
}

template <class W>
void linear_part(const W& weights, const typename W::Packed* x, int64_t x_stride, const LinearPart& part) {
  using Columns = void (*)(const W&, const typename W::Packed*, int64_t, int64_t, int64_t, int64_t);
  static constexpr Columns columns[kMaxTileM] = {linear_columns<W, 1>, linear_columns<W, 2>, linear_columns<W, 3>,
                                                 linear_columns<W, 4>, linear_columns<W, 5>, linear_columns<W, 6>,
                                                 linear_columns<W, 7>, linear_columns<W, 8>};
  // More rows of x than a tile holds: the weights of one strip stay in the second cache while the tiles pass over it.
  constexpr int64_t kStripBytes = 256 * 1024;
  const int64_t row_bytes = W::bytes(weights.p.k);
  const bool one_pass = part.m_end - part.m_begin <= kMaxTileM;
  const int64_t strip = one_pass ? part.n_end - part.n_begin : max(int64_t{8}, kStripBytes / row_bytes / 8 * 8);
  for (int64_t n = part.n_begin; n < part.n_end; n += strip) {
    for (int64_t m = part.m_begin; m < part.m_end; m += kMaxTileM) {
      const int64_t rows = min(part.m_end - m, int64_t{kMaxTileM});
      columns[rows - 1](weights, x, x_stride, m, n, min(n + strip, part.n_end));
    }
  }
}

template <class T>
void linear_typed(const LinearParams& p, const void* packed, int64_t packed_stride, const LinearPart& part) {
  using W = DenseWeights<T>;
  linear_part(W{p}, static_cast<const typename W::Packed*>(packed), packed_stride, part);
}

static void linear(const LinearParams& p, const void* packed, int64_t packed_stride, const LinearPart& part) {
#if defined(FLASHDECPP_TILES)
  if (on_tiles(p)) return TiledLinear(p, packed, packed_stride).run(part);
#endif
  switch (p.dtype) {
    case DType::kFloat32: return linear_typed<float>(p, packed, packed_stride, part);
    case DType::kFloat16: return linear_typed<fp16>(p, packed, packed_stride, part);
    case DType::kBFloat16: return linear_typed<bf16>(p, packed, packed_stride, part);
    default: return;
  }
}

template <class T>
void pack_typed(const LinearParams& p, void* packed, int64_t packed_stride, int64_t begin, int64_t end) {
  using P = Products<T>;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
    auto* row = static_cast<typename P::Packed*>(packed) + m * packed_stride;
    int64_t i = 0;
    for (; i + 2 * kLanes <= p.k; i += 2 * kLanes) P::pack(row + i, x + i);
    if (i < p.k) P::pack(row + i, x + i, static_cast<int>(p.k - i));
  }
}

static void pack(const LinearParams& p, void* packed, int64_t packed_stride, int64_t begin, int64_t end) {
#if defined(FLASHDECPP_TILES)
  if (on_tiles(p)) return pack_tiles(p, packed, packed_stride, begin, end);
#endif
  switch (p.dtype) {
    case DType::kFloat32: return pack_typed<float>(p, packed, packed_stride, begin, end);
    case DType::kFloat16: return pack_typed<fp16>(p, packed, packed_stride, begin, end);
    case DType::kBFloat16: return pack_typed<bf16>(p, packed, packed_stride, begin, end);
    default: return;
  }
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
