// Includes torch for the host code, and only its stable ABI, so one binary serves every torch >= 2.10.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdio>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace flashdecpp {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Without streams, whose locale facets crash if a second libstdc++ has been linked into the library.
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

// For example "5.5 TB".
inline std::string bytes_text(double bytes) {
  const char* const units[] = {" bytes", " kB", " MB", " GB", " TB", " PB", " EB"};
  size_t unit = 0;
  for (; bytes >= 1000 && unit + 1 < std::size(units); ++unit) bytes /= 1000;
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.3g", bytes);
  return digits + std::string(units[unit]);
}

// An error in an argument. Only such messages begin with "flashdecpp::OP: ", by which the wrappers recognize a
// ValueError.
template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  throw std::runtime_error("flashdecpp::" + std::string(op) + ": " + (text_of(args) + ...));
}

// Any other error.
template <class... Args>
[[noreturn]] void fault(const Args&... args) {
  throw std::runtime_error("flashdecpp: " + (text_of(args) + ...));
}

// The wrappers recognize it by the start of its message.
template <class... Args>
[[noreturn]] void out_of_memory(const Args&... args) {
  fault("out of memory: ", args...);
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
    case DType::kOther: break;
  }
  return "another dtype";
}

// The name of any torch dtype, by torch's code for it.
inline std::string dtype_name(int32_t code) {
  const struct {
    int32_t code;
    const char* name;
  } others[] = {{aoti_torch_dtype_float64(), "float64"},
                {aoti_torch_dtype_int16(), "int16"},
                {aoti_torch_dtype_uint16(), "uint16"},
                {aoti_torch_dtype_uint32(), "uint32"},
                {aoti_torch_dtype_uint64(), "uint64"},
                {aoti_torch_dtype_complex32(), "complex32"},
                {aoti_torch_dtype_complex64(), "complex64"},
                {aoti_torch_dtype_complex128(), "complex128"},
                {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
                {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
                {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"}};
  for (const auto& other : others) {
    if (other.code == code) return other.name;
  }
  const DType dtype = dtype_from_torch(code);
  return dtype == DType::kOther ? "dtype " + std::to_string(code) : name(dtype);
}

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
  std::string str() const {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    if (type == aoti_torch_device_type_meta()) return "meta";
    const std::string kind = type == aoti_torch_device_type_cuda() ? "cuda" : "device type " + std::to_string(type);
    return kind + ":" + std::to_string(index);
  }
};

// The properties of a tensor that checks and kernels use, read once.
struct View {
  void* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  DType dtype = DType::kOther;
  int32_t dtype_code = 0;  // torch's code
  Device device;
  bool defined = false;  // false for None, if the schema asks for a tensor

  View() = default;
  explicit View(const Tensor& tensor) {
    const AtenTensorHandle handle = tensor.get();
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined));
    if (!defined) return;
    int64_t *size_ptr = nullptr, *stride_ptr = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &size_ptr));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &stride_ptr));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device.index));
    sizes = size_ptr;
    strides = stride_ptr;
    dtype = dtype_from_torch(dtype_code);
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dim; ++i) product *= sizes[i];
    return product;
  }
  bool contiguous_from(int64_t first) const {  // dimensions first, first + 1, ... have no gaps
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= first; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }
  bool last_dim_contiguous() const { return dim > 0 && (strides[dim - 1] == 1 || sizes[dim - 1] <= 1); }
  std::string dtype_name() const { return flashdecpp::dtype_name(dtype_code); }
  std::string shape() const { return list_text(sizes, dim); }
  std::string stride_list() const { return list_text(strides, dim); }
};

inline constexpr int64_t kMaxDims = 64;  // torch's own limit

// A new contiguous tensor, from torch's allocator on that device.
inline Tensor new_tensor(const int64_t* sizes, int64_t dim, DType dtype, Device device) {
  int64_t strides[kMaxDims];
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  const int32_t code = dtype_to_torch(dtype);
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dim, sizes, strides, code, device.type, device.index, &handle) != AOTI_TORCH_SUCCESS) {
    double bytes = static_cast<double>(aoti_torch_dtype_element_size(code));
    for (int64_t i = 0; i < dim; ++i) bytes *= static_cast<double>(sizes[i]);
    out_of_memory(bytes_text(bytes), " could not be allocated on ", device.str(), " for a result of shape ",
                  list_text(sizes, dim), " in ", name(dtype));
  }
  return Tensor(handle);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, DType dtype, Device device) {
  return new_tensor(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, device);
}

// The same memory with other sizes and strides, invisible to autograd.
inline Tensor alias(const Tensor& tensor, std::initializer_list<int64_t> sizes,
                    std::initializer_list<int64_t> strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                        strides.begin(), 0, &handle));
  return Tensor(handle);
}

template <class Copy>
Tensor copy_or_out_of_memory(const Tensor& tensor, Copy copy) {
  try {
    return copy(tensor);
  } catch (const std::exception&) {
    const View t(tensor);
    const auto bytes =
        static_cast<double>(aoti_torch_dtype_element_size(t.dtype_code)) * static_cast<double>(t.numel());
    out_of_memory(bytes_text(bytes), " could not be allocated on ", t.device.str(), " for a copy of shape ", t.shape());
  }
}

// The tensor itself if it is contiguous, else a contiguous copy.
inline Tensor packed(const Tensor& tensor) {
  return copy_or_out_of_memory(tensor, [](const Tensor& t) { return torch::stable::contiguous(t); });
}

// Always a contiguous copy.
inline Tensor packed_copy(const Tensor& tensor) {
  return copy_or_out_of_memory(tensor,
                               [](const Tensor& t) { return torch::stable::contiguous(torch::stable::clone(t)); });
}

// Calls any op that returns one tensor, by name and overload, with all of its arguments.
template <class... Args>
Tensor call_op(const char* name, const char* overload, const Args&... args) {
  StableIValue stack[] = {torch::stable::detail::from(args)...};
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    fault("torch's ", name, " failed");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace flashdecpp
