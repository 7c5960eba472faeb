// linear: dispatches to the GEMV, the flat GEMM or the BLAS. A gate, an activation or a residual is part of the first
// two; a norm is a launch of its own, which under CUDA graphs is faster than normalizing x again in every CTA
// (bench/NOTES.md).
#include <string>

#include "boxing.h"
#include "cuda/linear/linear.h"
#include "cuda/numeric.cuh"
#include "heuristics/linear_table.h"
#include "linear_unfused.h"

namespace flashdecpp {
namespace {

// impl="auto": the BLAS where the hand-written kernels cannot run, else by the inflection points measured on this
// device, else by the rule's.
LinearImpl choose(const Launcher& launcher, const checks::Linear& call) {
  const LinearParams& p = call.params;
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const int64_t rows = p.weight_rows();
  if (!half || !rows_are_aligned(p.weight, rows, p.weight_stride, p.dtype)) return LinearImpl::kBlas;
  const auto measured = linear_tables().find(arch::name_in_tables(call.x_view.device.index), p.dtype, rows, p.k, p.m);
  return choose_linear(measured ? *measured : default_inflection_points(launcher.properties()), p.m, p.k);
}

LinearImpl choose(const char* op, const std::string& impl, const Launcher& launcher, const checks::Linear& call) {
  return impl == "auto" ? choose(launcher, call) : checks::linear_impl(op, impl);
}

void run(const Launcher& launcher, LinearImpl impl, const checks::Linear& call) {
  impl == LinearImpl::kGemv ? run_gemv(launcher, call.params)
                            : run_flat_gemm(launcher, call.params, call.x_view.device);
}

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, double norm_eps,
              std::optional<std::string> gate, std::optional<std::string> activation, std::string impl) {
  checks::Linear call = checks::linear("linear", x, weight, bias);
  checks::check_norm(call, norm_weight, norm_eps);
  checks::check_activation(call, gate, activation);
  const Launcher launcher("linear", call.x_view.device);
  const LinearImpl chosen = choose("linear", impl, launcher, call);
  if (chosen != LinearImpl::kBlas) require_vector_rows("linear", call);
  apply_norm(call, norm_weight, norm_eps);
  if (chosen == LinearImpl::kBlas) {
    return apply_activation("linear", blas_linear(call, weight, bias), call.params.fusion);
  }
  align_rows(call);
  Tensor out = allocate(call);
  run(launcher, chosen, call);
  return out;
}

Tensor linear_plain(Tensor x, Tensor weight, OptionalTensor bias) {
  return linear(std::move(x), std::move(weight), std::move(bias), std::nullopt, 0, std::nullopt, std::nullopt, "auto");
}

void linear_residual(Tensor x, Tensor weight, OptionalTensor bias, Tensor residual, OptionalTensor norm_weight,
                     double norm_eps, std::string impl) {
  checks::Linear call = checks::linear("linear", x, weight, bias);
  checks::check_norm(call, norm_weight, norm_eps);
  checks::check_residual(call, x, residual);
  const Launcher launcher("linear", call.x_view.device);
  const LinearImpl chosen = choose("linear", impl, launcher, call);
  if (chosen != LinearImpl::kBlas) require_vector_rows("linear", call);
  apply_norm(call, norm_weight, norm_eps);
  if (chosen == LinearImpl::kBlas) return add_rows(launcher, call.params, blas_linear(call, weight, bias));
  align_rows(call);
  if (residual_fits(call.params)) return run(launcher, chosen, call);
  checks::Linear product = call;
  product.params = unfused(call.params);
  const Tensor rows = allocate(product);
  run(launcher, chosen, product);
  add_rows(launcher, call.params, rows);
}

template <class T>
__global__ void add_kernel(T* sums, const T* terms, int64_t count) {
  const int64_t step = gridDim.x * int64_t{blockDim.x};
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    sums[i] = arch::from_float<T>(arch::to_float(sums[i]) + arch::to_float(terms[i]));
  }
}

int64_t linear_choice_index(Tensor x, Tensor weight) {
  const checks::Linear call = checks::linear("linear_choice", x, weight, std::nullopt);
  return static_cast<int64_t>(choose(Launcher("linear_choice", call.x_view.device), call));
}

}  // namespace

void add_rows(const Launcher& launcher, const LinearParams& p, const Tensor& rows) {
  constexpr int64_t threads = 256, max_blocks = 4096;
  const int64_t count = p.m * p.n;
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(std::min((count + threads - 1) / threads, max_blocks));
  arch::with_float_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launcher(add_kernel<T>, blocks, threads, 0, static_cast<T*>(p.out), static_cast<const T*>(View(rows).data), count);
  });
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("linear", boxed<&linear>);
  m.impl("linear.plain", boxed<&linear_plain>);
  m.impl("linear.residual", boxed<&linear_residual>);
  m.impl("linear_choice_index", boxed<&linear_choice_index>);
}

}  // namespace flashdecpp

// Called from Python through ctypes.
extern "C" __attribute__((visibility("default"))) void flashdecpp_install_linear_table(
    const char* device, const flashdecpp::LinearRow* rows, int64_t count) {
  flashdecpp::linear_tables().install(device, {rows, rows + count});
}
