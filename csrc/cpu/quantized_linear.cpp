// quantized_linear on a CPU: the quantized weight is streamed for a few rows of x, and dequantized strip by strip for
// more.
#include "boxing.h"
#include "cpu/add_rows.h"
#include "cpu/kernels.h"
#include "cpu/linear_rule.h"
#include "cpu/linear_split.h"
#include "cpu/scratch.h"
#include "linear_unfused.h"

namespace flashdecpp::cpu {
namespace {

// From this many rows on, dequantizing a weight once costs less than decoding it for every 8 rows.
constexpr int64_t kDequantizeRows = 32;
// Size of a strip of dequantized weights: it stays in the L2 cache while the rows of x pass over it.
constexpr int64_t kStripBytes = 256 * 1024;

void run_streamed(const QuantizedLinearParams& p) {
  const Kernels& kernel = kernels();
  const int64_t packed_stride = quantized_sums_at(p.k) + ceil_div(p.groups(), kPackAlign) * kPackAlign;
  Scratch<float, 16384> packed(static_cast<size_t>(p.m * packed_stride));
  float* x = packed.data();
  split_linear(
      p, p.k * p.bits / 8, [&](int64_t begin, int64_t end) { kernel.pack_quantized(p, x, packed_stride, begin, end); },
      [&](const LinearPart& part) { kernel.quantized_linear(p, x, packed_stride, part); });
}

void run_dequantized(const QuantizedLinearParams& p) {
  const Kernels& kernel = kernels();
  const int64_t size = checks::element_size(p.dtype), packed_stride = ceil_div(p.k, kPackAlign) * kPackAlign;
  const int64_t strip = std::max(kUnit, kStripBytes / (p.k * size) / kUnit * kUnit);
  Scratch<float, 16384> packed(static_cast<size_t>(p.m * packed_stride));
  float* x = packed.data();
  split_linear(
      p, p.k * size, [&](int64_t begin, int64_t end) { kernel.pack(p, x, packed_stride, begin, end); },
      [&](const LinearPart& part) {
        Scratch<char, 1024> weights(static_cast<size_t>(strip * p.k * size));
        for (int64_t n = part.n_begin; n < part.n_end; n += strip) {
          const int64_t last = std::min(n + strip, part.n_end);
          kernel.dequantize(p, weights.data(), n, last);
          LinearParams dense = p;  // outputs [n, last); p.n stays their row stride
          dense.weight = weights.data();
          dense.weight_stride = p.k;
          dense.out = static_cast<char*>(p.out) + n * size;
          if (p.bias) dense.bias = static_cast<const char*>(p.bias) + n * size;
          kernel.linear(dense, x, packed_stride, {part.m_begin, part.m_end, 0, last - n});
        }
      });
}

// Dequantizes the whole weight for the BLAS, for shapes whose dense weight would go there too: it pays for its memory.
Tensor run_blas(const checks::QuantizedLinear& call, const OptionalTensor& bias) {
  const QuantizedLinearParams& p = call.params;
  const Kernels& kernel = kernels();
  const Tensor weight = new_tensor({p.n, p.k}, p.dtype, call.x_view.device);
  char* out = static_cast<char*>(View(weight).data);
  const int64_t row_bytes = p.k * checks::element_size(p.dtype);
  torch::stable::parallel_for(0, p.n, ceil_div(kMinElementsPerThread, p.k), [&](int64_t begin, int64_t end) {
    kernel.dequantize(p, out + begin * row_bytes, begin, end);
  });
  return blas_linear(call, weight, bias);
}

bool prefers_blas(const QuantizedLinearParams& p) {
  return linear_prefers_blas(p.dtype, p.m, p.k, kernels().bfloat16_dot);
}

void run(const QuantizedLinearParams& p) { p.m < kDequantizeRows ? run_streamed(p) : run_dequantized(p); }

Tensor run(checks::QuantizedLinear& call, const OptionalTensor& bias) {
  if (prefers_blas(call.params)) return run_blas(call, bias);
  Tensor out = checks::new_like_rows(call.x_view, call.params.n);
  call.params.out = View(out).data;
  run(call.params);
  return out;
}

Tensor quantized_linear(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets, OptionalTensor bias,
                        OptionalTensor norm_weight, double norm_eps, std::optional<std::string> gate,
                        std::optional<std::string> activation) {
  checks::QuantizedLinear call = checks::quantized_linear("quantized_linear", x, weight, scales, offsets, bias);
  checks::check_norm(call, norm_weight, norm_eps);
  checks::check_activation(call, gate, activation);
  const LinearFusion fusion = call.params.fusion;
  call.params = unfused(call.params);
  apply_norm(call, norm_weight, norm_eps);
  return apply_activation("quantized_linear", run(call, bias), fusion);
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
  apply_norm(call, norm_weight, norm_eps);
  const QuantizedLinearParams& p = call.params;
  prefers_blas(p) ? add_rows(p, run_blas(call, bias)) : run(p);
}

}  // namespace
}  // namespace flashdecpp::cpu

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)
{
  m.impl("quantized_linear", flashdecpp::boxed<&flashdecpp::cpu::quantized_linear>);
  m.impl("quantized_linear.plain", flashdecpp::boxed<&flashdecpp::cpu::quantized_linear_plain>);
  m.impl("quantized_linear.residual", flashdecpp::boxed<&flashdecpp::cpu::quantized_linear_residual>);
}
