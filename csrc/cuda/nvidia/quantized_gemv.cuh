// out[m, n] = sum_k x[m, k] (scale q[n, k] + offset) + bias[n] for weights of 8 or 4 bits and up to 16 rows of x, on
// the tensor cores. NVIDIA only: lanes are placed as in an m16n8k16 fragment, row lane / 4 and quad position lane % 4.
//
// As in gemv_mma.cuh, weights go from memory to registers in 16-byte loads and become A fragments there. A 16-bit type
// holds q exactly, in a unit and with a zero point of its own (Integers), so the products with x are exact. A group's
// sum is scaled in float32, and the group's sum of x, from an MMA with ones, corrects for the zero point and applies
// the offset. The result differs from the float32 reference in the order of summation only.
//
// An m16n8k16 product must not mix groups, yet each of a row's four lanes loads 32 consecutive 4-bit weights. Groups
// of 128 and more hold all of them. For smaller groups the four lanes exchange words: then each lane has a quarter of
// every block of 32 weights, and a block is two products.
//
// A CTA of 8 warps computes 16 or 32 rows of the weight by 8 or 16 rows of x; its warps split K in steps of 128. A lane
// has 64 to 128 bytes of weights in flight, a CTA 16 to 32 KiB, and two CTAs fit on an SM. Shared memory: up to 16 KiB
// of warp sums, and for more than 8 rows of x 64 KiB that stage x in two buffers per warp. Floor: the bytes of q,
// scales and offsets over the memory bandwidth.
#pragma once

#include "cuda/linear/dequantize_kernel.cuh"
#include "cuda/linear/epilogue.cuh"
#include "cuda/nvidia/linear_arch.cuh"

namespace flashdecpp {

struct QuantizedLaunch {
  int32_t group_shift;       // log2 of the weights per scale; 31: one scale per row
  int32_t blocks_per_group;  // blocks of 32 weights after which sums are scaled, at most 4
};

template <int bits, int row_tiles, int tiles, bool exchange>
struct QuantizedGemv {
  static constexpr int kBits = bits;
  static constexpr int kRowTiles = row_tiles;  // tiles of 8 rows of x
  static constexpr int kTiles = tiles;         // tiles of 16 rows of the weight
  static constexpr bool kExchange = exchange;  // lanes exchange words: groups are smaller than kStepK
  static constexpr int kStepK = 128;           // columns of K that four lanes decode at a time
  static constexpr int kBlocks = kStepK / 32;
  static constexpr bool kStaged = row_tiles > 1;  // x passes through shared memory
  static constexpr int kStepLoads = bits / 4;     // 16-byte loads per row and step
  static constexpr int kSteps = 4 / kStepLoads / tiles / (kStaged && bits == 4 ? 2 : 1);  // steps in flight
  static constexpr int kChains = bits == 4 && !kStaged ? 2 : 1;  // independent chains of MMAs that sum x
  // Whether the compiler is told that a step lies in one group. It generates worse code from that for unstaged 8-bit
  // weights (1.55 times the speed of float16 on an H100, against 1.8), better code for all others.
  static constexpr bool kOneGroupPerStep = !exchange && (bits == 4 || kStaged);
  static constexpr int kWarps = 8, kThreads = kWarps * arch::kWarpSize;
  static constexpr int kMaxRows = row_tiles * arch::kTileN, kBlockN = 16 * tiles;
  static constexpr int kStageBytes = kMaxRows * kStepK * 2;
  static constexpr int kSharedBytes = kStaged ? kWarps * 2 * kStageBytes : 0;
};

// How a 16-bit type T holds integers: q = kUnit * (kFirst * a + b) - kZero, where a and b are the factors of two
// products. Each function turns a word of four bytes into two pairs of T, from bytes 0 and 2 and from bytes 1 and 3;
// kOnes is a pair of ones.
template <class T, int bits>
struct Integers;

// An integer below 1024 is a subnormal fp16: the mantissa alone, in units of 2^-24. High nibbles need no shift.
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
    const uint32_t biased = word ^ 0x80808080;
    return {biased & 0x00ff00ff, biased >> 8 & 0x00ff00ff};
  }
};

// bfloat16's mantissa is shorter: an integer n below 128 is the mantissa of 128 + n. A byte is two nibbles.
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
  static __device__ __forceinline__ uint32_t biased(uint32_t word) { return word ^ 0x80808080; }
};

