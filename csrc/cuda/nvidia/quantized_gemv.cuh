// out[m, n] = sum_k x[m, k] (scale q[n, k] + offset) + bias[n] for weights of 8 or 4 bits and up to 16 rows of x, on
// the matrix units.
//
// As gemv_sm90.cuh: weights go from memory to registers, 16 bytes a load, and there become fragments. A half type holds
// q, in units and from a zero of its own (Integers), so its products with x are exact; a group's sum is scaled in
// float32, and x's sum over the group, a product with ones, takes off the zero and puts on the offset. The result
// differs from the float32 reference by the order of summation alone.
//
// A product of 16 x 8 x 16 must not mix groups, and the four lanes of a row load 32 neighbors of 4 bit each. Groups of
// 128 and more hold all of them. For smaller ones the four lanes exchange words: then every lane has a part of each
// block of 32, and a block is two products.
//
// Floor: the bytes of q, scales and offsets over the memory bandwidth; close to it, what decoding costs.
#pragma once

#include "cuda/linear/dequantize_kernel.cuh"
#include "cuda/linear/epilogue.cuh"
#include "cuda/nvidia/linear_arch.cuh"

namespace flashdecpp {

struct QuantizedLaunch {
  int32_t group_shift;     // log2 of the weights that share a scale; 31: a row
  int32_t blocks_a_group;  // of 32 weights, at most 4: sums are scaled so often
};

template <int bits, int row_tiles, int tiles, bool exchange>
struct QuantizedGemv {
  static constexpr int kBits = bits;
  static constexpr int kRowTiles = row_tiles;  // of 8 rows of x
  static constexpr int kTiles = tiles;         // of 16 rows of the weight
  static constexpr bool kExchange = exchange;  // of words, for groups of less than kStepK
  static constexpr int kStepK = 128;           // of K: what four lanes decode at a time
  static constexpr int kBlocks = kStepK / 32;
  static constexpr bool kStaged = row_tiles > 1;  // x passes through shared memory
  static constexpr int kStepLoads = bits / 4;     // of 16 bytes, a row
  static constexpr int kSteps = 4 / kStepLoads / tiles / (kStaged && bits == 4 ? 2 : 1);  // in flight
  static constexpr int kChains = bits == 4 && !kStaged ? 2 : 1;  // of sums of x: a product waits for the one before it
  // That a step is one group's: the compiler makes worse code of it for 8 bits without stages (1.55 times the speed of
  // float16 on an H100 against 1.8), better code for all others.
  static constexpr bool kKnownGroup = !exchange && (bits == 4 || kStaged);
  static constexpr int kWarps = 8, kThreads = kWarps * arch::kWarpSize;
  static constexpr int kMaxRows = row_tiles * arch::kTileN, kBlockN = 16 * tiles;
  static constexpr int kStageBytes = kMaxRows * kStepK * 2;
  static constexpr int kSharedBytes = kStaged ? kWarps * 2 * kStageBytes : 0;
};

// How a half type holds integers: q = kUnit * (kFirst * a + b) - kZero, where a and b come from two products. Words
// have four bytes; pairs(word) has those of bytes 0 and 2, then of 1 and 3.
template <class T, int bits>
struct Integers;

// A number below 1024 is a subnormal half: the mantissa alone, in units of 2^-24. The high nibble stays where it is.
template <>
struct Integers<arch::half, 4> {
  static constexpr float kUnit = 0x1p20f, kFirst = 16.f, kZero = 0.f;
  static constexpr uint32_t kOnes = 0x3c003c00;
  static __device__ __forceinline__ uint2 low(uint32_t word) { return {word & 0x000f000f, word >> 8 & 0x000f000f}; }
  static __device__ __forceinline__ uint2 high(uint32_t word) { return {word & 0x00f000f0, word >> 8 & 0x00f000f0}; }
};
template <>
struct Integers<arch::half, 8> {
  static constexpr float kUnit = 0x1p24f, kFirst = 1.f, kZero = 128.f;
  static constexpr uint32_t kOnes = 0x3c003c00;
  static __device__ __forceinline__ uint2 bytes(uint32_t word) {
    const uint32_t from_0 = word ^ 0x80808080;
    return {from_0 & 0x00ff00ff, from_0 >> 8 & 0x00ff00ff};
  }
};

// bfloat16 has no such room below: a number below 128 is the mantissa of 128 and more. A byte is two nibbles.
template <>
struct Integers<arch::bfloat16, 4> {
  static constexpr float kUnit = 1.f, kFirst = 1.f, kZero = 128.f;
  static constexpr uint32_t kOnes = 0x3f803f80;
  static __device__ __forceinline__ uint32_t pair(uint32_t bits) { return (bits & 0x000f000f) | 0x43004300; }
  static __device__ __forceinline__ uint2 low(uint32_t word) { return {pair(word), pair(word >> 8)}; }
  static __device__ __forceinline__ uint2 high(uint32_t word) { return {pair(word >> 4), pair(word >> 12)}; }
};
template <>
struct Integers<arch::bfloat16, 8> : Integers<arch::bfloat16, 4> {
  static constexpr float kFirst = 16.f, kZero = 128.f + 17.f * 128.f;
  static __device__ __forceinline__ uint32_t from_0(uint32_t word) { return word ^ 0x80808080; }
};

// What a lane has in flight of one row for one step: its part of 128 weights, and the scale and the offset of one
// group.
template <class G>
struct QuantizedStep {
  uint4 bits[G::kStepLoads];
  uint32_t scale_bits, offset_bits;

