// quantized_linear on a GPU: the quantized weight is streamed for a few rows of x, and dequantized for the BLAS for
// more.
#include "boxing.h"
#include "cuda/linear/dequantize_kernel.cuh"
#include "cuda/linear/linear.h"
#include "linear_unfused.h"

namespace flashdecpp {
namespace {

// With more rows, streaming the weight once per 16 rows costs more than writing and reading it once in x's dtype.
constexpr int64_t kStreamedRows = 48;

bool can_stream(const QuantizedLinearParams& p) {
  return (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.m <= kStreamedRows && p.k % 16 == 0 &&
         rows_are_aligned(p.weight, p.weight_rows(), p.weight_stride, DType::kUInt8);
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

// Streams the weight into params.out; false if this device has no kernel for the call.
bool run_streamed(const Launcher& launcher, checks::QuantizedLinear& call) {
  align_rows(call);
  const QuantizedLinearParams& p = call.params;
  return p.m == 0 || p.n == 0 || launch_quantized_gemv(launcher, p);
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
  if (can_stream(call.params)) {
    Tensor out = allocate(call);
    if (run_streamed(launcher, call)) return out;
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
  if (can_stream(call.params) && run_streamed(launcher, call)) return;
  add_rows(launcher, call.params, run_blas(launcher, call, bias));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("quantized_linear", boxed<&quantized_linear>);
  m.impl("quantized_linear.plain", boxed<&quantized_linear_plain>);
  m.impl("quantized_linear.residual", boxed<&quantized_linear_residual>);
}

}  // namespace flashdecpp
