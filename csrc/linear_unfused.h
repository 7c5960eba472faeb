// The parts of a linear that are launches of their own: torch's BLAS, and what a fused kernel has no place for.
#pragma once

#include <string>
#include <utility>

#include "checks/linear.h"

namespace flashdecpp {

// The product by torch's own linear, the vendor BLAS. Written to memory of x's dtype, of tensors that hold nothing but
// memory: so neither autocast, which would change the dtype, nor autograd has a part in it.
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

// The ops of these names, which every backend has.
Tensor rms_norm(Tensor x, Tensor weight, double eps);
Tensor gated_activation(Tensor gate_up, std::string activation);

// The norm ahead of the product: the call's x becomes what is multiplied.
template <class Params>
void normalize(checks::LinearCall<Params>& call, const OptionalTensor& norm_weight, double norm_eps) {
  if (!norm_weight) return;
  call.take(rms_norm(call.x, *norm_weight, norm_eps));
  call.params.fusion.norm_weight = nullptr;
}

// The gate behind it.
inline Tensor activate(Tensor gate_up, const std::optional<std::string>& activation) {
  return activation ? gated_activation(std::move(gate_up), *activation) : gate_up;
}

// The call's product by itself, of the whole weight into memory of its own.
template <class Params>
Params product_alone(Params p) {
  p.n = p.weight_rows();
  p.fusion = {};
  p.out = nullptr;
  return p;
}

}  // namespace flashdecpp
