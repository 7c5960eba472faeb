// Linear calls with random arguments, compared with sums in double.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace flashdecpp {

inline Checks check(11);

struct Fusion {
  bool bias = false, norm = false, add = false, gated = false;
  bool late = false;  // the kernel rounds x * norm and multiplies the sum by 1 / rms
};

template <class T>
struct Call {
  simulated::Tensor<T> x, weight, bias, norm, out;
  std::vector<float> residual;  // initial contents of out, if the result is added to it
  std::vector<double> exact;    // the weight, if the kernel does not read `weight`
  LinearParams p{};
  bool late;

  Call(int m, int n, int k, Fusion fusion)
      : x(size_t(m) * k),
        weight(size_t(n) * (fusion.gated ? 2 : 1) * k),
        bias(n * 2),
        norm(k),
        out(size_t(m) * n),
        late(fusion.late) {
    for (const auto* tensor : {&x, &weight, &bias, &norm}) check.fill(*tensor);
    p.x = x.data();
    p.weight = weight.data();
    p.bias = fusion.bias ? bias.data() : nullptr;
    p.out = out.data();
    p.m = m;
    p.n = n;
    p.k = p.x_stride = p.weight_stride = k;
    p.fusion.norm_weight = fusion.norm ? norm.data() : nullptr;
    p.fusion.norm_dtype = std::is_same_v<T, arch::half> ? DType::kFloat16 : DType::kBFloat16;
    p.fusion.norm_eps = 0.5f;
    p.fusion.add = fusion.add;
    p.fusion.gated = fusion.gated;
    p.fusion.activation = Activation::kSilu;
    residual.assign(out.size(), 0.f);
    if (!fusion.add) return;
    check.fill(out);
    for (size_t i = 0; i < out.size(); ++i) residual[i] = arch::to_float(out[i]);
  }

  // Resets out for another launch.
  void restore() {
    if (!p.fusion.add) return;
    for (size_t i = 0; i < out.size(); ++i) out[i] = arch::from_float<T>(residual[i]);
  }

  double sum(const std::vector<float>& h, int row, float factor) const {
    double sum = 0;
    for (int k = 0; k < p.k; ++k) {
      sum += double{h[k]} * (exact.empty() ? arch::to_float(weight[row * p.k + k]) : exact[size_t(row) * p.k + k]);
    }
    return sum * factor + (p.bias ? arch::to_float(bias[row]) : 0);
  }

  void compare(const std::string& what) const {
    double worst = 0;
    std::vector<float> h(p.k);
    for (int m = 0; m < p.m; ++m) {
      double squares = 0;
      for (int k = 0; k < p.k; ++k) {
        h[k] = arch::to_float(x[m * p.k + k]);
        squares += double{h[k]} * h[k];
      }
      float factor = 1, late_factor = 1;
      if (p.fusion.norm_weight) {
        (late ? late_factor : factor) = static_cast<float>(1 / std::sqrt(squares / p.k + p.fusion.norm_eps));
        for (int k = 0; k < p.k; ++k) {
          h[k] = arch::to_float(arch::from_float<T>(h[k] * factor * arch::to_float(norm[k])));
        }
      }
      for (int n = 0; n < p.n; ++n) {
        double expected = sum(h, n, late_factor);
        if (p.fusion.gated) expected = expected / (1 + std::exp(-expected)) * sum(h, p.n + n, late_factor);
        expected += residual[m * p.n + n];
        const double got = arch::to_float(out[m * p.n + n]);
        worst = std::isnan(got) ? INFINITY : std::max(worst, std::fabs(expected - got) / (1 + std::fabs(expected)));
      }
    }
    // A gate amplifies the errors of its factors.
    const double allowed = (std::is_same_v<T, arch::half> ? 1e-3 : 8e-3) * (p.fusion.gated ? 4 : 1);
    const auto number = [](int64_t x) { return std::to_string(x); };
    check(worst <= allowed, what + (p.fusion.any() ? ", fused" : "") + ", m " + number(p.m) + ", n " + number(p.n) +
                                ", k " + number(p.k) + ": off by " + std::to_string(worst));
  }
};

}  // namespace flashdecpp
