// The only header that includes torch, and only its stable ABI: one binary serves every torch >= 2.10.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace flashdecpp {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Text without streams: their locale facets crash where a linker has put a second libstdc++ into the library.
inline std::string text_of(const char* value) { return value; }
inline std::string text_of(const std::string& value) { return value; }
template <class Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
std::string text_of(Integer value) {
  return std::to_string(value);
}
inline std::string text_of(double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", value);
  return digits;
}

inline std::string list_text(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  throw std::runtime_error("flashdecpp::" + std::string(op) + ": " + (text_of(args) + ...));
}

// The message is built only when the check fails: REQUIRE(ok, op, "q must be ..., got ", q.shape()).
#define FLASHDECPP_REQUIRE(condition, op, ...) \
  do {                                         \
    if (!(condition)) {                        \
      ::flashdecpp::fail(op, __VA_ARGS__);     \
    }                                          \
  } while (false)

inline DType dtype_from_torch(int32_t code) {
  if (code == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (code == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (code == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (code == aoti_torch_dtype_float8_e4m3fn()) return DType::kFloat8E4M3;
  if (code == aoti_torch_dtype_int8()) return DType::kInt8;
  if (code == aoti_torch_dtype_uint8()) return DType::kUInt8;
  if (code == aoti_torch_dtype_int32()) return DType::kInt32;
  if (code == aoti_torch_dtype_int64()) return DType::kInt64;
  if (code == aoti_torch_dtype_bool()) return DType::kBool;
  return DType::kOther;
}

inline int32_t dtype_to_torch(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return aoti_torch_dtype_float32();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    case DType::kBFloat16: return aoti_torch_dtype_bfloat16();
    case DType::kFloat8E4M3: return aoti_torch_dtype_float8_e4m3fn();
    case DType::kInt8: return aoti_torch_dtype_int8();
    case DType::kUInt8: return aoti_torch_dtype_uint8();
    case DType::kInt32: return aoti_torch_dtype_int32();
    case DType::kInt64: return aoti_torch_dtype_int64();
    case DType::kBool: return aoti_torch_dtype_bool();
    case DType::kOther: break;
  }
  throw std::logic_error("flashdecpp: a dtype without a torch code");
}

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kBool: return "bool";
    case DType::kOther: return "another dtype";
  }
  return "another dtype";
}

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
  std::string str() const {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    const std::string kind = type == aoti_torch_device_type_cuda() ? "cuda" : "device type " + std::to_string(type);
    return kind + ":" + std::to_string(index);
  }
};

// What the checks and the kernels read of a tensor, read once.
struct View {
  void* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  DType dtype = DType::kOther;
  Device device;

  View() = default;
  explicit View(const Tensor& tensor) {
    const AtenTensorHandle handle = tensor.get();
    int64_t *size_ptr = nullptr, *stride_ptr = nullptr;
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &size_ptr));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &stride_ptr));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device.index));
    sizes = size_ptr;
    strides = stride_ptr;
    dtype = dtype_from_torch(code);
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dim; ++i) product *= sizes[i];
    return product;
  }
  bool contiguous_from(int64_t first) const {  // dimensions first, first + 1, ... packed without gaps
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= first; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }
  bool last_dim_contiguous() const { return dim > 0 && (strides[dim - 1] == 1 || sizes[dim - 1] <= 1); }
  std::string shape() const { return list_text(sizes, dim); }
  std::string stride_list() const { return list_text(strides, dim); }
};

inline constexpr int64_t kMaxDims = 64;  // torch's own limit

// A new contiguous tensor; memory comes from torch's allocator on that device.
inline Tensor new_tensor(const int64_t* sizes, int64_t dim, DType dtype, Device device) {
  int64_t strides[kMaxDims];
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype_to_torch(dtype), device.type, device.index, &handle));
  return Tensor(handle);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, DType dtype, Device device) {
  return new_tensor(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, device);
}

// Any op that returns a tensor, by its name, with all its arguments.
template <class... Args>
Tensor call_op(const char* name, const Args&... args) {
  StableIValue stack[] = {torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's own linear: the vendor BLAS.
inline Tensor blas_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return call_op("aten::linear", x, weight, bias);
}

}  // namespace flashdecpp
