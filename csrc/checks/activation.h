// What gated_activation refuses, and the names of activations.
#pragma once

#include <string>

#include "checks/checker.h"

namespace flashdecpp::checks {

inline Activation activation_named(const char* op, const char* arg, const std::string& activation) {
  if (activation == "silu") return Activation::kSilu;
  if (activation == "gelu") return Activation::kGelu;
  if (activation == "gelu_tanh") return Activation::kGeluTanh;
  if (activation == "relu") return Activation::kRelu;
  fail(op, arg, " must be silu, gelu, gelu_tanh or relu, got ", activation);
}

inline ActivationParams gated_activation(const Tensor& gate_up, const std::string& activation) {
  Checker check("gated_activation", "gate_up");
  const View a = check.take("gate_up", gate_up);
  FLASHDECPP_REQUIRE(a.dim >= 1 && a.sizes[a.dim - 1] % 2 == 0, check.op,
                     "gate_up must be [..., 2 * features], got shape ", a.shape());
  check.float_dtype("gate_up", a);
  check.contiguous("gate_up", a);
  ActivationParams p{};
  p.x = a.data;
  p.cols = a.sizes[a.dim - 1] / 2;
  p.rows = p.cols > 0 ? a.numel() / (2 * p.cols) : 0;
  p.dtype = a.dtype;
  p.gated = true;
  p.activation = activation_named(check.op, "activation", activation);
  return p;
}

}  // namespace flashdecpp::checks