  __device__ __forceinline__ void load(const QuantizedLinearParams& p, const QuantizedLaunch& launch, int64_t n,
                                       int step) {
    const int part = arch::lane() % 4, k = static_cast<int>(p.k);
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride;
#pragma unroll
    for (int i = 0; i < G::kStepLoads; ++i) {
      const int at = ((step * G::kStepLoads + i) * 4 + part) * 16;
      bits[i] = at * (8 / G::kBits) < k ? arch::load_weight(row + at) : make_uint4(0, 0, 0, 0);
    }
    // Without an exchange the whole step is one group's; with one, this lane's is that of block `part`.
    const int group = min(step * G::kStepK + (G::kExchange ? part * 32 : 0), k - 1) >> launch.group_shift;
    scale_bits = load_parameter(p.scales, p.scales_dtype, n * p.scales_stride + group);
    if (p.offsets) offset_bits = load_parameter(p.offsets, p.scales_dtype, n * p.offsets_stride + group);
  }

  __device__ __forceinline__ void prepare() {
    if constexpr (G::kExchange) {
#pragma unroll
      for (uint4& b : bits) exchange_words<1>(b);
    }
  }

  // One word of 4 bit has weights of both halves of a block, one of 8 bit those of one half.
  __device__ __forceinline__ uint32_t word(int block, int half) const {
    return G::kBits == 4 ? word_of(bits[0], block) : word_of(bits[block / 2], block % 2 * 2 + half);
  }

  // Where in a step the four neighbors along K are that a lane has of each half of a block.
  static __device__ __forceinline__ int place(int block, int half) {
    const int part = arch::lane() % 4;
    if (G::kExchange) return block * 32 + half * 16 + part * 4;
    return G::kBits == 4 ? part * 32 + half * 16 + block * 4 : (block / 2 * 4 + part) * 16 + (block % 2 * 2 + half) * 4;
  }
};

// The columns of x that a step multiplies, in shared memory, a warp's own: one stage is read while the next arrives.
// Lanes want pieces of rows that lie in many lines: taken from L1 as they are, these would cost more than the weights.
// Chunks of 16 bytes are swapped so that the lanes that read together find all banks, whatever the kind of step.
template <class T, class G>
struct StagedColumns {
  const T* x;
  int64_t stride;
  int m, k;
  unsigned char* stages;  // [2][kMaxRows][kStepK]

  __device__ __forceinline__ StagedColumns(const LinearParams& p, unsigned char* shared)
      : x(static_cast<const T*>(p.x)),
        stride(p.x_stride),
        m(static_cast<int>(p.m)),
        k(static_cast<int>(p.k)),
        stages(shared + arch::warp() * 2 * G::kStageBytes) {}

  static __device__ __forceinline__ int place(int row, int chunk) {
    const int swapped = chunk ^ (row & 3) << 1 ^ (row & 1) ^ (chunk >> 3 & 1);
    return row * (G::kStepK * 2) + swapped * 16;
  }

