// Tensors -> params, or an error that names the argument, what it must be and what it was. Shared by every backend, so
// the contract of an op exists once. Outputs are not allocated here: the host function of the backend does that after
// its guard.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "heuristics.h"
#include "sharing.h"
#include "torch_api.h"

namespace flashdecpp::contract {

// What differs between backends.
struct Backend {
  bool attention_float32;  // decode_attention in float32
  int64_t alignment;       // bytes that a vector load needs; 1: none
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

// One op call being checked: its name, the device that every tensor must share, and what it was given so far.
class Checker {
 public:
  const char* op;
  Device device;
  const char* first;  // the argument whose device counts

  Checker(const char* op_name, const char* first_name) : op(op_name), first(first_name) {}

  // An argument as the checks and the kernels see it. The first one taken is `first`.
  View take(const char* arg, const Tensor& tensor) { return add(arg, tensor, false); }
  // The same of one that the op updates in place.
  View take_written(const char* arg, const Tensor& tensor) { return add(arg, tensor, true); }

  // Of all that was taken: what is written must be written once, and be no other argument.
  void written_apart() const {
    for (int i = 0; i < count_; ++i) {
      const Argument& a = arguments_[i];
      if (!a.written) continue;
      FLASHDECPP_REQUIRE(!overlaps_itself(region(a.view)), op, a.name, " must not overlap itself, got strides ",
                         a.view.stride_list(), " for shape ", a.view.shape());
      for (int j = 0; j < count_; ++j) {
        const Argument& b = arguments_[j];
        if (j == i || (b.written && j < i)) continue;
        FLASHDECPP_REQUIRE(!share_memory(region(a.view), region(b.view)), op, a.name, " must share no memory with ",
                           b.name, ", got one that does");
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
  // Vector loads: the first element and every row start on a multiple of `bytes`.
  void aligned(const char* arg, const View& t, int64_t bytes) const {
    if (bytes <= 1) return;
    FLASHDECPP_REQUIRE(reinterpret_cast<uintptr_t>(t.data) % bytes == 0, op, arg, " must start on a multiple of ",
                       bytes, " bytes, got address remainder ", reinterpret_cast<uintptr_t>(t.data) % bytes);
    for (int64_t i = 0; i + 1 < t.dim; ++i) {
      FLASHDECPP_REQUIRE(t.sizes[i] <= 1 || t.strides[i] * element_size(t.dtype) % bytes == 0, op, arg,
                         " must have strides of a multiple of ", bytes, " bytes, got strides ", t.stride_list());
    }
  }
  // A small contiguous tensor of one dtype and exact shape: the per-head and per-sequence parameters.
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
  // A float of Python's that the kernels get as a float32: not one that would be another number there, such as infinity
  // or 0.
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

  static constexpr int kMostArguments = 12;  // decode_attention has 11
  Argument arguments_[kMostArguments];
  int count_ = 0;
};

inline int32_t to_int32(const Checker& check, const char* arg, int64_t value) {
  FLASHDECPP_REQUIRE(value <= INT32_MAX, check.op, arg, " must have dimensions below 2^31, got ", value);
  return static_cast<int32_t>(value);
}

// The cache arguments that decode_attention and rotary_append share.
struct Cache {
  const void *k, *v;
  CacheLayout k_layout, v_layout;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t table_stride;
  int32_t num_blocks, block_size, max_blocks, kv_heads;
  const float *k_scale, *v_scale;
  DType dtype;
};

// `written`: into the caches.
inline Cache cache(Checker& check, const Backend& backend, DType compute_dtype, int64_t batch, int64_t head_dim,
                   const Tensor& k_cache, const Tensor& v_cache, bool written, const Tensor& seq_lens,
                   const OptionalTensor& block_table, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const auto take = [&](const char* arg, const Tensor& tensor) {
    return written ? check.take_written(arg, tensor) : check.take(arg, tensor);
  };
  const View k = take("k_cache", k_cache), v = take("v_cache", v_cache);
  const char* shape =
      block_table ? "[num_blocks, block_size, kv_heads, head_dim]" : "[batch, max_len, kv_heads, head_dim]";
  const char* names[] = {"k_cache", "v_cache"};
  const View* views[] = {&k, &v};
  for (int i = 0; i < 2; ++i) {
    const View& t = *views[i];
    check.rank(names[i], t, 4, shape);
    FLASHDECPP_REQUIRE(t.dtype == compute_dtype || t.dtype == DType::kFloat8E4M3, check.op, names[i], " must be ",
                       name(compute_dtype), " as ", check.first, " or float8_e4m3fn, got ", t.dtype_name());
    FLASHDECPP_REQUIRE(t.sizes[3] == head_dim, check.op, names[i], " must have head_dim ", head_dim, " as ",
                       check.first, ", got shape ", t.shape());
    check.last_contiguous(names[i], t);
    check.aligned(names[i], t, backend.alignment == 1 ? 1 : 8 * element_size(t.dtype));
  }
  check.dtype("v_cache", v, k.dtype);
  check.shape("v_cache", v, {k.sizes[0], k.sizes[1], k.sizes[2], k.sizes[3]});

  const View lens = check.take("seq_lens", seq_lens);
  check.dtype("seq_lens", lens, DType::kInt32);
  check.shape("seq_lens", lens, {batch});
  check.contiguous("seq_lens", lens);

  Cache c{};
  c.k = k.data;
  c.v = v.data;
  c.k_layout = {k.strides[0], k.strides[1], k.strides[2]};
  c.v_layout = {v.strides[0], v.strides[1], v.strides[2]};
  c.seq_lens = static_cast<const int32_t*>(lens.data);
  c.num_blocks = to_int32(check, "k_cache", k.sizes[0]);
  c.block_size = to_int32(check, "k_cache", k.sizes[1]);
  c.kv_heads = to_int32(check, "k_cache", k.sizes[2]);
  c.dtype = k.dtype;
  if (block_table) {
    const View table = check.take("block_table", *block_table);
    check.dtype("block_table", table, DType::kInt32);
    check.rank("block_table", table, 2, "[batch, max_blocks]");
    FLASHDECPP_REQUIRE(table.sizes[0] == batch, check.op, "block_table must have ", batch, " rows as ", check.first,
                       " has sequences, got shape ", table.shape());
    check.last_contiguous("block_table", table);
    FLASHDECPP_REQUIRE(c.block_size == 1 || (c.block_size > 0 && c.block_size % 8 == 0), check.op,
                       "k_cache must have a block_size of 1 or a multiple of 8, got ", c.block_size);
    c.block_table = static_cast<const int32_t*>(table.data);
    c.table_stride = table.strides[0];
    c.max_blocks = to_int32(check, "block_table", table.sizes[1]);
  } else {
    FLASHDECPP_REQUIRE(k.sizes[0] == batch, check.op, "k_cache without a block_table must have ", batch,
                       " sequences as ", check.first, ", got shape ", k.shape());
    c.max_blocks = 1;
  }
  FLASHDECPP_REQUIRE(int64_t{c.max_blocks} * c.block_size <= INT32_MAX, check.op,
                     "block_table must address fewer than 2^31 tokens a sequence, got ",
                     int64_t{c.max_blocks} * c.block_size);
  FLASHDECPP_REQUIRE(c.dtype == DType::kFloat8E4M3 || (!k_scale && !v_scale), check.op, k_scale ? "k_scale" : "v_scale",
                     " must be None unless the cache is float8_e4m3fn, got a ", name(c.dtype), " cache");
  c.k_scale = check.parameter<float>("k_scale", k_scale, DType::kFloat32, {c.kv_heads});
  c.v_scale = check.parameter<float>("v_scale", v_scale, DType::kFloat32, {c.kv_heads});
  return c;
}

// A phi that stays as it is: [q_heads] or [batch, q_heads].
inline void unified_maximum(Checker& check, AttentionParams& p, const OptionalTensor& phi) {
  if (!phi) return;
  const View t = check.take("phi", *phi);
  check.dtype("phi", t, DType::kFloat32);
  if (t.dim == 2) {
    check.shape("phi", t, {p.batch, p.q_heads});
    p.phi_batch_stride = p.q_heads;
  } else {
    check.shape("phi", t, {p.q_heads});
  }
  check.contiguous("phi", t);
  p.phi = static_cast<const float*>(t.data);
}

// A phi that is carried from step to step: [batch, q_heads], replaced by the row maximum.
inline void unified_maximum(Checker& check, AttentionParams& p, const Tensor& carried_phi) {
  const View t = check.take_written("carried_phi", carried_phi);
  check.dtype("carried_phi", t, DType::kFloat32);
  check.shape("carried_phi", t, {p.batch, p.q_heads});
  check.last_contiguous("carried_phi", t);
  p.row_max = static_cast<float*>(t.data);
  p.phi = p.row_max;
  p.phi_batch_stride = p.row_max_batch_stride = t.strides[0];
}

// `Phi`: OptionalTensor for one that stays as it is, Tensor for one that is carried.
template <class Phi>
AttentionParams decode_attention(const Backend& backend, const Tensor& q_tensor, const Tensor& k_cache,
                                 const Tensor& v_cache, const Tensor& seq_lens, const OptionalTensor& block_table,
                                 std::optional<double> scale, const Phi& phi, double softcap, int64_t window,
                                 const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                 const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t num_splits,
                                 const OptionalTensor& fallback_count) {
  Checker check("decode_attention", "q");
  const View q = check.take("q", q_tensor);
  check.rank("q", q, 4, "[batch, q_len, q_heads, head_dim]");
  if (backend.attention_float32) {
    check.float_dtype("q", q);
  } else {
    FLASHDECPP_REQUIRE(q.dtype == DType::kFloat16 || q.dtype == DType::kBFloat16, check.op,
                       "q must be float16 or bfloat16 on this device, got ", q.dtype_name());
  }
  check.last_contiguous("q", q);
  check.aligned("q", q, backend.alignment);
  const int64_t batch = q.sizes[0], q_len = q.sizes[1], q_heads = q.sizes[2], head_dim = q.sizes[3];
  FLASHDECPP_REQUIRE(q_len >= 1 && q_len <= 16, check.op, "q must have a q_len of 1 to 16, got ", q_len);
  FLASHDECPP_REQUIRE(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0, check.op,
                     "q must have a head_dim that is a multiple of 8 up to 256, got ", head_dim);
  const Cache c =
      cache(check, backend, q.dtype, batch, head_dim, k_cache, v_cache, false, seq_lens, block_table, k_scale, v_scale);
  FLASHDECPP_REQUIRE(q_heads > 0 && c.kv_heads > 0 && q_heads % c.kv_heads == 0, check.op,
                     "q must have q_heads that are a multiple of kv_heads ", c.kv_heads, ", got ", q_heads);
  FLASHDECPP_REQUIRE(q_heads / c.kv_heads <= 16, check.op, "q must have at most 16 q_heads a kv_head, got ", q_heads,
                     " for ", c.kv_heads);
  FLASHDECPP_REQUIRE(num_splits >= 0, check.op, "num_splits must be 0 (chosen) or positive, got ", num_splits);

  AttentionParams p{};
  p.q = q.data;
  p.k_cache = c.k;
  p.v_cache = c.v;
  p.seq_lens = c.seq_lens;
  p.block_table = c.block_table;
  p.k_scale = c.k_scale;
  p.v_scale = c.v_scale;
  p.k = c.k_layout;
  p.v = c.v_layout;
  p.table_stride = c.table_stride;
  p.num_blocks = c.num_blocks;
  p.block_size = c.block_size;
  p.max_blocks = c.max_blocks;
  p.kv_heads = c.kv_heads;
  p.kv_dtype = c.dtype;
  p.q_dtype = q.dtype;
  p.q_batch_stride = q.strides[0];
  p.q_token_stride = q.strides[1];
  p.q_head_stride = q.strides[2];
  p.batch = to_int32(check, "q", batch);
  p.q_len = static_cast<int32_t>(q_len);
  p.q_heads = to_int32(check, "q", q_heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  p.scale = scale ? check.number("scale", *scale) : 1.0f / std::sqrt(static_cast<float>(head_dim));
  p.softcap = check.positive_or_zero("softcap", softcap);
  p.window = window > 0 ? static_cast<int32_t>(std::min<int64_t>(window, INT32_MAX)) : 0;
  p.num_splits = static_cast<int32_t>(std::min<int64_t>(num_splits, INT32_MAX));
  unified_maximum(check, p, phi);
  p.alibi_slopes = check.parameter<float>("alibi_slopes", alibi_slopes, DType::kFloat32, {q_heads});
  p.sinks = check.parameter<float>("sinks", sinks, DType::kFloat32, {q_heads});
  p.fallback_count = check.written_parameter<int32_t>("fallback_count", fallback_count, DType::kInt32, {1});
  check.written_apart();
  return p;
}

// x as rows of one stride. `x` keeps a packed copy alive where x's own strides cannot be described so.
template <class Params>
struct LinearCall {
  Checker check;
  Tensor x;
  View x_view;
  Params params;

  LinearCall(const char* op, const Tensor& x_tensor)
      : check(op, "x"), x(x_tensor), x_view(check.take("x", x)), params{} {}

  // Packed rows in place of x's.
  void take(Tensor rows) {
    x = std::move(rows);
    x_view = View(x);
    params.x = x_view.data;
    params.x_stride = params.k;
  }
};
using Linear = LinearCall<LinearParams>;
using QuantizedLinear = LinearCall<QuantizedLinearParams>;

// What every linear takes beside its weight, whose n and k are known: x's rows, its dtype, bias.
template <class Params>
void linear_operands(LinearCall<Params>& call, const OptionalTensor& bias) {
  Checker& check = call.check;
  View& a = call.x_view;
  Params& p = call.params;
  p.m = a.numel() / p.k;
  p.dtype = a.dtype;
  p.bias = check.template parameter<void>("bias", bias, a.dtype, std::initializer_list<int64_t>{p.n});
  const bool rows = a.last_dim_contiguous() && (a.dim <= 2 || a.contiguous_from(0));
  if (!rows) {
    call.x = packed(call.x);
    a = View(call.x);
  }
  p.x = a.data;
  p.x_stride = a.dim == 2 ? a.strides[0] : p.k;
}

inline Linear linear(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  Linear call(op, x);
  Checker& check = call.check;
  const View& a = call.x_view;
  FLASHDECPP_REQUIRE(a.dim >= 1, check.op, "x must be [..., K], got a scalar");
  check.float_dtype("x", a);
  const View w = check.take("weight", weight);
  check.rank("weight", w, 2, "[N, K]");
  check.dtype("weight", w, a.dtype);
  const int64_t k = a.sizes[a.dim - 1];
  FLASHDECPP_REQUIRE(w.sizes[1] == k, check.op, "weight must have K ", k, " as x, got shape ", w.shape());
  FLASHDECPP_REQUIRE(k > 0, check.op, "x must have a K above 0, got shape ", a.shape());
  check.last_contiguous("weight", w);

  LinearParams& p = call.params;
  p.n = w.sizes[0];
  p.k = k;
  p.weight = w.data;
  p.weight_stride = w.strides[0];
  linear_operands(call, bias);
  return call;
}

inline QuantizedLinear quantized_linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scales,
                                        const OptionalTensor& offsets, const OptionalTensor& bias) {
  QuantizedLinear call(op, x);
  Checker& check = call.check;
  const View& a = call.x_view;
  FLASHDECPP_REQUIRE(a.dim >= 1, check.op, "x must be [..., K], got a scalar");
  check.float_dtype("x", a);
  const int64_t k = a.sizes[a.dim - 1];
  FLASHDECPP_REQUIRE(k > 0, check.op, "x must have a K above 0, got shape ", a.shape());
  const View w = check.take("weight", weight);
  FLASHDECPP_REQUIRE(w.dtype == DType::kInt8 || w.dtype == DType::kUInt8, check.op,
                     "weight must be int8 (8 bit) or uint8 (4 bit, two a byte), got ", w.dtype_name());
  const bool packed = w.dtype == DType::kUInt8;
  check.rank("weight", w, 2, packed ? "[N, K / 2]" : "[N, K]");
  FLASHDECPP_REQUIRE(w.sizes[1] * (packed ? 2 : 1) == k, check.op, "weight must have ", packed ? "K / 2 bytes" : "K",
                     " a row for K ", k, " of x, got shape ", w.shape());
  check.last_contiguous("weight", w);

  QuantizedLinearParams& p = call.params;
  p.n = w.sizes[0];
  p.k = k;
  p.bits = packed ? 4 : 8;
  p.weight = w.data;
  p.weight_stride = w.strides[0];
  const View s = check.take("scales", scales);
  check.float_dtype("scales", s);
  FLASHDECPP_REQUIRE(s.dim == 2 || (s.dim == 1 && !packed), check.op, "scales must be ",
                     packed ? "[N, K / group]" : "[N] or [N, K / group]", ", got shape ", s.shape());
  const int64_t groups = s.dim == 2 ? s.sizes[1] : 1;
  p.group = s.dim == 2 && groups > 0 ? k / groups : k;
  FLASHDECPP_REQUIRE(s.sizes[0] == p.n &&
                         (s.dim == 1 || (p.group * groups == k && (p.group == 32 || p.group == 64 || p.group == 128))),
                     check.op, "scales must have ", p.n, " rows with one for each 32, 64 or 128 of ", k,
                     packed ? "" : " weights, or one for each row", packed ? " weights" : "", ", got shape ",
                     s.shape());
  check.last_contiguous("scales", s);
  p.scales = s.data;
  p.scales_stride = s.strides[0];
  p.scales_dtype = s.dtype;
  if (offsets) {
    const View o = check.take("offsets", *offsets);
    check.dtype("offsets", o, s.dtype);
    if (s.dim == 2) {
      check.shape("offsets", o, {p.n, groups});
    } else {
      check.shape("offsets", o, {p.n});
    }
    check.last_contiguous("offsets", o);
    p.offsets = o.data;
    p.offsets_stride = o.strides[0];
  }
  linear_operands(call, bias);
  return call;
}

// What `impl` names, where it is not auto.
inline LinearImpl linear_impl(const char* op, const std::string& impl) {
  for (const LinearImpl candidate : {LinearImpl::kGemv, LinearImpl::kFlatGemm, LinearImpl::kBlas}) {
    if (impl == name(candidate)) return candidate;
  }
  fail(op, "impl must be auto, gemv, flat_gemm or blas, got ", impl);
}

// x's shape with its last dimension replaced: the shape of a linear's or a gated activation's output.
inline Tensor new_like_rows(const View& x, int64_t last) {
  int64_t sizes[kMaxDims];
  for (int64_t i = 0; i + 1 < x.dim; ++i) sizes[i] = x.sizes[i];
  sizes[x.dim - 1] = last;
  return new_tensor(sizes, x.dim, x.dtype, x.device);
}

inline Activation activation_named(const char* op, const std::string& activation) {
  if (activation == "silu") return Activation::kSilu;
  if (activation == "gelu") return Activation::kGelu;
  if (activation == "gelu_tanh") return Activation::kGeluTanh;
  if (activation == "relu") return Activation::kRelu;
  fail(op, "activation must be silu, gelu, gelu_tanh or relu, got ", activation);
}

// ---- what the fused linears take beside a linear's arguments: call's fusion, and what follows from it

template <class Params>
void fuse_norm(LinearCall<Params>& call, const OptionalTensor& norm_weight, double norm_eps) {
  Checker& check = call.check;
  const float eps = check.positive_or_zero("norm_eps", norm_eps);
  if (!norm_weight) return;
  const View w = check.take("norm_weight", *norm_weight);
  FLASHDECPP_REQUIRE(w.dtype == call.x_view.dtype || w.dtype == DType::kFloat32, check.op, "norm_weight must be ",
                     name(call.x_view.dtype), " as x or float32, got ", w.dtype_name());
  check.shape("norm_weight", w, std::initializer_list<int64_t>{call.params.k});
  check.contiguous("norm_weight", w);
  LinearFusion& fusion = call.params.fusion;
  fusion.norm_weight = w.data;
  fusion.norm_dtype = w.dtype;
  fusion.norm_eps = eps;
}

template <class Params>
void fuse_activation(LinearCall<Params>& call, const std::optional<std::string>& activation) {
  if (!activation) return;
  Params& p = call.params;
  FLASHDECPP_REQUIRE(p.n % 2 == 0, call.check.op, "weight must have an even number of rows, gate and up, got ", p.n);
  p.fusion.gated = true;
  p.fusion.activation = activation_named(call.check.op, *activation);
  p.n /= 2;
}

// After fuse_norm: what is written is held against all the call's tensors. x is the caller's, of whatever rows.
template <class Params>
void fuse_residual(LinearCall<Params>& call, const Tensor& x, const Tensor& residual) {
  Params& p = call.params;
  Checker& check = call.check;
  const View a(x), r = check.take_written("residual", residual);
  check.dtype("residual", r, a.dtype);
  bool same = r.dim == a.dim && r.sizes[r.dim - 1] == p.n;
  for (int64_t i = 0; same && i + 1 < a.dim; ++i) same = r.sizes[i] == a.sizes[i];
  FLASHDECPP_REQUIRE(same, check.op, "residual must have shape [..., ", p.n, "] with the rows of x, ", a.shape(),
                     ", got ", r.shape());
  check.contiguous("residual", r);
  check.written_apart();
  p.fusion.add = true;
  p.out = r.data;
}

inline NormParams norm(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, double eps, bool subtract_mean) {
  Checker check(op, "x");
  const View a = check.take("x", x);
  FLASHDECPP_REQUIRE(a.dim >= 1, check.op, "x must be [..., hidden], got a scalar");
  check.float_dtype("x", a);
  check.last_contiguous("x", a);
  NormParams p{};
  p.cols = a.sizes[a.dim - 1];
  FLASHDECPP_REQUIRE(p.cols > 0, check.op, "x must have a hidden size above 0, got shape ", a.shape());
  p.rows = a.numel() / p.cols;
  p.x = a.data;
  p.dtype = a.dtype;
  p.weight_dtype = a.dtype;
  p.eps = check.positive_or_zero("eps", eps);
  p.subtract_mean = subtract_mean;
  // Two levels of rows: the last but one dimension, and everything before it, which must be packed among itself.
  p.inner_rows = a.dim >= 2 ? a.sizes[a.dim - 2] : 1;
  p.x_stride = a.dim >= 2 ? a.strides[a.dim - 2] : p.cols;
  p.outer_stride = a.dim >= 3 ? a.strides[a.dim - 3] : p.inner_rows * p.x_stride;
  for (int64_t i = a.dim - 4; i >= 0; --i) {
    FLASHDECPP_REQUIRE(a.sizes[i] == 1 || a.strides[i] == a.strides[i + 1] * a.sizes[i + 1], check.op,
                       "x must have evenly spaced rows, got strides ", a.stride_list(), " for shape ", a.shape());
  }
  const OptionalTensor* affine[] = {&weight, &bias};
  const char* affine_names[] = {"weight", "bias"};
  for (int i = 0; i < 2; ++i) {
    if (!*affine[i]) continue;
    const View t = check.take(affine_names[i], **affine[i]);
    FLASHDECPP_REQUIRE(t.dtype == a.dtype || t.dtype == DType::kFloat32, check.op, affine_names[i], " must be ",
                       name(a.dtype), " as x or float32, got ", t.dtype_name());
    check.shape(affine_names[i], t, {p.cols});
    check.contiguous(affine_names[i], t);
    if (i == 0) {
      p.weight = t.data;
      p.weight_dtype = t.dtype;
    } else {
      FLASHDECPP_REQUIRE(!p.weight || t.dtype == p.weight_dtype, check.op, "bias must be ", name(p.weight_dtype),
                         " as weight, got ", t.dtype_name());
      p.bias = t.data;
      p.weight_dtype = t.dtype;
    }
  }
  if (residual) {
    const View r = check.take_written("residual", *residual);
    check.dtype("residual", r, a.dtype);
    bool same = r.dim == a.dim;
    for (int64_t i = 0; same && i < a.dim; ++i) same = r.sizes[i] == a.sizes[i];
    FLASHDECPP_REQUIRE(same, check.op, "residual must have shape ", a.shape(), " as x, got ", r.shape());
    check.contiguous("residual", r);
    check.written_apart();
    p.residual = r.data;
  }
  return p;
}

inline RotaryParams rotary_append(const Tensor& q_tensor, const Tensor& k_tensor, const Tensor& v_tensor,
                                  const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                                  const OptionalTensor& block_table, const OptionalTensor& cos_sin, bool interleaved,
                                  const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  Checker check("rotary_append", "q");
  const View q = check.take_written("q", q_tensor);
  check.rank("q", q, 4, "[batch, q_len, q_heads, head_dim]");
  check.float_dtype("q", q);
  check.last_contiguous("q", q);
  const int64_t batch = q.sizes[0], q_len = q.sizes[1], q_heads = q.sizes[2], head_dim = q.sizes[3];
  const View k = check.take_written("k", k_tensor), v = check.take("v", v_tensor);
  const Cache c =
      cache(check, kCpu, q.dtype, batch, head_dim, k_cache, v_cache, true, seq_lens, block_table, k_scale, v_scale);
  const char* names[] = {"k", "v"};
  const View* views[] = {&k, &v};
  for (int i = 0; i < 2; ++i) {
    check.dtype(names[i], *views[i], q.dtype);
    check.shape(names[i], *views[i], {batch, q_len, c.kv_heads, head_dim});
    check.last_contiguous(names[i], *views[i]);
  }

  RotaryParams p{};
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.k_cache = const_cast<void*>(c.k);
  p.v_cache = const_cast<void*>(c.v);
  p.seq_lens = c.seq_lens;
  p.block_table = c.block_table;
  p.k_scale = c.k_scale;
  p.v_scale = c.v_scale;
  p.kc = c.k_layout;
  p.vc = c.v_layout;
  p.table_stride = c.table_stride;
  p.num_blocks = c.num_blocks;
  p.block_size = c.block_size;
  p.max_blocks = c.max_blocks;
  p.kv_heads = c.kv_heads;
  p.kv_dtype = c.dtype;
  p.dtype = q.dtype;
  p.q_batch_stride = q.strides[0];
  p.q_token_stride = q.strides[1];
  p.q_head_stride = q.strides[2];
  p.k_batch_stride = k.strides[0];
  p.k_token_stride = k.strides[1];
  p.k_head_stride = k.strides[2];
  p.v_batch_stride = v.strides[0];
  p.v_token_stride = v.strides[1];
  p.v_head_stride = v.strides[2];
  p.batch = to_int32(check, "q", batch);
  p.q_len = to_int32(check, "q", q_len);
  p.q_heads = to_int32(check, "q", q_heads);
  p.head_dim = to_int32(check, "q", head_dim);
  p.interleaved = interleaved;
  if (cos_sin) {
    const View t = check.take("cos_sin", *cos_sin);
    check.dtype("cos_sin", t, DType::kFloat32);
    check.rank("cos_sin", t, 2, "[max_positions, rotary_dim]");
    check.last_contiguous("cos_sin", t);
    FLASHDECPP_REQUIRE(t.sizes[1] % 2 == 0 && t.sizes[1] <= head_dim, check.op,
                       "cos_sin must have an even rotary_dim of at most head_dim ", head_dim, ", got shape ",
                       t.shape());
    p.cos_sin = static_cast<const float*>(t.data);
    p.cos_sin_stride = t.strides[0];
    p.max_positions = to_int32(check, "cos_sin", t.sizes[0]);
    p.rotary_dim = static_cast<int32_t>(t.sizes[1]);
  }
  check.written_apart();
  return p;
}

inline GatedParams gated_activation(const Tensor& gate_up, const std::string& activation) {
  Checker check("gated_activation", "gate_up");
  const View a = check.take("gate_up", gate_up);
  FLASHDECPP_REQUIRE(a.dim >= 1 && a.sizes[a.dim - 1] % 2 == 0, check.op,
                     "gate_up must be [..., 2 * features], got shape ", a.shape());
  check.float_dtype("gate_up", a);
  check.contiguous("gate_up", a);
  GatedParams p{};
  p.gate_up = a.data;
  p.cols = a.sizes[a.dim - 1] / 2;
  p.rows = p.cols > 0 ? a.numel() / (2 * p.cols) : 0;
  p.dtype = a.dtype;
  p.activation = activation_named(check.op, activation);
  return p;
}

inline SampleParams sample(const Tensor& logits, const OptionalTensor& temperature, const OptionalTensor& top_k,
                           const OptionalTensor& top_p, const OptionalTensor& min_p, const OptionalTensor& seed,
                           const OptionalTensor& position, const OptionalTensor& repetition_penalty,
                           const OptionalTensor& seen) {
  Checker check("sample", "logits");
  const View a = check.take("logits", logits);
  check.rank("logits", a, 2, "[batch, vocab]");
  check.float_dtype("logits", a);
  check.last_contiguous("logits", a);
  const int64_t batch = a.sizes[0], vocab = a.sizes[1];
  FLASHDECPP_REQUIRE(vocab > 0 && vocab <= INT32_MAX, check.op, "logits must have a vocabulary of 1 to 2^31, got ",
                     vocab);
  SampleParams p{};
  p.logits = a.data;
  p.logits_stride = a.strides[0];
  p.batch = batch;
  p.vocab = vocab;
  p.dtype = a.dtype;
  p.temperature = check.parameter<float>("temperature", temperature, DType::kFloat32, {batch});
  p.top_k = check.parameter<int32_t>("top_k", top_k, DType::kInt32, {batch});
  p.top_p = check.parameter<float>("top_p", top_p, DType::kFloat32, {batch});
  p.min_p = check.parameter<float>("min_p", min_p, DType::kFloat32, {batch});
  p.seed = check.parameter<int64_t>("seed", seed, DType::kInt64, {batch});
  p.position = check.parameter<int64_t>("position", position, DType::kInt64, {batch});
  p.repetition_penalty = check.parameter<float>("repetition_penalty", repetition_penalty, DType::kFloat32, {batch});
  p.seen = check.written_parameter<bool>("seen", seen, DType::kBool, {batch, vocab});
  check.written_apart();
  return p;
}

}  // namespace flashdecpp::contract
