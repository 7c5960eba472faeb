// out[m, n] = x[m, :] . weight[n, :] + bias[n], added to out if p.fusion.adds(). The weights are streamed once per 8
// rows of x, so the floor is the time to read them; a register tile is kM rows of x by tile_rows(kM) rows of weights.
//
// Every output is one vector accumulator that runs along all of K, then is summed over its lanes by a fixed tree,
// whatever its tile. Its bits therefore depend only on its row of x and its row of weights, not on M or on how N is
// split among threads.
//
// The storage of weights is a type: DenseWeights here, QuantizedWeights in quantized_linear_kernel.h. It defines
//   Packed                    the type of packed numbers of x
//   with_out(f)               calls f with the type of outputs, a template argument
//   kStep                     runs along K have lengths that are multiples of it
//   tile_rows(m)              weight rows per tile with m rows of x
//   row(n), stride(), bytes(k)  address of a row of weights, distance between rows, size of k weights, in bytes
//   run, finish               adds a run's products; completes the accumulators after the last run
#pragma once

#include "cpu/kernels.h"
#include "cpu/linear_tiles.h"
#include "cpu/products.h"
#include "cpu/simd/simd.h"
#include "cpu/with_dtype.h"

namespace flashdecpp::cpu::FLASHDECPP_ISA {

// Weight rows per tile, as many as this number of accumulators allows for m rows of x.
constexpr int rows_within(int accumulators, int m) {
  const int rows = accumulators / m;
  return rows > 8 ? 8 : (rows > 0 ? rows : 1);
}

// Prefetch distance. Hardware prefetchers do not keep up: they follow one row at a time, and the arithmetic of 8 rows
// of x fills the out-of-order window in which loads could overlap.
inline constexpr int64_t kAheadBytes = 8192;
// Bytes of x that stay in L1 while weights stream through it. A longer K is processed in blocks, with the accumulators
// of kStripRows rows of weights kept in memory between blocks.
inline constexpr int64_t kActivationBytes = 24576;
inline constexpr int kStripRows = 16;

// Prefetch addresses for a run of weights: at byte i of the run, (i < turn ? first : second) + i.
struct Lookahead {
  const char *first, *second;
  int64_t turn;

  template <int kBytes>
  FLASHDECPP_INLINE void fetch(const Lookahead& ahead, int64_t i, int64_t row) {
    const char* next = (i < ahead.turn ? ahead.first : ahead.second) + i + row;
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(next + line);
  }
};

// step(i, from, stride) for each kStep of `count` elements along K, where the first of kRows rows of weights is at
// `from`, and rows are `stride` apart. A last step that is not whole gets a copy padded with zeros, and goes through
// the same loop as the others, which would otherwise be compiled twice.
template <int kRows, int64_t kStep, class T, class F>
FLASHDECPP_INLINE void for_steps(const T* weight, int64_t stride, int64_t count, F&& step) {
  const int64_t whole = count / kStep * kStep;
  T padded[kRows][kStep];
  for (int r = 0; whole < count && r < kRows; ++r) {
    for (int64_t i = 0; i < kStep; ++i) padded[r][i] = whole + i < count ? weight[r * stride + whole + i] : T{};
  }
  const struct {
    const T* from;
    int64_t stride, begin, end;
  } stretches[] = {{weight, stride, 0, whole}, {padded[0], kStep, whole, count}};
#pragma GCC unroll 1
  for (auto [from, row_stride, begin, end] : stretches) {
    for (int64_t i = begin; i < end; i += kStep, from += kStep) step(i, from, row_stride);
  }
}

// Weights of x's dtype, [n, k].
template <class T>
struct DenseWeights {
  using P = Products<T>;
  using Packed = typename P::Packed;
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr int tile_rows(int m) { return rows_within(kManyRegisters ? 16 : 8, m); }

  const LinearParams& p;

  const char* row(int64_t n) const { return static_cast<const char*>(p.weight) + n * stride(); }
  int64_t stride() const { return bytes(p.weight_stride); }
  static constexpr int64_t bytes(int64_t k) { return k * static_cast<int64_t>(sizeof(T)); }
  template <class F>
  FLASHDECPP_INLINE void with_out(const DenseWeights&, F&& f) {
    f.template operator()<T>();
  }

  // acc[m][r] += x[m][k, k + count) * weight[n + r][k, k + count), lane by lane.
  template <int kRows, int kM>
  FLASHDECPP_INLINE void run(const DenseWeights& self, Vec (&acc)[kM * kRows], int64_t n, int64_t k, int64_t count,
                             const Packed* x, int64_t x_stride, const Lookahead& ahead) {
    const int64_t stride = self.p.weight_stride;
    const T* weight = static_cast<const T*>(self.p.weight) + n * stride + k;
    x += k;
    const auto step = [&](int64_t i, const T* from, int64_t row_stride) __attribute__((always_inline)) {
      typename P::Operand w[kRows];
      for (int r = 0; r < kRows; ++r) {
        Lookahead::fetch<bytes(kStep)>(ahead, bytes(i), bytes(r * stride));
        w[r] = P::load_once(from + r * row_stride);
      }
      for (int m = 0; m < kM; ++m) {
        typename P::Operand operand = P::load_packed(x + m * x_stride + i);
        if (kRows > 1) keep_in_register(operand);
        for (int r = 0; r < kRows; ++r) P::add(acc[m * kRows + r], w[r], operand);
      }
    };
    for_steps<kRows, kStep>(weight, stride, count, step);
  }

