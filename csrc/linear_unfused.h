// The steps of a linear that run as launches of their own: torch's BLAS, and the fusions that a kernel does not take.
#pragma once

#include <string>
#include <utility>

#include "checks/linear.h"

namespace flashdecpp {

// x weight^T + bias by torch's linear, the vendor BLAS, in x's dtype. Its arguments are aliases that carry memory
// alone, so neither autocast, which would change the dtype, nor autograd sees the call.
template <class Params>
Tensor blas_linear(const checks::LinearCall<Params>& call, const Tensor& weight, const OptionalTensor& bias) {
  const Params& p = call.params;
  const View w(weight);
  const int64_t n = w.sizes[0];
  const Tensor out = checks::new_like_rows(call.x_view, n);
  call_op("aten::linear", "out", alias(call.x, {p.m, p.k}, {p.x_stride, 1}), alias(weight, {n, p.k}, {w.strides[0], 1}),
          bias ? OptionalTensor(alias(*bias, {n}, {1})) : std::nullopt, alias(out, {p.m, n}, {n, 1}));
  return out;
}

// Every backend defines these.
Tensor rms_norm(Tensor x, Tensor weight, double eps);
void run_activation(const char* op, Device device, const ActivationParams& p);

// Multiplies the norm of x from here on.
template <class Params>
void apply_norm(checks::LinearCall<Params>& call, const OptionalTensor& norm_weight, double norm_eps) {
  if (norm_weight) call.replace_x(rms_norm(call.x, *norm_weight, norm_eps));
}

// The activation or gate of a product y that was stored without it; in place where there is no gate.
inline Tensor apply_activation(const char* op, Tensor y, LinearFusion fusion) {
  if (!fusion.activates()) return y;
  const View view(y);
  ActivationParams p{};
  p.x = view.data;
  p.gated = fusion.gates();
  p.cols = view.sizes[view.dim - 1] / (p.gated ? 2 : 1);
  p.rows = p.cols > 0 ? view.numel() / view.sizes[view.dim - 1] : 0;
  p.dtype = view.dtype;
  p.activation = fusion.activation;
  Tensor out = p.gated ? checks::new_like_rows(view, p.cols) : std::move(y);
  p.out = View(out).data;
  run_activation(op, view.device, p);
  return out;
}

// The same product with no fusion, over all rows of the weight.
template <class Params>
Params unfused(Params p) {
  p.n = p.weight_rows();
  p.fusion = {};
  p.out = nullptr;
  return p;
}

}  // namespace flashdecpp
