// rms_norm, layer_norm, rotary_append and gated_activation on a CPU: each splits its rows among torch's threads.
#include <string>

#include "boxing.h"
#include "checks/activation.h"
#include "checks/norm.h"
#include "checks/rotary_append.h"
#include "cpu/kernels.h"
#include "linear_unfused.h"

namespace flashdecpp::cpu {
namespace {

constexpr int64_t kMinElementsPerThread = 32 * 1024;

int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kMinElementsPerThread / std::max<int64_t>(1, elements_per_item));
}

Tensor norm(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
            const OptionalTensor& residual, double eps, bool subtract_mean) {
  NormParams p = checks::norm(op, x, weight, bias, residual, eps, subtract_mean);
  Tensor out = checks::new_like_rows(View(x), p.cols);
  p.out = View(out).data;
  torch::stable::parallel_for(0, p.rows, grain(p.cols),
                              [&](int64_t begin, int64_t end) { kernels().norm(p, begin, end); });
  return out;
}

Tensor rms_norm_residual(Tensor x, Tensor weight, Tensor residual, double eps) {
  return norm("rms_norm", x, weight, std::nullopt, residual, eps, false);
}

Tensor layer_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, double eps) {
  return norm("layer_norm", x, weight, bias, std::nullopt, eps, true);
}

Tensor layer_norm_residual(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor residual, double eps) {
  return norm("layer_norm", x, weight, bias, residual, eps, true);
}

void rotary_append(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor seq_lens,
                   OptionalTensor block_table, OptionalTensor cos_sin, bool interleaved, OptionalTensor k_scale,
                   OptionalTensor v_scale) {
  const RotaryParams p =
      checks::rotary_append(q, k, v, k_cache, v_cache, seq_lens, block_table, cos_sin, interleaved, k_scale, v_scale);
  torch::stable::parallel_for(0, int64_t{p.batch} * p.q_len,
                              grain((int64_t{p.q_heads} + 2 * int64_t{p.kv_heads}) * p.head_dim),
                              [&](int64_t begin, int64_t end) { kernels().rotary(p, begin, end); });
}

}  // namespace
}  // namespace flashdecpp::cpu

namespace flashdecpp {

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  return cpu::norm("rms_norm", x, weight, std::nullopt, std::nullopt, eps, false);
}

void run_activation(const char*, Device, const ActivationParams& p) {
  const cpu::Kernels& kernel = cpu::kernels();
  torch::stable::parallel_for(0, p.rows, cpu::grain(p.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernel.activation(p, row, 0, p.cols);
  });
}

Tensor gated_activation(Tensor gate_up, std::string activation) {
  ActivationParams p = checks::gated_activation(gate_up, activation);
  const View view(gate_up);
  Tensor out = checks::new_like_rows(view, p.cols);
  p.out = View(out).data;
  run_activation("gated_activation", view.device, p);
  return out;
}

}  // namespace flashdecpp

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  m.impl("rms_norm", flashdecpp::boxed<&flashdecpp::rms_norm>);
  m.impl("rms_norm.residual", flashdecpp::boxed<&flashdecpp::cpu::rms_norm_residual>);
  m.impl("layer_norm", flashdecpp::boxed<&flashdecpp::cpu::layer_norm>);
  m.impl("layer_norm.residual", flashdecpp::boxed<&flashdecpp::cpu::layer_norm_residual>);
  m.impl("rotary_append", flashdecpp::boxed<&flashdecpp::cpu::rotary_append>);
  m.impl("gated_activation", flashdecpp::boxed<&flashdecpp::gated_activation>);
}
