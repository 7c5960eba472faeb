// Every vector kernel of the CPU library as a table of function pointers: one table an instruction set, one choice a
// process. A kernel works on a range of rows and knows nothing of threads; the hosts (attention.cpp, linear.cpp, ...)
// split the work.
#pragma once

#include <cstdint>

#include "params.h"

namespace flashdecpp::cpu {

// Packed activations of linear are padded to a multiple of this: what a kernel reads at once.
inline constexpr int64_t kPackAlign = 32;
// The same of quantized_linear: how many weights of 4 bits a vector holds.
inline constexpr int64_t kQuantizedAlign = 128;
inline constexpr int64_t quantized_sums_at(int64_t k) {
  return (k + kQuantizedAlign - 1) / kQuantizedAlign * kQuantizedAlign;
}
// Rows of x that one pass over the weights serves.
inline constexpr int kMaxTileM = 8;

// A row of decode_attention is one query head of one token; the rows of one KV head are numbered token by token.
// KV heads [head_begin, head_end) of sequence b, which is `length` keys long, over its keys [key_begin, key_end).
struct AttentionTask {
  int32_t b, head_begin, head_end;
  int64_t length, key_begin, key_end;
  float* partial;  // [heads, rows, kStateHeader + head_dim] where the keys are split; null where these are all of them
};
// Rows that a kernel works on at once: as many heads as have them together share the passes over a run of keys.
inline constexpr int kTaskRows = 32;

// A row's state over some keys: the value subtracted from its logits, the sum of exponentials, the largest logit, one
// unused; then its weighted sum of values. States of disjoint keys merge exactly.
inline constexpr int64_t kStateHeader = 4;

// Outputs [m_begin, m_end) x [n_begin, n_end) of a linear.
struct LinearPart {
  int64_t m_begin, m_end, n_begin, n_end;
};

struct Kernels {
  const char* name;
  bool bfloat16_dot;  // has instructions for products of bfloat16

  // decode_attention. A task without `partial` writes the output, as merge does for a task's heads from the partials of
  // all splits, which are all heads' partials apart; both return how many of the rows they wrote could not use phi.
  int32_t (*attend)(const AttentionParams&, const AttentionTask&);
  int32_t (*merge)(const AttentionParams&, const AttentionTask&, const float* partials, int64_t splits);

  // linear: the rows [begin, end) of x as the kernel wants them, at most a float a number, each padded with zeros to
  // packed_stride; then a part of the outputs.
  void (*pack)(const LinearParams&, void* packed, int64_t packed_stride, int64_t begin, int64_t end);
  void (*linear)(const LinearParams&, const void* packed, int64_t packed_stride, const LinearPart&);

  // quantized_linear, the same way. A packed row is packed_stride floats: at most one a number, of which there are
  // quantized_sums_at(k) with padding, then the sum of each group of numbers.
  void (*pack_quantized)(const QuantizedLinearParams&, void* packed, int64_t packed_stride, int64_t begin, int64_t end);
  void (*quantized_linear)(const QuantizedLinearParams&, const void* packed, int64_t packed_stride, const LinearPart&);
  // The weight rows [begin, end) as numbers of x's dtype, [end - begin, k].
  void (*dequantize)(const QuantizedLinearParams&, void* out, int64_t begin, int64_t end);

  // to[begin, end) += from[begin, end), of one dtype.
  void (*add)(void* to, const void* from, DType dtype, int64_t begin, int64_t end);
  void (*norm)(const NormParams&, int64_t row_begin, int64_t row_end);
  void (*rotary)(const RotaryParams&, int64_t token_begin, int64_t token_end);  // a token of batch * q_len
  void (*activation)(const ActivationParams&, int64_t row, int64_t col_begin, int64_t col_end);

  // sample: the lowest index of the row's largest logit, -1 where none is above -inf (NaN counts as -inf).
  int64_t (*argmax)(const void* logits, DType dtype, int64_t n);
  // The row's logits after the repetition penalty, NaN as -inf; returns the largest.
  float (*scores)(const SampleParams&, int64_t row, float* x);
  // x -> exp((x - largest) / temperature), the weights relative to the most likely token. block_sums[i] adds up weights
  // [i * kSumBlock, (i + 1) * kSumBlock).
  void (*weights)(const float* x, float largest, float temperature, float* w, int64_t n);
  void (*block_sums)(const float* w, double* sums, int64_t n);
  // maxima[i]: the largest of x[i * kMaxBlock, (i + 1) * kMaxBlock).
  void (*block_maxima)(const float* x, float* maxima, int64_t n);
};

inline constexpr int64_t kSumBlock = 256, kMaxBlock = 64;

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
#if defined(FLASHDECPP_HAS_AMX)  // the compiler has it
extern const Kernels kAvx512AmxKernels;
#endif
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// The table for this machine, or the one that FLASHDECPP_CPU_ISA names.
const Kernels& kernels();

}  // namespace flashdecpp::cpu
