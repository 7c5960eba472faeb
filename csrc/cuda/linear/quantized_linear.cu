// quantized_linear on a GPU: the quantized weight is streamed for a few rows of x, and dequantized for the BLAS for
// more.
#include "boxing.h"
#include "choice_log.h"
#include "cuda/linear/dequantize_kernel.cuh"
#include "cuda/linear/linear.h"
#include "linear_unfused.h"

namespace flashdecpp {
namespace {

QuantizedLinearConfig choose(const Launcher& launcher, const QuantizedLinearParams& p) {
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const bool vectors = half && rows_are_aligned(p.weight, p.weight_rows(), p.weight_stride, DType::kUInt8);
  const LinearProblem problem = linear_problem(p, vectors);
  const QuantizedLinearConfig config = choose_quantized_linear(problem, launcher.properties(), p.fusion.any());
  log_choice("quantized_linear", name(p.dtype), problem, config);
  return config;
}

Tensor dequantize(const Launcher& launcher, const QuantizedLinearParams& p, Device device) {
  Tensor weight = new_tensor({p.n, p.k}, p.dtype, device);
  if (p.n == 0) return weight;
  constexpr int threads = 256, max_rows = 65535;
  const dim3 grid(static_cast<unsigned>((p.k + threads - 1) / threads),
                  static_cast<unsigned>(std::min<int64_t>(p.n, max_rows)));
  arch::with_float_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launcher(dequantize_kernel<T>, grid, threads, 0, p, static_cast<T*>(View(weight).data));
  });
  return weight;
}

// Streams the weight into params.out.
void run_streamed(const Launcher& launcher, checks::QuantizedLinear& call, const QuantizedLinearConfig& config) {
  align_rows(call);
  const QuantizedLinearParams& p = call.params;
  if (p.m > 0 && p.n > 0) launch_quantized_gemv(launcher, p, config);
}

Tensor run_blas(const Launcher& launcher, const checks::QuantizedLinear& call, const OptionalTensor& bias) {
  return blas_linear(call, dequantize(launcher, unfused(call.params), call.x_view.device), bias);
}

Tensor quantized_linear(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets, OptionalTensor bias,
                        OptionalTensor norm_weight, double norm_eps, std::optional<std::string> gate,
                        std::optional<std::string> activation) {
  checks::QuantizedLinear call = checks::quantized_linear("quantized_linear", x, weight, scales, offsets, bias);
  checks::check_norm(call, norm_weight, norm_eps);
  checks::check_activation(call, gate, activation);
  const Launcher launcher("quantized_linear", call.x_view.device);
  apply_norm(call, norm_weight, norm_eps);
  if (const QuantizedLinearConfig config = choose(launcher, call.params); config.streams) {
    Tensor out = allocate(call);
    run_streamed(launcher, call, config);
    return out;
  }
  return apply_activation("quantized_linear", run_blas(launcher, call, bias), call.params.fusion);
}

Tensor quantized_linear_plain(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets, OptionalTensor bias) {
  return quantized_linear(std::move(x), std::move(weight), std::move(scales), std::move(offsets), std::move(bias),
                          std::nullopt, 0, std::nullopt, std::nullopt);
}

void quantized_linear_residual(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets, OptionalTensor bias,
                               Tensor residual, OptionalTensor norm_weight, double norm_eps) {
  checks::QuantizedLinear call = checks::quantized_linear("quantized_linear", x, weight, scales, offsets, bias);
  checks::check_norm(call, norm_weight, norm_eps);
  checks::check_residual(call, x, residual);
  const Launcher launcher("quantized_linear", call.x_view.device);
  apply_norm(call, norm_weight, norm_eps);
  const QuantizedLinearConfig config = choose(launcher, call.params);
  config.streams ? run_streamed(launcher, call, config)
                 : add_rows(launcher, call.params, run_blas(launcher, call, bias));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("quantized_linear", boxed<&quantized_linear>);
  m.impl("quantized_linear.plain", boxed<&quantized_linear_plain>);
  m.impl("quantized_linear.residual", boxed<&quantized_linear_residual>);
}

}  // namespace flashdecpp
