// The limits of the ops' contracts: read by the checks, by the hosts of the kernels and, through _C, by Python.
#pragma once

#include <cstdint>

namespace flashdecpp {

inline constexpr int64_t kMaxNewTokens = 16;   // decode_attention: q_len
inline constexpr int64_t kMaxHeadDim = 256;    // decode_attention: head_dim
inline constexpr int64_t kMaxQueryGroup = 16;  // decode_attention: query heads per KV head

// quantized_linear on a GPU: up to this many rows of x stream the quantized weights. Beyond it, reading the weights
// once per 16 rows costs more than dequantizing them to memory and reading them back once.
inline constexpr int64_t kMaxStreamedRows = 48;

}  // namespace flashdecpp
