// Which accesses fit, for the elementwise launches.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "torch_api.h"

namespace flashdecpp {

// Elements of a 16-byte access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// Whether accesses of `vector` elements fit: the pointer (which may be null) and every stride.
inline bool vectors_fit(const void* data, int64_t bytes, int vector, std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % std::min<int64_t>(16, bytes * vector) != 0) return false;
  return std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride % vector == 0; });
}

inline void check_grid_y(const char* op, const char* arg, int64_t blocks) {
  FLASHDECPP_REQUIRE(blocks <= 65535, op, arg, " must have rows that 65535 blocks can hold, got ", blocks, " blocks");
}

}  // namespace flashdecpp
