// TMA descriptors (tensor maps).
#pragma once

#include <cuda.h>

#include "cuda/launch.h"

namespace flashdecpp {

// The driver's cuTensorMapEncodeTiled, looked up once.
inline auto tensor_map_encoder(const char* op) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [op] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status;
    check_cuda(op,
               cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &status),
               "looking for cuTensorMapEncodeTiled");
    if (status != cudaDriverEntryPointSuccess) {
      fault(op, ": the driver is older than CUDA 12 and has no cuTensorMapEncodeTiled; ",
            "set FLASHDECPP_GPU_KERNELS=generic");
    }
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

// Dimensions are innermost first, strides are in bytes and leave out the innermost. Boxes have rows of 128 bytes, are
// swizzled, and read as zeros outside of the tensor.
template <int dims>
CUtensorMap tensor_map(const char* op, const char* arg, CUtensorMapDataType type, const void* data,
                       const uint64_t (&sizes)[dims], const uint64_t (&strides)[dims - 1], const uint32_t (&box)[dims],
                       CUtensorMapL2promotion promotion) {
  uint32_t element_strides[dims];
  std::fill(element_strides, element_strides + dims, 1);
  CUtensorMap map;
  const CUresult result = tensor_map_encoder(op)(
      &map, type, dims, const_cast<void*>(data), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fault(op, ": ", arg, " has a layout that TMA does not support (driver error ", static_cast<int>(result),
          "); set FLASHDECPP_GPU_KERNELS=generic");
  }
  return map;
}

}  // namespace flashdecpp