// What a lane loads of one row for one step: a quarter of the 128 weights, and the scale and offset of one group.
template <class G>
struct QuantizedStep {
  uint4 bits[G::kStepLoads];
  uint32_t scale_bits, offset_bits;

  __device__ __forceinline__ void load(const QuantizedLinearParams& p, const QuantizedLaunch& launch, int64_t n,
                                       int step) {
    const int quarter = arch::lane() % 4, k = static_cast<int>(p.k);
    const auto* row = static_cast<const unsigned char*>(p.weight) + n * p.weight_stride;
#pragma unroll
    for (int i = 0; i < G::kStepLoads; ++i) {
      const int at = ((step * G::kStepLoads + i) * 4 + quarter) * 16;
      bits[i] = at * (8 / G::kBits) < k ? arch::load_weight(row + at) : make_uint4(0, 0, 0, 0);
    }
    // Without an exchange the whole step lies in one group; with one, this lane loads the group of block `quarter`.
    const int group = min(step * G::kStepK + (G::kExchange ? quarter * 32 : 0), k - 1) >> launch.group_shift;
    scale_bits = load_parameter_bits(p.scales, p.scales_dtype, n * p.scales_stride + group);
    if (p.offsets) offset_bits = load_parameter_bits(p.offsets, p.scales_dtype, n * p.offsets_stride + group);
  }

  __device__ __forceinline__ void exchange() {
    if constexpr (G::kExchange) {
#pragma unroll
      for (uint4& b : bits) exchange_words<1>(b);
    }
  }

  // A 4-bit word holds weights of both halves of a block, an 8-bit word those of one half.
  __device__ __forceinline__ uint32_t word(int block, int half) const {
    return G::kBits == 4 ? word_of(bits[0], block) : word_of(bits[block / 2], block % 2 * 2 + half);
  }

  // The first of the four consecutive columns of the step that this lane has in one half of a block.
  static __device__ __forceinline__ int column(int block, int half) {
    const int quarter = arch::lane() % 4;
    if (G::kExchange) return block * 32 + half * 16 + quarter * 4;
    return G::kBits == 4 ? quarter * 32 + half * 16 + block * 4
                         : (block / 2 * 4 + quarter) * 16 + (block % 2 * 2 + half) * 4;
  }
};

// This lane's four columns of x for each half of a step's blocks, by row tile.
template <class G>
struct StepColumns {
  uint2 v[G::kBlocks][2][G::kRowTiles];
};

// The columns of x that a step multiplies, staged in shared memory per warp: one stage is read while the next arrives.
// The lanes of a warp need short pieces of many lines of x; loaded from L1, these would cost more than the weights.
// 16-byte chunks are swizzled so that reads are free of bank conflicts for every kind of step.
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

  static __device__ __forceinline__ int chunk_offset(int row, int chunk) {
    const int swizzled = chunk ^ (row & 3) << 1 ^ (row & 1) ^ (chunk >> 3 & 1);
    return row * (G::kStepK * 2) + swizzled * 16;
  }

  // Issues the copies of a step into stage `index` % 2.
  __device__ __forceinline__ void load(int index, int step) {
    // A warp copies `rows` rows in two instructions, the period of the swizzle.
    constexpr int chunks = G::kStepK / 8, rows = 2 * arch::kWarpSize / chunks;
    static_assert(rows == 4);
    unsigned char* const stage = stages + index % 2 * G::kStageBytes;
    const int row = arch::lane() / chunks, chunk = arch::lane() % chunks, at = step * G::kStepK + chunk * 8;
    const T* from = x + row * stride + at;
#pragma unroll 1  // unrolled, the addresses would fill the registers
    for (int i = 0; i < G::kMaxRows; i += rows, from += rows * stride) {
      unsigned char* const to = stage + i * (G::kStepK * 2);
      arch::copy_async(to + chunk_offset(row, chunk), from, i + row < m && at < k);
      arch::copy_async(to + chunk_offset(row + rows / 2, chunk), from + rows / 2 * stride,
                       i + row + rows / 2 < m && at < k);
    }
  }

  // Reads this lane's columns of rows lane / 4 + 8 j for the blocks first_block and first_block + 1.
  __device__ __forceinline__ void read(int index, int first_block, StepColumns<G>& columns) const {
    const unsigned char* const stage = stages + index % 2 * G::kStageBytes;
    const auto at = [&](int block, int half, int j) {
      const int column = QuantizedStep<G>::column(block, half);
      return stage + chunk_offset(arch::lane() / 4 + j * 8, column / 8) + column % 8 * 2;
    };
#pragma unroll
    for (int j = 0; j < G::kRowTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (G::kExchange) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            columns.v[first_block + i][half][j] = *reinterpret_cast<const uint2*>(at(first_block + i, half, j));
          }
        } else {  // 16 bytes hold the four columns of both blocks, or of both halves of one
          const int block = G::kBits == 4 ? first_block : first_block + i, half = G::kBits == 4 ? i : 0;
          const uint4 both = *reinterpret_cast<const uint4*>(at(block, half, j));
          columns.v[block][half][j] = {both.x, both.y};
          columns.v[G::kBits == 4 ? block + 1 : block][G::kBits == 4 ? half : 1][j] = {both.z, both.w};
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

// The products of half a block; `low` and `high` are words of rows 0 to 7 and 8 to 15 of a tile.
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
    const uint32_t a = I::biased(low), c = I::biased(high);
    mma_rows<T>(first, I::high(a), I::high(c), b);
    mma_rows<T>(second, I::low(a), I::low(c), b);
  }
}