  // Asks for a step; the one before the last that was asked for is overwritten.
  __device__ __forceinline__ void load(int turn, int step) {
    constexpr int chunks = G::kStepK / 8, rows = 2 * arch::kWarpSize / chunks;  // of two copies: places repeat then
    static_assert(rows == 4);
    unsigned char* const stage = stages + turn % 2 * G::kStageBytes;
    const int row = arch::lane() / chunks, chunk = arch::lane() % chunks, at = step * G::kStepK + chunk * 8;
    const T* from = x + row * stride + at;
#pragma unroll 1  // addresses would fill the registers
    for (int i = 0; i < G::kMaxRows; i += rows, from += rows * stride) {
      unsigned char* const to = stage + i * (G::kStepK * 2);
      arch::copy_async(to + place(row, chunk), from, i + row < m && at < k);
      arch::copy_async(to + place(row + rows / 2, chunk), from + rows / 2 * stride, i + row + rows / 2 < m && at < k);
    }
  }

  // What this lane multiplies of rows lane / 4 + 8 j in the blocks first_block and its neighbor.
  __device__ __forceinline__ void read(int turn, int first_block,
                                       uint2 (&neighbors)[G::kBlocks][2][G::kRowTiles]) const {
    const unsigned char* const stage = stages + turn % 2 * G::kStageBytes;
    const auto at = [&](int block, int half, int j) {
      const int column = QuantizedStep<G>::place(block, half);
      return stage + place(arch::lane() / 4 + j * 8, column / 8) + column % 8 * 2;
    };
#pragma unroll
    for (int j = 0; j < G::kRowTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (G::kExchange) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            neighbors[first_block + i][half][j] = *reinterpret_cast<const uint2*>(at(first_block + i, half, j));
          }
        } else {  // two neighbors of four make 16 bytes: those of both blocks, or of both halves of one
          const int block = G::kBits == 4 ? first_block : first_block + i, half = G::kBits == 4 ? i : 0;
          const uint4 both = *reinterpret_cast<const uint4*>(at(block, half, j));
          neighbors[block][half][j] = {both.x, both.y};
          neighbors[G::kBits == 4 ? block + 1 : block][G::kBits == 4 ? half : 1][j] = {both.z, both.w};
        }
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void mma_rows(arch::TileC& sums, const uint2& low, const uint2& high,
                                         const arch::TileB<T>& b) {
  arch::mma(sums, arch::TileA<T>{{low.x, high.x, low.y, high.y}}, b);
}

// The products of half a block: `low` and `high` are rows 0 to 7 and 8 to 15 of a tile.
template <class T, class G>
__device__ __forceinline__ void multiply_half(arch::TileC& first, arch::TileC& second, uint32_t low, uint32_t high,
                                              int half, const arch::TileB<T>& b) {
  using I = Integers<T, G::kBits>;
  if constexpr (G::kBits == 4) {
    if (half == 0) {
      mma_rows<T>(first, I::low(low), I::low(high), b);
    } else {
      mma_rows<T>(second, I::high(low), I::high(high), b);
    }
  } else if constexpr (std::is_same_v<T, arch::half>) {
    mma_rows<T>(half == 0 ? first : second, I::bytes(low), I::bytes(high), b);
  } else {
    const uint32_t a = I::from_0(low), c = I::from_0(high);
    mma_rows<T>(first, I::high(a), I::high(c), b);
    mma_rows<T>(second, I::low(a), I::low(c), b);
  }
}

template <class T, class G, bool fused>
__global__ void __launch_bounds__(G::kThreads, 2)
    quantized_gemv_kernel(QuantizedLinearParams p, QuantizedLaunch launch) {
  using namespace arch;
  using I = Integers<T, G::kBits>;
  constexpr int row_tiles = G::kRowTiles, tiles = G::kTiles;
  allow_next_kernel();

  const int row = lane() / 4;
  const int64_t first_n = blockIdx.x * int64_t{G::kBlockN};
  const int k = static_cast<int>(p.k), steps = (k + G::kStepK - 1) / G::kStepK;
  const T* x[row_tiles];  // rows that there are not are another's: nobody reads what becomes of them
#pragma unroll
  for (int j = 0; j < row_tiles; ++j) {
    x[j] = static_cast<const T*>(p.x) + min(int64_t{j * 8 + row}, p.m - 1) * p.x_stride;
  }

  EpilogueOperands<T, G, fused> operands(p, first_n);
  TileC sums[tiles][row_tiles];
  StagedColumns<T, G> staged(p, dynamic_shared());
  int turn = 0;
  bool waited = false;
  for (int base = warp() * G::kSteps; base < steps; base += G::kWarps * G::kSteps) {
    QuantizedStep<G> loaded[G::kSteps][tiles][2];
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          loaded[u][i][half].load(p, launch, weight_row<fused>(p, first_n, i, half, row), base + u);
        }
      }
    }
    if (!waited) {
      wait_for_previous_kernel();
      operands.load_residual(p, first_n);
      if constexpr (G::kStaged) {
        staged.load(0, base);
        copy_commit();
      }
    }
    waited = true;
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) {
      if (base + u >= steps) break;
      uint2 neighbors[G::kBlocks][2][row_tiles];  // of x
      if constexpr (G::kStaged) {
        warp_sync();  // nobody reads what is overwritten
        staged.load(turn + 1, u + 1 < G::kSteps && base + u + 1 < steps ? base + u + 1 : base + G::kWarps * G::kSteps);
        copy_commit();
        copy_wait<1>();
        warp_sync();
      } else {  // asked for before anything waits for weights
#pragma unroll
        for (int block = 0; block < G::kBlocks; ++block) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = (base + u) * G::kStepK + QuantizedStep<G>::place(block, half);
#pragma unroll
            for (int j = 0; j < row_tiles; ++j) {
              neighbors[block][half][j] = make_uint2(0, 0);
              if (at < k) neighbors[block][half][j] = *reinterpret_cast<const uint2*>(x[j] + at);
            }
          }
        }
      }
      float unit[tiles][2], from_x[tiles][2];
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          loaded[u][i][half].prepare();
          const float scale = parameter(loaded[u][i][half].scale_bits, p.scales_dtype);
          const float offset = p.offsets ? parameter(loaded[u][i][half].offset_bits, p.scales_dtype)
                                         : (G::kBits == 4 ? -8.f : 0.f) * scale;
          unit[i][half] = scale * I::kUnit;
          from_x[i][half] = offset - scale * I::kZero;
        }
      }
      TileC first[tiles][row_tiles], second[tiles][row_tiles];
      TileC x_sums[G::kChains][row_tiles];
