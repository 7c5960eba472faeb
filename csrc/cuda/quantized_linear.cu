// quantized_linear on a GPU: few rows of x stream the quantised weights, more have them dequantised for the BLAS.
#include <bit>

#include "../linear_parts.h"
#include "linear.h"
#include "quantized_linear_kernel.cuh"

namespace flashdecpp {
namespace {

// Beyond, reading the weights once for every 16 rows costs more than writing and reading them in x's dtype once.
constexpr int64_t kStreamedRows = 48;

bool can_stream(const QuantizedLinearParams& p) {
  return (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.m <= kStreamedRows && p.k % 16 == 0 &&
         rows_are_aligned(p.weight, p.weight_rows(), p.weight_stride, DType::kUInt8);
}

// Whether the 128 weights that four lanes decode together share a scale.
bool steps_share_a_scale(const QuantizedLinearParams& p) { return p.group >= 128 || p.group == p.k; }

template <class T, int bits, int row_tiles, int tiles>
void launch_gemv(const Launcher& launcher, const QuantizedLinearParams& p) {
  const int32_t blocks_a_group = steps_share_a_scale(p) ? 4 : static_cast<int32_t>(p.group / 32);
  const QuantizedLaunch launch{p.group == p.k ? 31 : std::countr_zero(static_cast<uint64_t>(p.group)), blocks_a_group};
  const auto blocks = static_cast<unsigned>((p.weight_rows() + 16 * tiles - 1) / (16 * tiles));
  const auto run = [&](auto* shape) {
    using G = std::remove_pointer_t<decltype(shape)>;
    const auto kernel = p.fusion.any() ? quantized_gemv_kernel<T, G, true> : quantized_gemv_kernel<T, G, false>;
    launcher.allow_shared_memory(kernel, G::kSharedBytes);
    launcher.overlapping(kernel, blocks, G::kThreads, G::kSharedBytes, p, launch);
  };
  blocks_a_group < 4 ? run(static_cast<QuantizedGemv<bits, row_tiles, tiles, true>*>(nullptr))
                     : run(static_cast<QuantizedGemv<bits, row_tiles, tiles, false>*>(nullptr));
}

template <class T, int bits, int row_tiles>
void launch_tiles(const Launcher& launcher, const QuantizedLinearParams& p) {
  choose_quantized_tiles(launcher.properties(), p.weight_rows()) == 1 ? launch_gemv<T, bits, row_tiles, 1>(launcher, p)
                                                                      : launch_gemv<T, bits, row_tiles, 2>(launcher, p);
}

template <class T, int bits>
void launch_rows(const Launcher& launcher, const QuantizedLinearParams& p) {
  p.m <= 8 ? launch_tiles<T, bits, 1>(launcher, p) : launch_tiles<T, bits, 2>(launcher, p);
}

template <class T>
void launch_streamed(const Launcher& launcher, const QuantizedLinearParams& p) {
  constexpr int64_t rows = 16;
  for (int64_t first = 0; first < p.m; first += rows) {
    QuantizedLinearParams part = p;
    part.m = std::min(rows, p.m - first);
    part.x = static_cast<const T*>(p.x) + first * p.x_stride;
    part.out = static_cast<T*>(p.out) + first * p.n;
    p.bits == 4 ? launch_rows<T, 4>(launcher, part) : launch_rows<T, 8>(launcher, part);
  }
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

// A call that can be streamed, into p.out.
void run_streamed(const Launcher& launcher, const QuantizedLinearParams& p) {
  if (p.m == 0 || p.n == 0) return;
  arch::with_half_type(p.dtype,
                       [&](auto* type) { launch_streamed<std::remove_pointer_t<decltype(type)>>(launcher, p); });
}

Tensor run_blas(const Launcher& launcher, const contract::QuantizedLinear& call, const OptionalTensor& bias) {
  return blas_linear(call.x, dequantize(launcher, product_alone(call.params), call.x_view.device), bias);
}

Tensor quantized_linear(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets, OptionalTensor bias) {
  contract::QuantizedLinear call = contract::quantized_linear("quantized_linear", x, weight, scales, offsets, bias);
  const Launcher launcher("quantized_linear", call.x_view.device);
  if (!can_stream(call.params)) return run_blas(launcher, call, bias);
  align_rows(call);
  Tensor out = allocate(call);
  run_streamed(launcher, call.params);
  return out;
}

constexpr const char* kFused = "quantized_linear_fused";

Tensor quantized_linear_fused(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets, OptionalTensor bias,
                              OptionalTensor norm_weight, double norm_eps, std::optional<std::string> activation) {
  contract::QuantizedLinear call = contract::quantized_linear(kFused, x, weight, scales, offsets, bias);
  contract::fuse_norm(kFused, call, norm_weight, norm_eps);
  contract::fuse_activation(kFused, call, activation);
  const Launcher launcher(kFused, call.x_view.device);
  normalise(call, norm_weight, norm_eps);
  if (!can_stream(call.params)) return activate(run_blas(launcher, call, bias), activation);
  align_rows(call);
  Tensor out = allocate(call);
  run_streamed(launcher, call.params);
  return out;
}

void quantized_linear_fused_residual(Tensor x, Tensor weight, Tensor scales, OptionalTensor offsets,
                                     OptionalTensor bias, Tensor residual, OptionalTensor norm_weight,
                                     double norm_eps) {
  contract::QuantizedLinear call = contract::quantized_linear(kFused, x, weight, scales, offsets, bias);
  contract::fuse_norm(kFused, call, norm_weight, norm_eps);
  contract::fuse_residual(kFused, call, x, residual);
  const Launcher launcher(kFused, call.x_view.device);
  normalise(call, norm_weight, norm_eps);
  if (!can_stream(call.params)) return add_rows(launcher, call.params, run_blas(launcher, call, bias));
  align_rows(call);
  run_streamed(launcher, call.params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_fused", TORCH_BOX(&quantized_linear_fused));
  m.impl("quantized_linear_fused.residual", TORCH_BOX(&quantized_linear_fused_residual));
}

}  // namespace flashdecpp
