// A cache as tensor copies want it described.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace flashdecpp {

// The driver's cuTensorMapEncodeTiled; looked up once, not at every call.
inline auto tensor_map_encoder(const char* op) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [op] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "looking for cuTensorMapEncodeTiled");
    FLASHDECPP_REQUIRE(found == cudaDriverEntryPointSuccess, op, "the driver is older than CUDA 12 and has no ",
                       "cuTensorMapEncodeTiled; set FLASHDECPP_GPU_KERNELS=generic");
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

// [head_dim, block_size, kv_heads, num_blocks], nearest first; boxes of 16 tokens and `columns` columns, 128 bytes.
inline CUtensorMap cache_map(const char* arg, const AttentionParams& p, const void* data, const CacheLayout& layout,
                             int columns) {
  constexpr const char* op = "decode_attention";
  const bool is_float8 = p.kv_dtype == DType::kFloat8E4M3;
  const uint64_t element = is_float8 ? 1 : 2;
  const uint64_t sizes[] = {static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(p.block_size),
                            static_cast<uint64_t>(p.kv_heads), static_cast<uint64_t>(p.num_blocks)};
  const int64_t steps[] = {layout.token_stride, layout.head_stride, layout.block_stride};
  uint64_t strides[3];
  for (int i = 0; i < 3; ++i) {  // of a dimension of one the stride is never used, but must be a legal one
    strides[i] = sizes[i + 1] > 1 ? static_cast<uint64_t>(steps[i]) * element : 16;
  }
  const uint32_t box[] = {static_cast<uint32_t>(columns), 16, 1, 1}, every[] = {1, 1, 1, 1};

  CUtensorMap map;
  const CUresult result = tensor_map_encoder(op)(
      &map, is_float8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data),
      sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FLASHDECPP_REQUIRE(result == CUDA_SUCCESS, op, arg, " has a layout that tensor copies refuse (driver error ",
                     static_cast<int>(result), "); set FLASHDECPP_GPU_KERNELS=generic");
  return map;
}

}  // namespace flashdecpp