  template <int kRows, int kM>
  FLASHDECPP_INLINE void finish(const DenseWeights&, Vec (&)[kM * kRows], int64_t, const Packed*, int64_t) {}
};

// offsets[m][r] = bias[r], plus out[m][r] if `add`.
template <class T>
FLASHDECPP_OUTLINE void output_offsets(const T* bias, bool add, const T* out, int64_t out_stride, int count, int rows,
                                       float* offsets) {
  for (int m = 0; m < count; ++m) {
    for (int r = 0; r < rows; ++r) {
      offsets[m * rows + r] = (bias ? to_float(bias[r]) : 0.0f) + (add ? to_float(out[m * out_stride + r]) : 0.0f);
    }
  }
}

// out[m][r] = the sum of the accumulator's lanes, plus bias, plus the previous out[m][r] if `add`.
template <class T, int kRows, int kM>
FLASHDECPP_INLINE void store_outputs(const Vec (&acc)[kM * kRows], const T* bias, bool add, T* out,
                                     int64_t out_stride) {
  constexpr int kCount = kM * kRows, kPadded = (kCount + kLanes - 1) / kLanes * kLanes;
  float offsets[kPadded] = {};
  if (bias || add) output_offsets(bias, add, out, out_stride, kM, kRows, offsets);
  T values[kPadded];
  for (int i = 0; i < kPadded; i += kLanes) {
    Vec full[kLanes];
    for (int j = 0; j < kLanes; ++j) full[j] = i + j < kCount ? acc[i + j] : set1(0.0f);
    const Vec sums = sum_each(full);
    store(values + i, bias || add ? sums + load(offsets + i) : sums);
  }
  for (int m = 0; m < kM; ++m) __builtin_memcpy(out + m * out_stride, values + m * kRows, sizeof(T) * kRows);
}

// Weight rows [begin, end), a multiple of kRows, for the rows [m, m + kM) of x.
template <class W, int kRows, int kM>
void linear_tiles(const W& weights, const typename W::Packed* x, int64_t x_stride, int64_t m, int64_t begin,
                  int64_t end) {
  const LinearParams& p = weights.p;
  const char* first_row = weights.row(begin);
  const int64_t tile_bytes = kRows * weights.stride();
  x += m * x_stride;

  // A run is one tile of weight rows over one block of K. Within a strip of tiles, runs are ordered by block.
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
  // Short runs look a whole number of runs ahead, so that the branch in fetch goes one way throughout a run.
  const int64_t runs_ahead = run_bytes <= kAhead ? (kAhead + run_bytes - 1) / run_bytes : 0;
  const int64_t rest_ahead = run_bytes <= kAhead ? 0 : kAhead;
  const auto ahead_of = [&](int64_t run) {
    return Lookahead{address(run + runs_ahead) + rest_ahead, address(run + runs_ahead + 1) + rest_ahead - run_bytes,
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
          W::with_out(weights, [&]<class T>() __attribute__((always_inline)) {
            const T* bias = static_cast<const T*>(p.bias);
            T* out = static_cast<T*>(p.out) + m * p.n + row;
            store_outputs<T, kRows, kM>(acc, bias ? bias + row : nullptr, p.fusion.adds(), out, p.n);
          });
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
  if (whole == end) return;
  // The last few rows of the weights: too few to repay a tile of their own for every kM.
  for (int64_t row = m; row < m + kM; ++row) linear_tiles<W, 1, 1>(weights, x, x_stride, row, whole, end);
}

template <class W>
void run_linear(const W& weights, const typename W::Packed* x, int64_t x_stride, const LinearTask& task) {
  using Columns = void (*)(const W&, const typename W::Packed*, int64_t, int64_t, int64_t, int64_t);
  static constexpr Columns columns[kMaxTileM] = {linear_columns<W, 1>, linear_columns<W, 2>, linear_columns<W, 3>,
                                                 linear_columns<W, 4>, linear_columns<W, 5>, linear_columns<W, 6>,
                                                 linear_columns<W, 7>, linear_columns<W, 8>};
  // With more rows of x than a tile holds, the weights of a strip stay in L2 while all tiles of x pass over them.
  constexpr int64_t kStripBytes = 256 * 1024;
  const int64_t row_bytes = W::bytes(weights.p.k);
  const bool one_pass = task.m_end - task.m_begin <= kMaxTileM;
  const int64_t strip = one_pass ? task.n_end - task.n_begin : max(int64_t{8}, kStripBytes / row_bytes / 8 * 8);
  for (int64_t n = task.n_begin; n < task.n_end; n += strip) {
    for (int64_t m = task.m_begin; m < task.m_end; m += kMaxTileM) {
      const int64_t rows = min(task.m_end - m, int64_t{kMaxTileM});
      columns[rows - 1](weights, x, x_stride, m, n, min(n + strip, task.n_end));
    }
  }
}

template <class T>
void linear_typed(const LinearParams& p, const void* packed, int64_t packed_stride, const LinearTask& task) {
  using W = DenseWeights<T>;
  run_linear(W{p}, static_cast<const typename W::Packed*>(packed), packed_stride, task);
}

static void linear(const LinearParams& p, const void* packed, int64_t packed_stride, const LinearTask& task) {
#if defined(FLASHDECPP_TILES)
  if (on_tiles(p)) return TiledLinear(p, packed, packed_stride).run(task);
#endif
  with_dtype(p.dtype, [&]<class T>() { linear_typed<T>(p, packed, packed_stride, task); });
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
  with_dtype(p.dtype, [&]<class T>() { pack_typed<T>(p, packed, packed_stride, begin, end); });
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA
