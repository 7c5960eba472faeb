// rms_norm and layer_norm on a GPU: check, guard, allocate, launch.
#include "boxing.h"
#include "checks/norm.h"
#include "cuda/elementwise/norm_kernel.cuh"
#include "cuda/elementwise/vectors.h"
#include "cuda/launch.h"
#include "linear_unfused.h"

namespace flashdecpp {
namespace {

template <class T, class W>
void launch_norm(const Launcher& launcher, const NormParams& p) {
  const auto start = [&](auto* kernel, int vector) {
    const int64_t warp_size = launcher.warp_size();
    const int64_t wanted = (p.cols + vector - 1) / vector;
    const int64_t threads = std::min<int64_t>((wanted + warp_size - 1) / warp_size * warp_size, kNormMaxThreads);
    launcher.overlapping(kernel, static_cast<unsigned>(p.rows), static_cast<unsigned>(threads), 0, p);
  };
  constexpr int vector = kVector<T>;
  const bool fits = vectors_fit(p.x, sizeof(T), vector, {p.cols, p.x_stride, p.outer_stride}) &&
                    vectors_fit(p.residual, sizeof(T), vector, {}) && vectors_fit(p.weight, sizeof(W), vector, {}) &&
                    vectors_fit(p.bias, sizeof(W), vector, {});
  fits ? start(norm_kernel<T, W, vector>, vector) : start(norm_kernel<T, W, 1>, 1);
}

Tensor run_norm(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& residual, double eps, bool subtract_mean) {
  NormParams p = checks::norm(op, x, weight, bias, residual, eps, subtract_mean);
  const View view(x);
  const Launcher launcher(op, view.device);
  Tensor result = checks::new_like_rows(view, p.cols);
  if (p.rows == 0) return result;
  FLASHDECPP_REQUIRE(p.rows <= INT32_MAX, op, "x must have fewer than 2^31 rows, got ", p.rows);
  p.out = View(result).data;
  arch::with_float_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    p.weight_dtype == p.dtype ? launch_norm<T, T>(launcher, p) : launch_norm<T, float>(launcher, p);
  });
  return result;
}

Tensor rms_norm_residual(Tensor x, Tensor weight, Tensor residual, double eps) {
  return run_norm("rms_norm", x, weight, std::nullopt, residual, eps, false);
}

Tensor layer_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, double eps) {
  return run_norm("layer_norm", x, weight, bias, std::nullopt, eps, true);
}

Tensor layer_norm_residual(Tensor x, OptionalTensor weight, OptionalTensor bias, Tensor residual, double eps) {
  return run_norm("layer_norm", x, weight, bias, residual, eps, true);
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  return run_norm("rms_norm", x, weight, std::nullopt, std::nullopt, eps, false);
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("rms_norm", boxed<&rms_norm>);
  m.impl("rms_norm.residual", boxed<&rms_norm_residual>);
  m.impl("layer_norm", boxed<&layer_norm>);
  m.impl("layer_norm.residual", boxed<&layer_norm_residual>);
}

}  // namespace flashdecpp
