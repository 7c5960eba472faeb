// What the linear ops refuse, and how their arguments become LinearParams and QuantizedLinearParams.
#pragma once

#include <string>
#include <utility>

#include "checks/activation.h"
#include "checks/checker.h"
#include "heuristics/linear.h"

namespace flashdecpp::checks {

// A checked call. x_view and params see `x` as rows at one stride; where the caller's x has other strides, `x` is a
// packed copy, which the call keeps alive.
template <class Params>
struct LinearCall {
  Checker check;
  Tensor x;
  View x_view;
  Params params;

  LinearCall(const char* op, const Tensor& x_tensor)
      : check(op, "x"), x(x_tensor), x_view(check.take("x", x)), params{} {}

  // Multiplies `rows`, which are contiguous and of x's shape, instead of x.
  void replace_x(Tensor rows) {
    x = std::move(rows);
    x_view = View(x);
    params.x = x_view.data;
    params.x_stride = params.k;
  }
};
using Linear = LinearCall<LinearParams>;
using QuantizedLinear = LinearCall<QuantizedLinearParams>;

// Checks and describes x and bias, once the weight's n and k are known.
template <class Params>
void linear_operands(LinearCall<Params>& call, const OptionalTensor& bias) {
  Checker& check = call.check;
  View& a = call.x_view;
  Params& p = call.params;
  p.m = a.numel() / p.k;
  p.dtype = a.dtype;
  p.bias = check.template parameter<void>("bias", bias, a.dtype, std::initializer_list<int64_t>{p.n});
  const bool evenly_spaced = a.last_dim_contiguous() && (a.dim <= 2 || a.contiguous_from(0));
  if (!evenly_spaced) {
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

// The implementation that `impl` names, auto aside.
inline LinearImpl linear_impl(const char* op, const std::string& impl) {
  for (const LinearImpl candidate : {LinearImpl::kGemv, LinearImpl::kFlatGemm, LinearImpl::kBlas}) {
    if (impl == name(candidate)) return candidate;
  }
  fail(op, "impl must be auto, gemv, flat_gemm or blas, got ", impl);
}

// ---- the fusions, which are keywords of both ops
// ---------------------------------------------------------------------

template <class Params>
void check_norm(LinearCall<Params>& call, const OptionalTensor& norm_weight, double norm_eps) {
  Checker& check = call.check;
  check.positive_or_zero("norm_eps", norm_eps);
  if (!norm_weight) return;
  const View w = check.take("norm_weight", *norm_weight);
  FLASHDECPP_REQUIRE(w.dtype == call.x_view.dtype || w.dtype == DType::kFloat32, check.op, "norm_weight must be ",
                     name(call.x_view.dtype), " as x or float32, got ", w.dtype_name());
  check.shape("norm_weight", w, std::initializer_list<int64_t>{call.params.k});
  check.contiguous("norm_weight", w);
}

// A gate halves params.n: from here on it counts outputs, and weight_rows() the rows of the weight.
template <class Params>
void check_activation(LinearCall<Params>& call, const std::optional<std::string>& gate,
                      const std::optional<std::string>& activation) {
  Params& p = call.params;
  const char* op = call.check.op;
  if (activation) {
    FLASHDECPP_REQUIRE(!gate, op, "activation must be None if gate is given, got ", *activation);
    p.fusion = {LinearFusion::kActivation, activation_named(op, "activation", *activation)};
  }
  if (gate) {
    FLASHDECPP_REQUIRE(p.n % 2 == 0, op, "weight must have an even number of rows, gate and up, got ", p.n);
    p.fusion = {LinearFusion::kGate, activation_named(op, "gate", *gate)};
    p.n /= 2;
  }
}

// After check_norm, so that the residual is compared with every other argument. x is the caller's, with its own shape.
template <class Params>
void check_residual(LinearCall<Params>& call, const Tensor& x, const Tensor& residual) {
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
  p.fusion.kind = LinearFusion::kResidual;
  p.out = r.data;
}

}  // namespace flashdecpp::checks