// The products of one block of 32 weights, and x's sum over it.
template <class T, class G>
__device__ __forceinline__ void multiply_block(const QuantizedStep<G> (&step)[G::kTiles][2],
                                               const StepColumns<G>& columns, int block,
                                               arch::TileC (&first)[G::kTiles][G::kRowTiles],
                                               arch::TileC (&second)[G::kTiles][G::kRowTiles],
                                               arch::TileC (&x_sums)[G::kChains][G::kRowTiles]) {
  using namespace arch;
  constexpr uint32_t ones = Integers<T, G::kBits>::kOnes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < G::kRowTiles; ++j) {
      const uint2& v = columns.v[block][half][j];
      const TileB<T> b{{low_halves(v.x, v.y), high_halves(v.x, v.y)}};  // paired as Integers pairs bytes
      mma(x_sums[half % G::kChains][j], TileA<T>{{ones, ones, ones, ones}}, b);
#pragma unroll
      for (int i = 0; i < G::kTiles; ++i) {
        multiply_half<T, G>(first[i][j], second[i][j], step[i][0].word(block, half), step[i][1].word(block, half), half,
                            b);
      }
    }
  }
}

// Computes what scales the sums of a group in one row of the weight: those of its products, and of x.
template <class T, class G>
__device__ __forceinline__ void group_factors(const QuantizedLinearParams& p, const QuantizedStep<G>& step,
                                              float& of_products, float& of_x) {
  using I = Integers<T, G::kBits>;
  const float scale = to_parameter(step.scale_bits, p.scales_dtype);
  const float offset =
      p.offsets ? to_parameter(step.offset_bits, p.scales_dtype) : (G::kBits == 4 ? -8.f : 0.f) * scale;
  of_products = scale * I::kUnit;
  of_x = offset - scale * I::kZero;
}

// Adds a group to the totals of one half of a tile and clears its sums.
template <class T, class G>
__device__ __forceinline__ void add_group(arch::TileC (&totals)[G::kRowTiles], arch::TileC (&first)[G::kRowTiles],
                                          arch::TileC (&second)[G::kRowTiles],
                                          const arch::TileC (&x_sums)[G::kChains][G::kRowTiles], float of_products,
                                          float of_x, int half) {
#pragma unroll
  for (int j = 0; j < G::kRowTiles; ++j) {
#pragma unroll
    for (int e = half * 2; e < half * 2 + 2; ++e) {
      totals[j].v[e] += of_products * (Integers<T, G::kBits>::kFirst * first[j].v[e] + second[j].v[e]) +
                        of_x * (x_sums[0][j].v[e] + (G::kChains == 2 ? x_sums[1][j].v[e] : 0.f));
      first[j].v[e] = second[j].v[e] = 0.f;
    }
  }
}

