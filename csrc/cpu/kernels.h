// The vector kernels of the CPU library as a table of function pointers: one table per instruction set, chosen once per
// process. A kernel works on a range of rows and knows nothing of threads; the host code (attention.cpp, linear.cpp,
// ...) splits the work.
#pragma once

#include <cstdint>

#include "params.h"

namespace flashdecpp::cpu {

// Packed rows of x are padded to a multiple of this, the most numbers that one step of `linear` reads.
inline constexpr int64_t kPackAlign = 32;
// The same for quantized_linear: the 4-bit weights in the widest vector.
inline constexpr int64_t kQuantizedAlign = 128;
inline constexpr int64_t quantized_sums_at(int64_t k) {
  return (k + kQuantizedAlign - 1) / kQuantizedAlign * kQuantizedAlign;
}
// Rows of x per pass over the weights.
inline constexpr int kMaxTileM = 8;

// A task of decode_attention: KV heads [head_begin, head_end) of sequence b over its keys [key_begin, key_end). A row
// is one query head of one token; the rows of a KV head are numbered token by token.
struct AttentionTask {
  int32_t b, head_begin, head_end;
  int64_t length, key_begin, key_end;  // length: of the sequence, in keys
  float* partial;  // [heads, rows, kPartialHeader + head_dim]; null if the task covers all of the sequence's keys
};
// Rows that a kernel processes together in one pass over the keys: those of as many heads as fit.
inline constexpr int kChunkRows = 32;

// A partial is a row's result over some keys: a header with the reference subtracted from its logits, the sum of
// exponentials, the largest logit and one unused number, then the weighted sum of values. Partials of disjoint keys
// combine exactly.
inline constexpr int64_t kPartialHeader = 4;

// A task of a linear: outputs [m_begin, m_end) x [n_begin, n_end).
struct LinearTask {
  int64_t m_begin, m_end, n_begin, n_end;
};

struct Kernels {
  const char* name;
  bool bfloat16_dot;  // uses dot product instructions for bfloat16

  // decode_attention. attend writes a task's partials, or the output if it has none; combine writes the output of a
  // task's heads from the partials of all splits, [splits, kv_heads, rows, kPartialHeader + head_dim] from the task's
  // first head on. Both return the number of rows they wrote to the output that fell back from phi.
  int32_t (*attend)(const AttentionParams&, const AttentionTask&);
  int32_t (*combine)(const AttentionParams&, const AttentionTask&, const float* partials, int64_t splits);

  // linear. pack rewrites rows [begin, end) of x in the kernel's layout, padded with zeros to packed_stride numbers of
  // at most 4 bytes; linear computes a task's outputs from packed rows.
  void (*pack)(const LinearParams&, void* packed, int64_t packed_stride, int64_t begin, int64_t end);
  void (*linear)(const LinearParams&, const void* packed, int64_t packed_stride, const LinearTask&);

  // quantized_linear, likewise. A packed row is packed_stride floats: quantized_sums_at(k) for the padded numbers, then
  // the sum of each group of numbers.
  void (*pack_quantized)(const QuantizedLinearParams&, void* packed, int64_t packed_stride, int64_t begin, int64_t end);
  void (*quantized_linear)(const QuantizedLinearParams&, const void* packed, int64_t packed_stride, const LinearTask&);
  // Weight rows [begin, end) in x's dtype: [end - begin, k].
  void (*dequantize)(const QuantizedLinearParams&, void* out, int64_t begin, int64_t end);

  // to[begin, end) += from[begin, end), both of this dtype.
  void (*add)(void* to, const void* from, DType dtype, int64_t begin, int64_t end);
  void (*norm)(const NormParams&, int64_t row_begin, int64_t row_end);
  void (*rotary)(const RotaryParams&, int64_t token_begin, int64_t token_end);  // tokens of batch * q_len
  void (*activation)(const ActivationParams&, int64_t row, int64_t col_begin, int64_t col_end);

  // sample. argmax: the lowest index of the row's largest logit, or -1 if none is above -inf; NaN counts as -inf.
  int64_t (*argmax)(const void* logits, DType dtype, int64_t n);
  // Writes the row's logits after the repetition penalty, NaN as -inf, to x; returns the largest.
  float (*scores)(const SampleParams&, int64_t row, float* x);
  // w = exp((x - largest) / temperature): weights relative to the most likely token.
  void (*weights)(const float* x, float largest, float temperature, float* w, int64_t n);
  // sums[i]: the sum of w[i * kSumBlock, (i + 1) * kSumBlock).
  void (*block_sums)(const float* w, double* sums, int64_t n);
  // maxima[i]: the maximum of x[i * kMaxBlock, (i + 1) * kMaxBlock).
  void (*block_maxima)(const float* x, float* maxima, int64_t n);
};

inline constexpr int64_t kSumBlock = 256, kMaxBlock = 64;

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
#if defined(FLASHDECPP_HAS_AVX512_AMX)  // set if the compiler supports AMX
extern const Kernels kAvx512AmxKernels;
#endif
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// The best table for this CPU, or the one that FLASHDECPP_CPU_ISA names.
const Kernels& kernels();

}  // namespace flashdecpp::cpu
