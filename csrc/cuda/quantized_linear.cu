// quantized_linear on a GPU: few rows of x stream the quantised weights, more have them dequantised for the BLAS.
#include "dequantize_kernel.cuh"
#include "linear.h"

namespace flashdecpp {
namespace {

constexpr const char* kOp = "quantized_linear";
// Beyond, reading the weights once for every 16 rows costs more than writing and reading them in x's dtype once.
constexpr int64_t kStreamedRows = 48;

bool can_stream(const QuantizedLinearParams& p) {
  return (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.m <= kStreamedRows && p.k % 16 == 0 &&
         rows_are_aligned(p.weight, p.n, p.weight_stride, DType::kUInt8);
}

Tensor dequantize(const Launcher& launcher, const QuantizedLinearParams& p, Device device) {
  Tensor weight = new_tensor({p.n, p.k}, p.dtype, device);
  if (p.n == 0) return weight;
  constexpr int threads = 256, most_rows = 65535;
  const dim3 grid(static_cast<unsigned>((p.k + threads - 1) / threads),
                  static_cast<unsigned>(std::min<int64_t>(p.n, most_rows)));
  arch::with_float_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launcher(dequantize_kernel<T>, grid, threads, 0, p, static_cast<T*>(View(weight).data));
  });
  return weight;
}

Tensor quantized_linear(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets, OptionalTensor bias) {
  contract::QuantizedLinear call = contract::quantized_linear(x, weight, scales, offsets, bias);
  QuantizedLinearParams& p = call.params;
  const Launcher launcher(kOp, call.x_view.device);
  if (!can_stream(p)) return blas_linear(x, dequantize(launcher, p, call.x_view.device), bias);
  align_rows(call);
  Tensor result = contract::new_like_rows(call.x_view, p.n);
  if (p.m == 0 || p.n == 0) return result;
  p.out = View(result).data;
  launch_quantized_gemv(launcher, p);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace flashdecpp
