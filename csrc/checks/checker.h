// The checks that all ops use. A tensor becomes a View, or an error names the argument, what it must be and what it
// was. Outputs are not allocated here; each backend's host function does that after its device guard.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "overlap.h"
#include "torch_api.h"

namespace flashdecpp::checks {

// The requirements in which backends differ.
struct Backend {
  bool attention_float32;  // decode_attention accepts float32
  int64_t alignment;       // that vector loads need, in bytes; 1: none
};
inline constexpr Backend kCpu{true, 1};
inline constexpr Backend kGpu{false, 16};

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kInt64: return 8;
    default: return 1;
  }
}

inline bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// The check of one call: the op's name, the device that all tensors must be on, and the arguments seen so far.
class Checker {
 public:
  const char* op;
  Device device;
  const char* first;  // the argument that sets the device

  Checker(const char* op_name, const char* first_name) : op(op_name), first(first_name) {}

  // Reads and records an argument. The first call must be for `first`.
  View take(const char* arg, const Tensor& tensor) { return add(arg, tensor, false); }
  // The same for an argument that the op updates in place.
  View take_written(const char* arg, const Tensor& tensor) { return add(arg, tensor, true); }

  // No updated argument may overlap itself or any other argument.
  void written_apart() const {
    for (int i = 0; i < count_; ++i) {
      const Argument& a = arguments_[i];
      if (!a.written) continue;
      FLASHDECPP_REQUIRE(!overlaps_itself(region(a.view)), op, a.name, " must not overlap itself, got strides ",
                         a.view.stride_list(), " for shape ", a.view.shape());
      for (int j = 0; j < count_; ++j) {
        const Argument& b = arguments_[j];
        if (j == i || (b.written && j < i)) continue;
        FLASHDECPP_REQUIRE(!overlaps(region(a.view), region(b.view)), op, a.name, " must share no memory with ", b.name,
                           ", got one that does");
      }
    }
  }

  void rank(const char* arg, const View& t, int64_t dim, const char* shape) const {
    FLASHDECPP_REQUIRE(t.dim == dim, op, arg, " must be ", shape, ", got shape ", t.shape());
  }
  void dtype(const char* arg, const View& t, DType wanted) const {
    FLASHDECPP_REQUIRE(t.dtype == wanted, op, arg, " must be ", name(wanted), ", got ", t.dtype_name());
  }
  void float_dtype(const char* arg, const View& t) const {
    FLASHDECPP_REQUIRE(is_float(t.dtype), op, arg, " must be float32, float16 or bfloat16, got ", t.dtype_name());
  }
  void shape(const char* arg, const View& t, std::initializer_list<int64_t> wanted) const {
    bool same = t.dim == static_cast<int64_t>(wanted.size());
    for (int64_t i = 0; same && i < t.dim; ++i) same = t.sizes[i] == wanted.begin()[i];
    if (same) return;
    fail(op, arg, " must have shape ", list_text(wanted.begin(), static_cast<int64_t>(wanted.size())), ", got ",
         t.shape());
  }
  void last_contiguous(const char* arg, const View& t) const {
    FLASHDECPP_REQUIRE(t.last_dim_contiguous(), op, arg, " must be contiguous in its last dimension, got strides ",
                       t.stride_list());
  }
  void contiguous(const char* arg, const View& t) const {
    FLASHDECPP_REQUIRE(t.contiguous_from(0), op, arg, " must be contiguous, got strides ", t.stride_list(),
                       " for shape ", t.shape());
  }
  // For vector loads: the first element and every row must start on a multiple of `bytes`.
  void aligned(const char* arg, const View& t, int64_t bytes) const {
    if (bytes <= 1) return;
    FLASHDECPP_REQUIRE(reinterpret_cast<uintptr_t>(t.data) % bytes == 0, op, arg, " must start on a multiple of ",
                       bytes, " bytes, got address remainder ", reinterpret_cast<uintptr_t>(t.data) % bytes);
    for (int64_t i = 0; i + 1 < t.dim; ++i) {
      FLASHDECPP_REQUIRE(t.sizes[i] <= 1 || t.strides[i] * element_size(t.dtype) % bytes == 0, op, arg,
                         " must have strides of a multiple of ", bytes, " bytes, got strides ", t.stride_list());
    }
  }
  // A small contiguous tensor of an exact dtype and shape, such as parameters per head or per sequence; null if None.
  template <class T>
  const T* parameter(const char* arg, const OptionalTensor& tensor, DType wanted,
                     std::initializer_list<int64_t> sizes) {
    return tensor ? static_cast<const T*>(parameter(arg, take(arg, *tensor), wanted, sizes)) : nullptr;
  }
  template <class T>
  T* written_parameter(const char* arg, const OptionalTensor& tensor, DType wanted,
                       std::initializer_list<int64_t> sizes) {
    return tensor ? static_cast<T*>(parameter(arg, take_written(arg, *tensor), wanted, sizes)) : nullptr;
  }
  // A Python float that kernels receive as float32. Values that would become 0 or infinity there are refused.
  float number(const char* arg, double value) const {
    const auto x = static_cast<float>(value);
    FLASHDECPP_REQUIRE(value == 0 || std::isnormal(x), op, arg, " must be a number that float32 holds, got ", value);
    return x;
  }
  float positive_or_zero(const char* arg, double value) const {
    FLASHDECPP_REQUIRE(value >= 0, op, arg, " must be 0 or positive, got ", value);
    return number(arg, value);
  }

 private:
  struct Argument {
    const char* name;
    View view;
    bool written;
  };

  static Region region(const View& t) {
    return {reinterpret_cast<uintptr_t>(t.data), t.sizes, t.strides, t.dim, element_size(t.dtype)};
  }

  View add(const char* arg, const Tensor& tensor, bool written) {
    const View t(tensor);
    FLASHDECPP_REQUIRE(t.defined, op, arg, " must be a tensor, got None");
    if (count_ == 0) device = t.device;
    FLASHDECPP_REQUIRE(t.device == device, op, arg, " must be on ", device.str(), " as ", first, ", got ",
                       t.device.str());
    FLASHDECPP_REQUIRE(t.data || t.numel() == 0, op, arg, " must have memory, got a tensor whose storage is empty");
    arguments_[count_++] = {arg, t, written};
    return t;
  }

  void* parameter(const char* arg, const View& t, DType wanted, std::initializer_list<int64_t> sizes) const {
    dtype(arg, t, wanted);
    shape(arg, t, sizes);
    contiguous(arg, t);
    return t.data;
  }

  static constexpr int kMaxArguments = 12;  // decode_attention has 11
  Argument arguments_[kMaxArguments];
  int count_ = 0;
};

inline int32_t to_int32(const Checker& check, const char* arg, int64_t value) {
  FLASHDECPP_REQUIRE(value <= INT32_MAX, check.op, arg, " must have dimensions below 2^31, got ", value);
  return static_cast<int32_t>(value);
}

// A new tensor of x's shape, dtype and device, but with another last dimension.
inline Tensor new_like_rows(const View& x, int64_t last) {
  int64_t sizes[kMaxDims];
  for (int64_t i = 0; i + 1 < x.dim; ++i) sizes[i] = x.sizes[i];
  sizes[x.dim - 1] = last;
  return new_tensor(sizes, x.dim, x.dtype, x.device);
}

}  // namespace flashdecpp::checks
