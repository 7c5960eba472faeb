// Linear calls with random arguments, compared with sums in double.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace flashdecpp {

inline Checks check(11);

struct Fusion {
  bool bias = false, add = false, gated = false, activated = false;
};

template <class T>
struct Call {
  simulated::Tensor<T> x, weight, bias, out;
  std::vector<float> residual;  // initial contents of out, if the result is added to it
  std::vector<double> exact;    // the weight, if the kernel does not read `weight`
  LinearParams p{};

  Call(int m, int n, int k, Fusion fusion)
      : x(size_t(m) * k), weight(size_t(n) * (fusion.gated ? 2 : 1) * k), bias(n * 2), out(size_t(m) * n) {
    for (const auto* tensor : {&x, &weight, &bias}) check.fill(*tensor);
    p.x = x.data();
    p.weight = weight.data();
    p.bias = fusion.bias ? bias.data() : nullptr;
    p.out = out.data();
    p.m = m;
    p.n = n;
    p.k = p.x_stride = p.weight_stride = k;
    p.fusion.kind = fusion.gated       ? LinearFusion::kGate
                    : fusion.activated ? LinearFusion::kActivation
                    : fusion.add       ? LinearFusion::kResidual
                                       : LinearFusion::kNone;
    p.fusion.activation = Activation::kSilu;
    residual.assign(out.size(), 0.f);
    if (!fusion.add) return;
    check.fill(out);
    for (size_t i = 0; i < out.size(); ++i) residual[i] = arch::to_float(out[i]);
  }

  // Resets out for another launch.
  void restore() {
    if (!p.fusion.adds()) return;
    for (size_t i = 0; i < out.size(); ++i) out[i] = arch::from_float<T>(residual[i]);
  }

  double sum(int m, int row) const {
    double sum = p.bias ? arch::to_float(bias[row]) : 0;
    for (int k = 0; k < p.k; ++k) {
      sum += double{arch::to_float(x[m * p.k + k])} *
             (exact.empty() ? arch::to_float(weight[row * p.k + k]) : exact[size_t(row) * p.k + k]);
    }
    return sum;
  }

  void compare(const std::string& what) const {
    double worst = 0;
    for (int m = 0; m < p.m; ++m) {
      for (int n = 0; n < p.n; ++n) {
        double expected = sum(m, n);
        if (p.fusion.activates()) expected /= 1 + std::exp(-expected);
        if (p.fusion.gates()) expected *= sum(m, p.n + n);
        expected += residual[m * p.n + n];
        const double got = arch::to_float(out[m * p.n + n]);
        worst = std::isnan(got) ? INFINITY : std::max(worst, std::fabs(expected - got) / (1 + std::fabs(expected)));
      }
    }
    // A gate amplifies the errors of its factors.
    const double allowed = (std::is_same_v<T, arch::half> ? 1e-3 : 8e-3) * (p.fusion.gates() ? 4 : 1);
    const auto number = [](int64_t x) { return std::to_string(x); };
    check(worst <= allowed, what + (p.fusion.any() ? ", fused" : "") + ", m " + number(p.m) + ", n " + number(p.n) +
                                ", k " + number(p.k) + ": off by " + std::to_string(worst));
  }
};

}  // namespace flashdecpp