// Grid: tiles of kBlockN rows of the weight. Requires p.m <= kMaxRows.
template <class T, class G, bool fused>
__global__ void __launch_bounds__(G::kThreads, 2)
    quantized_gemv_kernel(QuantizedLinearParams p, QuantizedLaunch launch) {
  using namespace arch;
  constexpr int row_tiles = G::kRowTiles, tiles = G::kTiles;
  allow_next_kernel();

  const int row = lane() / 4;
  const int64_t first_n = blockIdx.x * int64_t{G::kBlockN};
  const int k = static_cast<int>(p.k), steps = (k + G::kStepK - 1) / G::kStepK;
  const T* x[row_tiles];  // out-of-range rows are clamped to the last row; their results are never stored
#pragma unroll
  for (int j = 0; j < row_tiles; ++j) {
    x[j] = static_cast<const T*>(p.x) + min(int64_t{j * 8 + row}, p.m - 1) * p.x_stride;
  }
  const auto load_weights = [&](QuantizedStep<G>(&step)[tiles][2], int index) {
#pragma unroll
    for (int i = 0; i < tiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        step[i][half].load(p, launch, weight_row<fused>(p, first_n, i, half, row), index);
      }
    }
  };
  const auto load_columns = [&](StepColumns<G>& columns, int index) {
#pragma unroll
    for (int block = 0; block < G::kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = index * G::kStepK + QuantizedStep<G>::column(block, half);
#pragma unroll
        for (int j = 0; j < row_tiles; ++j) {
          columns.v[block][half][j] = make_uint2(0, 0);
          if (at < k) columns.v[block][half][j] = *reinterpret_cast<const uint2*>(x[j] + at);
        }
      }
    }
  };

  EpilogueOperands<T, G, fused> operands(p, first_n);
  TileC totals[tiles][row_tiles];
  StagedColumns<T, G> staged(p, dynamic_shared());
  int stage = 0;
  bool waited = false;
  for (int base = warp() * G::kSteps; base < steps; base += G::kWarps * G::kSteps) {
    QuantizedStep<G> weights[G::kSteps][tiles][2];
#pragma unroll
    for (int u = 0; u < G::kSteps; ++u) load_weights(weights[u], base + u);
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
      StepColumns<G> columns;
      if constexpr (G::kStaged) {
        warp_sync();  // no lane still reads the stage to be overwritten
        staged.load(stage + 1, u + 1 < G::kSteps && base + u + 1 < steps ? base + u + 1 : base + G::kWarps * G::kSteps);
        copy_commit();
        copy_wait<1>();
        warp_sync();
      } else {  // requested before anything waits for the weights
        load_columns(columns, base + u);
      }
      float of_products[tiles][2], of_x[tiles][2];
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          weights[u][i][half].exchange();
          group_factors<T>(p, weights[u][i][half], of_products[i][half], of_x[i][half]);
        }
      }
      TileC first[tiles][row_tiles], second[tiles][row_tiles];  // the two products of Integers, over one group
      TileC x_sums[G::kChains][row_tiles];
#pragma unroll
      for (int block = 0; block < G::kBlocks; ++block) {
        if constexpr (G::kStaged) {
          if (block % 2 == 0) staged.read(stage, block, columns);
        }
        multiply_block<T, G>(weights[u], columns, block, first, second, x_sums);
        const int blocks_per_group = G::kOneGroupPerStep ? G::kBlocks : launch.blocks_per_group;
        if ((block + 1) & (blocks_per_group - 1)) continue;
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float products_factor = of_products[i][half], x_factor = of_x[i][half];
            if constexpr (G::kExchange) {  // from the lane of the quad that loaded this block's group
              products_factor = shfl(products_factor, lane() / 4 * 4 + block);
              x_factor = shfl(x_factor, lane() / 4 * 4 + block);
            }
            add_group<T, G>(totals[i], first[i], second[i], x_sums, products_factor, x_factor, half);
          }
        }
#pragma unroll
        for (int j = 0; j < row_tiles; ++j) x_sums[0][j] = x_sums[G::kChains - 1][j] = TileC();
      }
      ++stage;
    }
  }

  if (!waited) {  // this warp has no step
    wait_for_previous_kernel();
    operands.load_residual(p, first_n);
  }
  if constexpr (G::kStaged) copy_wait<0>();
  write_warp_sums<T, G, fused>(p, totals, first_n, operands);
}

}  // namespace flashdecpp