#pragma unroll
      for (int block = 0; block < G::kBlocks; ++block) {
        if constexpr (G::kStaged) {
          if (block % 2 == 0) staged.read(turn, block, neighbors);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int j = 0; j < row_tiles; ++j) {
            const uint2& v = neighbors[block][half][j];
            const TileB<T> b{{__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632)}};  // as bytes come in pairs
            mma(x_sums[half % G::kChains][j], TileA<T>{{I::kOnes, I::kOnes, I::kOnes, I::kOnes}}, b);
#pragma unroll
            for (int i = 0; i < tiles; ++i) {
              multiply_half<T, G>(first[i][j], second[i][j], loaded[u][i][0].word(block, half),
                                  loaded[u][i][1].word(block, half), half, b);
            }
          }
        }
        const int blocks_a_group = G::kKnownGroup ? G::kBlocks : launch.blocks_a_group;
        if ((block + 1) & (blocks_a_group - 1)) continue;
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float of_sums = unit[i][half], of_x = from_x[i][half];
            if constexpr (G::kExchange) {
              of_sums = shfl(of_sums, lane() / 4 * 4 + block);
              of_x = shfl(of_x, lane() / 4 * 4 + block);
            }
#pragma unroll
            for (int j = 0; j < row_tiles; ++j) {
#pragma unroll
              for (int e = half * 2; e < half * 2 + 2; ++e) {
                sums[i][j].v[e] += of_sums * (I::kFirst * first[i][j].v[e] + second[i][j].v[e]) +
                                   of_x * (x_sums[0][j].v[e] + (G::kChains == 2 ? x_sums[1][j].v[e] : 0.f));
                first[i][j].v[e] = second[i][j].v[e] = 0.f;
              }
            }
          }
        }
#pragma unroll
        for (int j = 0; j < row_tiles; ++j) x_sums[0][j] = x_sums[G::kChains - 1][j] = TileC();
      }
      ++turn;
    }
  }

  if (!waited) {
    wait_for_previous_kernel();
    operands.load_residual(p, first_n);
  }
  if constexpr (G::kStaged) copy_wait<0>();
  write_warp_sums<T, G, fused>(p, sums, first_n, operands);
}

}  // namespace flashdecpp
