// Tensor maps of 16-bit matrices, for the TMA loads of the flat GEMM.
#pragma once

#include "cuda/nvidia/tensor_map.h"

namespace flashdecpp {

// True if TMA can address the matrix: 16-byte aligned rows that do not overlap, and 32-bit coordinates.
inline bool fits_matrix_map(const void* data, int64_t rows, int64_t columns, int64_t stride) {
  constexpr int64_t element = 2, max_size = INT32_MAX - 255;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows < max_size && columns < max_size &&
         (rows <= 1 || (stride >= columns && stride * element % 16 == 0 && stride * element < int64_t{1} << 40));
}

// A tensor map of [columns, rows], innermost first, with swizzled boxes of 64 columns (128 bytes) x box_rows rows.
inline CUtensorMap matrix_map(const char* op, const void* data, int64_t rows, int64_t columns, int64_t stride,
                              int box_rows, CUtensorMapL2promotion promotion) {
  const uint64_t sizes[] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)};
  const uint64_t strides[] = {rows > 1 ? static_cast<uint64_t>(stride) * 2 : static_cast<uint64_t>(columns) * 2};
  const uint32_t box[] = {64, static_cast<uint32_t>(box_rows)};
  return tensor_map(op, "weight or x", CU_TENSOR_MAP_DATA_TYPE_UINT16, data, sizes, strides, box, promotion);
}

}  // namespace flashdecpp
