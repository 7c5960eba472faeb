// A matrix as tensor copies want it described.
#pragma once

#include "cuda/nvidia/tensor_map.h"

namespace flashdecpp {

// Whether it can be: rows of whole 16 bytes that don't overlap.
inline bool fits_matrix_map(const void* data, int64_t rows, int64_t columns, int64_t stride) {
  constexpr int64_t element = 2, most = INT32_MAX - 255;  // coordinates are 32 bit
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows < most && columns < most &&
         (rows <= 1 || (stride >= columns && stride * element % 16 == 0 && stride * element < int64_t{1} << 40));
}

// [columns, rows], nearest first, of 2-byte elements; boxes of 128 bytes of box_rows rows, swizzled.
inline CUtensorMap matrix_map(const char* op, const void* data, int64_t rows, int64_t columns, int64_t stride,
                              int box_rows, CUtensorMapL2promotion promotion) {
  const uint64_t sizes[] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)};
  const uint64_t strides[] = {rows > 1 ? static_cast<uint64_t>(stride) * 2 : static_cast<uint64_t>(columns) * 2};
  const uint32_t box[] = {64, static_cast<uint32_t>(box_rows)};
  return tensor_map(op, "weight or x", CU_TENSOR_MAP_DATA_TYPE_UINT16, data, sizes, strides, box, promotion);
}

}  // namespace flashdecpp
