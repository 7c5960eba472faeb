// How memory is described to tensor copies.
#pragma once

#include <cuda.h>

#include "cuda/launch.h"

namespace flashdecpp {

// The driver's cuTensorMapEncodeTiled; looked up once, not at every call.
inline auto tensor_map_encoder(const char* op) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [op] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "looking for cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      fault(op, ": the driver is older than CUDA 12 and has no cuTensorMapEncodeTiled; ",
            "set FLASHDECPP_GPU_KERNELS=generic");
    }
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

// Dimensions nearest first; strides, in bytes, of all but the first; boxes of 128 bytes a row, swizzled. What is beyond
// the sizes reads as zeros.
template <int dims>
CUtensorMap tensor_map(const char* op, const char* arg, CUtensorMapDataType type, const void* data,
                       const uint64_t (&sizes)[dims], const uint64_t (&strides)[dims - 1], const uint32_t (&box)[dims],
                       CUtensorMapL2promotion promotion) {
  uint32_t every[dims];
  std::fill(every, every + dims, 1);
  CUtensorMap map;
  const CUresult result = tensor_map_encoder(op)(&map, type, dims, const_cast<void*>(data), sizes, strides, box, every,
                                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fault(op, ": ", arg, " has a layout that tensor copies refuse (driver error ", static_cast<int>(result),
          "); set FLASHDECPP_GPU_KERNELS=generic");
  }
  return map;
}

}  // namespace flashdecpp
