// The parts of a fused linear as launches of their own, for whatever a kernel has no place for.
#pragma once

#include <utility>

#include "contract.h"

namespace flashdecpp {

// The norm ahead of the product: the call's x becomes what is multiplied.
template <class Params>
void normalise(contract::LinearCall<Params>& call, const OptionalTensor& norm_weight, double norm_eps) {
  if (!norm_weight) return;
  call.take(call_op("flashdecpp::rms_norm", call.x, *norm_weight, norm_eps));
  call.params.fusion.norm_weight = nullptr;
}

// The gate behind it.
inline Tensor activate(Tensor gate_up, const std::optional<std::string>& activation) {
  return activation ? call_op("flashdecpp::gated_activation", gate_up, *activation) : gate_up;
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
