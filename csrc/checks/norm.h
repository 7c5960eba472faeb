// Checks the arguments of rms_norm and layer_norm and fills in their NormParams.
#pragma once

#include "checks/checker.h"

namespace flashdecpp::checks {

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
  // Rows have two strides: one along the second-to-last dimension, one across all earlier dimensions, which must
  // therefore be evenly spaced.
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

}  // namespace flashdecpp::checks
