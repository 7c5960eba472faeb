// Vector widths of the elementwise kernels, and whether a call's pointers and strides are aligned for them.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "torch_api.h"

namespace flashdecpp {

// Elements of a 16-byte access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// True if `data` (which may be null) and every stride are aligned for accesses of `vector` elements of `bytes` bytes.
inline bool vectors_fit(const void* data, int64_t bytes, int vector, std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % std::min<int64_t>(16, bytes * vector) != 0) return false;
  return std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride % vector == 0; });
}

inline void check_grid_y(const char* op, const char* arg, int64_t blocks) {
  FLASHDECPP_REQUIRE(blocks <= 65535, op, arg, " must have rows that 65535 blocks can hold, got ", blocks, " blocks");
}

}  // namespace flashdecpp
