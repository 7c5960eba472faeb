// The TMA descriptor of a KV cache.
#pragma once

#include "cuda/nvidia/tensor_map.h"

namespace flashdecpp {

// [head_dim, block_size, kv_heads, num_blocks], innermost first; boxes of 16 tokens of `columns` columns, 128 bytes.
inline CUtensorMap cache_map(const char* arg, const AttentionParams& p, const void* data, const CacheLayout& layout,
                             int columns) {
  const bool is_float8 = p.kv_dtype == DType::kFloat8E4M3;
  const uint64_t element = is_float8 ? 1 : 2;
  const uint64_t sizes[] = {static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(p.block_size),
                            static_cast<uint64_t>(p.kv_heads), static_cast<uint64_t>(p.num_blocks)};
  const int64_t steps[] = {layout.token_stride, layout.head_stride, layout.block_stride};
  uint64_t strides[3];
  for (int i = 0; i < 3; ++i) {  // a dimension of size 1 never uses its stride, which must still be valid
    strides[i] = sizes[i + 1] > 1 ? static_cast<uint64_t>(steps[i]) * element : 16;
  }
  const uint32_t box[] = {static_cast<uint32_t>(columns), 16, 1, 1};
  return tensor_map("decode_attention", arg, is_float8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
                    data, sizes, strides, box, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

}  // namespace flashdecpp
