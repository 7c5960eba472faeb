// The switch: which of the three implementations of a linear layer runs.
#include <string>

#include "boxing.h"
#include "checks/linear_table.h"
#include "choice_log.h"
#include "cuda/linear/linear.h"
#include "cuda/numeric.cuh"
#include "heuristics/linear_table.h"
#include "linear_unfused.h"

namespace flashdecpp {
namespace {

// The choice of impl="auto": by the inflection points that were measured on this device, else by the rule.
LinearConfig choose(const Launcher& launcher, const checks::Linear& call) {
  const LinearParams& p = call.params;
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const int64_t rows = p.weight_rows();
  const bool vectors = half && rows_are_aligned(p.weight, rows, p.weight_stride, p.dtype);
  const DeviceProperties& device = launcher.properties();
  const LinearProblem problem = linear_problem(p, vectors);
  const LinearConfig config =
      choose_linear(problem, device, linear_tables().find(device.name, p.dtype, rows, p.k, p.m));
  log_choice("linear", name(p.dtype), problem, config);
  return config;
}

LinearImpl choose(const char* op, const std::string& impl, const Launcher& launcher, const checks::Linear& call) {
  return impl == "auto" ? choose(launcher, call).impl : checks::linear_impl(op, impl);
}

void run(const Launcher& launcher, LinearImpl impl, const checks::Linear& call) {
  impl == LinearImpl::kGemv ? run_gemv(launcher, call.params)
                            : run_flat_gemm(launcher, call.params, call.x_view.device);
}

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, std::string impl) {
  checks::Linear call = checks::linear("linear", x, weight, bias);
  const Launcher launcher("linear", call.x_view.device);
  const LinearImpl chosen = choose("linear", impl, launcher, call);
  if (chosen == LinearImpl::kBlas) return blas_linear(call, weight, bias);
  require_vector_rows("linear", call);
  Tensor out = allocate(call);
  run(launcher, chosen, call);
  return out;
}

constexpr const char* kFused = "linear_fused";

// What comes before the product of a call to linear_fused.
void prepare(const Launcher& launcher, LinearImpl impl, checks::Linear& call, const OptionalTensor& norm_weight,
             double norm_eps) {
  if (impl != LinearImpl::kBlas) require_vector_rows(kFused, call);
  if (impl != LinearImpl::kGemv || !norm_fits(launcher, call.params)) normalize(call, norm_weight, norm_eps);
}

Tensor linear_fused(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight, double norm_eps,
                    std::optional<std::string> activation, std::string impl) {
  checks::Linear call = checks::linear(kFused, x, weight, bias);
  checks::fuse_norm(call, norm_weight, norm_eps);
  checks::fuse_activation(call, activation);
  const Launcher launcher(kFused, call.x_view.device);
  const LinearImpl chosen = choose(kFused, impl, launcher, call);
  prepare(launcher, chosen, call, norm_weight, norm_eps);
  if (chosen == LinearImpl::kBlas) return activate(blas_linear(call, weight, bias), activation);
  Tensor out = allocate(call);
  run(launcher, chosen, call);
  return out;
}

void linear_fused_residual(Tensor x, Tensor weight, OptionalTensor bias, Tensor residual, OptionalTensor norm_weight,
                           double norm_eps, std::string impl) {
  checks::Linear call = checks::linear(kFused, x, weight, bias);
  checks::fuse_norm(call, norm_weight, norm_eps);
  checks::fuse_residual(call, x, residual);
  const Launcher launcher(kFused, call.x_view.device);
  const LinearImpl chosen = choose(kFused, impl, launcher, call);
  prepare(launcher, chosen, call, norm_weight, norm_eps);
  if (chosen == LinearImpl::kBlas) {
    add_rows(launcher, call.params, blas_linear(call, weight, bias));
  } else if (!residual_fits(call.params)) {
    checks::Linear product = call;
    product.params.fusion.add = false;
    const Tensor out = allocate(product);
    run(launcher, chosen, product);
    add_rows(launcher, call.params, out);
  } else {
    run(launcher, chosen, call);
  }
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
  return static_cast<int64_t>(choose(Launcher("linear_choice", call.x_view.device), call).impl);
}

void install_linear_table(std::string device, Tensor rows) {
  linear_tables().install(std::move(device), checks::linear_rows(rows));
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
  m.impl("linear_fused", boxed<&linear_fused>);
  m.impl("linear_fused.residual", boxed<&linear_fused_residual>);
  m.impl("linear_choice_index", boxed<&linear_choice_index>);
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CPU, m)  // its rows are on the CPU
{
  m.impl("_install_linear_table.gpu", boxed<&install_linear_table>);
}

}  // namespace flashdecpp

void flashdecpp_install_linear_table(const char* device, const flashdecpp::LinearRow* rows, int64_t count) {
  flashdecpp::linear_tables().install(device, {rows, rows + count});
}
