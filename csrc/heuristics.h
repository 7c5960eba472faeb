// Every choice that the host makes before a launch, as pure functions of shapes and device properties: no torch, no
// CUDA, tested without a GPU and shown by `flashdecpp info`.
#pragma once

#include <algorithm>
#include <cstdint>

namespace flashdecpp {

struct DeviceProperties {
  int32_t multiprocessors;  // 132 on an H100 SXM
  int32_t arch;             // 80, 86, 89, 90: compute capability times ten
};

// ---- which linear
// ------------------------------------------------------------------------------------------------------
enum class LinearImpl : int8_t { kGemv, kFlatGemm, kBlas };

inline const char* name(LinearImpl impl) {
  switch (impl) {
    case LinearImpl::kGemv: return "gemv";
    case LinearImpl::kFlatGemm: return "flat_gemm";
    case LinearImpl::kBlas: return "blas";
  }
  return "blas";
}

// Inflection points of the paper's third idea (FlashDecoding++ section 5): gemv below m1, flat GEMM from m1 to m2, blas
// above.
struct InflectionPoints {
  int64_t m1, m2;
};

// The rule for a shape that nobody has profiled. The GEMV reads every weight once whatever M is, on CUDA cores: four
// rows of x cost 4 fused multiply-adds a weight, about what one multiprocessor issues in the time memory delivers it.
// The flat GEMM pads M to 8 and stays bound by the weight bytes until the tensor cores' tile of 64 rows is full.
inline InflectionPoints default_inflection_points(const DeviceProperties&) { return {5, 65}; }

inline LinearImpl choose_linear(InflectionPoints points, int64_t m, int64_t k) {
  if (k % 8 != 0) return LinearImpl::kBlas;  // rows that 16-byte loads cannot start on
  if (m < points.m1) return LinearImpl::kGemv;
  return m < points.m2 ? LinearImpl::kFlatGemm : LinearImpl::kBlas;
}

// ---- how many KV splits
// ------------------------------------------------------------------------------------------------ Lengths live on the
// device, so the choice is made from the capacity of the cache. Enough splits to give every multiprocessor
// `blocks_per_multiprocessor` blocks, but none shorter than `min_keys`, where a block's fixed cost would outweigh its
// loads.
inline int32_t choose_num_splits(const DeviceProperties& device, int64_t independent_blocks, int64_t capacity) {
  constexpr int64_t blocks_per_multiprocessor = 2, min_keys = 256, max_splits = 128;
  const int64_t wanted = (device.multiprocessors * blocks_per_multiprocessor + independent_blocks - 1) /
                         std::max<int64_t>(1, independent_blocks);
  const int64_t longest = std::max<int64_t>(1, (capacity + min_keys - 1) / min_keys);
  return static_cast<int32_t>(std::clamp<int64_t>(std::min(wanted, longest), 1, max_splits));
}

}  // namespace flashdecpp
